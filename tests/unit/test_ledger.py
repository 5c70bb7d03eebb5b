"""Every byte is booked once, to its owner, whatever is repeated, restarted or lost in between."""

from __future__ import annotations

import resource
import sqlite3
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpf.layout import Cell, TrafficKind
from driver.errors import NotNow, Refusal
from driver.journal import accounts
from driver.journal.database import Schema
from driver.journal.ledger import (
    Ledger,
    LedgerReader,
    LedgerUnusable,
    LedgerWriteFailed,
    UsageGap,
    UsageOwner,
)
from driver.model import AttachmentId, PodRef, PodUid
from hw.model import Direction
from tests.unit.journal_values import owner

NAMES = ("best-effort", "bulk")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path) as made:
        yield made


ONE = owner(1).attachment
TWO = owner(2).attachment


def cell(total: int, traffic_class: int = 0, direction: int = 0, kind: TrafficKind = TrafficKind.TCP) -> Cell:
    return Cell(direction, traffic_class, kind, total * 100, total)


def note(ledger: Ledger, wall: float, *cells: Cell, to: AttachmentId = ONE, source: str = "tcx") -> None:
    assert ledger.checkpoint({to: cells}, source=source, class_names=NAMES, wall=wall) == ()


def fold(ledger: Ledger, ended: float, *cells: Cell, names: Sequence[str] = NAMES) -> None:
    ledger.fold(ONE, cells, source="tcx", class_names=names, ended=ended)


def totals(ledger: Ledger | LedgerReader, pod: str = "train-1") -> dict[tuple[str, str, str, str], int]:
    return {
        (row.source, row.direction.name, row.class_name, row.kind.name): row.packets
        for row in ledger.usage(pod=pod)
    }


# --- totals -------------------------------------------------------------------------------------------


def test_usage_names_owner_class_kind_direction_and_source(ledger: Ledger) -> None:
    ledger.begin(owner(1, started=5.0))
    fold(ledger, 9.0, cell(7, traffic_class=1, direction=1, kind=TrafficKind.ROCE))
    (row,) = ledger.usage()
    assert row.owner == owner(1, started=5.0)
    assert (row.ended, row.source, row.direction, row.kind) == (
        9.0,
        "tcx",
        Direction.INGRESS,
        TrafficKind.ROCE,
    )
    assert (row.class_index, row.class_name, row.bytes, row.packets) == (1, "bulk", 700, 7)


