"""The journal takes a change as a whole and for good, or not at all."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from driver.errors import NotNow, OutOfTime
from driver.journal import (
    Journal,
    JournalState,
    JournalUnusable,
    JournalWriteFailed,
    Quarantine,
    StepPhase,
    database,
    opening,
)
from driver.journal.schema import JOURNAL
from driver.model import AttachmentId, DeviceName, attachment_owner, preparation_owner
from tests.unit.journal_values import BOOT, OTHER_BOOT, attachment, key, preparation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return tmp_path / "run" / "mirror"


@pytest.fixture
def journal(path: Path, mirror: Path) -> Iterator[Journal]:
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as made:
        yield made


def same(one: JournalState, two: JournalState) -> bool:
    """Equal but for the order of the records."""
    return (
        set(one.attachments) == set(two.attachments)
        and {p.key: p for p in one.preparations} == {p.key: p for p in two.preparations}
        and set(one.quarantines) == set(two.quarantines)
        and (one.boot_changed, one.recovery) == (two.boot_changed, two.recovery)
    )


def mirrored(mirror: Path) -> int:
    return len([name for name in os.listdir(mirror) if name != "witness.json"])


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As a full disk: the kernel refuses to let a file grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- the plain ways -----------------------------------------------------------------------------------


def test_a_first_start_has_an_empty_journal_that_is_trusted(journal: Journal) -> None:
    assert journal.state() == JournalState()


def test_what_was_written_is_there_after_reopening(path: Path, mirror: Path) -> None:
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        journal.put_preparation(preparation(1), durable=True)
        journal.put_preparation(preparation(1, share="s1"))
        journal.put_attachment(attachment(1))
        journal.put_quarantine(Quarantine(DeviceName("dev-9"), "still up", 12.5))
        before = journal.state()
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        assert same(journal.state(), before)
        assert len(journal.state().preparations) == 2
        journal.drop_preparation(key(1))
        journal.drop_attachment(AttachmentId("attachment-1"))
        journal.drop_quarantine(DeviceName("dev-9"))
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        assert journal.state() == JournalState(preparations=(preparation(1, share="s1"),))


def test_dropping_what_is_not_there_changes_nothing(journal: Journal) -> None:
    journal.drop_preparation(key(1))
    journal.drop_attachment(AttachmentId("none"))
    journal.drop_quarantine(DeviceName("none"))
    assert journal.state() == JournalState()


def test_files_are_for_root_only(journal: Journal, path: Path, mirror: Path) -> None:
    journal.put_attachment(attachment(1))
    for folder in (path.parent, mirror):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for file in folder.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_file_put_back_with_loose_rights_is_closed_again(path: Path, mirror: Path) -> None:
    Journal.open(path, mirror=mirror, boot_id=BOOT).close()
    path.chmod(0o644)
    with Journal.open(path, mirror=mirror, boot_id=BOOT):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_that_others_may_write_to_is_refused(path: Path, mirror: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(JournalUnusable, match="chmod it to 0700"):
        Journal.open(path, mirror=mirror, boot_id=BOOT)


def test_a_changed_boot_is_told_until_it_was_dealt_with(path: Path, mirror: Path) -> None:
    Journal.open(path, mirror=mirror, boot_id=BOOT).close()
    for _ in range(2):
        with Journal.open(path, mirror=mirror, boot_id=OTHER_BOOT) as journal:
            assert journal.state().boot_changed
    with Journal.open(path, mirror=mirror, boot_id=OTHER_BOOT) as journal:
        journal.boot_done()
        assert not journal.state().boot_changed
    with Journal.open(path, mirror=mirror, boot_id=OTHER_BOOT) as journal:
        assert not journal.state().boot_changed


def test_a_closed_journal_refuses_changes(path: Path, mirror: Path) -> None:
    journal = Journal.open(path, mirror=mirror, boot_id=BOOT)
    journal.close()
    with pytest.raises(JournalWriteFailed, match="closed"):
        journal.put_attachment(attachment(1))


def put_and_fail(journal: Journal, number: int) -> None:
    with journal.transaction():
        journal.put_attachment(attachment(number))
        raise ZeroDivisionError


# --- transactions -------------------------------------------------------------------------------------


def test_a_transaction_is_seen_as_a_whole_at_its_end(journal: Journal) -> None:
    with journal.transaction():
        journal.put_attachment(attachment(1))
        journal.put_attachment(attachment(2))
        assert journal.state().attachments == ()
    assert set(journal.state().attachments) == {attachment(1), attachment(2)}


def test_a_transaction_that_fails_leaves_nothing(journal: Journal, path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        put_and_fail(journal, 1)
    journal.put_attachment(attachment(2))
    assert journal.state().attachments == (attachment(2),)
    with Journal.open_read_only(path) as reader:
        assert reader.state().attachments == (attachment(2),)


def test_a_nested_transaction_joins_and_a_failed_one_takes_back_only_its_own(journal: Journal) -> None:
    with journal.transaction():
        journal.put_attachment(attachment(1))
        with pytest.raises(ZeroDivisionError):
            put_and_fail(journal, 2)
        with journal.transaction():
            journal.put_attachment(attachment(3))
        assert journal.state().attachments == ()
    assert set(journal.state().attachments) == {attachment(1), attachment(3)}


def test_the_last_change_of_a_record_in_a_transaction_wins(journal: Journal, mirror: Path) -> None:
    with journal.transaction():
        journal.put_attachment(attachment(1))
        journal.drop_attachment(attachment(1).id)
        journal.drop_attachment(attachment(2).id)
        journal.put_attachment(attachment(2))
    assert journal.state().attachments == (attachment(2),)
    assert mirrored(mirror) == 1


def test_an_overtaken_step_takes_its_whole_transaction_back(journal: Journal) -> None:
    owner = attachment_owner(attachment(1).id)
    journal.step(owner, 2, "move", StepPhase.INTENT)

    def attach_late() -> None:
        with journal.transaction():
            journal.put_attachment(attachment(1))
            journal.step(owner, 1, "move", StepPhase.DONE)

    with pytest.raises(OutOfTime):
        attach_late()
    assert journal.state().attachments == ()


def test_threads_do_not_mix_their_transactions(journal: Journal, path: Path) -> None:
    def work(base: int) -> None:
        for number in range(20):
            with journal.transaction():
                journal.put_attachment(attachment(base + number))
                journal.put_preparation(preparation(base + number))

    threads = [threading.Thread(target=work, args=(100 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(journal.state().attachments) == len(journal.state().preparations) == 80
    with Journal.open_read_only(path) as reader:
        assert same(reader.state(), journal.state())


def test_only_durable_commits_wait_for_the_disk(journal: Journal) -> None:
    spoken: list[str] = []
    journal._connection.set_trace_callback(spoken.append)

    def flushed(write: Callable[[], None]) -> bool:
        spoken.clear()
        write()
        begun = spoken.index("BEGIN IMMEDIATE")
        assert spoken[begun:].count("COMMIT") == 1
        return (
            "PRAGMA synchronous = FULL" in spoken[:begun] and "PRAGMA synchronous = NORMAL" in spoken[begun:]
        )

    def grouped() -> None:
        with journal.transaction():
            journal.put_attachment(attachment(1))
            journal.put_preparation(preparation(1), durable=True)

    def grouped_durably() -> None:
        with journal.transaction(durable=True):
            journal.put_attachment(attachment(1))

    assert not flushed(lambda: journal.put_preparation(preparation(1)))
    assert flushed(lambda: journal.put_preparation(preparation(1), durable=True))
    assert not flushed(lambda: journal.put_attachment(attachment(1)))
    assert flushed(grouped)
    assert flushed(grouped_durably)
    assert flushed(journal.recovery_done)


# --- steps --------------------------------------------------------------------------------------------


def test_steps_are_told_in_the_order_they_were_begun(journal: Journal) -> None:
    for step in ("rename", "move", "address"):
        journal.step("owner", 1, step, StepPhase.INTENT)
    journal.step("owner", 1, "rename", StepPhase.DONE)
    assert [(s.step, s.phase) for s in journal.steps("owner")] == [
        ("rename", StepPhase.DONE),
        ("move", StepPhase.INTENT),
        ("address", StepPhase.INTENT),
    ]
    assert journal.steps("stranger") == ()


def test_a_newer_generation_drops_the_older_steps_and_an_older_one_is_overtaken(journal: Journal) -> None:
    journal.step("owner", 1, "move", StepPhase.DONE)
    journal.step("owner", 2, "strip", StepPhase.INTENT)
    assert [(s.generation, s.step) for s in journal.steps("owner")] == [(2, "strip")]
    with pytest.raises(OutOfTime, match="overtaken by generation 2"):
        journal.step("owner", 1, "address", StepPhase.INTENT)
    assert len(journal.steps("owner")) == 1


def test_steps_go_with_their_record_and_no_other(path: Path, mirror: Path) -> None:
    owners = [
        preparation_owner(key(1)),
        preparation_owner(key(1, "s1")),
        attachment_owner(attachment(1).id),
        attachment_owner(attachment(2).id),
    ]
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        for owner in owners:
            journal.step(owner, 1, "move", StepPhase.INTENT)
        journal.drop_preparation(key(1))
        journal.drop_attachment(attachment(2).id)
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        assert [len(journal.steps(owner)) for owner in owners] == [0, 1, 1, 0]


def test_a_step_that_makes_no_sense_is_a_sentence(journal: Journal, path: Path) -> None:
    journal.step("owner", 1, "move", StepPhase.INTENT)
    journal._connection.execute("UPDATE steps SET phase = 'half'")
    with pytest.raises(JournalUnusable, match="step of owner"):
        journal.steps("owner")
    with Journal.open_read_only(path) as reader, pytest.raises(JournalUnusable, match="step of owner"):
        reader.steps("owner")


# --- disks that do not take it ------------------------------------------------------------------------


def test_a_full_disk_refuses_each_writer_and_later_writes_work_again(
    journal: Journal, path: Path, mirror: Path
) -> None:
    journal.put_attachment(attachment(1))
    journal.step("owner", 1, "move", StepPhase.INTENT)
    before = journal.state()
    wal = path.with_name(path.name + "-wal")
    writers = [
        lambda: journal.put_attachment(attachment(2)),
        lambda: journal.put_preparation(preparation(2), durable=True),
        lambda: journal.put_quarantine(Quarantine(DeviceName("dev-2"), "x", 0.0)),
        lambda: journal.drop_attachment(attachment(1).id),
        lambda: journal.step("owner", 2, "move", StepPhase.INTENT),
        journal.recovery_done,
        journal.boot_done,
    ]
    for write in writers:
        with no_file_larger_than(wal.stat().st_size), pytest.raises(JournalWriteFailed) as caught:
            write()
        assert isinstance(caught.value, NotNow)
        assert str(path) in str(caught.value)
        assert journal.state() is before
        assert mirrored(mirror) == 1
    assert [s.generation for s in journal.steps("owner")] == [1]
    journal.put_attachment(attachment(3))
    with Journal.open_read_only(path) as reader:
        assert set(reader.state().attachments) == {attachment(1), attachment(3)}


def test_a_mirror_that_cannot_be_written_is_told_and_made_good_later(
    journal: Journal, path: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal.put_attachment(attachment(1))
    shutil.rmtree(mirror)
    mirror.write_text("in the way")
    journal.put_attachment(attachment(2))
    journal.put_attachment(attachment(3))
    assert "mirror is behind" in journal.mirror_problem
    assert len(caplog.records) == 1
    assert len(journal.state().attachments) == 3
    mirror.unlink()
    journal.drop_attachment(attachment(3).id)
    assert journal.mirror_problem == ""
    assert mirrored(mirror) == 2


def test_a_mirror_that_was_swept_away_is_written_anew(journal: Journal, mirror: Path) -> None:
    journal.put_attachment(attachment(1))
    shutil.rmtree(mirror)
    journal.put_attachment(attachment(2))
    assert mirrored(mirror) == 2


# --- other releases and other processes ---------------------------------------------------------------


def set_version(path: Path, version: int, readable_by: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.execute("UPDATE meta SET value = ? WHERE name = 'readable_by'", (readable_by,))
    connection.close()


@pytest.mark.parametrize("readable_by", [str(JOURNAL.version + 1), "x", ""])
def test_a_journal_of_a_release_too_far_ahead_is_left_alone(
    path: Path, mirror: Path, readable_by: str
) -> None:
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        journal.put_attachment(attachment(1))
    set_version(path, 99, readable_by)
    before = path.read_bytes()
    with pytest.raises(JournalUnusable, match="run the release that wrote it"):
        Journal.open(path, mirror=mirror, boot_id=BOOT)
    with pytest.raises(JournalUnusable, match="schema version 99"):
        Journal.open_read_only(path)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.bad-*"))


def test_a_journal_of_the_next_release_is_read_and_written_and_stays_so(path: Path, mirror: Path) -> None:
    Journal.open(path, mirror=mirror, boot_id=BOOT).close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("ALTER TABLE records ADD COLUMN of_tomorrow TEXT NOT NULL DEFAULT ''")
    connection.close()
    set_version(path, JOURNAL.version + 1, str(JOURNAL.version))
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        journal.put_attachment(attachment(1))
        assert journal.state() == JournalState(attachments=(attachment(1),))
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (JOURNAL.version + 1,)
    connection.close()


def test_an_older_journal_is_migrated_and_keeps_its_records(
    path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        journal.put_attachment(attachment(1))
    added = database.Migration(2, 1, ("ALTER TABLE records ADD COLUMN note TEXT NOT NULL DEFAULT ''",))
    newer = database.Schema(JOURNAL.what, JOURNAL.application_id, (*JOURNAL.migrations, added))
    monkeypatch.setattr(opening, "JOURNAL", newer)
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        assert journal.state() == JournalState(attachments=(attachment(1),))
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT note FROM records").fetchall() == [("",)]
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()
    monkeypatch.undo()
    with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
        journal.put_attachment(attachment(2))
        assert journal.state().recovery == ""


def test_a_reader_follows_the_writer_and_writes_nothing(journal: Journal, path: Path) -> None:
    with Journal.open_read_only(path, OTHER_BOOT) as reader:
        assert reader.state() == JournalState(boot_changed=True)
        journal.put_attachment(attachment(1))
        journal.step("owner", 1, "move", StepPhase.INTENT)
        assert reader.state().attachments == (attachment(1),)
        assert reader.steps("owner") == journal.steps("owner")
    with Journal.open_read_only(path) as reader:
        assert not reader.state().boot_changed


def test_a_reader_of_nothing_says_so(path: Path) -> None:
    with pytest.raises(JournalUnusable, match="no agent has run here yet"):
        Journal.open_read_only(path)
    assert not path.exists()


def test_a_reader_of_rubbish_says_so_and_leaves_it(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite"
    file.write_bytes(b"rubbish" * 1000)
    with pytest.raises(JournalUnusable, match="cannot be read"):
        Journal.open_read_only(file)
    assert file.read_bytes() == b"rubbish" * 1000
