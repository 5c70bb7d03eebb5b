"""What a PF gives out: sizes published, charged to it, held to in prepare, and never more than there is."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver import limits
from driver.cli import devices as cli_devices
from driver.cli import sriov_ports
from driver.errors import ConfigError, Refusal
from driver.inventory import Inventory, build
from driver.kube.slice_device import without_counters
from driver.lifecycle.core import Lifecycle
from driver.model import (
    AllocatedDevice,
    Claim,
    Device,
    DeviceName,
    NicConfig,
    OfferedDevice,
    Preparation,
    ShareId,
    VfConfig,
    VfDriver,
)
from driver.paths import Paths
from driver.plan import Act
from driver.policy import NodePolicy
from driver.policy.bandwidth import BandwidthRule, SizeClass
from driver.qos import QosPolicy
from driver.rdma import RdmaBinding, RdmaMode
from driver.running import Running
from driver.sharing import Node, PortBudget, Sharing
from driver.traffic import Enforcement, Portion, QosConfig
from hw.model import (
    DeviceKind,
    HwDevice,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    PciAddress,
    PciFacts,
    PciIdentity,
    RdmaName,
    VfSettings,
)
from tests.unit.claims_world import POOL, World, device, play_claims
from tests.unit.journal_values import BOOT, preparation

PORT = PciAddress("0000:21:00.0")
PF_NAME = DeviceName("pci-0000-21-00-0")
SET = "pci-0000-21-00-0"


def vf_identity(index: int) -> PciIdentity:
    return PciIdentity(PciAddress(f"0000:21:10.{index}"), PORT, index)


def vf_name(index: int) -> DeviceName:
    return DeviceName(f"pci-0000-21-10-{index}")


# --- what is published ------------------------------------------------------------------------------


def link(ifindex: int, name: str) -> LinkInfo:
    return LinkInfo(ifindex=IfIndex(ifindex), name=IfName(name), flags=LinkFlags(0), link_type=1, mtu=1500)


def port(vfs: int, speed: int | None = 25_000) -> list[HwDevice]:
    """A PF and its VFs, VFs first: the order of discovery is nobody's promise."""
    pf = HwDevice(
        kind=DeviceKind.PF,
        identity=PciIdentity(PORT),
        link=link(3, "ens1"),
        pci=PciFacts(address=PORT, vendor="8086", product="10c9", driver="igb"),
        speed_mbps=speed,
        total_vfs=7,
    )
    parts = [
        replace(
            pf,
            kind=DeviceKind.VF,
            identity=vf_identity(index),
            link=link(10 + index, f"ens1v{index}"),
            pci=PciFacts(address=vf_identity(index).address, vendor="8086", product="10ca", driver="igbvf"),
            total_vfs=None,
        )
        for index in range(vfs)
    ]
    return [*parts, pf]


def policy(*sizes: tuple[int, int | None], speed: int | None = None, percent: int = 100) -> NodePolicy:
    classes = tuple(SizeClass(rate=rate, vfs=vfs) for rate, vfs in sizes)
    return NodePolicy(port_bandwidth=(BandwidthRule(sizes=classes, speed=speed, percent=percent),))


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


def devices_of(inventory: Inventory) -> Mapping[DeviceName, Device]:
    return inventory.by_name


def held(made: Device, **fields: Any) -> Preparation:
    record = preparation(0)
    sized = made.portion.size if made.portion is not None and made.kind is DeviceKind.VF else None
    return replace(
        record,
        key=replace(record.key, device=made.name),
        identity=made.identity,
        kind=made.kind,
        capacities=made.capacities,
        attributes=made.attributes,
        **({"size": sized} | fields),
    )


def sharing(devices: Mapping[DeviceName, Device], *holders: Preparation) -> Sharing:
    return Sharing(Node(devices=devices, held={each.key.device: each for each in holders}, quarantined={}))


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


# --- what a claim may ask -----------------------------------------------------------------------------

VF = replace(
    device(vf_name(0), 20),
    kind=DeviceKind.VF,
    identity=vf_identity(0),
    vf=VfSettings(max_rate=0),
    driver="igbvf",
    portion=Portion(size=5_000, of=25_000),
)


def asked(vf: VfConfig | None = None, **fields: Any) -> NicConfig:
    return NicConfig(qos=QosConfig(**fields), vf=vf or VfConfig())


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        (asked(egress_rate=5_001), ["qos.egress.rate"]),
        (asked(VfConfig(max_rate=6_000)), ["vf.maxRate"]),
        (asked(egress_min_rate=6_000), ["qos.egress.minRate"]),
        (asked(VfConfig(min_rate=6_000, max_rate=7_000)), ["vf.maxRate", "vf.minRate"]),
    ],
)
def test_a_rate_above_the_size_is_refused_with_its_field(config: NicConfig, paths: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        limits.sized(VF, config)
    assert [each.path for each in caught.value.problems] == paths
    assert "is above 5000M, the size of pci-0000-21-10-0" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (asked(), 5_000),
        (asked(VfConfig(max_rate=0)), 5_000),
        (asked(egress_rate=5_000), 5_000),
        (asked(egress_rate=10), 10),
        (asked(VfConfig(max_rate=10)), 10),
    ],
)
def test_whatever_a_claim_asks_its_vf_is_told_no_more_than_its_size(config: NicConfig, rate: int) -> None:
    settled = limits.settled(VF, limits.sized(VF, config))
    assert settled.on_pf()["max_rate"] == rate
    in_software = limits.sized(VF, replace(config, qos=replace(config.qos, enforcement=Enforcement.SOFTWARE)))
    told = in_software.on_pf().get("max_rate") or in_software.qos.egress_rate
    assert told == rate


