"""A VF is held to its size, and of a PF no more is given away than it gives out, whoever asks for what."""

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
from driver.errors import ConfigError, Refusal
from driver.inventory import build
from driver.lifecycle.core import Lifecycle
from driver.model import (
    AllocatedDevice,
    Claim,
    Device,
    DeviceName,
    NicConfig,
    Preparation,
    ShareId,
    VfConfig,
    VfDriver,
)
from driver.plan import Act
from driver.qos import QosPolicy
from driver.quantity import parse_quantity
from driver.rdma import RdmaBinding, RdmaMode
from driver.traffic import Enforcement, Portion
from hw.model import (
    DeviceKind,
    RdmaName,
    VfSettings,
)
from tests.unit.bandwidth_world import (
    PF_NAME,
    PORT,
    asked,
    held,
    policy,
    port,
    present,
    sharing,
    vf_identity,
    vf_name,
)
from tests.unit.claims_world import POOL, World, device, play_claims

# --- what a claim may ask -----------------------------------------------------------------------------

VF = replace(
    device(vf_name(0), 20),
    kind=DeviceKind.VF,
    identity=vf_identity(0),
    vf=VfSettings(max_rate=0),
    driver="igbvf",
    portion=Portion(size=5_000, of=25_000),
)


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


def test_a_claim_that_comes_too_late_for_its_port_blocks_no_other_device_until_it_ends(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = present(2, policy((10_000, None)))
        await world.prepare(world.claim("one", vf_name(0)))
        world.node.present = present(2, policy((10_000, None)), speed=10_000)
        late = world.claim("late", vf_name(1), pods=("p2",))

        def there_is() -> str:
            world.handler._projections.offer()
            return {use.of["bandwidth"] for each in world.offers[-1] for use in each.uses}.pop()

        assert there_is() == "10G"
        assert "gives out 10G, and claims have 10G" in await world.prepare(late)
        assert {use.of["bandwidth"] for each in world.offers[-1] for use in each.uses} == {"20G"}, "at once"
        assert await world.unprepare(late) == ""
        assert there_is() == "10G"
        assert "gives out 10G" in await world.prepare(late)
        world.node.present = present(2, policy((10_000, None)))
        assert await world.prepare(late) == [vf_name(1)]
        assert there_is() == "25G"
        assert world.handler._projections._promised == {}

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

SIZES = st.lists(st.integers(100, 60_000), min_size=1, max_size=4, unique=True)
NODES = st.tuples(st.integers(1_000, 100_000), st.integers(10, 300), SIZES)
"""A port's speed, how much of it is given out, and in which sizes."""
ASKS = st.tuples(st.integers(0, 6), st.sampled_from([None, 50, 1_000, 20_000]))
"""A VF that comes, or goes if it is there, and the rate that its claim asks for."""


@given(NODES, st.lists(st.one_of(ASKS, NODES), max_size=30))
def test_whatever_comes_no_more_is_given_than_there_is_and_the_scheduler_finds_never_less_than_nothing(
    first: tuple[int, int, list[int]],
    order: list[tuple[int, int | None] | tuple[int, int, list[int]]],
) -> None:
    def discovered(speed: int, percent: int, sizes: list[int]) -> Mapping[DeviceName, Device]:
        rules = [(size, 2) for size in sizes[:-1]] + [(sizes[-1], None)]
        return build(port(7, speed), policy(*rules, percent=percent)).by_name

    devices, budget = discovered(*first), first[0] * first[1] // 100
    given_out: dict[DeviceName, Preparation] = {}
    for event in order:
        if len(event) == 3:
            devices, budget = discovered(*event), event[0] * event[1] // 100
        elif given_out.pop(vf_name(event[0]), None) is None:
            record = _given(devices, given_out, *event)
            if record is not None:
                given_out[record.key.device] = record
                enforced = [int(str(each.config.on_pf()["max_rate"])) for each in given_out.values()]
                assert sum(enforced) <= budget
        offered = [name for name in devices if name in given_out or not devices[name].withheld]
        uses = sharing(devices, *given_out.values()).uses(offered)
        for name, (use,) in uses.items():
            assert sum(_amount(uses[each][0].takes) for each in given_out) <= _amount(use.of)
            assert name != PF_NAME or use.takes == use.of


def _given(
    devices: Mapping[DeviceName, Device],
    given_out: Mapping[DeviceName, Preparation],
    index: int,
    wish: int | None,
) -> Preparation | None:
    """As prepare would have it on record; None where it refuses."""
    seen = replace(devices[vf_name(index)], vf=VfSettings(max_rate=0))
    try:
        config = limits.settled(seen, limits.sized(seen, asked(egress_rate=wish or 0)))
    except ConfigError:
        assert wish is not None
        return None
    record = held(seen, config=config)
    over = sharing(devices, *given_out.values()).over_budget({seen.name: record.size})
    return None if seen.withheld or over else record


def _amount(counters: Mapping[str, str]) -> int:
    """In Mb/s."""
    return int(parse_quantity(counters["bandwidth"]) / 1_000_000)