def test_writing_the_same_totals_again_adds_nothing(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    for wall in (1.0, 2.0, 3.0):
        note(ledger, wall, cell(5))
    assert totals(ledger) == {("tcx", "EGRESS", "best-effort", "TCP"): 5}
    assert ledger.gaps() == ()


def test_sources_are_kept_apart(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    note(ledger, 1.0, cell(5), source="tcx")
    note(ledger, 1.0, cell(9, kind=TrafficKind.OTHER), source="interface")
    assert totals(ledger) == {
        ("tcx", "EGRESS", "best-effort", "TCP"): 5,
        ("interface", "EGRESS", "best-effort", "OTHER"): 9,
    }


def test_counters_that_began_anew_are_added_and_leave_a_gap(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    note(ledger, 1.0, cell(50), cell(3, traffic_class=1))
    note(ledger, 2.0, cell(4), cell(3, traffic_class=1))
    note(ledger, 3.0, cell(6), cell(3, traffic_class=1))
    assert totals(ledger) == {
        ("tcx", "EGRESS", "best-effort", "TCP"): 56,
        ("tcx", "EGRESS", "bulk", "TCP"): 6,
    }
    (gap,) = ledger.gaps()
    assert (gap.attachment, gap.start, gap.end) == (ONE, 1.0, 2.0)
    assert "tcx" in gap.reason


def test_a_machine_that_restarted_leaves_a_gap_in_each_open_account_and_one_for_what_none_knows(
    ledger: Ledger,
) -> None:
    ledger.restarted(0.5)
    for number in (1, 2, 3):
        ledger.begin(owner(number))
    note(ledger, 60.0, cell(100))
    fold(ledger, 70.0, cell(100))
    note(ledger, 80.0, cell(40), to=TWO)
    note(ledger, 81.0, cell(50), to=TWO, source="vf")
    ledger.machine_restarted(200.0)
    assert [(gap.attachment, gap.start, gap.end) for gap in ledger.gaps()] == [
        (None, 81.0, 200.0),
        (TWO, 81.0, 200.0),
        (owner(3).attachment, owner(3).started, 200.0),
    ]
    assert all("the machine restarted" in gap.reason for gap in ledger.gaps())


def test_counters_of_before_a_restart_and_after_it_are_added_with_no_second_gap(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    note(ledger, 60.0, cell(100))
    ledger.machine_restarted(90.0)
    before = ledger.gaps()
    note(ledger, 120.0, cell(30))
    fold(ledger, 180.0, cell(35))
    assert totals(ledger) == {("tcx", "EGRESS", "best-effort", "TCP"): 135}
    assert ledger.gaps() == before


def test_a_cell_that_vanished_was_zeroed(ledger: Ledger) -> None:
    """Readings hold only cells that are not zero: after a reboot there is none."""
    ledger.begin(owner(1))
    note(ledger, 60.0, cell(50))
    fold(ledger, 99.0)
    assert totals(ledger) == {("tcx", "EGRESS", "best-effort", "TCP"): 50}
    assert [(gap.start, gap.end) for gap in ledger.gaps()] == [(60.0, 99.0)]


def test_a_renamed_class_keeps_what_it_had_under_its_old_name(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    note(ledger, 1.0, cell(10), cell(4, traffic_class=1))
    fold(ledger, 9.0, cell(15), cell(4, traffic_class=1), names=("gold", "bulk"))
    assert {(r.class_index, r.class_name): (r.bytes, r.packets) for r in ledger.usage()} == {
        (0, "best-effort"): (1000, 10),
        (0, "gold"): (500, 5),
        (1, "bulk"): (400, 4),
    }
    assert ledger.gaps() == ()


def test_a_class_without_a_name_is_its_number(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    note(ledger, 1.0, cell(1, traffic_class=5))
    assert totals(ledger) == {("tcx", "EGRESS", "5", "TCP"): 1}


# --- closing ------------------------------------------------------------------------------------------


def test_a_repeated_fold_changes_nothing_also_when_the_slot_was_zeroed(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    fold(ledger, 9.0, cell(5))
    before = ledger.usage()
    fold(ledger, 10.0, cell(5))
    fold(ledger, 11.0)
    fold(ledger, 12.0, cell(3))
    assert ledger.usage() == before
    assert ledger.gaps() == ()


def test_a_closed_account_takes_no_more_traffic(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    fold(ledger, 9.0, cell(5))
    before = ledger.usage()
    with pytest.raises(Refusal, match="is closed") as caught:
        fold(ledger, 10.0, cell(6))
    assert caught.value.reason == "AccountClosed"
    with pytest.raises(Refusal):
        fold(ledger, 10.0, cell(5), cell(1, traffic_class=1))
    late = ledger.checkpoint({ONE: (cell(6),)}, source="tcx", class_names=NAMES, wall=10.0)
    assert late == (ONE,)
    assert ledger.usage() == before


def test_a_fold_without_an_account_is_refused(ledger: Ledger) -> None:
    with pytest.raises(Refusal, match="no account of attachment-1"):
        fold(ledger, 1.0, cell(1))


def test_beginning_again_keeps_start_end_and_totals(ledger: Ledger) -> None:
    ledger.begin(owner(1, started=1.0))
    fold(ledger, 9.0, cell(5))
    ledger.begin(owner(1, started=20.0))
    (row,) = ledger.usage()
    assert (row.owner.started, row.ended, row.packets) == (1.0, 9.0, 5)


# --- many at once -------------------------------------------------------------------------------------


def test_one_bad_reading_does_not_cost_the_others(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    ledger.begin(owner(2))
    stranger = AttachmentId("stranger")
    skipped = ledger.checkpoint(
        {ONE: (cell(1, traffic_class=8),), stranger: (cell(1),), TWO: (cell(2),)},
        source="tcx",
        class_names=NAMES,
        wall=1.0,
    )
    assert set(skipped) == {ONE, stranger}
    assert [row.owner.attachment for row in ledger.usage()] == [TWO]


@pytest.mark.parametrize(
    "cells",
    [
        (Cell(2, 0, TrafficKind.IP, 1, 1),),
        (Cell(0, -1, TrafficKind.IP, 1, 1),),
        (Cell(0, 0, TrafficKind.IP, 2**63, 1),),
        (Cell(0, 0, TrafficKind.IP, 1, -1),),
        (cell(1), cell(2)),
    ],
)
def test_counters_that_make_no_sense_are_refused(ledger: Ledger, cells: tuple[Cell, ...]) -> None:
    ledger.begin(owner(1))
    with pytest.raises(Refusal, match="not a counter that can be booked"):
        fold(ledger, 1.0, *cells)
    assert ledger.accounts()[0].ended is None


def test_the_largest_total_is_booked(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    fold(ledger, 1.0, Cell(0, 0, TrafficKind.IP, 2**63 - 1, 2**63 - 1))
    assert ledger.usage()[0].bytes == 2**63 - 1


# --- selecting, forgetting ----------------------------------------------------------------------------


def test_usage_is_selected_by_time_namespace_and_pod(ledger: Ledger) -> None:
    for number in (1, 2, 3):
        ledger.begin(owner(number, started=10.0 * number))
        note(ledger, 1.0, cell(number), to=owner(number).attachment)
    fold(ledger, 15.0, cell(1))

    def found(**chosen: object) -> list[int]:
        return [row.packets for row in ledger.usage(**chosen)]  # type: ignore[arg-type]

    assert found() == [1, 2, 3]
    assert found(until=20.0) == [1]
    assert found(since=15.5) == [2, 3]
    assert found(since=15.0, until=20.5) == [1, 2]
    assert found(pod="train-2") == [2]
    assert found(namespace="ml") == [1, 2, 3]
    assert found(namespace="other") == []


def test_accounts_without_traffic_are_told_too(ledger: Ledger) -> None:
    ledger.begin(owner(1, started=1.0))
    fold(ledger, 2.0)
    assert ledger.usage() == ()
    (account,) = ledger.accounts(pod="train-1")
    assert (account.owner, account.ended) == (owner(1, started=1.0), 2.0)


def test_a_gap_is_told_once_and_with_its_attachment(ledger: Ledger) -> None:
    ledger.begin(owner(1))
    for _ in range(2):
        ledger.gap(ONE, 1.0, 2.0, "the agent was away")
    assert ledger.gaps(pod="train-1") == (
        UsageGap(attachment=ONE, start=1.0, end=2.0, reason="the agent was away"),
    )
    assert ledger.gaps(pod="train-2") == ()


def test_only_closed_accounts_are_forgotten_and_wholly(ledger: Ledger) -> None:
    for number in (1, 2):
        ledger.begin(owner(number))
        note(ledger, 1.0, cell(9), to=owner(number).attachment)
    ledger.gap(ONE, 1.0, 2.0, "away")
    fold(ledger, 50.0, cell(9))
    assert ledger.forget(50.0) == 0
    assert ledger.forget(51.0) == 1
    assert [row.owner.attachment for row in ledger.usage()] == [TWO]
    assert ledger.gaps() == ()


# --- against a model ----------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(st.sampled_from(["checkpoint", "reset", "reopen"]), st.integers(0, 5), st.integers(0, 5)),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_the_sum_is_what_was_last_seen_of_every_stretch(script: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state" / "ledger.sqlite"
        ledger = Ledger.open(path)
        ledger.begin(owner(1))
        counter = [0, 0]
        noted, earlier = [0, 0], [0, 0]
        for wall, (what, one, two) in enumerate(script):
            if what == "reopen":
                ledger.close()
                ledger = Ledger.open(path)
                continue
            if what == "reset":
                counter = [0, 0]
            counter = [counter[0] + one, counter[1] + two]
            if any(now < before for now, before in zip(counter, noted, strict=True)):
                earlier = [total + before for total, before in zip(earlier, noted, strict=True)]
            noted = list(counter)
            cells = [cell(total, traffic_class=index) for index, total in enumerate(counter) if total]
            note(ledger, float(wall), *cells)
        summed = [0, 0]
        for row in ledger.usage():
            summed[row.class_index] += row.packets
        ledger.close()
        assert summed == [before + now for before, now in zip(earlier, noted, strict=True)]


# --- files --------------------------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_refuses_each_writer_and_the_same_write_works_later(ledger: Ledger, path: Path) -> None:
    ledger.begin(owner(1))
    note(ledger, 1.0, cell(5))
    before = ledger.usage(), ledger.accounts()
    size = path.with_name(path.name + "-wal").stat().st_size
    writers = [
        lambda: ledger.begin(owner(2)),
        lambda: note(ledger, 2.0, cell(6)),
        lambda: fold(ledger, 3.0, cell(7)),
        lambda: ledger.gap(ONE, 1.0, 2.0, "away"),
        lambda: ledger.machine_restarted(2.5),
        lambda: ledger.forget(-1.0),
    ]
    for write in writers[:-1]:
        with no_file_larger_than(size), pytest.raises(LedgerWriteFailed) as caught:
            write()
        assert isinstance(caught.value, NotNow)
        assert str(path) in str(caught.value)
        assert (ledger.usage(), ledger.accounts()) == before
    for write in writers:
        write()
    assert totals(ledger) == {("tcx", "EGRESS", "best-effort", "TCP"): 7}


def test_files_are_for_root_only(ledger: Ledger, path: Path) -> None:
    ledger.begin(owner(1))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_what_was_written_is_there_after_reopening(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.begin(owner(1))
        fold(ledger, 2.0, cell(5))
        before = ledger.usage()
    with Ledger.open(path) as ledger:
        assert ledger.usage() == before
        assert ledger.lost == ""


def test_a_reader_follows_the_writer(ledger: Ledger, path: Path) -> None:
    with Ledger.open_read_only(path) as reader:
        assert reader.usage() == ()
        ledger.begin(owner(1))
        note(ledger, 1.0, cell(5))
        assert reader.usage() == ledger.usage() != ()


@pytest.mark.parametrize("content", [b"", b"rubbish" * 1000])
def test_a_damaged_ledger_is_kept_aside_and_the_new_one_says_so(path: Path, content: bytes) -> None:
    Ledger.open(path).close()
    path.write_bytes(content)
    with Ledger.open(path, wall=lambda: 100.0) as ledger:
        assert str(path) in ledger.lost
        (gap,) = ledger.gaps()
        assert (gap.attachment, gap.start, gap.end, gap.reason) == (None, None, 100.0, ledger.lost)
        ledger.begin(owner(1))
    assert path.with_name("ledger.sqlite.bad-100").read_bytes() == content
    with Ledger.open(path) as ledger:
        assert ledger.lost == ""
        assert len(ledger.accounts()) == 1


def spoil_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    connection = sqlite3.connect(path)
    (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'usage'").fetchone()
    connection.close()
    start = (page - 1) * 4096
    data[start : start + 4096] = b"\xa5" * 4096
    path.write_bytes(data)


def test_damage_met_while_writing_is_searched_for_at_the_next_start(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.begin(owner(1))
        note(ledger, 1.0, cell(5))
    spoil_a_page(path)
    with Ledger.open(path) as ledger:
        assert ledger.lost == ""
        with pytest.raises(LedgerWriteFailed, match="restart the agent"):
            note(ledger, 2.0, cell(6))
        with pytest.raises(LedgerUnusable, match="cannot be read"):
            ledger.usage()
    with Ledger.open(path) as ledger:
        assert "corrupt" in ledger.lost
        ledger.begin(owner(1))
        note(ledger, 3.0, cell(7))
    with Ledger.open(path) as ledger:
        assert ledger.lost == ""


def test_a_ledger_of_a_release_too_far_ahead_is_left_alone(path: Path) -> None:
    Ledger.open(path).close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA user_version = 99")
    connection.execute("UPDATE meta SET value = '99' WHERE name = 'readable_by'")
    connection.close()
    with pytest.raises(LedgerUnusable, match="run the release that wrote it"):
        Ledger.open(path)
    with pytest.raises(LedgerUnusable, match="run the release that wrote it"):
        Ledger.open_read_only(path)
    assert not list(path.parent.glob("*.bad-*"))


def test_a_journal_is_not_taken_for_a_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger.open(path).close()
    other = Schema("other", 7, accounts.LEDGER.migrations)
    monkeypatch.setattr("driver.journal.ledger.LEDGER", other)
    with Ledger.open(path) as ledger:
        assert "is not a other" in ledger.lost


def test_a_reader_of_nothing_or_rubbish_says_so(path: Path) -> None:
    with pytest.raises(LedgerUnusable, match="no agent has run here yet"):
        Ledger.open_read_only(path)
    path.parent.mkdir()
    path.write_bytes(b"rubbish" * 1000)
    with pytest.raises(LedgerUnusable, match="not a database"):
        Ledger.open_read_only(path)


def test_names_of_any_shape_are_kept(ledger: Ledger) -> None:
    odd = UsageOwner(
        attachment=ONE,
        pod=PodRef("n'; DROP TABLE usage; --", 'p"\u202e', PodUid("u")),
        claim=owner(1).claim,
        device=owner(1).device,
        interface=owner(1).interface,
        sandbox=owner(1).sandbox,
        started=0.0,
    )
    ledger.begin(odd)
    fold(ledger, 1.0, cell(1))
    assert ledger.usage(namespace="n'; DROP TABLE usage; --")[0].owner == odd
