"""SQLite files of our own: how they are made, opened, written and set aside.

Invariant: a file appears under its name only complete, is readable by root alone, and is never deleted
or altered once found damaged. Each change is one transaction: all of it or nothing.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import sqlite3
import stat
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

BUSY_SECONDS = 5.0
"""How long a writer waits for a checkpoint that a reader of another process holds up."""
_WAL_LIMIT_BYTES = 4 << 20
_SIDE_FILES = ("", "-wal", "-shm")
_DAMAGE_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
"""SQLITE_ERROR: a statement of ours does not fit the file, so its tables are not ours."""


class Damaged(Exception):
    """A file that is not what it should be; the text completes "the journal ..."."""


class TooNew(Exception):
    """A file that a later release wrote in a way this one cannot read; the text says so."""


class Closes(abc.ABC):
    """A context manager by its close()."""

    @abc.abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Migration:
    """Additive statements that lead to version. readable_by: the oldest version that can still read and
    write the file afterwards."""

    version: int
    readable_by: int
    statements: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Schema:
    """What a kind of file looks like. application_id tells the kinds apart in the file's header."""

    what: str
    application_id: int
    migrations: tuple[Migration, ...]

    @property
    def version(self) -> int:
        return self.migrations[-1].version


def make_private_directory(path: Path) -> None:
    """Make path, mode 0700, if it is not there.

    PermissionError if others may write to it, since they could put a file of theirs in our place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    mode = path.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path} may be written to by others (mode {stat.S_IMODE(mode):04o}): chmod it to 0700"
        )


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open an existing file. Every thread may use the connection, one at a time."""
    mode = "ro" if read_only else "rw"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA trusted_schema = OFF")
    except BaseException:
        connection.close()
        raise
    return connection


def create(path: Path, schema: Schema, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Make a new file at path, replacing what is there, with what fill puts into it.

    It is built beside and moved into place, so that a crash leaves the old one or the new one.
    """
    building = path.with_name(path.name + ".new")
    for side in _SIDE_FILES:
        _beside(building, side).unlink(missing_ok=True)
    os.close(os.open(building, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    with contextlib.closing(connect(building)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA application_id = {schema.application_id}")
        with transaction(connection):
            _migrate(connection, schema, 0)
            fill(connection)
    building.rename(path)
    _sync_directory(path.parent)


def check(connection: sqlite3.Connection, schema: Schema) -> None:
    """Damaged if the file is not one of schema, TooNew if it is from a release too far ahead."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    if application_id != schema.application_id:
        raise Damaged(f"is not a {schema.what}")
    version = _version(connection)
    if version < schema.migrations[0].version:
        raise Damaged("has no schema version")
    if version > schema.version:
        row = connection.execute("SELECT value FROM meta WHERE name = 'readable_by'").fetchone()
        if row is None or not row[0].isdigit() or int(row[0]) > schema.version:
            raise TooNew(
                f"has schema version {version} and this release knows {schema.version}: "
                "run the release that wrote it, or a later one"
            )


def check_not_older(connection: sqlite3.Connection, schema: Schema) -> None:
    """Damaged if tables are missing that only a writer of this release makes."""
    version = _version(connection)
    if version < schema.version:
        raise Damaged(
            f"has schema version {version} and this release reads {schema.version}: start this release's "
            "agent, which brings it up to date, or read it with the release that wrote it"
        )


def migrate(connection: sqlite3.Connection, schema: Schema) -> None:
    """Bring a checked file to this release's version; later versions stay as they are."""
    connection.execute("PRAGMA journal_mode = WAL")
    if _version(connection) < schema.version:
        with transaction(connection, durable=True):
            _migrate(connection, schema, _version(connection))


def _migrate(connection: sqlite3.Connection, schema: Schema, version: int) -> None:
    for migration in schema.migrations:
        if migration.version <= version:
            continue
        for statement in migration.statements:
            connection.execute(statement)
        connection.execute(
            "INSERT OR REPLACE INTO meta (name, value) VALUES ('readable_by', ?)",
            (str(migration.readable_by),),
        )
        connection.execute(f"PRAGMA user_version = {migration.version}")


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    assert isinstance(version, int)
    return version


def check_pages(connection: sqlite3.Connection, path: Path) -> None:
    """Damaged if pages, rows or indexes do not fit together or some are cut off. Reads the whole file."""
    if not unclean(path):
        # A log may hold the pages that the file lacks; without one it must be as long as it says.
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
        size = path.stat().st_size
        if size < pages * page_size:
            raise Damaged(f"is cut off: it has {size} of {pages * page_size} bytes")
    (answer,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        raise Damaged(f"is corrupt: {answer}")


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, *, durable: bool = False) -> Iterator[None]:
    """All of the block or nothing. durable: on the disk when this returns, not only in its cache."""
    if durable:
        connection.execute("PRAGMA synchronous = FULL")
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            # A full disk rolls back by itself; a second ROLLBACK would hide the first error.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    finally:
        if durable:
            connection.execute("PRAGMA synchronous = NORMAL")


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; SQLITE_OK where the Python module raised by itself."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return int(code) & 0xFF


def is_damage(error: sqlite3.Error) -> bool:
    """Whether error says that the file itself is bad, rather than the disk or another process."""
    return primary_code(error) in _DAMAGE_CODES


def explain(error: Exception) -> str:
    """What happened and what to do, as the end of a sentence."""
    if isinstance(error, OSError) and error.strerror:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        return f"{error.strerror}: {'run this as root' if denied else 'check its file system'}"
    if not isinstance(error, sqlite3.Error):
        return str(error)
    advice = {
        sqlite3.SQLITE_FULL: "make room on its file system; it works again when there is space",
        sqlite3.SQLITE_IOERR: "check its disk and the kernel's log",
        sqlite3.SQLITE_READONLY: "make its file system writable",
        sqlite3.SQLITE_CANTOPEN: "check that its folder exists and can be written to",
        sqlite3.SQLITE_BUSY: "another process holds it: only one agent may run on a node",
        sqlite3.SQLITE_LOCKED: "another process holds it: only one agent may run on a node",
        sqlite3.SQLITE_CORRUPT: "restart the agent, which sets the file aside and recovers",
        sqlite3.SQLITE_NOTADB: "restart the agent, which sets the file aside and recovers",
    }.get(primary_code(error), "restart the agent")
    return f"{error}: {advice}"


def exists(path: Path) -> bool:
    """Whether there is a file, or a write-ahead log that says there was one."""
    return path.exists() or _has_content(_beside(path, "-wal"))


def unclean(path: Path) -> bool:
    """Whether the last process to write path did not close it, or one writes it now."""
    return _has_content(_beside(path, "-wal"))


def set_aside(path: Path, stamp: int) -> Path:
    """Rename path and its side files to `path.bad-<stamp>`; return the new name. Nothing is deleted."""
    target = path.with_name(f"{path.name}.bad-{stamp}")
    number = 1
    while any(_beside(target, side).exists() for side in _SIDE_FILES):
        target = path.with_name(f"{path.name}.bad-{stamp}-{number}")
        number += 1
    for side in _SIDE_FILES:
        with contextlib.suppress(FileNotFoundError):
            _beside(path, side).rename(_beside(target, side))
    _sync_directory(path.parent)
    return target


def make_private(path: Path) -> None:
    """Take a file put back by hand away from everyone but root."""
    for side in _SIDE_FILES:
        with contextlib.suppress(FileNotFoundError):
            _beside(path, side).chmod(0o600)


def _beside(path: Path, side: str) -> Path:
    return path.with_name(path.name + side)


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
