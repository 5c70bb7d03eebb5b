"""The book over a real journal: no record ever goes along an arrow that is not in the table, whatever is
asked in whatever order, with a disk that fills up and an agent that is killed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bpf.layout import Slot
from driver.errors import NotNow
from driver.journal import Journal, JournalWriteFailed
from driver.lifecycle.book import Book
from driver.lifecycle.states import ATTACHMENT, PREPARATION, ImpossibleTransition
from driver.model import (
    Attachment,
    AttachmentState,
    DeviceName,
    Preparation,
    PreparationKey,
    PreparationState,
)
from tests.unit.journal_values import BOOT, attachment, key, preparation

P, A = PreparationState, AttachmentState

PREPARATION_ARROWS = {
    (None, P.PREPARING),
    (P.PREPARING, P.PREPARED),
    (P.PREPARING, P.UNPREPARING),
    (P.PREPARING, None),
    (P.PREPARED, P.UNPREPARING),
    (P.UNPREPARING, None),
}
ATTACHMENT_ARROWS = {
    (None, A.ATTACHING),
    (A.ATTACHING, A.ATTACHED),
    (A.ATTACHING, A.DETACHING),
    (A.ATTACHING, None),
    (A.ATTACHED, A.DETACHING),
    (A.DETACHING, None),
}
SLOTS = 4


class Disk:
    """The journal as the book uses it, on a disk that can be full."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.journal, name)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with self.journal.transaction():
            yield
            if self.full:
                raise JournalWriteFailed("no space left: make room")


def opened(root: Path) -> Disk:
    return Disk(Journal.open(root / "journal.sqlite", mirror=root / "mirror", boot_id=BOOT))


def book_over(disk: Disk, slots: int = SLOTS) -> Book:
    return Book(disk, slots=slots)  # type: ignore[arg-type]


def fresh(number: int) -> Preparation:
    return preparation(number, state=P.PREPARING)


numbers = st.integers(0, 5)


