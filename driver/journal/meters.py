"""The ledger's part for counters that a device keeps itself: RDMA, its interface, its VF on the PF.

Invariant: of a meter at most one stretch lives, and each change of it is one transaction, so what a counter
counted is in one holder's account only.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from driver.journal import stretches
from driver.journal.accounts import (
    ACCOUNT,
    ACCOUNT_COLUMNS,
    OF_DEVICES,
    SELECTED,
    Selection,
    UsageGap,
    UsageOwner,
    account,
    insert_gap,
)
from driver.journal.stretches import Count, Course, Holder, Lost, MeterKey, Reading, Stretch
from driver.model import AttachmentId


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterRow:
    """What one counter of a device counted for one holder, over all its stretches.

    owner None: for the device, while several attachments had it. started and checked: of the first and the
    last of the readings, seconds since the epoch; checked None where there was none.
    """

    owner: UsageOwner | None
    ended: float | None
    meter: MeterKey
    counter: str
    total: int
    started: float
    checked: float | None


@dataclass(frozen=True, slots=True)
class Living:
    """A meter that is being counted, and for whom."""

    meter: MeterKey
    holder: Holder


@dataclass(frozen=True, slots=True)
class Taken:
    """Who has a meter from a reading on. reading None: it cannot be read, and reason says why, a sentence."""

    holder: Holder
    reading: Reading | None
    reason: str


class Meters:
    """Part of a Ledger, which lends its transactions. Calls block for the disk; every thread may call."""

    def __init__(
        self, connection: sqlite3.Connection, writing: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._connection = connection
        self._writing = writing

    def take(
        self,
        meter: MeterKey,
        holder: Holder,
        reading: Reading | None,
        wall: float,
        *,
        reason: str = "",
        late: bool = False,
    ) -> None:
        """From now on the meter counts for holder; up to now it did for whoever had it. For the same holder
        it is one more reading. In a transaction that a crash may lose: the next reading makes up for it.

        reading None: it cannot be read now, and reason says why, a sentence. late: the holder has had the
        device for a while, and what it did until now is lost.
        """
        with self._writing():
            self._take(meter, Taken(holder, reading, reason), wall, late)

    def begin(
        self, taken: Mapping[MeterKey, Taken], wall: float
    ) -> dict[tuple[Holder, MeterKey], dict[str, int]]:
        """As take, of all that a device has, in one transaction; and the totals of their holders."""
        with self._writing():
            for meter, each in taken.items():
                self._take(meter, each, wall, late=False)
            return self._totals({each.holder for each in taken.values()})

    def _take(self, meter: MeterKey, taken: Taken, wall: float, late: bool) -> None:
        holder, reading = taken.holder, taken.reading
        current = _living(self._connection, meter)
        if current is not None and current.holder == holder:
            if reading is not None:
                self._write(meter, current, stretches.follow(current, reading, wall))
            return
        number = _next_number(self._connection, meter)
        if current is not None:
            course = stretches.end(current, reading, wall, taken.reason)
            self._write(meter, current, course)
            number = course.stretches[-1].number + 1
        lost: tuple[Lost, ...] = ()
        if late:
            since = _since(self._connection, current, holder)
            lost = (Lost(holder, min(since, wall), wall, "they were not counted until then"),)
        self._write(meter, None, Course((stretches.begin(number, holder, reading, wall),), lost))

    def release(self, meter: MeterKey, reading: Reading | None, wall: float, reason: str = "") -> None:
        """The meter counts for nobody any more. Repeatable. reading None: as in take."""
        with self._writing():
            current = _living(self._connection, meter)
            if current is not None:
                self._write(meter, current, stretches.end(current, reading, wall, reason))

    def living(self) -> tuple[Living, ...]:
        """The meters that count for somebody."""
        with self._writing():
            rows = self._connection.execute(
                "SELECT subject, source, port, holder FROM stretches WHERE living"
            ).fetchall()
        return tuple(Living(MeterKey(*row[:3]), _holder(row[3])) for row in rows)

    def totals(self, holders: Collection[Holder]) -> dict[tuple[Holder, MeterKey], dict[str, int]]:
        """What was counted for these holders so far, by meter and counter."""
        with self._writing():
            return self._totals(holders)

    def _totals(self, holders: Collection[Holder]) -> dict[tuple[Holder, MeterKey], dict[str, int]]:
        found: dict[tuple[Holder, MeterKey], dict[str, int]] = {}
        for holder in holders:
            rows = self._connection.execute(
                "SELECT s.subject, s.source, s.port, c.name, SUM(c.value - c.base)"
                " FROM stretches s JOIN counters c USING (subject, source, port, stretch)"
                " WHERE s.holder IS ? GROUP BY s.subject, s.source, s.port, c.name",
                (holder,),
            ).fetchall()
            for *meter, name, total in rows:
                found.setdefault((holder, MeterKey(*meter)), {})[name] = total
        return found

    def _write(self, meter: MeterKey, before: Stretch | None, course: Course) -> None:
        for stretch in course.stretches:
            known = before.counts if before is not None and before.number == stretch.number else {}
            _put(self._connection, meter, stretch, known)
        for lost in course.lost:
            insert_gap(
                self._connection,
                UsageGap(
                    attachment=lost.holder,
                    start=lost.start,
                    end=lost.end,
                    reason=f"{meter.source} of {meter.subject}: {lost.reason}",
                    subject=meter.subject,
                    source=meter.source,
                ),
            )


def read_counters(connection: sqlite3.Connection, selection: Selection) -> tuple[CounterRow, ...]:
    """Of the selected attachments and, where no pod is asked for, of devices that several had."""
    rows = connection.execute(
        f"SELECT {ACCOUNT}, s.subject, s.source, s.port, c.name, SUM(c.value - c.base),"  # noqa: S608 - constants
        " MIN(s.started), MAX(s.checked)"
        " FROM stretches s JOIN counters c USING (subject, source, port, stretch)"
        " LEFT JOIN attachments a ON a.id = s.holder"
        f" WHERE (a.id IS NOT NULL AND {SELECTED}) OR (s.holder IS NULL AND {OF_DEVICES}"
        " AND (:since IS NULL OR s.checked >= :since) AND (:until IS NULL OR s.started < :until))"
        " GROUP BY s.holder, s.subject, s.source, s.port, c.name"
        " ORDER BY a.started, a.id, s.subject, s.source, s.port, c.name",
        selection.parameters(),
    ).fetchall()
    return tuple(_counter_row(row) for row in rows)


def forget(connection: sqlite3.Connection, before: float) -> None:
    """In the caller's transaction: stretches whose account is gone, and of devices those that ended before
    this time. Also what an older release left that knows of no stretches."""
    old = (
        "NOT living AND CASE WHEN holder IS NULL THEN COALESCE(checked, started) < :before"
        " ELSE holder NOT IN (SELECT id FROM attachments) END"
    )
    places = f"(SELECT subject, source, port, stretch FROM stretches WHERE {old})"  # noqa: S608 - constants
    connection.execute(
        f"DELETE FROM counters WHERE (subject, source, port, stretch) IN {places}",  # noqa: S608 - constants
        {"before": before},
    )
    connection.execute(f"DELETE FROM stretches WHERE {old}", {"before": before})  # noqa: S608 - constants
    connection.execute(
        "DELETE FROM gaps WHERE attachment IS NULL AND subject IS NOT NULL AND ended < ?", (before,)
    )


def _living(connection: sqlite3.Connection, meter: MeterKey) -> Stretch | None:
    row = connection.execute(
        "SELECT stretch, holder, instance, started, checked FROM stretches"
        " WHERE subject = ? AND source = ? AND port = ? AND living",
        (meter.subject, meter.source, meter.port),
    ).fetchone()
    if row is None:
        return None
    number, holder, instance, started, checked = row
    counts = connection.execute(
        "SELECT name, base, value FROM counters"
        " WHERE subject = ? AND source = ? AND port = ? AND stretch = ?",
        (meter.subject, meter.source, meter.port, number),
    ).fetchall()
    return Stretch(
        number=number,
        holder=_holder(holder),
        instance=instance,
        started=started,
        checked=checked,
        counts={name: Count(base, value) for name, base, value in counts},
    )


def _since(connection: sqlite3.Connection, before: Stretch | None, holder: Holder) -> float:
    """Since when, at most, a holder that was not counted for may have had the device."""
    row = connection.execute("SELECT started FROM attachments WHERE id = ?", (holder,)).fetchone()
    started = [float(row[0])] if row is not None else []
    if before is not None:
        started.append(before.started if before.checked is None else before.checked)
    return max(started, default=0.0)


def _next_number(connection: sqlite3.Connection, meter: MeterKey) -> int:
    (last,) = connection.execute(
        "SELECT MAX(stretch) FROM stretches WHERE subject = ? AND source = ? AND port = ?",
        (meter.subject, meter.source, meter.port),
    ).fetchone()
    return 0 if last is None else int(last) + 1


def _put(
    connection: sqlite3.Connection, meter: MeterKey, stretch: Stretch, known: Mapping[str, Count]
) -> None:
    place = (meter.subject, meter.source, meter.port, stretch.number)
    connection.execute(
        "INSERT OR REPLACE INTO stretches"
        " (subject, source, port, stretch, holder, instance, started, checked, living)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*place, stretch.holder, stretch.instance, stretch.started, stretch.checked, int(stretch.living)),
    )
    changed = [
        (*place, name, count.base, count.value)
        for name, count in stretch.counts.items()
        if known.get(name) != count
    ]
    connection.executemany(
        "INSERT OR REPLACE INTO counters (subject, source, port, stretch, name, base, value)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        changed,
    )


def _holder(text: str | None) -> Holder:
    return None if text is None else AttachmentId(text)


def _counter_row(row: tuple[Any, ...]) -> CounterRow:
    """The tables are STRICT: a column has the type it was declared with."""
    found = account(row[:ACCOUNT_COLUMNS]) if row[0] is not None else None
    subject, source, port, name, total, started, checked = row[ACCOUNT_COLUMNS:]
    return CounterRow(
        owner=found.owner if found is not None else None,
        ended=found.ended if found is not None else None,
        meter=MeterKey(subject, source, port),
        counter=name,
        total=total,
        started=started,
        checked=checked,
    )
