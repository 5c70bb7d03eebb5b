"""The journal's tables and how they are read.

Invariant: migrations only add, so the release before can read and write the file of this one. A file is
read as a whole or not at all: one row that makes no sense makes the file Damaged.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from driver.journal import database
from driver.journal.records import Record, RecordKind, RecordValue, StepPhase, StepRecord, from_record

JOURNAL = database.Schema(
    what="journal",
    application_id=0x6B6E646A,
    migrations=(
        database.Migration(
            version=1,
            readable_by=1,
            statements=(
                "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
                "CREATE TABLE records (kind TEXT NOT NULL, key TEXT NOT NULL, body TEXT NOT NULL,"
                " PRIMARY KEY (kind, key)) STRICT, WITHOUT ROWID",
                "CREATE TABLE steps (seq INTEGER PRIMARY KEY, owner TEXT NOT NULL,"
                " generation INTEGER NOT NULL, step TEXT NOT NULL, phase TEXT NOT NULL,"
                " UNIQUE (owner, step)) STRICT",
            ),
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """The journal of its own.

    uuid: which journal this is; a mirror of another one testifies nothing about it. counter: how many
    changes of records it has seen. boot: the last boot whose leftovers were dealt with. recovery: see
    JournalState.
    """

    uuid: str
    counter: int
    boot: str
    recovery: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    meta: Meta
    records: tuple[tuple[Record, RecordValue], ...]

    @property
    def plain(self) -> tuple[Record, ...]:
        return tuple(record for record, _ in self.records)


def read_contents(connection: sqlite3.Connection) -> Contents:
    """Everything but the steps, of one moment; Damaged if it makes no sense."""
    connection.execute("BEGIN")
    try:
        meta = _read_meta(connection)
        rows = connection.execute("SELECT kind, key, body FROM records ORDER BY kind, key").fetchall()
    finally:
        connection.execute("ROLLBACK")
    records = []
    for kind, key, body in rows:
        try:
            record = Record(RecordKind(kind), key, body)
            records.append((record, from_record(record)))
        except ValueError as error:
            raise database.Damaged(f"holds a record ({kind}) that cannot be read: {error}") from error
    return Contents(meta, tuple(records))


def _read_meta(connection: sqlite3.Connection) -> Meta:
    found = dict(connection.execute("SELECT name, value FROM meta").fetchall())
    try:
        return Meta(
            uuid=found["uuid"],
            counter=int(found["counter"]),
            boot=found["boot"],
            recovery=found["recovery"],
        )
    except (KeyError, ValueError) as error:
        raise database.Damaged(f"does not say which journal it is: {error}") from error


def write_meta(connection: sqlite3.Connection, meta: Meta) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)",
        [
            ("uuid", meta.uuid),
            ("counter", str(meta.counter)),
            ("boot", meta.boot),
            ("recovery", meta.recovery),
        ],
    )


def put_record(connection: sqlite3.Connection, record: Record) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO records (kind, key, body) VALUES (?, ?, ?)",
        (record.kind.value, record.key, record.body),
    )


def read_steps(connection: sqlite3.Connection, owner: str) -> tuple[StepRecord, ...]:
    """In the order they were begun; Damaged if one makes no sense."""
    rows = connection.execute(
        "SELECT generation, step, phase FROM steps WHERE owner = ? ORDER BY seq", (owner,)
    ).fetchall()
    try:
        return tuple(
            StepRecord(owner=owner, generation=generation, step=step, phase=StepPhase(phase))
            for generation, step, phase in rows
        )
    except ValueError as error:
        raise database.Damaged(f"has a step of {owner} that cannot be read: {error}") from error
