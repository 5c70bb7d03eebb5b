"""The agent's part in health: told once, to whom it concerns, tainted, and looked at again in time."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from driver.clock import SystemClock
from driver.journal import Journal
from driver.lifecycle import health as module
from driver.lifecycle import reporters
from driver.lifecycle.book import Book
from driver.lifecycle.context import Context
from driver.lifecycle.gate import Gate
from driver.lifecycle.health import Health
from driver.lifecycle.projections import Projections
from driver.lifecycle.workers import DeviceWorkers
from driver.model import (
    Attachment,
    AttachmentState,
    ClaimRef,
    Device,
    DeviceName,
    DeviceStatus,
    DriverEvent,
    NodeRef,
    OfferedDevice,
    PodRef,
    PoolName,
    Preparation,
    PreparationState,
)
from driver.policy import NodePolicy
from driver.policy.health import Effect, HealthPolicy, TroubleRule
from driver.troubles import DeviceHealth, Trouble
from hw.errors import Unsupported
from hw.model import DeviceKind, IfIndex, IfName, PciAddress, PciIdentity, PortState
from kndsim.waiting import wait_until_async
from tests.unit.journal_values import BOOT, attachment, preparation

PF = PciAddress("0000:21:00.0")
PORT = PortState(key=PF, name=IfName("ens1"), up=True, carrier=True)
DOWN = replace(PORT, carrier=False)
A, B = DeviceName("dev-0"), DeviceName("dev-1")


def told(story: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, in a loop of its own."""

    @functools.wraps(story)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(story(*args, **kwargs))

    return run


def identity(number: int) -> PciIdentity:
    return PciIdentity(PciAddress(f"0000:21:10.{number}"), PF, number)


def vf(number: int, **fields: Any) -> Device:
    made = Device(
        name=DeviceName(f"dev-{number}"),
        kind=DeviceKind.VF,
        identity=identity(number),
        ifindex=IfIndex(7 + number),
        settings=None,
        attributes={"now": number},
        driver="igbvf",
        physical_port=PORT,
    )
    return replace(made, **fields)


class World:
    """Health over a real book; what the scan and the programs say is made up, and time goes as it is told."""

    def __init__(self, journal: Journal) -> None:
        self.book = Book(journal, slots=8)
        self.devices = {each.name: each for each in (vf(0), vf(1))}
        self.policy = NodePolicy()
        self.now = 100.0
        self.dead: dict[DeviceName, bool] = {}
        self.held_back: set[object] = set()
        self.offers: list[tuple[OfferedDevice, ...]] = []
        self.events: list[DriverEvent] = []
        self.statuses: list[tuple[DeviceStatus, ...]] = []
        self.workers = DeviceWorkers(SystemClock())
        self.gate = Gate("")
        self.gate.settled = True
        context = SimpleNamespace(
            driver="knd.internal",
            pool=PoolName("node-a"),
            clock=SimpleNamespace(monotonic=lambda: self.now, wall=lambda: self.now),
            policy=lambda: self.policy,
            book=self.book,
            workers=self.workers,
            hook="tcx",
            accounting=SimpleNamespace(
                limits=SimpleNamespace(detour=lambda slot: 0, departs=lambda slot: False)
            ),
            devices=SimpleNamespace(
                current=lambda: self.devices,
                get=lambda name: self.devices.get(name),
                held_back=lambda found: "being made" if found in self.held_back else "",
            ),
            slices=SimpleNamespace(offer=self.offers.append),
            events=SimpleNamespace(emit=self.events.append),
            statuses=SimpleNamespace(write_status=lambda ref, rows: self.statuses.append(rows)),
        )
        homecoming = SimpleNamespace(is_dead=self.is_dead)
        self.projections = Projections(cast(Context, context))
        self.health = Health(cast(Context, context), self.projections, cast(Any, homecoming), self.gate)

    def is_dead(self, made: Preparation) -> bool:
        return self.dead.get(made.key.device, False)

    async def look(self, after: float = 0.0) -> None:
        self.now += after
        await self.health.look()

    def port(self, port: PortState) -> None:
        self.devices = {name: replace(device, physical_port=port) for name, device in self.devices.items()}

    def taints(self, number: int = -1) -> dict[DeviceName, list[str]]:
        return {each.name: [taint.key for taint in each.taints] for each in self.offers[number]}

    def hold(self, number: int) -> Preparation:
        made = replace(
            preparation(number, state=PreparationState.PREPARING),
            identity=identity(number),
            home_driver="igbvf",
        )
        opened = self.book.open_preparations([made])
        (prepared,) = self.book.advance_preparations(opened, PreparationState.PREPARED)
        return prepared

    def attach(self, number: int) -> Attachment:
        made = replace(attachment(number, state=AttachmentState.ATTACHING), preparation=self.hold(number).key)
        self.book.open_attachment(made)
        (attached,) = self.book.advance_attachments([made], AttachmentState.ATTACHED)
        return attached

    def said(self) -> list[tuple[str, type]]:
        found = [(event.reason, type(event.subject)) for event in self.events]
        self.events.clear()
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Journal.open(tmp_path / "j.sqlite", mirror=tmp_path / "m", boot_id=BOOT) as journal:
        made = World(journal)
        yield made
        made.workers.close()


