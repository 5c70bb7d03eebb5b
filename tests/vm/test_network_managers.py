"""NetworkManager and systemd-networkd run on the node, and the VFs that knd makes are no business of theirs.

One guest, one story (tests.vm.managers_story); each test below is something that it promises.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kndsim.guest import Image, Kernel, guest
from kndsim.guest.managers import managers
from kndsim.progress import Progress

LIMIT = 900.0
pytestmark = pytest.mark.timeout(LIMIT)
Seen = dict[str, Any]
FOREVER = ("up", "mac", "altnames", "addresses", "networkd", "NetworkManager")


@pytest.fixture(scope="module")
def seen(made: Image, progress: Progress) -> Any:
    with (
        progress.phase("VFs beside network managers in a guest"),
        guest(kernel=Kernel.NEWEST, name="managed", made=made, shares=[managers(progress=progress)]) as vm,
    ):
        command = "cd /srv/knd && exec python -m tests.vm.managers_story"
        done = vm.run(["sh", "-c", command], check=False, timeout=LIMIT - 300)
        if done.code != 0:
            logs = vm.run(["sh", "-c", "tail -n 40 /tmp/manager*.log"], check=False).out
            pytest.fail(f"{done.err[-4000:]}\n{logs}\n{done.out[-6000:]}")
    return json.loads(done.out)


def test_the_managers_take_what_nobody_told_them_to_leave_alone(seen: Seen) -> None:
    """Else nothing below would say anything."""
    for links in (seen["PFs"], seen["others"], seen["others' meanwhile"]):
        for link in links.values():
            assert link["networkd"] not in ("unmanaged", "")
            assert link["NetworkManager"] not in ("unmanaged", "")
            assert link["up"]


@pytest.mark.parametrize("when", ["made", "home"])
def test_neither_manager_touches_a_vf_of_ours(seen: Seen, when: str) -> None:
    assert len(seen[when]) == 2
    for link in seen[when].values():
        assert (link["networkd"], link["NetworkManager"]) == ("unmanaged", "unmanaged")
        assert not link["up"]
        assert link["addresses"] == []


def test_names_and_addresses_are_the_same_before_and_after_a_pod(seen: Seen) -> None:
    def lasting(links: Seen) -> Seen:
        return {name: {key: link[key] for key in FOREVER} for name, link in links.items()}

    assert lasting(seen["home"]) == lasting(seen["made"])
    indexes = [{link["ifindex"] for link in seen[when].values()} for when in ("made", "home")]
    assert indexes[0] != indexes[1], "no driver began anew"


def test_a_pod_has_the_addresses_of_its_claim_alone(seen: Seen) -> None:
    assert seen["in the pod"] == ["198.18.0.2"]