def test_what_is_no_sized_vf_is_asked_nothing() -> None:
    wide = asked(egress_rate=400_000)
    pf = replace(VF, kind=DeviceKind.PF, portion=Portion(size=25_000, of=25_000))
    for each in (replace(VF, portion=None), pf):
        assert limits.sized(each, wide) is wide
        assert limits.sized(each, asked()) == asked()


def test_a_size_is_kept_by_the_kernel_where_the_pf_will_not_and_the_pod_does_not_drive_the_vf_itself() -> (
    None
):
    sized = limits.sized(VF, asked())
    settled = limits.settled(VF, sized)
    assert settled.field_of("max_rate") == "its size (node policy, bandwidth)"
    software = limits.instead(settled, asked=sized)
    assert software is not None
    (kept,) = limits.kept(software, QosPolicy(classes=()), detour=False)
    assert (kept.rate, kept.by) == (5_000, limits.KeptBy.QUEUE)
    files = limits.sized(VF, asked(VfConfig(driver=VfDriver.VFIO)))
    assert limits.instead(limits.settled(VF, files), asked=files) is None
    unseen = limits.sized(VF, asked(VfConfig(driver=VfDriver.VFIO), enforcement=Enforcement.SOFTWARE))
    with pytest.raises(ConfigError, match=r"qos\.enforcement"):
        limits.check(VF, unseen, QosPolicy(classes=()))


# --- in prepare -------------------------------------------------------------------------------------


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return partial(play_claims, tmp_path, monkeypatch)


def present(vfs: int, made: NodePolicy, speed: int = 25_000) -> dict[DeviceName, Device]:
    """As discovered, with what a closer look at a VF adds."""
    return {
        name: replace(
            device(name, 20 + number),
            kind=each.kind,
            identity=each.identity,
            attributes=each.attributes,
            capacities=each.capacities,
            portion=each.portion,
            withheld=each.withheld,
            vf=VfSettings(max_rate=0) if each.kind is DeviceKind.VF else None,
            driver="igbvf",
        )
        for number, (name, each) in enumerate(build(port(vfs, speed), made).by_name.items())
    }


QOS = (
    '{"apiVersion": "knd.internal/v1alpha1", "kind": "NetworkDeviceConfig", '
    '"qos": {"egress": {"rate": "%s"}}}'
)