@told
async def test_a_port_that_lost_its_carrier_taints_what_is_behind_it_once_and_is_told_to_the_node_once(
    world: World,
) -> None:
    await world.look()
    world.projections.offer()
    world.port(DOWN)
    await world.look()
    assert len(world.offers) == 1
    await world.look(5.1)
    assert world.taints() == {A: ["knd.internal/no-carrier"], B: ["knd.internal/no-carrier"]}
    assert world.said() == [("PortUnhealthy", NodeRef)]
    world.port(PORT)
    await world.look(1.0)
    world.port(DOWN)
    await world.look(20.0)
    world.port(PORT)
    await world.look(1.0)
    await world.look(29.0)
    assert len(world.offers) == 2
    await world.look(2.0)
    assert world.taints() == {A: [], B: []}
    assert len(world.offers) == 3
    assert world.said() == [("PortHealthy", NodeRef)]


@told
async def test_who_holds_a_device_behind_a_sick_port_is_told_and_the_claim_says_so(world: World) -> None:
    attached = world.attach(0)
    await world.look()
    world.port(DOWN)
    await world.look()
    await world.look(6.0)
    to_holders = [("DeviceUnhealthy", ClaimRef), ("DeviceUnhealthy", PodRef)]
    assert world.said() == [("PortUnhealthy", NodeRef), *to_holders]
    ((status,),) = world.statuses[-1:]
    assert "no carrier" in (status.unhealthy or "")
    assert world.health.counts()["no-carrier"] == 2
    world.port(PORT)
    await world.look()
    await world.look(31.0)
    assert world.said() == [("PortHealthy", NodeRef), ("DeviceHealthy", ClaimRef), ("DeviceHealthy", PodRef)]
    ((status,),) = world.statuses[-1:]
    assert status.unhealthy == ""
    assert attached.preparation.device == A


@told
async def test_a_policy_may_evict_or_leave_the_taint_out(world: World) -> None:
    world.port(DOWN)
    world.policy = NodePolicy(health=HealthPolicy(no_carrier=TroubleRule(effect=Effect.NO_EXECUTE)))
    await world.look()
    (first, _) = world.offers[-1]
    assert [taint.effect for taint in first.taints] == ["NoExecute"]
    world.policy = NodePolicy(health=HealthPolicy(no_carrier=TroubleRule(effect=Effect.NONE)))
    world.projections.offer()
    assert world.taints() == {A: [], B: []}
    assert world.health.feed.devices[0].healthy is False


