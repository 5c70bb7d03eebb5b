"""What a PF gives out is published in sizes, charged to its counter set, and shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from driver.cli import devices as cli_devices
from driver.cli import sriov_ports
from driver.inventory import build
from driver.kube.slice_device import without_counters
from driver.model import (
    DeviceName,
    OfferedDevice,
    Preparation,
)
from driver.paths import Paths
from driver.policy import NodePolicy
from driver.running import Running
from driver.sharing import Node, PortBudget, Sharing
from driver.traffic import Portion
from hw.model import (
    DeviceKind,
    HwDevice,
    NetdevsimIdentity,
    PciAddress,
)
from tests.unit.bandwidth_world import (
    PF_NAME,
    PORT,
    SET,
    held,
    link,
    policy,
    port,
    sharing,
    vf_name,
)
from tests.unit.journal_values import BOOT

# --- what is published ------------------------------------------------------------------------------


def test_a_vf_is_published_with_its_size_and_says_the_links_speed_all_the_same() -> None:
    found = build(port(3), policy((10_000, 1), (2_500, None))).by_name
    assert [found[vf_name(index)].capacities for index in range(3)] == [
        {"bandwidth": "10G"},
        {"bandwidth": "2500M"},
        {"bandwidth": "2500M"},
    ]
    assert found[vf_name(0)].portion == Portion(size=10_000, of=25_000)
    assert found[vf_name(1)].attributes["linkSpeed"] == 25_000
    assert found[PF_NAME].capacities == {"bandwidth": "25G", "vfs": "7"}
    assert found[PF_NAME].portion == Portion(size=25_000, of=25_000)


def test_without_a_rule_nothing_has_a_size() -> None:
    found = build(port(2), NodePolicy()).by_name
    assert {each.portion for each in found.values()} == {None}
    assert found[vf_name(0)].capacities == {"bandwidth": "25G"}


@pytest.mark.parametrize(
    ("made", "speed", "words"),
    [
        (policy((1_000, 1)), 25_000, "no size is left for VF 1"),
        (policy((1_000, None)), None, "the speed of its port is not known"),
        (policy((1_000, 1), (40_000, None)), 25_000, "its size is 40G and its PF gives out 25G"),
        (
            policy((1_000, 1), (20_000, None), percent=50),
            25_000,
            "its size is 20G and its PF gives out 12500M",
        ),
    ],
)
def test_a_vf_that_can_have_no_size_is_withheld_with_the_reason(
    made: NodePolicy, speed: int | None, words: str
) -> None:
    withheld = build(port(2, speed), made).by_name[vf_name(1)]
    assert words in withheld.withheld
    assert withheld.portion is None


def test_a_function_without_a_netdev_is_withheld_since_nobody_could_hold_it_to_a_size() -> None:
    bare = [replace(each, kind=DeviceKind.RDMA, link=None) if each.link else each for each in port(1)[:1]]
    found = build([*bare, port(0)[0]], policy((1_000, None))).by_name
    assert "nobody could hold it to a size" in found[vf_name(0)].withheld


def test_a_flap_or_a_pf_in_a_pod_changes_no_size_and_no_budget() -> None:
    made = policy((1_000, None))
    by_name = replace(made.port_bandwidth[0], match=None)
    before = build(port(2), NodePolicy(port_bandwidth=(by_name,)))
    down = build(port(2, None), NodePolicy(port_bandwidth=(by_name,)), before)
    assert {name: each.portion for name, each in down.by_name.items()} == {
        name: each.portion for name, each in before.by_name.items()
    }
    away = [
        replace(each, link=None, speed_mbps=None)
        if each.kind is DeviceKind.PF
        else replace(each, speed_mbps=None)
        for each in port(2)
    ]
    gone = build(away, NodePolicy(), down)
    assert [gone.by_name[vf_name(index)].portion for index in range(2)] == [
        Portion(size=1_000, of=25_000)
    ] * 2
    assert build(port(2), NodePolicy(), gone).by_name[vf_name(0)].portion is None, (
        "it is home: the policy counts"
    )


# --- what is charged --------------------------------------------------------------------------------


def test_vfs_take_their_size_of_their_pfs_set_and_the_pf_takes_it_all() -> None:
    devices = build(port(3), policy((10_000, 1), (2_500, None), percent=80)).by_name
    uses = sharing(devices).uses(devices)
    taken = {name: each.takes for name, (each,) in uses.items()}
    assert {each.set for (each,) in uses.values()} == {SET}
    assert taken == {
        vf_name(0): {"vfs": "1", "bandwidth": "10G"},
        vf_name(1): {"vfs": "1", "bandwidth": "2500M"},
        vf_name(2): {"vfs": "1", "bandwidth": "2500M"},
        PF_NAME: {"vfs": "7", "bandwidth": "20G"},
    }
    assert {tuple(each.of.items()) for (each,) in uses.values()} == {(("vfs", "7"), ("bandwidth", "20G"))}


def test_vfs_whose_pf_is_not_offered_share_its_bandwidth_all_the_same() -> None:
    devices = build(port(2), policy((10_000, None))).by_name
    uses = sharing(devices).uses([vf_name(0), vf_name(1)])
    assert {name: (each.takes, each.of) for name, (each,) in uses.items()} == {
        vf_name(index): ({"bandwidth": "10G"}, {"bandwidth": "25G"}) for index in range(2)
    }


def test_counters_do_not_change_with_who_has_what() -> None:
    devices = build(port(3), policy((10_000, None))).by_name
    free = sharing(devices).uses(devices)
    assert sharing(devices, held(devices[vf_name(1)])).uses(devices) == free


def test_what_was_given_is_not_taken_back_by_a_slower_port_or_another_policy() -> None:
    before = build(port(3), policy((10_000, None))).by_name
    holders = [held(before[vf_name(index)]) for index in range(2)]
    slower = build(port(3, 10_000), policy((4_000, None))).by_name
    relations = sharing(slower, *holders)
    uses = relations.uses(slower)
    assert {name: each.takes["bandwidth"] for name, (each,) in uses.items()} == {
        vf_name(0): "10G",
        vf_name(1): "10G",
        vf_name(2): "4G",
        PF_NAME: "20G",
    }
    # Not 10G: with less than nothing left of one set the scheduler gives nothing of the whole pool away.
    assert {each.of["bandwidth"] for (each,) in uses.values()} == {"20G"}
    assert relations.budgets() == {PORT: PortBudget(of=10_000, given=20_000)}
    assert "gives out 10G, and claims have 20G" in relations.over_budget({vf_name(2): 4_000})


def test_a_simulated_card_gives_out_what_the_policy_says_it_has() -> None:
    card = HwDevice(kind=DeviceKind.PF, identity=NetdevsimIdentity(7, 1), link=link(3, "eni7np1"))
    parts = [
        HwDevice(
            kind=DeviceKind.VF, identity=NetdevsimIdentity(7, 0, index), link=link(4 + index, f"r{index}")
        )
        for index in range(2)
    ]
    silent = build([card, *parts], policy((1_000, None))).by_name
    assert "the speed of its port is not known" in silent[DeviceName("nsim-7-vf-0")].withheld
    devices = build([*parts, card], policy((1_000, 1), (4_000, None), speed=5_000)).by_name
    relations = sharing(devices, held(devices[DeviceName("nsim-7-vf-1")]))
    uses = relations.uses(name for name, each in devices.items() if each.kind is DeviceKind.VF)
    assert {name: (use.set, use.takes, use.of) for name, (use,) in uses.items()} == {
        f"nsim-7-vf-{index}": ("netdevsim7", {"bandwidth": size}, {"bandwidth": "5G"})
        for index, size in enumerate(("1G", "4G"))
    }
    assert relations.budgets() == {"netdevsim7": PortBudget(of=5_000, given=4_000)}


def test_a_pf_that_was_given_has_all_of_it() -> None:
    devices = build(port(2), policy((1_000, None))).by_name
    relations = sharing(devices, held(devices[PF_NAME]))
    assert relations.budgets() == {PORT: PortBudget(of=25_000, given=25_000)}
    assert relations.uses(devices)[vf_name(0)][0].of["bandwidth"] == "25G"


def test_a_vf_that_was_given_without_a_size_counts_as_the_whole_port() -> None:
    unsized = build(port(2), NodePolicy()).by_name
    now = build(port(2), policy((1_000, None))).by_name
    relations = sharing(now, held(unsized[vf_name(0)]))
    assert relations.budgets() == {PORT: PortBudget(of=25_000, given=25_000)}
    assert relations.over_budget({vf_name(1): 1_000})


def test_where_the_server_has_no_counters_only_vfs_within_the_budget_are_offered_in_order_of_index() -> None:
    devices = build(port(4), policy((10_000, 1), (20_000, 1), (10_000, None))).by_name

    def offered(*holders: Preparation) -> list[str]:
        uses = sharing(devices, *holders).uses(devices)
        all_of_them = [
            OfferedDevice(name=name, attributes={}, uses=uses.get(name, ())) for name in sorted(devices)
        ]
        return [each.name for each in without_counters(all_of_them)]

    assert offered() == [vf_name(0), vf_name(2)]
    assert offered(held(devices[vf_name(2)])) == [vf_name(0), vf_name(2)]
    assert offered(held(devices[vf_name(1)])) == [vf_name(1)], "what is held goes first"
    assert offered(held(devices[PF_NAME])) == [PF_NAME]


# --- what people are shown ------------------------------------------------------------------------------


def test_devices_say_their_size_and_ports_what_they_give_out_and_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build(port(3), policy((10_000, 1), (2_500, None))).by_name
    gone = held(found[vf_name(0)])
    node = Node(
        devices={name: each for name, each in found.items() if name != vf_name(0)},
        held={vf_name(0): gone},
        quarantined={},
    )
    assert [cli_devices._size(name, node) for name in (vf_name(0), vf_name(1), PF_NAME)] == [
        "10G",
        "2500M",
        None,
    ]
    plan = SimpleNamespace(
        port=SimpleNamespace(link=None, num_vfs=3, total_vfs=7), rule=None, maker="knd", why="", changes=False
    )
    survey = SimpleNamespace(plans={PORT: plan, PciAddress("0000:22:00.0"): plan})
    monkeypatch.setattr(sriov_ports, "read_boot_id", lambda proc: BOOT)
    monkeypatch.setattr(sriov_ports.Provision, "survey", lambda *rest: survey)
    budgets = Sharing(node).budgets()
    rows = sriov_ports.rows(Paths(root=tmp_path), NodePolicy(), {}, budgets)
    assert [(row["port"], row["bandwidth"], row["given"]) for row in rows] == [
        (PORT, "25G", "10G"),
        ("0000:22:00.0", None, None),
    ]
    assert set(sriov_ports.COLUMNS) == rows[0].keys()


@pytest.mark.parametrize("has_counters", [True, False])
def test_a_vf_that_is_not_offered_for_want_of_counters_is_shown_with_that_reason(has_counters: bool) -> None:
    devices = build(port(3), policy((10_000, None))).by_name
    agent = Running(pid=1, node="n", hook="tcx", has_counters=has_counters)
    why = cli_devices._reasons(Node(devices=devices, held={}, quarantined={}), agent)
    assert not why[vf_name(0)]
    assert not why[vf_name(1)]
    said = "the VFs before it are all that its PF gives out"
    assert (said in why[vf_name(2)]) is not has_counters
    assert ("its VFs are offered instead" in why[PF_NAME]) is not has_counters
