"""Who used which device for how much, kept after the pod is gone.

Invariant: totals are a counter's own, absolute within a segment, so writing them twice changes nothing;
they never go down. A counter found lower than before began anew: a new segment and a gap. A closed
account takes no more traffic.

A file of its own, apart from the journal: losing it costs history, never a device.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpf.layout import CLASSES, DIRECTIONS, Cell
from driver.errors import NotNow, Refusal
from driver.journal import buckets, database
from driver.journal.accounts import (
    LEDGER,
    Account,
    UsageGap,
    UsageOwner,
    UsageRow,
    insert_account,
    insert_gap,
)
from driver.journal.ledger_reading import Bill, LedgerReader, LedgerUnusable, Reading
from driver.journal.meters import CounterRow, Meters
from driver.journal.meters import forget as forget_stretches
from driver.model import AttachmentId

__all__ = [
    "Account",
    "Bill",
    "CounterRow",
    "Ledger",
    "LedgerReader",
    "LedgerUnusable",
    "LedgerWriteFailed",
    "UsageGap",
    "UsageOwner",
    "UsageRow",
]

_RESTARTED = "the machine restarted, and its counters with it"
_log = logging.getLogger(__name__)

_TOTAL_MAX = 2**63 - 1
"""SQLite's largest integer: three years at 800 Gb/s."""

_CellKey = tuple[int, int, int]
"""Direction, class, kind."""


class _AccountState(enum.Enum):
    NONE = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


class LedgerWriteFailed(NotNow):
    """Nothing of the change is in the ledger. Keep the counters, and write them again."""


@dataclass(frozen=True, slots=True)
class _Total:
    bytes: int
    packets: int
    class_name: str