@told
async def test_a_free_device_whose_driver_was_taken_stays_offered_with_a_taint(
    world: World,
) -> None:
    await world.look()
    world.projections.offer()
    world.devices[A] = vf(0, driver=None, withheld="it has no driver", attributes={"now": 99})
    await world.look()
    world.projections.offer()
    assert world.taints() == {A: [], B: []}
    await world.look(2.1)
    assert world.taints() == {A: ["knd.internal/no-driver"], B: []}
    assert world.offers[-1][0].attributes == {"now": 0}
    assert world.said() == [("DeviceUnhealthy", NodeRef)]
    world.devices[A] = vf(0)
    await world.look()
    await world.look(5.1)
    assert world.taints() == {A: [], B: []}
    assert world.said() == [("DeviceHealthy", NodeRef)]


@told
async def test_a_free_device_that_is_gone_or_taken_by_others_is_not_offered(world: World) -> None:
    await world.look()
    world.projections.offer()
    del world.devices[A]
    world.devices[B] = vf(1, driver="vfio-pci", has_netdev=False, withheld="in use by others")
    await world.look()
    await world.look(60.0)
    world.projections.offer()
    assert world.offers[-1] == ()
    assert world.said() == []


@told
async def test_what_this_driver_does_itself_is_no_trouble(world: World) -> None:
    await world.look()
    world.projections.offer()
    made = world.hold(0)
    world.devices = {
        A: vf(0, driver=None, withheld="it has no driver"),
        B: vf(1, driver=None, withheld="it has no driver"),
    }
    world.held_back = {identity(1)}
    world.book.advance_preparations([made], PreparationState.UNPREPARING)
    await world.look()
    await world.look(60.0)
    assert [health.findings for health in world.health.feed.devices] == [(), ()]
    assert world.said() == []


@told
async def test_a_pods_device_that_is_no_more_is_told_at_once(world: World) -> None:
    world.attach(0)
    await world.look()
    world.dead[A] = True
    await world.look()
    assert world.said() == [("DeviceUnhealthy", ClaimRef), ("DeviceUnhealthy", PodRef)]
    assert world.taints()[A] == ["knd.internal/reset"]
    del world.devices[A]
    await world.look()
    await world.look(3.0)
    assert world.taints()[A] == ["knd.internal/gone", "knd.internal/reset"]


@told
async def test_a_loss_is_told_until_the_device_is_in_a_pod_again(world: World) -> None:
    attached = world.attach(0)
    await world.look()
    world.health.lose(attached, dead=True)
    assert world.health.to_give_back()[0][0] == attached.preparation
    (leaving,) = world.book.advance_attachments([attached], AttachmentState.DETACHING)
    world.book.close_attachment(leaving)
    await world.look()
    assert world.taints()[A] == ["knd.internal/reset"]
    again = replace(attached, id=cast(Any, "again"), state=AttachmentState.ATTACHING)
    world.book.open_attachment(again)
    world.book.advance_attachments([again], AttachmentState.ATTACHED)
    await world.look()
    await world.look(6.0)
    assert world.taints()[A] == []
    assert world.health.to_give_back() == []


@told
async def test_what_was_moved_out_of_a_pod_is_not_given_back(world: World) -> None:
    world.health.lose(world.attach(0), dead=False)
    assert world.health.to_give_back() == []


@told
async def test_who_comes_and_goes_is_no_reason_to_look_while_all_are_well(world: World) -> None:
    world.attach(0)
    await world.look()
    world.health.holders_changed()
    assert not world.health._asked
    world.book.quarantine(A, "dirty", 1.0)
    world.health.holders_changed()
    assert world.health._asked


@told
async def test_nothing_is_offered_before_the_node_was_compared_with_its_records(world: World) -> None:
    world.gate.settled = False
    world.port(DOWN)
    await world.look()
    assert world.offers == []
    world.gate.settled = True
    world.projections.offer()
    assert world.taints() == {A: ["knd.internal/no-carrier"], B: ["knd.internal/no-carrier"]}


