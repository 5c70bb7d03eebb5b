"""VFs of a simulated card in switchdev mode: made by policy, set by devlink and on their PF, given to pods
and put back. What an igb cannot do is held to the kernel here.

One guest for each kernel, one story in it (tests.vm.switchdev_story); each test below is a promise of it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from kndsim.guest import Image, Kernel, guest
from kndsim.progress import Progress
from tests.vm.switchdev_story import HANDLE, MAC

LIMIT = 1200.0
pytestmark = pytest.mark.timeout(LIMIT)
Seen = dict[str, Any]
LEAVES = [f"{HANDLE}/{128 + vf}" for vf in range(3)]
NO_RATES = {"type": "leaf"}


@pytest.fixture(scope="module", params=[Kernel.NEWEST, Kernel.STABLE], ids=str)
def seen(request: pytest.FixtureRequest, made: Image, progress: Progress) -> Any:
    with (
        progress.phase(f"VFs in switchdev mode in a guest, kernel {made.names[request.param]}"),
        guest(kernel=request.param, name=f"switchdev-{request.param}", memory=3072, made=made) as vm,
    ):
        command = "modprobe netdevsim && cd /srv/knd && exec python -m tests.vm.switchdev_story"
        done = vm.run(["sh", "-c", command], check=False, timeout=LIMIT - 200)
    if done.code != 0:
        log = json.loads(done.out)["log"] if done.out.startswith("{") else done.out
        pytest.fail(f"{done.err[-5000:]}\n{log[-6000:]}")
    return json.loads(done.out)


def test_from_none_the_card_gets_its_mode_and_its_vfs(seen: Seen) -> None:
    before, made = seen["before"], seen["made"]
    assert (before["mode"], before["vfs"], sorted(before["ports"])) == ("legacy", 0, ["p1", "p2"])
    assert (made["mode"], made["vfs"]) == ("switchdev", 3)
    assert [made["names"][f"pf0vf{vf}"] for vf in range(3)] == [
        f"{made['names']['p1']}v{vf}" for vf in range(3)
    ]
    assert made["rates"] == dict.fromkeys(LEAVES, NO_RATES)
    row = seen["port"]
    assert (row["vfs"], row["wanted"], row["made_by"], row["why_not"]) == (3, 3, "knd", None)


def test_each_vf_has_the_address_its_pf_was_told(seen: Seen) -> None:
    macs = [seen["made"]["macs"][f"pf0vf{vf}"] for vf in range(3)]
    assert macs == [seen["made"]["held"][str(vf)]["address"] for vf in range(3)]
    assert len(set(macs)) == 3


def test_vf_ports_are_offered_with_their_mode_and_the_cards_ports_are_not(seen: Seen) -> None:
    assert sorted(seen["offered"]) == [f"nsim-10-vf-{vf}" for vf in range(3)]
    for attributes in seen["offered"].values():
        assert attributes["eswitchMode"] == {"string": "switchdev"}
        assert attributes["kind"] == {"string": "vf"}


def test_network_managers_are_told_to_leave_vf_ports_alone(seen: Seen) -> None:
    assert (seen["udev"]["KND_VF"], seen["udev"]["NM_UNMANAGED"]) == ("1", "1")


def test_our_codec_and_devlink_say_the_same_of_ports_and_a_function_that_cannot_be_set(seen: Seen) -> None:
    ours, theirs = seen["ports of VFs"]
    assert ours == theirs
    assert len(ours) == 3
    assert "ENOTSUP" in seen["function"]
    assert seen["driver"] == "netdevsim"
    assert seen["heard"] == [False, True]


@pytest.mark.parametrize("when", ["set", "set after a kill"])
def test_a_claims_settings_are_on_the_pf_and_its_rates_on_the_vfs_port(seen: Seen, when: str) -> None:
    held = seen[when]["held"]["1"]
    (vlan,) = held["vlan_list"]
    assert (vlan["vlan"], vlan["qos"], vlan["protocol"]) == (77, 3, "802.1ad")
    assert (held["trust"], held["spoofchk"], held["link_state"]) == (True, True, "disable")
    assert held["address"] == MAC
    mega = 125_000
    assert seen[when]["rates"][LEAVES[1]] == NO_RATES | {"tx_share": 10 * mega, "tx_max": 100 * mega}
    assert seen[when]["rates"][LEAVES[0]] == NO_RATES
    assert seen["in pod"]["address"] == MAC
    assert seen["status"].endswith("sends at least 10 Mb/s and at most 100 Mb/s by devlink rate")


def test_all_of_it_is_as_before_when_the_pod_is_gone(seen: Seen) -> None:
    before, after = seen["put back"]
    assert after == before
    assert before == seen["made"]


def test_a_rate_that_the_kernel_refuses_leaves_nothing(seen: Seen) -> None:
    assert "vf.maxRate 70000M: netdevsim" in seen["refusal"]
    before, after = seen["refused"]
    assert after == before


def test_a_card_is_not_changed_under_a_holder_and_a_rate_tree_is_no_obstacle(seen: Seen) -> None:
    why, number = seen["held"]
    assert "nsim-10-vf-2 is held by claim default/holder-nic" in why
    assert number == 3
    assert (seen["fewer"]["mode"], seen["fewer"]["vfs"]) == ("switchdev", 2)
    assert seen["fewer"]["rates"] == dict.fromkeys(LEAVES[:2], NO_RATES)


def test_a_mode_changed_by_hand_is_made_again(seen: Seen) -> None:
    assert seen["again"] == seen["fewer"]


def test_in_legacy_mode_vfs_are_set_up_and_nothing_is_offered(seen: Seen) -> None:
    held = seen["legacy"]["held"]
    assert sorted(held) == ["0", "1"]
    for vf in held.values():
        assert [entry["vlan"] for entry in vf["vlan_list"]] == [5]
        assert (vf["trust"], vf["spoofchk"]) == (True, True)
    assert seen["legacy"]["macs"] == {}
    assert set(seen["legacy devices"]) == {"nsim-10-port-1", "nsim-10-port-2"}
    assert all("it has VFs" in why for why in seen["legacy devices"].values())


def test_an_agent_killed_half_way_comes_to_the_same(seen: Seen) -> None:
    halves = [(each["half"]["vfs"], each["half"]["mode"]) for each in seen["killed"]]
    assert len(set(halves)) > 1, halves
    for each in seen["killed"]:
        after, made = each["after"], seen["made"]
        keys = ("mode", "vfs", "names", "macs", "rates")
        assert {key: after[key] for key in keys} == {key: made[key] for key in keys}, each["at"]


def test_cleanup_leaves_the_card_as_it_was_found(seen: Seen) -> None:
    assert seen["cleanup"][0] == 0, seen["cleanup"]
    assert seen["cleaned"] == seen["before"]
    assert seen["rules left"] == []
