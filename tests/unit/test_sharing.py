"""A PF or its VFs, never both: in what is offered, in what is prepared, and whoever asks first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver import plan
from driver.model import (
    Device,
    DeviceName,
    Preparation,
)
from driver.plan import Act
from driver.sharing import Node, Sharing
from hw.model import (
    DeviceKind,
    PciAddress,
    PciIdentity,
    PortBaseline,
    PortVf,
    VfSettings,
)
from tests.unit.claims_world import A, B, C, World, device, play_claims
from tests.unit.journal_values import preparation

PORT = PciAddress("0000:21:00.0")
PF = PciIdentity(PORT)


def vf(index: int) -> PciIdentity:
    return PciIdentity(PciAddress(f"0000:21:10.{index}"), PORT, index)


def port_and_vfs(count: int = 2, **whole: Any) -> dict[DeviceName, Device]:
    """`pf`, which can have seven VFs, and vf-0, vf-1..."""
    pf = device(DeviceName("pf"), 10, kind=DeviceKind.PF, identity=PF, capacities={"vfs": "7"}, **whole)
    vfs = [
        device(DeviceName(f"vf-{index}"), 20 + index, kind=DeviceKind.VF, identity=vf(index))
        for index in range(count)
    ]
    return {each.name: each for each in (pf, *vfs)}


def held(made: Device) -> Preparation:
    record = preparation(0)
    key = replace(record.key, device=made.name)
    return replace(
        record,
        key=key,
        identity=made.identity,
        kind=made.kind,
        capacities=made.capacities,
        attributes=made.attributes,
    )


def sharing(devices: dict[DeviceName, Device], *holds: str, dirty: str = "") -> Sharing:
    names = [DeviceName(each) for each in holds]
    quarantined = {DeviceName(dirty): "its MTU is 9000"} if dirty else {}
    return Sharing(
        Node(devices=devices, held={name: held(devices[name]) for name in names}, quarantined=quarantined)
    )


def test_a_pf_takes_what_all_its_vfs_take_together_and_gives_way_where_there_are_no_counters() -> None:
    devices = port_and_vfs()
    uses = sharing(devices).uses(devices)
    (whole,) = uses[DeviceName("pf")]
    assert (whole.set, whole.takes, whole.of, whole.instead) == (
        "pci-0000-21-00-0",
        {"vfs": "7"},
        {"vfs": "7"},
        True,
    )
    for name in ("vf-0", "vf-1"):
        (part,) = uses[DeviceName(name)]
        assert (part.set, part.takes, part.of, part.instead) == (whole.set, {"vfs": "1"}, whole.of, False)


def test_counts_do_not_change_with_who_has_what_but_who_gives_way_does() -> None:
    devices = port_and_vfs()
    uses = sharing(devices, "pf").uses(devices)
    assert [(uses[name][0].instead, uses[name][0].of["vfs"]) for name in sorted(devices)] == [
        (False, "7"),
        (True, "7"),
        (True, "7"),
    ]
    free, taken = sharing(devices).uses(devices), sharing(devices, "vf-0").uses(devices)
    assert taken == free


@pytest.mark.parametrize("offered", [["pf"], ["vf-0", "vf-1"]])
def test_a_pf_alone_and_vfs_alone_need_no_counters(offered: list[str]) -> None:
    assert sharing(port_and_vfs()).uses(map(DeviceName, offered)) == {}


def test_netdevs_that_have_an_rdma_device_together_share_one_counter() -> None:
    devices = {
        name: device(name, number, attributes={"rdmaDevice": rdma})
        for number, (name, rdma) in enumerate([(A, "mlx4_0"), (B, "mlx4_0"), (C, "mlx5_1")], 20)
    }
    relations = sharing(devices)
    assert {name: [use.set for use in uses] for name, uses in relations.uses(devices).items()} == {
        A: ["rdma-mlx4-0"],
        B: ["rdma-mlx4-0"],
    }
    against = sharing(devices, A).against(B)
    assert against is not None
    assert "same RDMA device" in against.sentence


@pytest.mark.parametrize(
    ("wanted", "holds", "dirty", "words", "passing"),
    [
        ("pf", ["vf-1"], "", "its VF vf-1 is held by claim", False),
        ("vf-0", ["pf"], "", "its PF pf is held by claim", False),
        ("pf", [], "vf-0", "its VF vf-0 is withheld until it is clean: its MTU is 9000", True),
        ("vf-0", [], "pf", "its PF pf is withheld until it is clean", True),
        ("pf", ["vf-1"], "vf-0", "vf-1 is held", False),
    ],
)
def test_each_reason_against_is_named(
    wanted: str, holds: list[str], dirty: str, words: str, passing: bool
) -> None:
    against = sharing(port_and_vfs(), *holds, dirty=dirty).against(DeviceName(wanted))
    assert against is not None
    assert words in against.sentence
    assert against.passing is passing


def test_vfs_do_not_rule_each_other_out() -> None:
    relations = sharing(port_and_vfs(), "vf-1", dirty="vf-1")
    assert relations.against(DeviceName("vf-0")) is None
    assert not relations.quarantine(DeviceName("vf-0"))
    assert relations.quarantine(DeviceName("pf"))


def test_a_pf_with_a_vf_that_others_have_is_in_others_hands_and_with_one_of_ours_it_is_not() -> None:
    devices = port_and_vfs()
    name = DeviceName("vf-1")
    devices[name] = replace(devices[name], withheld="in use by others: it is bound to vfio-pci", taken=True)
    assert sharing(devices).in_others_hands(DeviceName("pf"))
    assert not sharing(devices).in_others_hands(DeviceName("vf-0"))
    assert not sharing(devices, "vf-1").in_others_hands(DeviceName("pf"))
    against = sharing(devices).against(DeviceName("pf"))
    assert against is not None
    assert "vfio-pci" in against.sentence


@pytest.mark.parametrize("here", [True, False])
def test_vfs_are_had_beside_a_pf_that_the_host_uses_and_not_beside_one_that_others_took_away(
    here: bool,
) -> None:
    why = "in use by the host: it has an address" if here else "its netdev is in another network namespace"
    devices = port_and_vfs(withheld=why, taken=True)
    if not here:
        devices[DeviceName("pf")] = replace(devices[DeviceName("pf")], ifindex=None)
    assert sharing(devices).in_others_hands(DeviceName("vf-0")) is not here
    assert (sharing(devices).against(DeviceName("vf-0")) is None) is here


def test_a_vf_of_a_pf_that_the_host_uses_is_offered_and_given(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = port_and_vfs(withheld="in use by the host: it has an address", taken=True)
        world.handler._projections.offer()
        assert [each.name for each in world.offers[-1]] == ["vf-0", "vf-1"]
        assert await world.prepare(world.claim("one", DeviceName("vf-0"))) == ["vf-0"]

    play(story)


@given(st.sets(st.sampled_from(["pf", "vf-0", "vf-1", "vf-2"]), min_size=1, max_size=2))
def test_of_two_that_rule_each_other_out_one_locks_both(pair: set[str]) -> None:
    relations = sharing(port_and_vfs(3))
    names = [DeviceName(each) for each in pair]
    rivals = len(names) == 2 and names[1] in relations.rivals(names[0])
    locks = [relations.to_lock(name) for name in names]
    assert rivals is (len(locks) == 2 and bool(locks[0] & locks[1]))


# --- in prepare -------------------------------------------------------------------------------------


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return partial(play_claims, tmp_path, monkeypatch)


@pytest.mark.parametrize(("first", "second"), [("pf", "vf-1"), ("vf-1", "pf")])
def test_whoever_comes_second_is_refused_whatever_the_scheduler_says_and_not_when_the_first_left(  # type: ignore[no-untyped-def]
    play, first: str, second: str
) -> None:
    async def story(world: World) -> None:
        world.node.present = port_and_vfs()
        one, two = world.claim("one", DeviceName(first)), world.claim("two", DeviceName(second), pods=("p2",))
        assert await world.prepare(one) == [first]
        before = world.states()
        answer = await world.prepare(two)
        assert f"{first} is held by claim ns/one" in answer
        assert world.states() == before, "a refusal never touches the holder"
        assert await world.prepare(one) == [first]
        assert await world.unprepare(one) == ""
        assert await world.prepare(two) == [second]

    play(story)


def test_a_claim_cannot_have_both(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = port_and_vfs()
        answer = await world.prepare(world.claim("both", DeviceName("pf"), DeviceName("vf-0")))
        assert "cannot both be given away" in answer
        assert not world.states()

    play(story)


def test_of_claims_that_come_together_one_gets_the_pf_or_the_others_its_vfs(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = port_and_vfs()
        refs = [world.claim(name, DeviceName(name), pods=(name,)) for name in ("pf", "vf-0", "vf-1")]
        await asyncio.gather(*map(world.prepare, refs))
        assert set(world.states()) in ({"pf"}, {"vf-0", "vf-1"})

    play(story)


def test_what_is_offered_stays_while_a_pf_or_a_vf_is_given_away_and_a_pf_comes_last(play) -> None:  # type: ignore[no-untyped-def]
    async def story(world: World) -> None:
        world.node.present = port_and_vfs()
        world.handler._projections.offer()
        for name in ("vf-0", "vf-1"):
            ref = world.claim(f"of-{name}", DeviceName(name))
            await world.prepare(ref)
            world.handler._projections.offer()
            await world.unprepare(ref)
        assert all(each == world.offers[0] for each in world.offers)
        assert [each.name for each in world.offers[-1]] == ["vf-0", "vf-1", "pf"]

    play(story)


def test_a_pf_goes_home_to_its_vfs_last_of_all() -> None:
    vfs = (PortVf(index=0, settings=VfSettings(trust=False)),)
    made = replace(preparation(0), kind=DeviceKind.PF, port=PortBaseline(up=True, vfs=vfs))
    assert [step.act for step in plan.unprepare(made).steps][-2:] == [Act.VERIFY, Act.RESTORE_PORT]
    assert Act.RESTORE_PORT not in [step.act for step in plan.unprepare(preparation(0)).steps]
