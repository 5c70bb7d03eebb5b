"""A bill can be cut at a time: every byte is in one hour, the hours add up to the totals, and what makes an
answer less than certain is said with it."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpf.layout import Cell, TrafficKind
from driver.journal import accounts, buckets
from driver.journal.buckets import DAY, HOUR, ROLL_AFTER
from driver.journal.database import Schema
from driver.journal.ledger import Ledger, LedgerUnusable, UsageOwner
from driver.model import AttachmentId
from tests.unit import journal_values

NAMES = ("best-effort", "bulk")
NOON = float(int(time.time() // DAY) * DAY - 3 * DAY + 12 * HOUR)
"""Lately enough that hours are kept."""


def owner(number: int, *labels: tuple[str, str]) -> UsageOwner:
    return journal_values.owner(number, NOON, labels)


ONE = owner(1).attachment
TWO = owner(2).attachment


def cell(total: int, traffic_class: int = 0) -> Cell:
    return Cell(0, traffic_class, TrafficKind.TCP, total * 100, total)


def note(
    ledger: Ledger, wall: float, *cells: Cell, to: AttachmentId = ONE, names: tuple[str, ...] = NAMES
) -> None:
    assert ledger.checkpoint({to: cells}, source="tcx", class_names=names, wall=wall) == ()


def billed(ledger: Ledger, since: float | None = None, until: float | None = None) -> int:
    rows = ledger.bill(since, until).rows
    assert all(row.bytes == 100 * row.packets for row in rows)
    return sum(row.packets for row in rows)


@pytest.fixture
def ledger(tmp_path: Path):  # type: ignore[no-untyped-def]
    with Ledger.open(tmp_path / "state" / "ledger.sqlite") as made:
        made.begin(owner(1))
        yield made


def test_an_attachment_that_lives_on_is_billed_for_the_hours_asked_for(ledger: Ledger) -> None:
    note(ledger, NOON - 1, cell(10))
    note(ledger, NOON, cell(15))
    note(ledger, NOON + 3599, cell(40))
    note(ledger, NOON + 3600, cell(100))
    assert billed(ledger) == 100
    assert billed(ledger, NOON, NOON + HOUR) == 30
    assert billed(ledger, NOON - HOUR, NOON) == 10
    assert billed(ledger, NOON + HOUR) == 60


def test_a_range_is_widened_to_whole_hours_and_says_so(ledger: Ledger) -> None:
    note(ledger, NOON + 60, cell(10))
    bill = ledger.bill(NOON + 1800, NOON + 1801)
    assert (bill.period.start, bill.period.end) == (NOON, NOON + HOUR)
    assert sum(row.packets for row in bill.rows) == 10


def test_a_reading_written_twice_is_billed_once(ledger: Ledger) -> None:
    for _ in range(3):
        note(ledger, NOON, cell(7))
    ledger.fold(ONE, [cell(7)], source="tcx", class_names=NAMES, ended=NOON + 1)
    ledger.fold(ONE, [cell(7)], source="tcx", class_names=NAMES, ended=NOON + 9999)
    assert billed(ledger) == billed(ledger, NOON, NOON + HOUR) == 7


_STEPS = st.lists(
    st.tuples(
        st.integers(-7200, 7200),  # how the wall clock goes on, or is set
        st.integers(0, 50),  # what was counted meanwhile
        st.booleans(),  # the kernel's counters begin anew
        st.booleans(),  # the policy renames the class
        st.integers(0, 1),  # whose
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=60)
@given(_STEPS)
def test_hours_add_up_to_totals_whatever_clock_counters_and_policy_do(
    steps: list[tuple[int, int, bool, bool, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "l" / "ledger.sqlite") as ledger:
        ledger.begin(owner(1))
        ledger.begin(owner(2))
        wall, counters = NOON, {ONE: 0, TWO: 0}
        by_hour: Counter[int] = Counter()
        renamed = 0
        for forward, counted, anew, rename, whose in steps:
            wall += forward
            attachment_id = (ONE, TWO)[whose]
            renamed += rename
            before = counters[attachment_id]
            # A counter that began anew is noticed by being less than before.
            after = counted if anew and counted < before else before + counted
            by_hour[int(wall // HOUR)] += after if after < before else after - before
            counters[attachment_id] = after
            note(ledger, wall, cell(after), to=attachment_id, names=(f"class-{renamed}",))
        expected = +by_hour
        assert billed(ledger) == sum(row.packets for row in ledger.usage()) == expected.total()
        for hour, packets in expected.items():
            assert billed(ledger, hour * HOUR, hour * HOUR + 1) == packets
        ledger.roll_up(wall + 2 * ROLL_AFTER)
        assert billed(ledger) == expected.total()


def test_old_hours_become_days_and_keep_their_sum(ledger: Ledger) -> None:
    day = NOON - 12 * HOUR
    for hour in range(26):
        note(ledger, day + hour * HOUR, cell(hour + 1))
    ledger.roll_up(day + DAY + ROLL_AFTER)
    assert billed(ledger) == 26
    connection = sqlite3.connect(ledger._path)
    with contextlib.closing(connection):
        found = connection.execute("SELECT start, seconds, packets FROM buckets ORDER BY start").fetchall()
    assert found == [(day, DAY, 24), (day + DAY, HOUR, 1), (day + DAY + HOUR, HOUR, 1)]
    ledger.roll_up(day + DAY + ROLL_AFTER)
    assert billed(ledger) == 26


def test_what_was_read_late_is_told_where_it_blurs_an_end_of_the_range(ledger: Ledger) -> None:
    note(ledger, NOON - 600, cell(1))
    note(ledger, NOON + 600, cell(9))
    note(ledger, NOON + 660, cell(10))
    (late,) = ledger.bill(NOON).late
    assert (late.attachment, late.start, late.end) == (ONE, NOON - 600, NOON + 600)
    assert ledger.bill(NOON - 5 * HOUR).late == ()


def test_who_asks_for_a_pod_is_not_told_what_was_read_late_of_others(ledger: Ledger) -> None:
    ledger.begin(owner(2))
    for attachment in (ONE, TWO):
        note(ledger, NOON - 600, cell(1), to=attachment)
        note(ledger, NOON + 600, cell(9), to=attachment)
    pod = owner(2).pod
    assert {late.attachment for late in ledger.bill(NOON).late} == {ONE, TWO}
    (late,) = ledger.bill(NOON, namespace=pod.namespace, pod=pod.name).late
    assert late.attachment == TWO
    assert ledger.bill(NOON, namespace="another").late == ()


def test_a_ledger_of_the_release_before_is_taken_over_with_what_it_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state" / "ledger.sqlite"
    first = Schema(accounts.LEDGER.what, accounts.LEDGER.application_id, accounts.LEDGER.migrations[:1])
    with monkeypatch.context() as patch:
        patch.setattr("driver.journal.ledger.LEDGER", first)
        Ledger.open(path).close()
    connection = sqlite3.connect(path)
    with contextlib.closing(connection), connection:
        connection.execute(
            "INSERT INTO attachments VALUES (?, 'n', 'p', 'u', 'n', 'c', 'cu', 'd', 'net1', 's', ?, NULL)",
            (ONE, NOON),
        )
        connection.execute("INSERT INTO segments VALUES (?, 'tcx', 0, ?)", (ONE, NOON + 60))
        connection.execute("INSERT INTO usage VALUES (?, 'tcx', 0, 0, 0, 2, 'x', 4200, 42, 200, 2)", (ONE,))
    with pytest.raises(LedgerUnusable, match="start this release's agent"):
        Ledger.open_read_only(path)
    with Ledger.open(path) as ledger:
        assert billed(ledger) == billed(ledger, NOON, NOON + HOUR) == 40
        note(ledger, NOON + HOUR, cell(50), names=("x",))
        assert billed(ledger, NOON + HOUR) == 8


def test_pod_labels_are_kept_also_when_they_are_known_late(ledger: Ledger) -> None:
    note(ledger, NOON, cell(1))
    ledger.begin(owner(1, ("app", "train"), ("team", "a")))
    ledger.begin(owner(1, ("app", "changed")))
    (row,) = ledger.bill().rows
    assert row.owner.labels == (("app", "train"), ("team", "a"))


def test_restarts_and_clock_steps_of_the_range_are_told(ledger: Ledger) -> None:
    ledger.restarted(NOON)
    ledger.restarted(NOON + 2 * HOUR)
    ledger.clock_stepped(NOON, -90.0)
    bill = ledger.bill(NOON, NOON + HOUR)
    assert bill.restarts == (NOON,)
    assert [(step.at, step.seconds) for step in bill.clock_steps] == [(NOON, -90.0)]


def test_forgetting_takes_all_of_an_account_and_nothing_of_others(ledger: Ledger) -> None:
    ledger.begin(owner(2, ("app", "x")))
    note(ledger, NOON - 600, cell(5), to=TWO)
    note(ledger, NOON, cell(5), to=TWO)
    note(ledger, NOON, cell(3))
    ledger.fold(TWO, [cell(6)], source="tcx", class_names=NAMES, ended=NOON + 1)
    assert ledger.forget(NOON + 2) == 1
    assert billed(ledger) == 3
    connection = sqlite3.connect(ledger._path)
    with contextlib.closing(connection):
        for table in ("usage", "segments", "labels", "buckets", "late"):
            rows = connection.execute(f"SELECT COUNT(*) FROM {table} WHERE attachment = ?", (TWO,)).fetchone()
            assert rows == (0,), table


def test_days_are_the_unit_where_hours_are_gone() -> None:
    now = NOON + 2 * ROLL_AFTER
    period = buckets.widened(NOON + 1, NOON + 2, now)
    assert (period.start, period.end) == (NOON - 12 * HOUR, NOON + 12 * HOUR)
