"""Whether a journal can be believed, and what to start with if not.

Invariant: a journal that is missing, damaged or older than its mirror never passes for a good one, also
when the process dies in the middle of replacing it; the bad file is kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from driver.journal import database
from driver.journal.mirror import Mirror, Testimony
from driver.journal.records import JournalUnusable, Record, RecordValue, from_record
from driver.journal.schema import JOURNAL, Contents, Meta, put_record, read_contents, write_meta
from driver.model import BootId

_log = logging.getLogger(__name__)

_RECOVERY_JUMP = 1 << 32
"""A recovered journal counts on from far above its mirror, so that the file it replaced, which may be
ahead of the mirror by a few, is still found older when someone puts it back."""


@dataclass(frozen=True, slots=True)
class Opened:
    connection: sqlite3.Connection
    contents: Contents
    mirrored: bool = False
    """The mirror says the same already."""


def open_journal(
    path: Path, mirror: Mirror, boot_id: BootId, stamp: int, traces: Callable[[], str]
) -> Opened:
    """A journal to go on with: the one at path, a first one, or one recovered from the mirror.

    JournalUnusable if it is from a later release; OSError and sqlite3.Error if the disk is not usable.
    """
    database.make_private_directory(path.parent)
    mirror.prepare()
    testimony = mirror.read()
    reason = _unfinished(path)
    if not reason:
        found = _examine(path)
        if isinstance(found, Opened):
            reason = _contradiction(path, found.contents, testimony)
            if not reason:
                return replace(found, mirrored=_same_commit(found.contents, testimony))
            found.connection.close()
        elif found is None and testimony.empty:
            contents = Contents(replace(_first_meta(boot_id), recovery=_both_lost(path, traces())), ())
            _make(path, contents)
            return Opened(database.connect(path), contents)
        else:
            reason = _loss(path, found)
    return _recover(path, mirror, testimony, reason, boot_id, stamp)


def _examine(path: Path) -> Opened | database.Damaged | None:
    """The journal, what is wrong with it, or None where there is none. JournalUnusable: too new."""
    if not path.exists():
        return database.Damaged("is missing") if database.exists(path) else None
    if path.stat().st_size == 0:
        return database.Damaged("is empty")
    database.make_private(path)
    with contextlib.ExitStack() as stack:
        try:
            connection = database.connect(path)
            stack.callback(connection.close)
            database.check(connection, JOURNAL)
            database.check_pages(connection, path)
            database.migrate(connection, JOURNAL)
            contents = read_contents(connection)
            stack.pop_all()
            return Opened(connection, contents)
        except database.Damaged as error:
            return error
        except database.TooNew as error:
            raise JournalUnusable(f"the journal {path} {error}") from error
        except sqlite3.Error as error:
            if not database.is_damage(error):
                raise
            return database.Damaged(f"is corrupt: {error}")


def _contradiction(path: Path, contents: Contents, testimony: Testimony) -> str:
    """Why a readable journal is not to be believed, or ""."""
    if testimony.counter is None:
        return ""
    meta = contents.meta
    if testimony.uuid != meta.uuid:
        return f"the journal {path} is not the one that this node was using"
    if meta.counter < testimony.counter:
        return (
            f"the journal {path} is older than what this node did last "
            f"(change {meta.counter}, its mirror is at {testimony.counter}): a copy was put back"
        )
    if _same_commit(contents, testimony) and set(contents.plain) != set(testimony.records):
        return f"the journal {path} and its mirror tell different things of the same change"
    return ""


def _both_lost(path: Path, traces: str) -> str:
    return f"the journal {path} and its mirror are missing, though {traces}" if traces else ""


def _same_commit(contents: Contents, testimony: Testimony) -> bool:
    return testimony.settled and testimony.counter == contents.meta.counter


def _loss(path: Path, damage: database.Damaged | None) -> str:
    if damage is None:
        return f"the journal {path} is missing, and its mirror says there was one"
    return f"the journal {path} {damage}"


def _first_meta(boot_id: BootId) -> Meta:
    return Meta(uuid=str(uuid.uuid4()), counter=0, boot=boot_id)


def _make(path: Path, contents: Contents) -> None:
    def fill(connection: sqlite3.Connection) -> None:
        write_meta(connection, contents.meta)
        for record in contents.plain:
            put_record(connection, record)

    database.create(path, JOURNAL, fill)


def _recover(
    path: Path, mirror: Mirror, testimony: Testimony, reason: str, boot_id: BootId, stamp: int
) -> Opened:
    """Set the bad file aside and start a new one from the mirror."""
    _mark_unfinished(path, reason)
    records, unreadable = _readable(mirror, testimony)
    text = f"{reason}; {len(records)} records were taken from its mirror"
    if unreadable:
        text += f", {len(unreadable)} files of which could not be read"
    if database.exists(path):
        text += f"; the file is kept as {database.set_aside(path, stamp)}"
    meta = replace(_first_meta(boot_id), recovery=text)
    if testimony.counter is not None:
        meta = replace(
            meta,
            uuid=testimony.uuid or meta.uuid,
            counter=testimony.counter + _RECOVERY_JUMP,
            boot=testimony.boot or meta.boot,
        )
    contents = Contents(meta, records)
    _make(path, contents)
    mirror.set_aside(unreadable, stamp)
    _marker(path).unlink(missing_ok=True)
    _log.error("%s", text)
    return Opened(database.connect(path), contents)


def _readable(
    mirror: Mirror, testimony: Testimony
) -> tuple[tuple[tuple[Record, RecordValue], ...], tuple[Path, ...]]:
    """The mirror's records with their values, and the files that make no sense."""
    records: list[tuple[Record, RecordValue]] = []
    unreadable = list(testimony.unreadable)
    for record in testimony.records:
        try:
            records.append((record, from_record(record)))
        except ValueError:
            unreadable.append(mirror.path_of(record))
    return tuple(records), tuple(unreadable)


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".recovering")


def _unfinished(path: Path) -> str:
    """Why a recovery was begun that did not come to its end, or ""."""
    try:
        return _marker(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _mark_unfinished(path: Path, reason: str) -> None:
    """Before the bad file is moved: without it, a crash now would look like a first start."""
    building = path.with_name(_marker(path).name + ".new")
    fd = os.open(building, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8", errors="replace") as file:
        file.write(reason)
        file.flush()
        os.fsync(fd)
    building.rename(_marker(path))
