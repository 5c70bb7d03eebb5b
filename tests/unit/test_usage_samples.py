"""What a scrape shows of a slot is what is in it now, under the names of who has it now."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bpf.layout import Cell, Hook, Slot, TrafficKind
from driver.lifecycle.usage import Usage
from driver.model import Attachment, AttachmentState, Preparation
from driver.policy.usage import DEFAULT_USAGE
from tests.unit.journal_values import attachment, preparation


class World:
    def __init__(self) -> None:
        self.held: Attachment = attachment(1)
        self.known: Preparation = preparation(1)
        self.cells: dict[Slot, tuple[Cell, ...]] = {
            Slot(1): (Cell(0, 0, TrafficKind.TCP, 100, 1), Cell(1, 7, TrafficKind.OTHER, 40, 2))
        }
        book: Any = SimpleNamespace(
            attachments=lambda: (self.held,),
            attachment=lambda id: self.held if id == self.held.id else None,
            preparation=lambda key: self.known if key == self.known.key else None,
        )
        accounting: Any = SimpleNamespace(
            read_slots=lambda slots: {slot: self.cells[slot] for slot in slots if slot in self.cells}
        )
        ledger: Any = SimpleNamespace(checkpoint=lambda *args, **more: ())
        clock: Any = SimpleNamespace(monotonic=lambda: 0.0, wall=lambda: 0.0)
        self.usage = Usage(
            book=book,
            ledger=ledger,
            accounting=accounting,
            clock=clock,
            hook=Hook.TCX,
            class_names=("bulk",),
            policy=lambda: DEFAULT_USAGE,
            labels_of=lambda uid: {},
        )


@pytest.fixture
def world() -> World:
    return World()


def test_each_cell_is_a_sample_in_words(world: World) -> None:
    owner = ("ml", "train-1", "nic-1", "dev-1", "net0")
    assert world.usage.samples() == (
        (*owner, "egress", "bulk", "tcp", "tcx", 100, 1),
        (*owner, "ingress", "7", "other", "tcx", 40, 2),
    )


def test_what_was_counted_since_is_shown_and_what_was_not_is_the_same(world: World) -> None:
    first = world.usage.samples()
    again = world.usage.samples()
    assert all(one is other for one, other in zip(first, again, strict=True))
    world.cells[Slot(1)] = (Cell(0, 0, TrafficKind.TCP, 150, 2),)
    assert [(each.bytes, each.packets) for each in world.usage.samples()] == [(150, 2)]
    world.cells[Slot(1)] = ()
    assert world.usage.samples() == ()


def test_other_names_are_shown_at_once(world: World) -> None:
    world.usage.samples()
    world.known = replace(world.known, claim=replace(world.known.claim, name="other"))
    assert {each.claim for each in world.usage.samples()} == {"other"}
    world.usage.set_class_names(("first",))
    assert [each.traffic_class for each in world.usage.samples()] == ["first", "7"]
    world.held = replace(world.held, pod=replace(world.held.pod, name="eval"))
    assert {each.pod for each in world.usage.samples()} == {"eval"}


def test_nothing_is_kept_of_who_is_gone(world: World) -> None:
    world.usage.samples()
    world.held = replace(world.held, state=AttachmentState.ATTACHING)
    assert world.usage.samples() == ()
    assert not world.usage._shown