class Ledger(Reading):
    """Made by open(); a context manager that closes the file. Every thread may call it; calls block
    for the disk. Readings of one attachment must come in the order they were taken."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lost: str = "") -> None:
        """Use open()."""
        super().__init__(path, connection)
        self.meters = Meters(connection, self._writing)
        """Counters that devices keep themselves."""
        self.lost = lost
        """Why the ledger begins anew, a sentence, or ""."""

    @classmethod
    def open(cls, path: Path, *, expected: bool = False, wall: Callable[[], float] = time.time) -> Ledger:
        """Open or make the ledger. A damaged one is set aside and a new one begun with a gap.

        expected: there was one, by what other records say, so that a missing one is a gap too.

        LedgerUnusable: it is from a later release, or the disk does not let us read or replace it.
        """
        try:
            database.make_private_directory(path.parent)
            found = _examine(path)
            if isinstance(found, sqlite3.Connection):
                return cls(path, found)
            lost = ""
            if found is None and expected:
                lost = f"the usage ledger {path} is missing, and with it who used what before"
                _log.error("%s", lost)
            if found is not None:
                aside = database.set_aside(path, int(wall()))
                lost = f"the usage ledger {path} {found}; it is kept as {aside}"
                _log.error("%s", lost)
            return cls(path, _make(path, lost, wall()), lost)
        except (OSError, sqlite3.Error) as error:
            raise LedgerUnusable(
                f"the usage ledger {path} cannot be opened: {database.explain(error)}"
            ) from error

    @staticmethod
    def open_read_only(path: Path) -> LedgerReader:
        """For the command line, beside a running agent. LedgerUnusable says why it cannot be read."""
        try:
            if not path.exists():
                raise LedgerUnusable(f"there is no usage ledger at {path}: no agent has run here yet")
            connection = database.connect(path, read_only=True)
            try:
                database.check(connection, LEDGER)
                database.check_not_older(connection, LEDGER)
            except BaseException:
                connection.close()
                raise
            return LedgerReader(path, connection)
        except (database.Damaged, database.TooNew) as error:
            raise LedgerUnusable(f"the usage ledger {path} {error}") from error
        except (OSError, sqlite3.Error) as error:
            raise LedgerUnusable(
                f"the usage ledger {path} cannot be read: {database.explain(error)}"
            ) from error

    def knows(self, attachment: AttachmentId) -> bool:
        """Whether there is an account, open or closed."""
        with self._reading():
            return _account_state(self._connection, attachment) is not _AccountState.NONE

    def begin(self, owner: UsageOwner) -> None:
        """Open an account, before its first packet. A repeated call changes nothing."""
        with self._writing():
            insert_account(self._connection, owner)

    def checkpoint(
        self,
        totals: Mapping[AttachmentId, Sequence[Cell]],
        *,
        source: str,
        class_names: Sequence[str],
        wall: float,
    ) -> tuple[AttachmentId, ...]:
        """Note the totals of many attachments in one transaction, on the disk when this returns.

        A cell that is not given counts as zero. Returns the attachments that were left out: they have no
        account, it is closed (a fold came first), or their counters make no sense.
        """
        skipped = []
        with self._writing(durable=True):
            for attachment, cells in totals.items():
                if _account_state(self._connection, attachment) is not _AccountState.OPEN:
                    skipped.append(attachment)
                    continue
                try:
                    found = _by_key(cells, class_names, attachment)
                except Refusal as error:
                    _log.warning("%s", error)
                    skipped.append(attachment)
                    continue
                _note_totals(self._connection, attachment, str(source), found, wall)
        return tuple(skipped)

    def fold(
        self,
        attachment: AttachmentId,
        cells: Sequence[Cell],
        *,
        source: str,
        class_names: Sequence[str],
        ended: float,
    ) -> None:
        """Final totals and end of an attachment in one transaction; its counters are free afterwards.

        A repeated fold is a no-op, also when the counters have been zeroed since. Refusal: there is no
        such account, or it is closed and the counters have gone on.
        """
        found = _by_key(cells, class_names, attachment)
        with self._writing():
            state = _account_state(self._connection, attachment)
            if state is _AccountState.NONE:
                raise Refusal("UnknownAttachment", f"the usage ledger has no account of {attachment}")
            if state is _AccountState.CLOSED:
                self._check_nothing_new(attachment, str(source), found)
                return
            _note_totals(self._connection, attachment, str(source), found, ended)
            self._connection.execute(
                "UPDATE attachments SET ended = ? WHERE id = ?", (float(ended), attachment)
            )

    def gap(self, attachment: AttachmentId, start: float, end: float, reason: str) -> None:
        """Note that from start to end, seconds since the epoch, not all was counted. Repeatable."""
        with self._writing():
            insert_gap(
                self._connection,
                UsageGap(attachment=attachment, start=float(start), end=float(end), reason=reason),
            )

    def begin_anew(self, attachment: AttachmentId, source: str, wall: float, reason: str) -> None:
        """Note that what was counted since the last reading is lost, and that the counters begin anew: what
        they show next is all new, also where it is more than before. May be repeated."""
        with self._writing():
            if _account_state(self._connection, attachment) is not _AccountState.OPEN:
                return
            segment, checked, known = _current_segment(self._connection, attachment, str(source))
            began = self._connection.execute(
                "SELECT started FROM attachments WHERE id = ?", (attachment,)
            ).fetchone()[0]
            start = checked if checked is not None else began
            insert_gap(
                self._connection, UsageGap(attachment=attachment, start=start, end=float(wall), reason=reason)
            )
            self._connection.execute(
                "INSERT OR REPLACE INTO segments (attachment, source, segment, checked) VALUES (?, ?, ?, ?)",
                (attachment, str(source), segment + bool(known), float(wall)),
            )

    def restarted(self, at: float) -> None:
        """Note that an agent begins to write here, at a time in seconds since the epoch."""
        with self._writing():
            self._connection.execute("INSERT INTO restarts (at) VALUES (?)", (float(at),))

    def machine_restarted(self, at: float) -> None:
        """Note that the machine began anew before `at`, and its counters with it.

        Each open account has a gap since its last reading, and goes on from zero. What began after the last
        reading of all may be on no record, which is a gap of the ledger's.
        """
        with self._writing(durable=True):
            (since,) = self._connection.execute(
                "SELECT max(at) FROM"
                " (SELECT max(checked) AS at FROM segments UNION SELECT max(at) FROM restarts)"
            ).fetchone()
            if since is not None:
                unknown = f"{_RESTARTED}: what began after the last reading may be on no record"
                insert_gap(self._connection, UsageGap(attachment=None, start=since, end=at, reason=unknown))
            for account, started in self._connection.execute(
                "SELECT id, started FROM attachments WHERE ended IS NULL"
            ).fetchall():
                _begin_anew(self._connection, account, started, at)

    def clock_stepped(self, at: float, seconds: float) -> None:
        """Note that the wall clock, which shows `at` now, has been set by so many seconds."""
        with self._writing():
            self._connection.execute("INSERT INTO clock_steps (at, seconds) VALUES (?, ?)", (at, seconds))

    def forget(self, ended_before: float) -> int:
        """Delete accounts that were closed before this time; returns how many. A living one stays whole."""
        old = "(SELECT id FROM attachments WHERE ended < ?)"
        with self._writing():
            for table in ("usage", "segments", "gaps", "labels", "buckets", "late"):
                self._connection.execute(
                    f"DELETE FROM {table} WHERE attachment IN {old}",  # noqa: S608 - constants
                    (ended_before,),
                )
            for table, column in (("restarts", "at"), ("clock_steps", "at"), ("late", "ended")):
                self._connection.execute(
                    f"DELETE FROM {table} WHERE {column} < ?",  # noqa: S608 - constants
                    (ended_before,),
                )
            forgotten = self._connection.execute(
                "DELETE FROM attachments WHERE ended < ?", (ended_before,)
            ).rowcount
            forget_stretches(self._connection, ended_before)
            return forgotten

    def roll_up(self, now: float) -> None:
        """Make days of the hours that are older than anyone bills by the hour."""
        with self._writing():
            buckets.roll_up(self._connection, now - buckets.ROLL_AFTER)

    def _check_nothing_new(
        self, attachment: AttachmentId, source: str, found: Mapping[_CellKey, _Total]
    ) -> None:
        _, _, known = _current_segment(self._connection, attachment, source)
        for key, total in found.items():
            before = known.get(key, _Total(0, 0, ""))
            if total.bytes > before.bytes or total.packets > before.packets:
                raise Refusal(
                    "AccountClosed",
                    f"the account of {attachment} is closed and its counters show more than it was "
                    f"closed with ({total.bytes} bytes, {before.bytes} in the ledger): not counted",
                )

    @contextlib.contextmanager
    def _writing(self, durable: bool = False) -> Iterator[None]:
        try:
            with self._lock, database.transaction(self._connection, durable=durable):
                yield
        except sqlite3.Error as error:
            if database.is_damage(error):
                # The file is not searched at every start; this makes the next one look.
                with contextlib.suppress(OSError):
                    _suspicion(self._path).touch(mode=0o600)
            raise LedgerWriteFailed(
                f"the usage ledger {self._path} did not take a change: {database.explain(error)}"
            ) from error


def _examine(path: Path) -> sqlite3.Connection | database.Damaged | None:
    """The open ledger, what is wrong with it, or None where there is none.

    Its pages are read through only after a crash or an error: a ledger may be large.
    """
    if not path.exists():
        return database.Damaged("is missing") if database.exists(path) else None
    if path.stat().st_size == 0:
        return database.Damaged("is empty")
    database.make_private(path)
    suspect = database.unclean(path) or _suspicion(path).exists()
    with contextlib.ExitStack() as stack:
        try:
            connection = database.connect(path)
            stack.callback(connection.close)
            database.check(connection, LEDGER)
            if suspect:
                database.check_pages(connection, path)
            database.migrate(connection, LEDGER)
            _suspicion(path).unlink(missing_ok=True)
            stack.pop_all()
            return connection
        except database.Damaged as error:
            return error
        except database.TooNew as error:
            raise LedgerUnusable(f"the usage ledger {path} {error}") from error
        except sqlite3.Error as error:
            if not database.is_damage(error):
                raise
            return database.Damaged(f"is corrupt: {error}")


def _make(path: Path, lost: str, wall: float) -> sqlite3.Connection:
    def fill(connection: sqlite3.Connection) -> None:
        if lost:
            insert_gap(connection, UsageGap(attachment=None, start=None, end=wall, reason=lost))

    database.create(path, LEDGER, fill)
    _suspicion(path).unlink(missing_ok=True)
    return database.connect(path)


def _suspicion(path: Path) -> Path:
    return path.with_name(path.name + ".suspect")


def _by_key(
    cells: Sequence[Cell], class_names: Sequence[str], attachment: AttachmentId
) -> dict[_CellKey, _Total]:
    """Cells by their place; Refusal if they cannot be counters."""
    found: dict[_CellKey, _Total] = {}
    for cell in cells:
        key = (int(cell.direction), cell.traffic_class, int(cell.kind))
        known = 0 <= cell.direction < DIRECTIONS and 0 <= cell.traffic_class < CLASSES
        fits = 0 <= cell.bytes <= _TOTAL_MAX and 0 <= cell.packets <= _TOTAL_MAX
        if not known or not fits or key in found:
            raise Refusal("BadCounters", f"{cell} of {attachment} is not a counter that can be booked")
        named = cell.traffic_class < len(class_names)
        name = class_names[cell.traffic_class] if named else str(cell.traffic_class)
        found[key] = _Total(cell.bytes, cell.packets, name)
    return found


def _account_state(connection: sqlite3.Connection, attachment: AttachmentId) -> _AccountState:
    row = connection.execute("SELECT ended FROM attachments WHERE id = ?", (attachment,)).fetchone()
    if row is None:
        return _AccountState.NONE
    return _AccountState.OPEN if row[0] is None else _AccountState.CLOSED


def _current_segment(
    connection: sqlite3.Connection, attachment: AttachmentId, source: str
) -> tuple[int, float | None, dict[_CellKey, _Total]]:
    """Number, time of the last reading (None: there was none) and totals of the latest segment."""
    row = connection.execute(
        "SELECT segment, checked FROM segments WHERE attachment = ? AND source = ?"
        " ORDER BY segment DESC LIMIT 1",
        (attachment, source),
    ).fetchone()
    if row is None:
        return 0, None, {}
    segment, checked = row
    cells = connection.execute(
        "SELECT direction, class_index, kind, bytes, packets, class_name FROM usage"
        " WHERE attachment = ? AND source = ? AND segment = ?",
        (attachment, source, segment),
    ).fetchall()
    return segment, checked, {tuple(cell[:3]): _Total(*cell[3:]) for cell in cells}


def _note_totals(
    connection: sqlite3.Connection,
    attachment: AttachmentId,
    source: str,
    found: Mapping[_CellKey, _Total],
    wall: float,
) -> None:
    segment, checked, known = _current_segment(connection, attachment, source)
    nothing = _Total(0, 0, "")
    base: Mapping[_CellKey, _Total] = {}
    if any(_less(found.get(key, nothing), total) for key, total in known.items()):
        segment += 1
        reason = f"the {source} counters began anew: what they counted after the last reading is lost"
        insert_gap(connection, UsageGap(attachment=attachment, start=checked, end=float(wall), reason=reason))
    elif any(found[key].class_name != total.class_name for key, total in known.items() if key in found):
        segment += 1
        base = known
    buckets.note_reading(connection, attachment, source, checked, float(wall))
    connection.execute(
        "INSERT OR REPLACE INTO segments (attachment, source, segment, checked) VALUES (?, ?, ?, ?)",
        (attachment, source, segment, float(wall)),
    )
    rows = []
    for key, total in found.items():
        start = base.get(key, nothing)
        amounts = (total.bytes, total.packets, start.bytes, start.packets)
        rows.append((attachment, source, segment, *key, total.class_name, *amounts))
    connection.executemany(
        "INSERT INTO usage (attachment, source, segment, direction, class_index, kind, class_name,"
        " bytes, packets, base_bytes, base_packets) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET bytes = excluded.bytes, packets = excluded.packets",
        rows,
    )


def _begin_anew(connection: sqlite3.Connection, attachment: AttachmentId, started: float, at: float) -> None:
    """A segment of nothing for each source of an account, and the gap before it."""
    sources = connection.execute(
        "SELECT source, max(segment), max(checked) FROM segments WHERE attachment = ? GROUP BY source",
        (attachment,),
    ).fetchall()
    seen = max((checked for _, _, checked in sources), default=started)
    reason = f"{_RESTARTED}: what was counted after the last reading is lost"
    insert_gap(connection, UsageGap(attachment=attachment, start=seen, end=at, reason=reason))
    connection.executemany(
        "INSERT INTO segments (attachment, source, segment, checked) VALUES (?, ?, ?, ?)",
        [(attachment, source, segment + 1, at) for source, segment, _ in sources],
    )


def _less(now: _Total, before: _Total) -> bool:
    return now.bytes < before.bytes or now.packets < before.packets
