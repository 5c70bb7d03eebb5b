"""Parts of a device: never more of it than the node policy says, whatever was allocated, and whoever asks
first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver import plan, shares
from driver.errors import ConfigError, NotNow, Refusal
from driver.lifecycle.shares import as_share, renewed
from driver.model import (
    AllocatedDevice,
    Claim,
    ClaimRef,
    ClaimUid,
    Device,
    DeviceName,
    InterfaceConfig,
    NicConfig,
    Preparation,
    PreparationKey,
    PreparationState,
    ShareId,
    SubinterfaceConfig,
    device_of,
)
from driver.plan import Act
from driver.rdma import RdmaConfig
from driver.sharing import Node, Sharing
from driver.traffic import Amounts, Sharable, VlanRange
from hw.model import DeviceKind, IfIndex, IfName, MacAddress, SoftwareIdentity
from hw.subinterface import FIRST_INDEX, LAST_INDEX, SubinterfaceKind, SubinterfaceMode
from tests.unit.bandwidth_world import PF_NAME, policy, present
from tests.unit.claims_world import POOL, World, device, play_claims
from tests.unit.journal_values import preparation
from tests.unit.test_sharing import held, port_and_vfs

NAME = DeviceName("uplink")
OWN = MacAddress("02:00:00:00:00:09")
MACVLAN = Sharable(
    kind=SubinterfaceKind.MACVLAN,
    mode=SubinterfaceMode.BRIDGE,
    bandwidth=1_000,
    amounts=Amounts(default=100, least=1, most=1_000),
    shares=4,
)
IPVLAN = replace(MACVLAN, kind=SubinterfaceKind.IPVLAN, mode=SubinterfaceMode.L2)
VLAN = replace(
    MACVLAN,
    kind=SubinterfaceKind.VLAN,
    mode=None,
    vlans=(VlanRange(first=100, last=100), VlanRange(first=200, last=209)),
)


def uplink(sharable: Sharable | None = MACVLAN, **fields: Any) -> Device:
    kind = DeviceKind.SHARED if sharable is not None else DeviceKind.NETDEV
    return device(NAME, 7, **{"kind": kind, "sharable": sharable} | fields)


def part(number: int, size: int = 100, *, of: Device | None = None, vlan: int | None = None) -> Preparation:
    """The record of a share."""
    whole, known = of or uplink(), preparation(0)
    key = PreparationKey(ClaimUid(f"uid-{number}"), POOL, whole.name, ShareId(f"share-{number}"))
    record = replace(
        known,
        key=key,
        claim=ClaimRef("ns", f"claim-{number}", key.claim_uid),
        kind=whole.kind,
        size=size,
        state=PreparationState.PREPARED,
    )
    config = NicConfig(subinterface=SubinterfaceConfig(vlan=vlan))
    return as_share(record, whole, config, owner="a share of ours", taken=())


def allocated(amount: str | None = "100M", share: str | None = "share-1") -> AllocatedDevice:
    return AllocatedDevice(
        request="r0",
        pool=POOL,
        device=NAME,
        share_id=ShareId(share) if share else None,
        consumed_capacity={"bandwidth": amount, "shares": "1"} if amount else {},
    )


# --- what was allocated -------------------------------------------------------------------------------


def test_an_amount_is_what_the_claim_has_of_the_capacity_in_whole_megabits() -> None:
    assert shares.amount(allocated("300M"), uplink()) == 300
    assert shares.amount(allocated("1G"), uplink()) == 1_000
    assert shares.amount(allocated("1500500k"), uplink()) == 1_500
    assert shares.amount(allocated(None, None), uplink(None)) is None


@pytest.mark.parametrize(
    ("result", "sharable", "reason", "words"),
    [
        (allocated(), None, "NotSharable", "allocated in part .* gives it out whole"),
        (allocated(None, None), MACVLAN, "NotInParts", "allocated whole .* gives it out in parts"),
        (allocated("100M", None), MACVLAN, "NotInParts", "without a shareID"),
        (allocated("999k"), MACVLAN, "NoBandwidth", "999k of the bandwidth of uplink, and 1M is the least"),
        (allocated(None), MACVLAN, "NoBandwidth", "the claim has nothing of the bandwidth"),
    ],
)
def test_an_allocation_that_is_not_of_the_kind_the_device_is_offered_for_is_refused(
    result: AllocatedDevice, sharable: Sharable | None, reason: str, words: str
) -> None:
    with pytest.raises(Refusal, match=words) as raised:
        shares.amount(result, uplink(sharable))
    assert raised.value.reason == reason


def config(*, vlan: int | None = None, rdma: RdmaConfig | None = None, **interface: Any) -> NicConfig:
    return NicConfig(
        interface=InterfaceConfig(**interface),
        subinterface=SubinterfaceConfig(vlan=vlan),
        rdma=rdma or RdmaConfig(),
    )


@pytest.mark.parametrize(
    ("sharable", "asked", "path"),
    [
        (None, config(vlan=100), "subinterface.vlan"),
        (MACVLAN, config(vlan=100), "subinterface.vlan"),
        (VLAN, config(), "subinterface.vlan"),
        (VLAN, config(vlan=101), "subinterface.vlan"),
        (VLAN, config(vlan=100, hardware_address=OWN), "interface.hardwareAddress"),
        (IPVLAN, config(hardware_address=OWN), "interface.hardwareAddress"),
        (MACVLAN, config(mtu=9000), "interface.mtu"),
        (MACVLAN, config(rdma=RdmaConfig(nccl=True)), "rdma"),
    ],
)
def test_what_a_part_cannot_be_is_refused_with_its_field(
    sharable: Sharable | None, asked: NicConfig, path: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        shares.check_share(uplink(sharable), asked)
    assert [problem.path for problem in raised.value.problems] == [path]


@pytest.mark.parametrize(
    ("sharable", "asked"),
    [
        (None, config(mtu=9000)),
        (MACVLAN, config(mtu=1400, hardware_address=OWN)),
        (IPVLAN, config()),
        (VLAN, config(vlan=100)),
        (VLAN, config(vlan=205)),
    ],
)
def test_what_a_part_can_be_is_taken(sharable: Sharable | None, asked: NicConfig) -> None:
    shares.check_share(uplink(sharable), asked)


# --- whether there is so much ---------------------------------------------------------------------------


@given(st.lists(st.integers(1, 600), max_size=8))
def test_never_more_is_given_out_than_the_policy_says(sizes: list[int]) -> None:
    has: list[Preparation] = []
    for number, size in enumerate(sizes):
        coming = part(number, size)
        try:
            shares.check_room(uplink(), has, [coming])
        except Refusal:
            given_out = sum(each.size or 0 for each in has)
            assert given_out + size > MACVLAN.bandwidth or len(has) == MACVLAN.shares
        else:
            has.append(coming)
    assert sum(each.size or 0 for each in has) <= MACVLAN.bandwidth
    assert len(has) <= MACVLAN.shares


def test_other_devices_and_what_is_given_whole_take_nothing_of_it() -> None:
    other = replace(part(1, 900), key=replace(part(1).key, device=DeviceName("other")))
    whole = replace(preparation(0), key=replace(preparation(0).key, device=NAME), size=900)
    shares.check_room(uplink(), [other, whole], [part(2, 1_000)])


def test_a_vlan_of_a_device_is_one_claims() -> None:
    of = uplink(VLAN)
    has = [part(1, of=of, vlan=100)]
    shares.check_room(of, has, [part(2, of=of, vlan=200)])
    with pytest.raises(NotNow, match="VLAN 100 of uplink is that of claim ns/claim-1"):
        shares.check_room(of, has, [part(2, of=of, vlan=100)])
    with pytest.raises(NotNow, match="VLAN 200 of uplink"):
        shares.check_room(of, [], [part(2, of=of, vlan=200), part(3, of=of, vlan=200)])


@pytest.mark.parametrize(
    ("before", "now"),
    [(MACVLAN, IPVLAN), (IPVLAN, MACVLAN), (IPVLAN, replace(IPVLAN, mode=SubinterfaceMode.L3))],
)
def test_what_would_change_other_pods_interfaces_waits_for_them(before: Sharable, now: Sharable) -> None:
    with pytest.raises(NotNow, match=r"beside the .* of claim ns/claim-1"):
        shares.check_room(uplink(now), [part(1, of=uplink(before))], [part(2, of=uplink(now))])


def test_kinds_that_stand_beside_each_other_may() -> None:
    private = replace(MACVLAN, mode=SubinterfaceMode.PRIVATE)
    shares.check_room(uplink(private), [part(1)], [part(2, of=uplink(private))])
    shares.check_room(uplink(VLAN), [part(1)], [part(2, of=uplink(VLAN), vlan=100)])


# --- records --------------------------------------------------------------------------------------------


def test_a_share_is_known_before_it_is_made_and_by_nothing_that_another_has() -> None:
    one, two = part(1), part(2)
    assert isinstance(one.identity, SoftwareIdentity)
    assert isinstance(two.identity, SoftwareIdentity)
    assert FIRST_INDEX <= one.identity.ifindex <= LAST_INDEX
    assert one.identity.peer == IfIndex(7)
    assert one.baseline.mac not in (None, two.baseline.mac)
    assert one.key.unit != two.key.unit
    assert (device_of(one.key.unit), device_of(NAME)) == (NAME, NAME)
    assert part(1).baseline.mac == one.baseline.mac, "made anew it has the same"
    assert one.share is not None
    assert one.share.ifname == "host7", "as the device is called, where the claim says nothing"


def test_one_without_an_address_of_its_own_has_that_of_the_device() -> None:
    of = uplink(IPVLAN)
    assert of.settings is not None
    assert part(1, of=of).baseline.mac == of.settings.mac


def test_a_share_is_made_anew_on_the_index_that_its_device_has_by_then() -> None:
    record = part(1)
    there = {NAME: uplink(ifindex=IfIndex(19))}
    written: list[Preparation] = []

    def amend(changed: Preparation) -> Preparation:
        written.append(changed)
        return changed

    context: Any = type("Context", (), {})()
    context.devices, context.book = there, type("Book", (), {"amend_preparation": staticmethod(amend)})()
    again = renewed(context, record)
    assert written == [again]
    assert isinstance(again.identity, SoftwareIdentity)
    assert isinstance(record.identity, SoftwareIdentity)
    assert (again.identity.peer, again.identity.ifindex) == (19, record.identity.ifindex)
    assert renewed(context, again) == again
    assert len(written) == 1, "nothing is written for nothing"
    whole = uplink(ifindex=IfIndex(19))
    assert whole.settings is not None
    there[NAME] = replace(whole, settings=replace(whole.settings, mtu=1300))
    assert renewed(context, again).baseline.mtu == 1300
    there[NAME] = replace(whole, settings=replace(whole.settings, name=IfName("another")))
    with pytest.raises(NotNow, match="uplink is 'another' now, and was 'host7'"):
        renewed(context, again)
    there[NAME] = uplink(ifindex=None)
    with pytest.raises(NotNow, match="uplink is not in the host's network namespace"):
        renewed(context, record)


def test_it_is_made_before_anything_is_done_to_it_and_removed_first() -> None:
    record = part(1)
    acts = [step.act for step in plan.prepare(record, plan.Hook.TCX).steps]
    assert acts == [Act.SHARE_MAKE, Act.NOTE_FOREIGN, Act.ARM]
    leaving = [step.act for step in plan.unprepare(record, reset=True).steps]
    assert leaving == [Act.SHARE_REMOVE, Act.DISARM, Act.PUT_FOREIGN_BACK]


# --- beside what is given whole -----------------------------------------------------------------------


def sharing(devices: dict[DeviceName, Device], *records: Preparation) -> Sharing:
    return Sharing(Node(devices=devices, held={p.key.unit: p for p in records}, quarantined={}))


def test_a_device_whose_parts_claims_have_is_not_given_whole_by_a_new_policy() -> None:
    relations = sharing({NAME: uplink(None)}, part(1))
    against = relations.against(NAME)
    assert against is not None
    assert "a part of it, is held by claim ns/claim-1" in against.sentence
    assert relations.in_parts(NAME)
    assert sharing({NAME: uplink(None)}).against(NAME) is None


def test_a_pf_and_a_vf_of_it_that_is_given_out_in_parts_rule_each_other_out() -> None:
    devices = port_and_vfs(2)
    vf, pf = DeviceName("vf-0"), DeviceName("pf")
    devices[vf] = replace(devices[vf], kind=DeviceKind.SHARED, sharable=MACVLAN)
    against = sharing(devices).against(pf)
    assert against is not None
    assert "its VF vf-0 is given out in parts" in against.sentence
    assert sharing(devices).against(vf) is None
    taken = sharing(devices, held(devices[pf])).against(vf)
    assert taken is not None
    assert "is held by claim" in taken.sentence
    assert sharing(devices, part(1, of=devices[vf])).against(DeviceName("vf-1")) is None


def test_a_pf_is_not_given_whole_while_claims_have_parts_of_a_vf_of_an_older_policy() -> None:
    devices = port_and_vfs(2)
    vf = DeviceName("vf-0")
    record = part(1, of=replace(devices[vf], kind=DeviceKind.SHARED, sharable=MACVLAN))
    assert sharing(devices, record).against(DeviceName("pf")) is not None
    assert sharing(devices, record).against(vf) is not None
    assert sharing(devices, record).against(DeviceName("vf-1")) is None


def test_what_claims_have_in_parts_stays_taken_off_a_port_whatever_the_policy_says_by_then() -> None:
    devices = present(2, policy((10_000, None)))
    pf = devices[PF_NAME]
    record = replace(part(1, 7_000), key=replace(part(1).key, device=PF_NAME))
    (budget,) = sharing(devices, record).budgets().values()
    assert budget.given == 7_000
    wider = replace(MACVLAN, bandwidth=5_000)
    devices[PF_NAME] = replace(pf, kind=DeviceKind.SHARED, sharable=wider)
    (budget,) = sharing(devices, record).budgets().values()
    assert budget.given == 2_000, "the policy takes 5 Gb/s off by itself"


def test_a_pf_that_is_given_out_in_parts_leaves_its_vfs_free() -> None:
    devices = port_and_vfs(2)
    pf = DeviceName("pf")
    devices[pf] = replace(devices[pf], kind=DeviceKind.SHARED, sharable=MACVLAN)
    relations = sharing(devices, part(1, of=devices[pf]))
    assert relations.against(DeviceName("vf-0")) is None
    assert relations.uses(devices) == {}


# --- through prepare ------------------------------------------------------------------------------------

Play = Callable[[Callable[[World], Awaitable[None]]], None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    return partial(play_claims, tmp_path, monkeypatch)


def asks(world: World, name: str, *amounts: str) -> ClaimRef:
    ref = world.claim(name, NAME, pods=(name,))
    claim = world.claims[ref.uid]
    assert isinstance(claim, Claim)
    parts = tuple(
        replace(allocated(amount, f"{name}-{number}"), request=f"r{number}")
        for number, amount in enumerate(amounts)
    )
    world.claims[ref.uid] = replace(claim, devices=parts)
    return ref


def test_claims_have_parts_of_one_device_at_once_and_the_next_has_what_is_left(play: Play) -> None:
    async def story(world: World) -> None:
        world.node.present = {NAME: uplink()}
        first = await asyncio.gather(
            world.prepare(asks(world, "one", "600M")), world.prepare(asks(world, "two", "300M"))
        )
        assert first == [[NAME], [NAME]]
        answer = await world.prepare(asks(world, "three", "200M"))
        assert "gives out 1G, claims have 900M of that, and 200M more are asked for" in answer
        assert await world.prepare(asks(world, "four", "100M")) == [NAME]
        assert await world.unprepare(ClaimRef("ns", "one", ClaimUid("uid-one"))) == ""
        assert await world.prepare(asks(world, "three", "200M")) == [NAME]
        assert [act for act, _ in world.node.acts].count(Act.SHARE_MAKE) == 4

    play(story)


def test_of_claims_that_come_together_no_more_are_served_than_there_is(play: Play) -> None:
    async def story(world: World) -> None:
        world.node.present = {NAME: uplink()}
        refs = [asks(world, f"c{number}", "400M") for number in range(5)]
        answers = await asyncio.gather(*(world.prepare(ref) for ref in refs))
        assert sum(answer == [NAME] for answer in answers) == 2
        assert sum(p.size or 0 for p in world.book.preparations()) == 800

    play(story)


def test_a_limit_is_the_size_of_the_share_each_way(play: Play) -> None:
    async def story(world: World) -> None:
        world.node.present = {NAME: uplink()}
        await world.prepare(asks(world, "one", "600M"))
        (record,) = world.book.preparations()
        qos = record.config.qos
        assert (qos.egress_rate, qos.ingress_rate, qos.by_size, qos.on_pf) == (600, 600, True, False)
        assert record.dies_with_netns
        assert record.rdma is None

    play(story)


def test_a_share_that_cannot_be_removed_withholds_itself_and_not_the_device(play: Play) -> None:
    async def story(world: World) -> None:
        world.node.present = {NAME: uplink()}
        ref = asks(world, "one", "600M")
        await world.prepare(ref)
        world.node.fail[Act.SHARE_REMOVE, NAME] = NotNow("it is in a network namespace of its pod's own")
        assert await world.unprepare(ref) == ""
        (withheld,) = world.book.quarantines()
        assert device_of(withheld) == NAME
        assert withheld != NAME
        del world.node.fail[Act.SHARE_REMOVE, NAME]
        assert "gives out 1G, claims have 600M" in await world.prepare(asks(world, "two", "500M"))
        assert await world.prepare(asks(world, "two", "400M")) == [NAME]

    play(story)


def test_the_device_under_parts_is_not_given_whole_whoever_allocated_it(play: Play) -> None:
    async def story(world: World) -> None:
        world.node.present = {NAME: uplink()}
        await world.prepare(asks(world, "one", "600M"))
        assert "allocated whole" in await world.prepare(world.claim("all", NAME))
        world.node.present = {NAME: uplink(None)}
        assert "a part of it, is held by claim ns/one" in await world.prepare(
            world.claim("every", NAME, pods=("every",))
        )

    play(story)