class Records(RuleBasedStateMachine):
    """now is what the book must say; written is what the disk must say."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.disk = opened(self.root)
        self.book = book_over(self.disk)
        self.now: dict[object, object] = {}
        self.written: dict[object, object] = {}
        self.remembered: list[Preparation] = []

    def wrote(self) -> None:
        if not self.disk.full:
            self.written = dict(self.now)

    def have(self, number: int) -> Preparation | None:
        return self.book.preparation(key(number))

    @rule(chosen=st.lists(numbers, min_size=1, max_size=3, unique=True))
    def open_a_claim(self, chosen: list[int]) -> None:
        taken = sum(isinstance(each, Preparation) for each in self.now.values())
        try:
            made = self.book.open_preparations([fresh(number) for number in chosen])
        except ImpossibleTransition:
            assert any(key(number) in self.now for number in chosen)
            return
        except JournalWriteFailed:
            assert self.disk.full
            return
        except NotNow:
            assert taken + len(chosen) > SLOTS
            return
        assert not any(key(number) in self.now for number in chosen)
        self.now.update({each.key: each for each in made})
        self.remembered += made
        self.wrote()

    @rule(chosen=st.lists(numbers, max_size=3, unique=True), state=st.sampled_from(P), insist=st.booleans())
    def advance(self, chosen: list[int], state: P, insist: bool) -> None:
        olds = [self.have(number) for number in chosen]
        asked = [old or fresh(number) for number, old in zip(chosen, olds, strict=True)]
        legal = all(
            old is not None and (old.state is state or (old.state, state) in PREPARATION_ARROWS)
            for old in olds
        )
        creates = any(old is None for old in olds) and state is P.PREPARING
        if creates:
            return
        try:
            made = self.book.advance_preparations(asked, state, insist=insist)
        except ImpossibleTransition:
            assert not legal
            return
        except JournalWriteFailed:
            assert self.disk.full
            assert insist
            return
        assert legal
        assert [each.state for each in made] == [state] * len(chosen)
        self.now.update({each.key: each for each in made})
        self.wrote()

    @rule(index=st.integers(0, 50), state=st.sampled_from([None, *P]))
    def a_late_change_of_a_record_made_anew_changes_nothing(self, index: int, state: P | None) -> None:
        if not self.remembered:
            return
        late = self.remembered[index % len(self.remembered)]
        current = self.book.preparation(late.key)
        if current is not None and current.generation == late.generation:
            return
        if state is None:
            with contextlib.suppress(ImpossibleTransition):
                self.book.close_preparation(late)
        else:
            with contextlib.suppress(ImpossibleTransition):
                if not (current is None and state is P.PREPARING):
                    self.book.advance_preparations([late], state, insist=False)

    @rule(number=numbers)
    def close(self, number: int) -> None:
        old = self.have(number)
        try:
            self.book.close_preparation(old or fresh(number))
        except ImpossibleTransition:
            assert old is not None
            assert (old.state, None) not in PREPARATION_ARROWS
            return
        if old is not None:
            assert (old.state, None) in PREPARATION_ARROWS
            self.now.pop(old.key)
            self.now.pop(old.key.device, None)
        self.wrote()

    @rule(number=numbers)
    def open_attachment(self, number: int) -> None:
        value = attachment(number, state=A.ATTACHING)
        if value.id in self.now:
            return
        try:
            self.book.open_attachment(value)
        except JournalWriteFailed:
            assert self.disk.full
            return
        self.now[value.id] = value
        self.wrote()

    @rule(
        chosen=st.lists(numbers, min_size=1, max_size=3, unique=True),
        state=st.sampled_from(A),
        insist=st.booleans(),
    )
    def advance_attachments(self, chosen: list[int], state: A, insist: bool) -> None:
        olds = [self.book.attachment(attachment(number).id) for number in chosen]
        if any(old is None for old in olds) and state is A.ATTACHING:
            return
        legal = all(
            old is not None and (old.state is state or (old.state, state) in ATTACHMENT_ARROWS)
            for old in olds
        )
        asked = [old or attachment(number) for number, old in zip(chosen, olds, strict=True)]
        try:
            made = self.book.advance_attachments(asked, state, insist=insist)
        except ImpossibleTransition:
            assert not legal
            return
        except JournalWriteFailed:
            assert self.disk.full
            assert insist
            return
        assert legal
        self.now.update({each.id: each for each in made})
        self.wrote()

    @rule(number=numbers)
    def close_attachment(self, number: int) -> None:
        value = attachment(number)
        old = self.book.attachment(value.id)
        try:
            self.book.close_attachment(value)
        except ImpossibleTransition:
            assert old is not None
            assert (old.state, None) not in ATTACHMENT_ARROWS
            return
        self.now.pop(value.id, None)
        self.wrote()

    @rule(number=numbers, reason=st.sampled_from(["dirty", "late"]), held=st.booleans())
    def quarantine(self, number: int, reason: str, held: bool) -> None:
        device = key(number).device
        known = self.book.quarantines().get(device)
        news = self.book.quarantine(device, reason, 1.0, held=key(number) if held else None)
        allowed = not held or key(number) in self.now
        assert news == (allowed and (known is None or known.reason != reason))
        if news:
            self.now[device] = self.book.quarantines()[device]
            self.wrote()

    @rule(number=numbers)
    def release(self, number: int) -> None:
        self.book.release(key(number).device)
        if self.now.pop(key(number).device, None) is not None:
            self.wrote()

    @rule()
    def the_disk_fills_up(self) -> None:
        self.disk.full = True

    @rule()
    def there_is_room_again(self) -> None:
        self.disk.full = False
        self.book.catch_up()
        self.written = dict(self.now)

    @rule()
    def killed_and_started_again(self) -> None:
        self.disk.journal.close()
        self.disk = opened(self.root)
        self.book = book_over(self.disk)
        self.now = dict(self.written)

    @invariant()
    def the_book_says_what_was_done(self) -> None:
        self.compare(self.now, self.book.preparations(), self.book.attachments(), self.book.quarantines())
        slots = [each.slot for each in self.book.preparations()]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= {Slot(number) for number in range(SLOTS)}

    @invariant()
    def the_disk_says_so_too_or_is_known_to_be_behind(self) -> None:
        state = self.disk.journal.state()
        quarantines = {each.device: each for each in state.quarantines}
        self.compare(self.written, state.preparations, state.attachments, quarantines)
        if not self.book.behind:
            assert self.written == self.now

    def compare(
        self,
        wanted: dict[object, object],
        preparations: tuple[Preparation, ...],
        attachments: tuple[Attachment, ...],
        quarantines: dict[DeviceName, Any],
    ) -> None:
        found: dict[object, object] = {each.key: each for each in preparations}
        found.update({each.id: each for each in attachments})
        found.update(quarantines)
        assert found == wanted

    def teardown(self) -> None:
        self.disk.journal.close()
        shutil.rmtree(self.root)


TestRecords = Records.TestCase
TestRecords.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_tables_are_the_arrows_and_no_more() -> None:
    assert {(old, new) for old, news in PREPARATION.items() for new in news} == PREPARATION_ARROWS
    assert {(old, new) for old, news in ATTACHMENT.items() for new in news} == ATTACHMENT_ARROWS


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = opened(tmp_path)
    yield found
    found.journal.close()


def test_a_claim_of_several_devices_is_on_record_as_a_whole_or_not_at_all(disk: Disk, tmp_path: Path) -> None:
    book = book_over(disk)
    disk.full = True
    with pytest.raises(JournalWriteFailed):
        book.open_preparations([fresh(0), fresh(1)])
    assert book.preparations() == disk.journal.state().preparations == ()
    disk.full = False
    made = book.open_preparations([fresh(0), fresh(1)])
    disk.full = True
    with pytest.raises(JournalWriteFailed):
        book.advance_preparations(made, P.PREPARED)
    assert {each.state for each in book.preparations()} == {P.PREPARING}
    with pytest.raises(ImpossibleTransition):
        book.advance_preparations([made[0], replace(fresh(5), generation=99)], P.PREPARED)
    assert {each.state for each in disk.journal.state().preparations} == {P.PREPARING}


def test_more_devices_than_slots_are_refused_and_take_none(disk: Disk) -> None:
    book = book_over(disk, slots=2)
    with pytest.raises(NotNow, match="all 2 accounting slots"):
        book.open_preparations([fresh(0), fresh(1), fresh(2)])
    (one, two) = book.open_preparations([fresh(0), fresh(1)])
    assert {one.slot, two.slot} == {Slot(0), Slot(1)}
    (gone,) = book.advance_preparations([one], P.UNPREPARING)
    book.close_preparation(gone)
    (third,) = book.open_preparations([fresh(2)])
    assert third.slot == one.slot


def test_a_late_change_does_not_bring_a_closed_record_back(disk: Disk) -> None:
    book = book_over(disk)
    (made,) = book.open_preparations([fresh(0)])
    (leaving,) = book.advance_preparations([made], P.UNPREPARING)
    book.close_preparation(leaving)
    for late in (made, leaving):
        with pytest.raises(ImpossibleTransition):
            book.advance_preparations([late], P.UNPREPARING, insist=False)
    (anew,) = book.open_preparations([fresh(0)])
    with pytest.raises(ImpossibleTransition, match="made anew"):
        book.advance_preparations([made], P.PREPARED)
    with pytest.raises(ImpossibleTransition, match="made anew"):
        book.close_preparation(leaving)
    assert book.preparations() == (anew,)


def test_a_quarantine_for_a_record_that_is_closed_meanwhile_is_not_left_behind(disk: Disk) -> None:
    book = book_over(disk)
    (made,) = book.open_preparations([fresh(0)])
    device = made.key.device
    assert book.quarantine(device, "late", 1.0, held=made.key)
    book.close_preparation(made)
    assert book.quarantines() == {}
    assert not book.quarantine(device, "late", 1.0, held=made.key)
    assert book.quarantines() == {}
    assert disk.journal.state().quarantines == ()


def test_readers_do_not_wait_for_a_disk(disk: Disk) -> None:
    """The loop reads the book; a commit may take as long as a disk likes."""
    book = book_over(disk)
    (made,) = book.open_preparations([fresh(0)])
    writing, go_on = threading.Event(), threading.Event()

    def slow(key: PreparationKey) -> None:
        del key
        writing.set()
        assert go_on.wait(10)

    disk.drop_preparation = slow  # type: ignore[attr-defined]
    thread = threading.Thread(target=book.close_preparation, args=(made,))
    thread.start()
    try:
        assert writing.wait(10)
        assert book.preparations() == (made,)
        assert book.preparation(made.key) == made
        assert book.quarantines() == {}
    finally:
        go_on.set()
        thread.join(10)
    assert book.preparations() == ()


def test_generations_go_on_from_the_highest_on_record(disk: Disk, tmp_path: Path) -> None:
    book = book_over(disk)
    made = book.open_preparations([fresh(0), fresh(1)])
    highest = max(each.generation for each in made)
    assert book_over(disk).next_generation() == highest + 1