def test_the_size_is_on_record_and_is_the_limit_where_nobody_asks_for_less(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = present(3, policy((5_000, None)))
        assert await world.prepare(world.claim("one", vf_name(0))) == [vf_name(0)]
        less = world.claim("two", vf_name(1), pods=("p2",), parameters=QOS % "1G")
        assert await world.prepare(less) == [vf_name(1)]
        more = world.claim("three", vf_name(2), pods=("p3",), parameters=QOS % "6G")
        answer = await world.prepare(more)
        assert "qos.egress.rate" in answer
        assert "6000M is above 5000M, the size of" in answer
        records = {each.key.device: each for each in world.book.preparations()}
        assert {name: (each.size, each.config.on_pf()["max_rate"]) for name, each in records.items()} == {
            vf_name(0): (5_000, 5_000),
            vf_name(1): (5_000, 1_000),
        }

    play(story)


def test_a_size_that_the_pf_refuses_is_kept_by_the_kernel(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = present(1, policy((5_000, None)))
        world.node.fail[Act.SET_VF, vf_name(0)] = Refusal("VfSettingRefused", "no")
        assert await world.prepare(world.claim("one", vf_name(0))) == [vf_name(0)]
        (record,) = world.book.preparations()
        assert record.config.qos.enforcement is Enforcement.SOFTWARE
        assert record.config.qos.egress_rate == 5_000

    play(story)


@pytest.mark.parametrize("told", [True, False])
def test_rdma_of_hardware_is_given_only_where_the_pf_holds_it_to_its_size(play, told: bool) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = present(1, policy((5_000, None)))
        world.bindings[vf_name(0)] = RdmaBinding(name=RdmaName("mlx5_1"), mode=RdmaMode.EXCLUSIVE)
        if told:
            world.node.fail[Act.SET_VF, vf_name(0)] = Refusal("VfSettingRefused", "the PF will not")
        else:
            seen = world.node.present[vf_name(0)]
            world.node.present[vf_name(0)] = replace(seen, vf=None)
        answer = await world.prepare(world.claim("one", vf_name(0)))
        assert ("the PF will not" if told else "to which only its PF could hold it") in answer
        assert not world.states()
        world.node.fail.clear()
        world.node.present = present(1, policy((5_000, None)))
        assert await world.prepare(world.claim("one", vf_name(0))) == [vf_name(0)]

    play(story)


def test_prepare_gives_out_no_more_than_there_is_whatever_the_scheduler_says(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = present(4, policy((10_000, None)))
        refs = [world.claim(f"c{index}", vf_name(index), pods=(f"p{index}",)) for index in range(4)]
        answers = await asyncio.gather(*map(world.prepare, refs))
        refused = [index for index, answer in enumerate(answers) if isinstance(answer, str)]
        assert len(refused) == 2
        for index in refused:
            assert f"{vf_name(index)} would take 10G of PF {PORT}, which gives out 25G" in answers[index]
        first = next(index for index in range(4) if index not in refused)
        assert await world.unprepare(refs[first]) == ""
        assert await world.prepare(refs[refused[0]]) == [vf_name(refused[0])]

    play(story)


def test_of_claims_at_the_same_moment_the_later_sees_the_record_of_the_earlier(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = present(2, policy((20_000, None)))
        both = threading.Barrier(2)
        opened = world.book.open_preparations

        def slowly(made: Sequence[Preparation]) -> tuple[Preparation, ...]:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.5)
            return opened(made)

        world.book.open_preparations = slowly  # type: ignore[method-assign]
        refs = [world.claim(f"c{index}", vf_name(index), pods=(f"p{index}",)) for index in range(2)]
        await asyncio.gather(*map(world.prepare, refs))
        assert len(world.states()) == 1

    play(story)


def test_the_vfs_of_one_claim_count_together(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = present(3, policy((10_000, None)))
        answer = await world.prepare(world.claim("three", *(vf_name(index) for index in range(3))))
        assert "would take 30G" in answer
        assert not world.states()

    play(story)


@pytest.mark.parametrize("share", [{"share_id": ShareId("0b5c")}, {"consumed_capacity": {"bandwidth": "1G"}}])
def test_a_share_of_a_device_is_refused(play, share: dict[str, Any]) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = present(1, policy((5_000, None)))
        ref = world.claim("one", vf_name(0))
        part = AllocatedDevice(request="r0", pool=POOL, device=vf_name(0), **share)
        claim = world.claims[ref.uid]
        assert isinstance(claim, Claim)
        world.claims[ref.uid] = replace(claim, devices=(part,))
        assert "is allocated in part" in await world.prepare(ref)
        assert not world.states()

    play(story)


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


def test_the_gauge_shows_what_is_given_out_and_given(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = present(2, policy((10_000, None)))
        agent: Any = SimpleNamespace(_context=world.handler._context)

        def shown() -> Mapping[tuple[str, ...], float]:
            return Lifecycle.port_bandwidth(agent)

        assert shown() == {(PORT, "budget"): 25e9, (PORT, "given"): 0.0}
        await world.prepare(world.claim("one", vf_name(1)))
        assert shown() == {(PORT, "budget"): 25e9, (PORT, "given"): 10e9}

    play(story)


# --- whatever happens ---------------------------------------------------------------------------------


@given(
    speed=st.integers(1_000, 100_000),
    percent=st.integers(10, 300),
    sizes=st.lists(st.integers(100, 60_000), min_size=1, max_size=4, unique=True),
    order=st.lists(st.tuples(st.integers(0, 6), st.sampled_from([None, 50, 1_000, 20_000])), max_size=20),
)
def test_enforced_rates_of_one_pf_are_together_never_more_than_is_given_out(
    speed: int, percent: int, sizes: list[int], order: list[tuple[int, int | None]]
) -> None:
    """order: VFs that come, or go if they are there, with what their claims ask for."""
    rules = [(size, 2) for size in sizes[:-1]] + [(sizes[-1], None)]
    devices = build(port(7, speed), policy(*rules, percent=percent)).by_name
    given_out: dict[DeviceName, Preparation] = {}
    enforced: dict[DeviceName, int] = {}
    for index, wish in order:
        seen = replace(devices[vf_name(index)], vf=VfSettings(max_rate=0))
        if given_out.pop(seen.name, None) is not None:
            del enforced[seen.name]
            continue
        try:
            config = limits.settled(seen, limits.sized(seen, asked(egress_rate=wish or 0)))
        except ConfigError:
            assert wish is not None
            continue
        record = held(seen, config=config)
        if seen.withheld or sharing(devices, *given_out.values()).over_budget({seen.name: record.size}):
            continue
        given_out[seen.name] = record
        enforced[seen.name] = int(str(config.on_pf()["max_rate"]))
        assert sum(enforced.values()) * 100 <= speed * percent
        uses = sharing(devices, *given_out.values()).uses(devices)
        # The scheduler, which goes by counters alone, would have said the same.
        left = {use.set: amount(use.of) for each in uses.values() for use in each}
        assert sum(amount(use.takes) for name in given_out for use in uses[name]) <= left[SET]


def amount(counters: Mapping[str, str]) -> int:
    from driver.kube.quantity import parse_quantity

    return int(parse_quantity(counters["bandwidth"]))
