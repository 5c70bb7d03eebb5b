"""VFs of real ports, made as the policy says: from nothing to pods' devices and back to nothing.

One guest, one story (tests.vm.provisioning_story); each test below is something that it promises.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kndsim.guest import Image, Kernel, guest
from kndsim.progress import Progress
from tests.vm.provisioning_story import ALL, FAR, FOREIGN, HOST, KILLS, NEAR

LIMIT = 1500.0
pytestmark = pytest.mark.timeout(LIMIT)
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def seen(made: Image, progress: Progress) -> Any:
    with (
        progress.phase("VFs made, changed and removed in a guest"),
        guest(kernel=Kernel.NEWEST, name="makes-vfs", memory=3072, made=made) as vm,
    ):
        command = "cd /srv/knd && exec python -m tests.vm.provisioning_story"
        done = vm.run(["sh", "-c", command], check=False, timeout=LIMIT - 300)
    if done.code != 0:
        log = json.loads(done.out)["log"] if done.out.startswith("{") else done.out
        pytest.fail(f"{done.err[-4000:]}\n{log[-6000:]}")
    return json.loads(done.out)


def vfs(picture: Seen, pf: str) -> list[Seen]:
    return list(picture[pf]["vfs"].values())


def macs(picture: Seen, pf: str) -> list[str]:
    return [vf["mac"] for vf in vfs(picture, pf)]


def names(picture: Seen, pf: str) -> list[str]:
    return [vf["name"] for vf in vfs(picture, pf)]


def without_indexes(picture: Seen) -> Seen:
    return {
        pf: {**told, "vfs": [{k: v for k, v in vf.items() if k != "ifindex"} for vf in told["vfs"].values()]}
        for pf, told in picture.items()
    }


def test_from_none_each_port_gets_its_vfs_on_its_numa_node(seen: Seen) -> None:
    assert [len(vfs(seen["before"], pf)) for pf in (NEAR, FAR)] == [0, 0]
    for pf, numa in ((NEAR, 0), (FAR, 1)):
        made = vfs(seen["made"], pf)
        assert [(vf["driver"], vf["numa"], vf["up"]) for vf in made] == [("igbvf", numa, False)] * 4
        assert names(seen["made"], pf) == [f"{seen['made'][pf]['name']}v{index}" for index in range(4)]
        assert seen["made"][pf]["autoprobe"] == 1
    ours = [vf["address"] for pf in (NEAR, FAR) for vf in vfs(seen["made"], pf)]
    assert {f"pci-{address}".replace(":", "-").replace(".", "-") for address in ours} <= set(
        seen["published"]
    )


def test_a_vf_has_the_address_its_pf_was_told_and_no_two_share_one(seen: Seen) -> None:
    every = []
    for pf in (NEAR, FAR):
        told = seen["made"][pf]["given"]
        assert macs(seen["made"], pf) == [told[str(index)]["address"] for index in range(4)]
        assert not any(vf["spoofchk"] for vf in told.values())
        every += macs(seen["made"], pf)
    assert len(set(every)) == 8
    assert all(int(mac[:2], 16) & 3 == 2 for mac in every)


def test_network_managers_are_told_to_leave_these_vfs_alone_and_no_others(seen: Seen) -> None:
    assert (seen["udev"]["KND_VF"], seen["udev"]["NM_UNMANAGED"]) == ("1", "1")
    assert seen["udev"]["ID_NET_MANAGED_BY"] == "internal.knd"
    assert seen["udev"]["ID_NET_LINK_FILE"].endswith("/10-knd-vf.link")
    assert "KND_VF" not in seen["udev of the PF"]


def test_a_restart_does_nothing(seen: Seen) -> None:
    assert seen["restarted"] == seen["made"]


def test_a_smaller_number_waits_for_the_holder_and_is_then_there(seen: Seen) -> None:
    assert (seen["held"][NEAR], seen["held"][FAR]) == (4, 2)
    why = seen["ports while held"][NEAR]["why_not"]
    assert "pci-0000-21-10-0 is held by claim default/one" in why
    assert (len(vfs(seen["let go"], NEAR)), len(vfs(seen["let go"], FAR))) == (2, 2)
    for pf in (NEAR, FAR):
        assert macs(seen["let go"], pf) == macs(seen["made"], pf)[:2]


def test_what_was_unmade_by_hand_is_made_again_as_it_was(seen: Seen) -> None:
    assert without_indexes(seen["again"]) == without_indexes(seen["let go"])
    assert {vf["ifindex"] for vf in vfs(seen["again"], FAR)}.isdisjoint(
        vf["ifindex"] for vf in vfs(seen["let go"], FAR)
    )


@pytest.mark.parametrize("at", KILLS)
def test_an_agent_that_was_killed_half_way_comes_to_the_same(seen: Seen, at: int) -> None:
    (told,) = (each for each in seen["killed"] if each["at"] == at)
    assert without_indexes(told["after"]) == without_indexes(seen["let go"])


def test_some_of_the_kills_were_before_and_some_after_vfs_were_there(seen: Seen) -> None:
    numbers = {number for each in seen["killed"] for number in each["half"].values()}
    assert numbers == {0, 2}


def test_a_port_of_the_hosts_own_and_one_of_others_are_never_touched(seen: Seen) -> None:
    pictures = ["made", "restarted", "let go", "again", "cleaned"]
    for key in pictures:
        assert seen[key][HOST] == seen["before"][HOST], key
        assert seen[key][FOREIGN] == seen["before"][FOREIGN], key
    assert "it has an address" in seen["ports"][HOST]["why_not"]
    foreign = seen["ports"][FOREIGN]
    assert (foreign["made_by"], foreign["vfs"], foreign["why_not"]) == ("others", 2, None)
    assert seen["ports"][NEAR]["made_by"] == "knd"


def test_cleanup_leaves_the_node_as_it_was_found(seen: Seen) -> None:
    assert seen["cleanup"][0] == 0, seen["cleanup"]
    assert seen["cleaned"] == {pf: seen["before"][pf] for pf in ALL}
    assert seen["rules left"] == []
