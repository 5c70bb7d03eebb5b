"""A journal that is lost, damaged or old never passes for a good one, and nothing of it is deleted."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from driver.journal import Journal, JournalState, JournalUnusable, Quarantine, opening
from driver.journal.mirror import Mirror
from driver.model import BootId, DeviceName, attachment_owner
from tests.unit.journal_values import BOOT, OTHER_BOOT, attachment, preparation


class Node:
    """A journal and its mirror in a folder of their own."""

    def __init__(self, root: Path) -> None:
        self.path = root / "state" / "journal.sqlite"
        self.mirror = root / "run" / "mirror"

    def open(self, boot_id: BootId = BOOT) -> Journal:
        return Journal.open(self.path, mirror=self.mirror, boot_id=boot_id, wall=lambda: 1700000000.5)

    def state(self, boot_id: BootId = BOOT) -> JournalState:
        with self.open(boot_id) as journal:
            return journal.state()

    def fill(self, *numbers: int) -> None:
        with self.open() as journal:
            for number in numbers:
                journal.put_preparation(preparation(number))
                journal.put_attachment(attachment(number))

    def side(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def kept(self) -> list[str]:
        return sorted(file.name for file in self.path.parent.glob("*.bad-*"))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


BAD = "journal.sqlite.bad-1700000000"


def numbers(state: JournalState) -> list[int]:
    return sorted(int(a.id.removeprefix("attachment-")) for a in state.attachments)


# --- lost and damaged ---------------------------------------------------------------------------------


def test_a_missing_journal_is_recovered_from_its_mirror(node: Node) -> None:
    node.fill(1, 2)
    with node.open() as journal:
        journal.put_quarantine(Quarantine(DeviceName("dev-9"), "dirty", 1.0))
    before = node.state()
    node.path.unlink()
    after = node.state()
    assert "is missing, and its mirror says there was one" in after.recovery
    assert "5 records were taken from its mirror" in after.recovery
    assert numbers(after) == [1, 2]
    assert after.quarantines == before.quarantines
    assert {p.key: p for p in after.preparations} == {p.key: p for p in before.preparations}


def test_recovery_lasts_until_the_caller_has_compared(node: Node) -> None:
    node.fill(1)
    node.path.unlink()
    assert node.state().recovery
    with node.open() as journal:
        assert journal.state().recovery
        journal.put_attachment(attachment(2))
        assert journal.state().recovery
        journal.recovery_done()
        assert journal.state().recovery == ""
    assert node.state().recovery == ""
    assert numbers(node.state()) == [1, 2]


def test_a_journal_that_is_missing_with_its_mirror_is_a_first_start(node: Node) -> None:
    node.fill(1)
    shutil.rmtree(node.path.parent)
    shutil.rmtree(node.mirror)
    assert node.state() == JournalState()


def test_a_reboot_takes_the_mirror_and_the_journal_is_trusted(node: Node) -> None:
    node.fill(1)
    shutil.rmtree(node.mirror)
    state = node.state(OTHER_BOOT)
    assert state.recovery == ""
    assert state.boot_changed
    assert numbers(state) == [1]


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_truncated_journal_is_kept_aside_and_recovered_from_its_mirror(node: Node, part: float) -> None:
    node.fill(*range(20))
    whole = node.path.read_bytes()
    cut = whole[: int(len(whole) * part)]
    node.path.write_bytes(cut)
    state = node.state()
    assert str(node.path) in state.recovery
    assert BAD in state.recovery
    assert numbers(state) == list(range(20))
    assert (node.path.parent / BAD).read_bytes() == cut


@pytest.mark.parametrize("rubbish", [b"rubbish" * 1000, b"\0" * 8192, b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_journal_of_rubbish_is_kept_aside(node: Node, rubbish: bytes) -> None:
    node.fill(1)
    node.path.write_bytes(rubbish)
    state = node.state()
    assert state.recovery
    assert numbers(state) == [1]
    assert (node.path.parent / BAD).read_bytes() == rubbish


def test_pages_overwritten_within_are_found(node: Node) -> None:
    node.fill(*range(20))
    data = bytearray(node.path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 4096] = b"\xa5" * 4096
    node.path.write_bytes(data)
    state = node.state()
    assert "corrupt" in state.recovery
    assert numbers(state) == list(range(20))


@pytest.mark.parametrize("boot_id", [BOOT, OTHER_BOOT])
def test_a_corrupt_journal_without_a_mirror_is_recovery_with_no_records(node: Node, boot_id: BootId) -> None:
    node.fill(1)
    shutil.rmtree(node.mirror)
    node.path.write_bytes(b"rubbish" * 1000)
    state = node.state(boot_id)
    assert state.recovery
    assert state.attachments == state.preparations == ()
    assert node.kept() == [BAD]


def test_another_kind_of_database_is_not_taken_for_a_journal(node: Node) -> None:
    node.path.parent.mkdir(mode=0o700)
    connection = sqlite3.connect(node.path)
    connection.execute("CREATE TABLE t (a)")
    connection.commit()
    connection.close()
    assert "is not a journal" in node.state().recovery


def test_rows_that_make_no_sense_are_damage(node: Node) -> None:
    node.fill(1)
    connection = sqlite3.connect(node.path, isolation_level=None)
    connection.execute("UPDATE records SET body = '{}' WHERE kind = 'attachment'")
    connection.close()
    state = node.state()
    assert "(attachment) that cannot be read" in state.recovery
    assert numbers(state) == [1]


def test_a_second_bad_file_does_not_replace_the_first(node: Node) -> None:
    for text in (b"one" * 1000, b"two" * 1000):
        node.fill(1)
        node.path.write_bytes(text)
        node.state()
    assert node.kept() == [BAD, f"{BAD}-1"]


# --- crashes in between -------------------------------------------------------------------------------


def crash_copy(node: Node, root: Path) -> Node:
    """What is on disk at this moment, with the writer still in the middle."""
    copy = Node(root)
    shutil.copytree(node.path.parent, copy.path.parent)
    shutil.copytree(node.mirror, copy.mirror)
    return copy


def test_a_mirror_that_a_crash_left_behind_is_brought_up_and_nothing_is_wrong(
    node: Node, tmp_path: Path
) -> None:
    with node.open() as journal:
        journal.put_attachment(attachment(1))
        shutil.copytree(node.mirror, tmp_path / "older")
        journal.put_attachment(attachment(2))
        journal.drop_attachment(attachment(1).id)
        copy = crash_copy(node, tmp_path / "copy")
    shutil.rmtree(copy.mirror)
    shutil.copytree(tmp_path / "older", copy.mirror)
    state = copy.state()
    assert state.recovery == ""
    assert numbers(state) == [2]
    testimony = Mirror(copy.mirror).read()
    assert testimony.settled
    assert [record.key for record in testimony.records] == [attachment_owner(attachment(2).id)]


def test_a_lost_write_ahead_log_is_noticed(node: Node, tmp_path: Path) -> None:
    with node.open() as journal:
        journal.put_attachment(attachment(1))
        copy = crash_copy(node, tmp_path / "copy")
    copy.side("-wal").unlink()
    copy.side("-shm").unlink()
    state = copy.state()
    assert "older than what this node did last" in state.recovery
    assert numbers(state) == [1]


@pytest.mark.parametrize("part", [0.0, 0.4, 0.8, 0.999])
def test_a_truncated_write_ahead_log_is_noticed(node: Node, tmp_path: Path, part: float) -> None:
    with node.open() as journal:
        for number in range(10):
            journal.put_attachment(attachment(number))
        copy = crash_copy(node, tmp_path / "copy")
    log = copy.side("-wal").read_bytes()
    copy.side("-wal").write_bytes(log[: int(len(log) * part)])
    state = copy.state()
    assert state.recovery
    assert numbers(state) == list(range(10))


def test_a_journal_gone_while_its_log_is_there_is_no_first_start(node: Node, tmp_path: Path) -> None:
    with node.open() as journal:
        journal.put_attachment(attachment(1))
        copy = crash_copy(node, tmp_path / "copy")
    copy.path.unlink()
    shutil.rmtree(copy.mirror)
    state = copy.state()
    assert "is missing" in state.recovery
    assert state.attachments == ()
    assert f"{BAD}-wal" in copy.kept()


@pytest.mark.parametrize("stop", ["set_aside", "_make", "unlink"])
@pytest.mark.parametrize("with_mirror", [True, False])
def test_a_recovery_that_was_cut_off_is_taken_up_again(
    node: Node, monkeypatch: pytest.MonkeyPatch, stop: str, with_mirror: bool
) -> None:
    node.fill(1)
    if not with_mirror:
        shutil.rmtree(node.mirror)
    node.path.write_bytes(b"rubbish" * 1000)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop == "set_aside":
            real = opening.database.set_aside

            def set_aside_and_die(path: Path, stamp: int) -> Path:
                real(path, stamp)
                raise KeyboardInterrupt

            patch.setattr(opening.database, "set_aside", set_aside_and_die)
        elif stop == "_make":
            patch.setattr(opening, "_make", killed)
        else:
            patch.setattr(Mirror, "set_aside", killed)
        with pytest.raises(KeyboardInterrupt):
            node.open()
    state = node.state()
    assert state.recovery
    assert numbers(state) == ([1] if with_mirror else [])
    assert (node.path.parent / BAD).read_bytes() == b"rubbish" * 1000
    assert node.state().recovery == state.recovery
    with node.open() as journal:
        journal.recovery_done()
    assert node.state().recovery == ""


def test_a_new_file_that_was_cut_off_is_built_again(node: Node) -> None:
    node.path.parent.mkdir(mode=0o700)
    node.side(".new").write_bytes(b"half a fi")
    assert node.state() == JournalState()
    assert not node.side(".new").exists()


# --- old copies and other journals --------------------------------------------------------------------


def test_a_day_old_copy_is_not_believed(node: Node, tmp_path: Path) -> None:
    node.fill(1)
    shutil.copytree(node.path.parent, tmp_path / "yesterday")
    node.fill(2)
    with node.open() as journal:
        journal.drop_attachment(attachment(1).id)
    shutil.rmtree(node.path.parent)
    shutil.copytree(tmp_path / "yesterday", node.path.parent)
    state = node.state()
    assert "a copy was put back" in state.recovery
    assert numbers(state) == [2]
    assert node.kept() == [BAD]


def test_the_file_that_was_set_aside_is_not_believed_when_it_is_put_back(node: Node, tmp_path: Path) -> None:
    """Also when it was ahead of the mirror by what the mirror had missed."""
    with node.open() as journal:
        journal.put_attachment(attachment(1))
        shutil.copytree(node.mirror, tmp_path / "older")
        for number in range(2, 9):
            journal.put_attachment(attachment(number))
    good = node.path.read_bytes()
    shutil.rmtree(node.mirror)
    shutil.copytree(tmp_path / "older", node.mirror)
    node.path.unlink()
    with node.open() as journal:
        journal.recovery_done()
    node.path.write_bytes(good)
    state = node.state()
    assert "a copy was put back" in state.recovery
    assert numbers(state) == [1]


def test_the_journal_of_another_node_is_not_believed(node: Node, tmp_path: Path) -> None:
    other = Node(tmp_path / "other")
    other.fill(5, 6, 7)
    node.fill(1)
    shutil.copy(other.path, node.path)
    state = node.state()
    assert "is not the one that this node was using" in state.recovery
    assert numbers(state) == [1]


def test_a_journal_changed_behind_the_agents_back_is_not_believed(node: Node) -> None:
    node.fill(1, 2)
    connection = sqlite3.connect(node.path, isolation_level=None)
    connection.execute("DELETE FROM records WHERE kind = 'attachment' AND key = 'attachment-1'")
    connection.close()
    state = node.state()
    assert "tell different things of the same change" in state.recovery
    assert numbers(state) == [1, 2]


# --- bad mirrors --------------------------------------------------------------------------------------


def spoil_one(mirror: Path, text: str) -> Path:
    file = next(iter(sorted(mirror.glob("attachment-*.json"))))
    file.write_text(text)
    return file


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "attachment"}', "\x00" * 100])
def test_a_spoilt_mirror_costs_a_good_journal_nothing(node: Node, text: str) -> None:
    node.fill(1, 2)
    spoil_one(node.mirror, text)
    state = node.state()
    assert state.recovery == ""
    assert numbers(state) == [1, 2]
    assert Mirror(node.mirror).read().settled


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_spoilt_witness_costs_a_good_journal_nothing(node: Node, text: str) -> None:
    node.fill(1)
    (node.mirror / "witness.json").write_text(text)
    assert node.state().recovery == ""
    assert Mirror(node.mirror).read().settled


def test_a_spoilt_record_is_kept_aside_in_a_recovery_and_told(node: Node) -> None:
    node.fill(1, 2)
    tree = json.loads(next(iter(sorted(node.mirror.glob("attachment-*.json")))).read_text())
    tree["body"]["generation"] = "many"
    spoilt = spoil_one(node.mirror, json.dumps(tree))
    node.path.unlink()
    state = node.state()
    assert "3 records were taken from its mirror, 1 files of which could not be read" in state.recovery
    assert len(state.attachments) == 1
    assert (spoilt.parent / f"{spoilt.name}.bad-1700000000").exists()
    assert node.state().recovery == state.recovery


def test_without_its_witness_the_mirrors_files_still_testify(node: Node, tmp_path: Path) -> None:
    node.fill(1)
    shutil.copytree(node.path.parent, tmp_path / "yesterday")
    node.fill(2)
    (node.mirror / "witness.json").unlink()
    shutil.rmtree(node.path.parent)
    shutil.copytree(tmp_path / "yesterday", node.path.parent)
    state = node.state()
    assert "a copy was put back" in state.recovery
    assert numbers(state) == [1, 2]


# --- disks that cannot be used ------------------------------------------------------------------------


def test_a_folder_that_is_a_file_is_a_sentence(node: Node) -> None:
    node.path.parent.write_text("in the way")
    with pytest.raises(JournalUnusable, match=r"cannot be opened: .*"):
        node.open()


def test_a_journal_that_is_a_folder_is_a_sentence(node: Node) -> None:
    node.path.mkdir(parents=True)
    node.path.parent.chmod(0o700)
    with pytest.raises(JournalUnusable, match="cannot be opened"):
        node.open()