@told
async def test_it_looks_again_by_itself_when_a_hold_is_over_and_when_it_is_asked(world: World) -> None:
    rule = TroubleRule(after=0, until=0)
    world.policy = NodePolicy(health=HealthPolicy(no_carrier=rule))
    task = asyncio.get_running_loop().create_task(world.health.run())
    try:
        world.health.nudge()
        await wait_until_async(lambda: world.health.feed.version > 0, 5.0, "a look that was asked for")
        world.port(DOWN)
        world.policy = NodePolicy()
        await world.look()
        # The hold is measured by a clock that the test moves, so it is over when the task asks next.
        world.now += 60.0
        world.health.nudge()
        await wait_until_async(lambda: bool(world.offers), 5.0, "a look at the end of the hold")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@told
async def test_the_feed_wakes_whoever_waits_and_says_nothing_twice(world: World) -> None:
    await world.look()
    feed = world.health.feed
    version = feed.version
    waiting = asyncio.get_running_loop().create_task(feed.newer_than(version, 30.0))
    await world.look(1.0)
    assert feed.version == version
    world.book.quarantine(A, "dirty", 1.0)
    await world.look()
    await asyncio.wait_for(waiting, 5.0)
    assert [(each.device, each.healthy) for each in feed.devices] == [(A, False), (B, True)]
    assert feed.devices[0].message.endswith("dirty")
    await feed.newer_than(feed.version, 0.0)


def test_a_quarantine_is_told_by_who_made_it(world: World) -> None:
    async def story() -> None:
        world.hold(0)
        await world.look()
        world.book.quarantine(A, "dirty", 1.0)
        await world.look()
        assert world.said() == []
        assert world.health.counts()[Trouble.QUARANTINED] == 1

    asyncio.run(story())


def test_a_message_is_all_that_is_wrong() -> None:
    assert DeviceHealth(device=A).message == ""


@told
async def test_a_health_reporter_that_says_error_is_the_trouble_of_its_device_or_its_port(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.look()
    sick: dict[str, frozenset[str]] = {str(PF): frozenset({"fw_fatal"})}
    monkeypatch.setattr(module, "sick_reporters", lambda: sick)
    await world.health.ask_reporters()
    await world.look()
    assert world.taints() == {A: ["knd.internal/firmware"], B: ["knd.internal/firmware"]}
    assert world.said() == [("PortUnhealthy", NodeRef)]
    sick = {identity(0).address: frozenset({"tx"})}
    await world.health.ask_reporters()
    await world.look()
    await world.look(31.0)
    assert world.taints() == {A: ["knd.internal/firmware"], B: []}


@told
async def test_reporters_are_asked_at_first_and_each_time_one_of_them_says_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    heard: list[object] = [("an error",), (), None]
    asked = 0

    class Events:
        def __enter__(self) -> Events:
            return self

        def __exit__(self, *rest: object) -> None: ...

        def fileno(self) -> int:
            return ours.fileno()

        def read(self) -> object:
            ours.recv(1)
            return heard.pop(0)

    async def changed() -> None:
        nonlocal asked
        asked += 1

    monkeypatch.setattr(reporters, "HealthEvents", Events)
    with ours, theirs:
        task = asyncio.get_running_loop().create_task(reporters.watch_reporters(changed))
        await wait_until_async(lambda: asked == 1, 5.0, "the first look")
        theirs.send(b"xxx")
        await wait_until_async(lambda: not heard, 5.0, "all that was said is read")
        await wait_until_async(lambda: asked == 3, 5.0, "a look for what was said and for what was lost")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@told
async def test_a_kernel_without_devlink_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise Unsupported("hear of devlink's devices", 95)

    asked = []

    async def changed() -> None:
        asked.append(1)

    monkeypatch.setattr(reporters, "HealthEvents", none)
    await reporters.watch_reporters(changed)
    assert asked == [1]
