"""What a device counts itself is billed once, to who had it alone, and never more than it counted."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpf.layout import Cell, TrafficKind
from driver.journal import accounts
from driver.journal.database import Schema
from driver.journal.ledger import Ledger
from driver.journal.stretches import Holder, MeterKey, Reading
from tests.unit.journal_values import owner

METER = MeterKey("mlx5_2", "rdma-hw", 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path) as made:
        for number in (1, 2):
            made.begin(owner(number))
        yield made


ONE, TWO = owner(1).attachment, owner(2).attachment


def shows(instance: str = "boot/7", **values: int) -> Reading:
    return Reading(instance, values)


def note(ledger: Ledger, reading: Reading, wall: float) -> None:
    for living in ledger.meters.living():
        ledger.meters.take(living.meter, living.holder, reading, wall)


def billed(ledger: Ledger) -> dict[tuple[str, str], int]:
    """By pod, or `the device`, and counter."""
    return {
        (row.owner.pod.name if row.owner else "the device", row.counter): row.total
        for row in ledger.counters()
        if row.total
    }


def told(ledger: Ledger) -> list[tuple[Holder, float | None, float]]:
    return [(gap.attachment, gap.start, gap.end) for gap in ledger.gaps()]


def test_what_was_counted_before_the_holder_came_is_not_its_own(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=1000), 1.0)
    note(ledger, shows(sent=1010), 2.0)
    ledger.meters.release(METER, shows(sent=1015), 3.0)
    ledger.meters.take(METER, TWO, shows(sent=1100), 4.0)
    ledger.meters.release(METER, shows(sent=1101), 5.0)
    assert billed(ledger) == {("train-1", "sent"): 15, ("train-2", "sent"): 1}
    (row, _) = ledger.counters()
    assert (row.meter, row.started, row.checked, row.owner) == (METER, 1.0, 3.0, owner(1))
    assert told(ledger) == []


def test_repeating_a_call_changes_nothing(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.meters.take(METER, ONE, shows(sent=5), 1.0)
    for _ in range(2):
        note(ledger, shows(sent=9), 2.0)
    for _ in range(2):
        ledger.meters.release(METER, shows(sent=11), 3.0)
    assert billed(ledger) == {("train-1", "sent"): 6}
    assert ledger.meters.living() == ()


def test_while_two_have_a_device_what_it_counts_is_the_device_s(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=0), 1.0)
    ledger.meters.take(METER, None, shows(sent=10), 2.0)
    ledger.meters.take(METER, TWO, shows(sent=30), 3.0)
    ledger.meters.release(METER, shows(sent=60), 4.0)
    assert billed(ledger) == {("train-1", "sent"): 10, ("the device", "sent"): 20, ("train-2", "sent"): 30}
    assert {row.owner for row in ledger.counters(pod="train-2")} == {owner(2)}
    assert [row.total for row in ledger.counters(since=3.5) if row.owner is None] == []


def test_a_counter_that_began_anew_is_a_new_stretch_and_a_gap(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=100, received=50), 1.0)
    note(ledger, shows(sent=130, received=60), 2.0)
    note(ledger, shows(sent=4, received=63), 3.0)
    ledger.meters.release(METER, shows(sent=9, received=70), 4.0)
    assert billed(ledger) == {("train-1", "sent"): 39, ("train-1", "received"): 20}
    (gap,) = ledger.gaps()
    assert (gap.attachment, gap.start, gap.end) == (ONE, 2.0, 3.0)
    assert (gap.subject, gap.source) == ("mlx5_2", "rdma-hw")
    assert "sent" in gap.reason
    assert "received" not in gap.reason


def wide_and(**narrow: int) -> Reading:
    return Reading("boot/7", {"bytes": 9000, **narrow}, dict.fromkeys(narrow, 4))


def test_a_counter_that_wraps_by_itself_is_counted_on(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, wide_and(requests=10), 1.0)
    note(ledger, wide_and(requests=3), 2.0)
    ledger.meters.release(METER, wide_and(requests=5), 3.0)
    assert billed(ledger) == {("train-1", "requests"): 11}
    (gap,) = ledger.gaps()
    assert "wrapped" in gap.reason


def test_counters_that_all_show_less_have_been_reset_and_did_not_wrap(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, Reading("boot/7", {"a": 10, "b": 12}, {"a": 4, "b": 4}), 1.0)
    ledger.meters.release(METER, Reading("boot/7", {"a": 1, "b": 0}, {"a": 4, "b": 4}), 2.0)
    assert billed(ledger) == {("train-1", "a"): 1}


def test_another_device_of_the_same_name_is_counted_from_its_first_reading(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=10), 1.0)
    note(ledger, shows("boot/8", sent=500), 2.0)
    ledger.meters.release(METER, shows("boot/8", sent=501), 3.0)
    assert billed(ledger) == {("train-1", "sent"): 1}
    assert told(ledger) == [(ONE, 1.0, 2.0)]


def test_a_reading_that_failed_costs_nothing_while_a_later_one_comes(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=10), 1.0)
    ledger.meters.take(METER, ONE, None, 2.0, reason="no answer")
    ledger.meters.release(METER, shows(sent=90), 3.0)
    assert billed(ledger) == {("train-1", "sent"): 80}
    assert told(ledger) == []


def test_a_device_that_was_gone_at_the_end_leaves_a_gap_since_it_was_last_read(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=10), 1.0)
    note(ledger, shows(sent=17), 60.0)
    ledger.meters.release(METER, None, 99.0, "the kernel destroyed it with its netns")
    assert billed(ledger) == {("train-1", "sent"): 7}
    (gap,) = ledger.gaps()
    assert (gap.attachment, gap.start, gap.end) == (ONE, 60.0, 99.0)
    assert gap.reason == "rdma-hw of mlx5_2: the kernel destroyed it with its netns"


def test_who_could_not_be_read_at_the_start_is_counted_from_the_first_reading(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, None, 1.0, reason="busy")
    note(ledger, shows(sent=1000), 5.0)
    ledger.meters.release(METER, shows(sent=1002), 6.0)
    ledger.meters.take(METER, TWO, None, 7.0)
    ledger.meters.release(METER, None, 8.0)
    assert billed(ledger) == {("train-1", "sent"): 2}
    assert told(ledger) == [(ONE, 1.0, 5.0), (TWO, 7.0, 8.0)]


def test_a_hand_over_that_could_not_be_read_is_billed_to_neither(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=10), 1.0)
    ledger.meters.take(METER, None, None, 2.0, reason="busy")
    note(ledger, shows(sent=100), 3.0)
    ledger.meters.release(METER, shows(sent=110), 4.0)
    assert billed(ledger) == {("the device", "sent"): 10}
    assert told(ledger) == [(ONE, 1.0, 2.0), (None, 2.0, 3.0)]
    assert ledger.gaps(pod="train-2") == ()


def test_a_late_start_is_told(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=10), 50.0, late=True)
    assert told(ledger) == [(ONE, owner(1).started, 50.0)]
    ledger.meters.take(METER, None, shows(sent=30), 60.0)
    ledger.meters.take(METER, TWO, shows(sent=40), 70.0, late=True)
    assert told(ledger)[1:] == [(TWO, 60.0, 70.0)]
    assert billed(ledger) == {("train-1", "sent"): 20, ("the device", "sent"): 10}


def test_a_counter_that_appears_or_goes_is_counted_while_it_was_seen(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=1, stuck=5), 1.0)
    note(ledger, shows(sent=2, optional=700), 2.0)
    ledger.meters.release(METER, shows(sent=3, optional=704), 3.0)
    assert billed(ledger) == {("train-1", "sent"): 2, ("train-1", "optional"): 4}
    (gap,) = ledger.gaps()
    assert "stuck" in gap.reason


def test_what_nobody_has_is_not_counted(ledger: Ledger) -> None:
    ledger.meters.release(METER, shows(sent=5), 2.0)
    assert ledger.counters() == ()


@pytest.mark.parametrize("value", [-1, 2**63])
def test_garbage_is_no_reading(value: int) -> None:
    with pytest.raises(ValueError, match="cannot have counted"):
        shows(sent=value)


def test_a_clock_that_stepped_back_makes_no_gap_that_ends_before_it_begins(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=10), 100.0)
    note(ledger, shows(sent=3), 50.0)
    ledger.meters.release(METER, None, 20.0)
    assert all(gap.start is not None and gap.start <= gap.end for gap in ledger.gaps())
    assert len(ledger.gaps()) == 2


def test_totals_are_told_while_it_counts_and_after_reopening(path: Path, ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=10), 1.0)
    note(ledger, shows(sent=15), 2.0)
    with Ledger.open(path) as again:
        assert again.meters.totals({ONE, None}) == {(ONE, METER): {"sent": 5}}
        assert [(each.meter, each.holder) for each in again.meters.living()] == [(METER, ONE)]
        again.meters.release(METER, shows(sent=20), 3.0)
    assert billed(ledger) == {("train-1", "sent"): 10}


def test_old_stretches_are_forgotten_with_their_accounts(ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=0), 1.0)
    ledger.meters.take(METER, None, shows(sent=1), 2.0)
    ledger.meters.take(METER, TWO, shows(sent=2), 30.0)
    note(ledger, shows(sent=9), 31.0)
    ledger.fold(ONE, (), source="tcx", class_names=(), ended=2.0)
    ledger.forget(20.0)
    assert billed(ledger) == {("the device", "sent"): 1, ("train-2", "sent"): 7}
    ledger.forget(40.0)
    assert billed(ledger) == {("train-2", "sent"): 7}


# --- the release before -------------------------------------------------------------------------------

FIRST = Schema(accounts.LEDGER.what, accounts.LEDGER.application_id, accounts.LEDGER.migrations[:1])


def test_a_ledger_of_the_release_before_is_taken_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("driver.journal.ledger.LEDGER", FIRST)
        Ledger.open(path).close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(
        "INSERT INTO gaps (attachment, started, ended, reason) VALUES (NULL, 1.0, 2.0, 'away')"
    )
    connection.close()
    with Ledger.open(path) as ledger:
        assert ledger.lost == ""
        ledger.begin(owner(1))
        ledger.meters.take(METER, ONE, shows(sent=1), 1.0)
        ledger.meters.release(METER, shows(sent=4), 2.0)
        assert billed(ledger) == {("train-1", "sent"): 3}
        assert [gap.reason for gap in ledger.gaps(pod="train-1")] == ["away"]


def test_the_release_before_can_open_the_file_and_write_what_it_knows(path: Path, ledger: Ledger) -> None:
    ledger.meters.take(METER, ONE, shows(sent=1), 1.0)
    ledger.close()
    connection = sqlite3.connect(path, isolation_level=None)
    assert connection.execute("PRAGMA user_version").fetchone() == (accounts.LEDGER.version,)
    assert connection.execute("SELECT value FROM meta WHERE name = 'readable_by'").fetchone() == ("1",)
    # As the release before wrote them.
    connection.execute("INSERT INTO gaps (attachment, started, ended, reason) VALUES (NULL, NULL, 2.0, 'x')")
    connection.execute("DELETE FROM attachments WHERE id = ?", (ONE,))
    connection.close()
    with Ledger.open(path) as again:
        again.meters.release(METER, shows(sent=4), 2.0)
        again.forget(0.0)
        assert again.counters() == ()


# --- against a model ----------------------------------------------------------------------------------

events = st.lists(
    st.tuples(
        st.sampled_from(["run", "run", "reset", "made anew", "one", "two", "both", "none", "note", "reopen"]),
        st.integers(0, 9),
        st.booleans(),
    ),
    max_size=30,
)
HOLDERS: dict[str, Holder] = {"one": ONE, "two": TWO, "both": None}


@settings(max_examples=80, deadline=None)
@given(events)
def test_never_more_is_billed_than_the_device_counted_and_to_nobody_what_others_did(
    script: list[tuple[str, int, bool]],
) -> None:
    """Readings fail, counters are reset, devices made anew, holders come and go, the agent restarts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state" / "ledger.sqlite"
        ledger = Ledger.open(path)
        for number in (1, 2):
            ledger.begin(owner(number))
        counter, instance, clean = 1000, 0, True
        holder: Holder | str = "nobody"
        counted: dict[Holder | str, int] = {}
        for wall, (what, amount, readable) in enumerate(script, start=1):
            reading = Reading(f"boot/{instance}", {"sent": counter}) if readable else None
            match what:
                case "run":
                    counter += amount
                    counted[holder] = counted.get(holder, 0) + amount
                case "reset":
                    counter, clean = 0, False
                case "made anew":
                    counter, instance, clean = amount, instance + 1, False
                case "note" if reading is not None:
                    note(ledger, reading, float(wall))
                case "none":
                    ledger.meters.release(METER, reading, float(wall))
                    holder, clean = "nobody", clean and readable
                case "one" | "two" | "both":
                    if holder != HOLDERS[what]:
                        ledger.meters.take(METER, HOLDERS[what], reading, float(wall))
                        holder, clean = HOLDERS[what], clean and readable
                case "reopen":
                    ledger.close()
                    ledger = Ledger.open(path)
        ledger.meters.release(METER, Reading(f"boot/{instance}", {"sent": counter}), 99.0)
        billed: dict[Holder | str, int] = {}
        for row in ledger.counters():
            billed[row.owner.attachment if row.owner else None] = row.total
        lost = bool(ledger.gaps())
        ledger.close()
        for whose, total in billed.items():
            assert 0 <= total <= counted.get(whose, 0), whose
        if clean:
            assert not lost
            assert {k: v for k, v in billed.items() if v} == {
                k: v for k, v in counted.items() if v and k != "nobody"
            }


def test_counters_of_bpf_and_of_devices_do_not_meet(ledger: Ledger) -> None:
    ledger.checkpoint({ONE: (Cell(0, 0, TrafficKind.ROCE, 9, 1),)}, source="tcx", class_names=(), wall=1.0)
    ledger.meters.take(METER, ONE, shows(sent=1), 1.0)
    ledger.meters.release(METER, shows(sent=3), 2.0)
    assert [row.bytes for row in ledger.usage()] == [9]
    assert [row.total for row in ledger.counters()] == [2]
