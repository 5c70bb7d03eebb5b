"""Who has a limit is looked up again whenever it may be another; where nobody has one nothing is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpf.layout import Slot
from bpf.limits import Dropped
from driver.journal import Journal
from driver.lifecycle.book import Book
from driver.lifecycle.keeping import Keeping
from driver.lifecycle.projections import Projections
from driver.limits import KeptBy
from driver.model import AttachmentState, PreparationState
from driver.qos import DEFAULT_CLASSES, PodLimits, QosPolicy
from driver.traffic import QosConfig
from tests.unit.journal_values import BOOT, attachment, preparation


class Maps:
    """Rules of slots, and how often the kernel was asked for them."""

    def __init__(self) -> None:
        self.state: object = object()
        self.departs_of: set[Slot] = set()
        self.asked = 0

    def set(self, slot: Slot, *, departs: bool) -> None:
        (self.departs_of.add if departs else self.departs_of.discard)(slot)
        self.state = object()

    def detour(self, slot: Slot) -> int:
        self.asked += 1
        return 0

    def departs(self, slot: Slot) -> bool:
        self.asked += 1
        return slot in self.departs_of

    def departing(self, slots: list[Slot]) -> frozenset[Slot]:
        return frozenset(self.departs_of & set(slots))

    def waiting(self, slot: Slot) -> float | None:
        return 0.25 if slot in self.departs_of else None

    def dropped(self, slots: list[Slot]) -> dict[Slot, Dropped]:
        self.asked += len(slots)
        return {slot: Dropped((0, 0), (3, 4)) for slot in slots}


class World:
    def __init__(self, folder: Path) -> None:
        self.journal = Journal.open(folder / "journal.db", mirror=folder / "mirror", boot_id=BOOT)
        self.book = Book(self.journal, slots=8)
        self.maps = Maps()
        self.ran = 0
        self.policy: Any = SimpleNamespace(qos=QosPolicy(classes=DEFAULT_CLASSES))
        context: Any = SimpleNamespace(
            book=self.book,
            policy=lambda: self.policy,
            accounting=SimpleNamespace(limits=self.maps, read_slots=lambda slots: dict.fromkeys(slots, ())),
            clock=SimpleNamespace(monotonic=lambda: float(self.ran)),
            workers=SimpleNamespace(run=self.run),
        )
        self.keeping = Keeping(context, Projections(context), SimpleNamespace())  # type: ignore[arg-type]

    async def run(self, devices: list[str], work: Callable[[], object]) -> object:
        self.ran += 1
        return work()

    def attach(self, number: int, **qos: object) -> None:
        made = replace(preparation(number, state=PreparationState.PREPARING))
        made = replace(made, config=replace(made.config, qos=QosConfig(**qos)))  # type: ignore[arg-type]
        self.book.open_preparations([made])
        opened = self.book.open_attachment(attachment(number, state=AttachmentState.ATTACHING))
        self.book.advance_attachments([opened], AttachmentState.ATTACHED)

    def limits(self) -> dict[tuple[str, str, str], float]:
        return {(key[1], key[5], key[6]): value for key, value in self.keeping.limits().items()}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.journal.close()


def test_where_nobody_has_a_limit_no_map_is_read_and_no_thread_is_run(world: World) -> None:
    world.attach(1)
    world.attach(2)
    for _ in range(200):
        asyncio.run(world.keeping.watch())
    assert (world.ran, world.maps.asked) == (1, 0)
    assert world.limits() == {}
    assert not world.keeping.dropped()


def test_nothing_wakes_up_until_somebody_has_a_limit_and_then_it_is_looked_at_at_once(world: World) -> None:
    world.attach(1)

    async def rest() -> None:
        await world.keeping.until_worth_a_look()
        await world.keeping.watch()
        waiting = asyncio.create_task(world.keeping.until_worth_a_look())
        for _ in range(3):
            await asyncio.sleep(0)
        assert not waiting.done()
        # As an attach does it: by another thread.
        await asyncio.to_thread(world.attach, 2, egress_rate=100)
        await asyncio.wait_for(waiting, 5.0)
        await world.keeping.watch()
        await asyncio.wait_for(world.keeping.until_worth_a_look(), 5.0)

    asyncio.run(rest())
    assert world.limits() == {("train-2", "egress", "htb"): 1e8}


def test_a_new_policy_has_limits_looked_at(world: World) -> None:
    async def rest() -> None:
        await world.keeping.watch()
        waiting = asyncio.create_task(world.keeping.until_worth_a_look())
        await asyncio.sleep(0)
        world.policy = SimpleNamespace(qos=replace(world.policy.qos, limits=PodLimits(egress=50)))
        await world.keeping.apply_all(report=False)
        await asyncio.wait_for(waiting, 5.0)

    asyncio.run(rest())


def test_a_pod_with_a_limit_is_seen_from_its_attach_to_its_end(world: World) -> None:
    world.attach(1)
    asyncio.run(world.keeping.watch())
    assert world.limits() == {}
    world.attach(2, egress_rate=100)
    assert world.limits() == {("train-2", "egress", "htb"): 1e8}
    for number in range(3):
        asyncio.run(world.keeping.watch())
        assert world.ran == 2 + number
    (leaving,) = world.book.advance_attachments(
        [each for each in world.book.attachments() if each.pod.name == "train-2"], AttachmentState.DETACHING
    )
    assert world.limits() == {}
    world.book.close_attachment(leaving)
    asyncio.run(world.keeping.watch())
    ran = world.ran
    asyncio.run(world.keeping.watch())
    assert world.ran == ran


def test_another_policy_is_another_limit_at_once(world: World) -> None:
    world.attach(1)
    assert world.limits() == {}
    world.policy = SimpleNamespace(qos=replace(world.policy.qos, limits=PodLimits(egress=50)))
    assert world.limits() == {("train-1", "egress", "htb"): 5e7}


def test_other_rules_are_seen_at_once(world: World) -> None:
    world.attach(1, egress_rate=100)
    assert world.limits() == {("train-1", "egress", KeptBy.QUEUE.value): 1e8}
    assert not world.keeping.waiting()
    (made,) = world.book.preparations()
    world.maps.set(made.slot, departs=True)
    assert world.limits() == {("train-1", "egress", KeptBy.DEPARTURES.value): 1e8}
    assert list(world.keeping.waiting().values()) == [0.25]
    assert list(world.keeping.dropped().values()) == [3, 4]


def test_a_record_that_changes_while_it_is_looked_up_is_looked_up_again(world: World) -> None:
    world.attach(1, egress_rate=100)
    known = world.maps.detour

    def meanwhile(slot: Slot) -> int:
        world.maps.detour = known  # type: ignore[method-assign]
        world.attach(2, egress_rate=200)
        return 0

    world.maps.detour = meanwhile  # type: ignore[method-assign]
    assert len(world.limits()) == 1
    assert len(world.limits()) == 2
