"""When traffic was read, in buckets of an hour: what lets a bill be cut at a time.

Invariant: the buckets of an attachment add up to its totals. Triggers of the database keep it, so that it
holds whichever release writes; what the totals gained by a reading goes into the hour of that reading. No
hour's traffic is guessed from another's: a reading that came late is on record, with its stretch of time.

After ROLL_AFTER hours become days, in UTC, so that a year of many pods stays a file of some megabytes.
"""

from __future__ import annotations

import math
import sqlite3
from dataclasses import dataclass

from driver.model import AttachmentId

HOUR = 3600
DAY = 24 * HOUR
ROLL_AFTER = 62 * DAY
"""Seconds that hours are kept: two months can be billed by any time zone's days."""
LATE = 180.0
"""Seconds between two readings of a counter from which on the stretch is on record: three checkpoints."""

_KEY = "attachment, source, direction, class_index, kind, class_name"
_NEW = "NEW.attachment, NEW.source, NEW.direction, NEW.class_index, NEW.kind, NEW.class_name"
_HOUR_OF_READING = (
    "(SELECT CAST(checked / 3600 AS INTEGER) * 3600 FROM segments s WHERE s.attachment = NEW.attachment"
    " AND s.source = NEW.source AND s.segment = NEW.segment)"
)
_ADD = " ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes, packets = packets + excluded.packets"

STATEMENTS = (
    "CREATE TABLE buckets (attachment TEXT NOT NULL, source TEXT NOT NULL, direction INTEGER NOT NULL,"
    " class_index INTEGER NOT NULL, kind INTEGER NOT NULL, class_name TEXT NOT NULL,"
    " start INTEGER NOT NULL, seconds INTEGER NOT NULL, bytes INTEGER NOT NULL, packets INTEGER NOT NULL,"
    f" PRIMARY KEY ({_KEY}, start, seconds)) STRICT, WITHOUT ROWID",
    "CREATE INDEX buckets_by_start ON buckets (start)",
    # Of what was counted before there were buckets only the time of the last reading is known.
    "INSERT INTO buckets SELECT u.attachment, u.source, u.direction, u.class_index, u.kind, u.class_name,"
    " CAST(s.checked / 3600 AS INTEGER) * 3600, 3600, SUM(u.bytes - u.base_bytes),"
    " SUM(u.packets - u.base_packets) FROM usage u JOIN segments s USING (attachment, source, segment)"
    " GROUP BY 1, 2, 3, 4, 5, 6, 7",
    f"CREATE TRIGGER usage_begins AFTER INSERT ON usage BEGIN INSERT INTO buckets SELECT {_NEW},"
    f" {_HOUR_OF_READING}, 3600, NEW.bytes - NEW.base_bytes, NEW.packets - NEW.base_packets"
    f" WHERE NEW.bytes > NEW.base_bytes OR NEW.packets > NEW.base_packets{_ADD}; END",
    "CREATE TRIGGER usage_grows AFTER UPDATE ON usage"  # noqa: S608 - constants
    " WHEN NEW.bytes > OLD.bytes OR NEW.packets > OLD.packets"
    f" BEGIN INSERT INTO buckets VALUES ({_NEW}, {_HOUR_OF_READING}, 3600,"
    f" NEW.bytes - OLD.bytes, NEW.packets - OLD.packets){_ADD}; END",
    "CREATE TABLE late (attachment TEXT NOT NULL, source TEXT NOT NULL, started REAL NOT NULL,"
    " ended REAL NOT NULL) STRICT",
    "CREATE INDEX late_by_attachment ON late (attachment)",
)


@dataclass(frozen=True, slots=True)
class LateReading:
    """Traffic between start and end, seconds since the epoch, was read at its end: all of it is in the end's
    bucket, though some may be older."""

    attachment: AttachmentId
    source: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Period:
    """The whole buckets that a range of time touches, [start, end) in seconds since the epoch; None: open."""

    start: int | None
    end: int | None


def widened(since: float | None, until: float | None, now: float) -> Period:
    """A range at whole hours, or days where hours are no longer kept."""

    def width(at: float) -> int:
        return DAY if at < now - ROLL_AFTER else HOUR

    return Period(
        start=None if since is None else math.floor(since / width(since)) * width(since),
        end=None if until is None else math.ceil(until / width(until)) * width(until),
    )


def note_reading(
    connection: sqlite3.Connection, attachment: AttachmentId, source: str, before: float | None, now: float
) -> None:
    """Put a stretch on record in which nobody read, though traffic went on. Before the totals are noted."""
    if before is not None and now - before > LATE:
        connection.execute(
            "INSERT INTO late (attachment, source, started, ended) VALUES (?, ?, ?, ?)",
            (attachment, source, before, now),
        )


def read_late(
    connection: sqlite3.Connection, period: Period, *, namespace: str | None, pod: str | None
) -> tuple[LateReading, ...]:
    """The late readings that make an end of a period unsharp: they begin before it and end after it. Of one
    namespace, and of pods of one name, or of all."""
    rows = connection.execute(
        "SELECT l.attachment, l.source, l.started, l.ended FROM late l"
        " JOIN attachments a ON a.id = l.attachment"
        " WHERE ((l.started < :start AND l.ended >= :start) OR (l.started < :end AND l.ended >= :end))"
        " AND (:namespace IS NULL OR a.pod_namespace = :namespace) AND (:pod IS NULL OR a.pod_name = :pod)"
        " ORDER BY l.ended",
        {"start": period.start, "end": period.end, "namespace": namespace, "pod": pod},
    ).fetchall()
    return tuple(LateReading(AttachmentId(row[0]), *row[1:]) for row in rows)


def roll_up(connection: sqlite3.Connection, before: float) -> None:
    """Make days of the hours of all days that were over before a time."""
    limit = int(before // DAY) * DAY
    connection.execute(
        f"INSERT INTO buckets SELECT {_KEY}, start / {DAY} * {DAY}, {DAY}, SUM(bytes), SUM(packets)"  # noqa: S608 - constants
        f" FROM buckets WHERE seconds = {HOUR} AND start < ? GROUP BY {_KEY}, start / {DAY}{_ADD}",
        (limit,),
    )
    connection.execute(f"DELETE FROM buckets WHERE seconds = {HOUR} AND start < ?", (limit,))  # noqa: S608 - constants
