"""The ledger's tables and the values read from them.

Invariant: what is read is a value of its type or the file is Damaged; sources are never added up.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

from bpf.layout import TrafficKind
from driver.journal import buckets, database
from driver.model import AttachmentId, ClaimRef, ClaimUid, DeviceName, PodRef, PodUid, SandboxId
from hw.model import Direction, IfName

LEDGER = database.Schema(
    what="usage ledger",
    application_id=0x6B6E646C,
    migrations=(
        database.Migration(
            version=1,
            readable_by=1,
            statements=(
                "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
                "CREATE TABLE attachments (id TEXT PRIMARY KEY, pod_namespace TEXT NOT NULL,"
                " pod_name TEXT NOT NULL, pod_uid TEXT NOT NULL, claim_namespace TEXT NOT NULL,"
                " claim_name TEXT NOT NULL, claim_uid TEXT NOT NULL, device TEXT NOT NULL,"
                " interface TEXT NOT NULL, sandbox TEXT NOT NULL, started REAL NOT NULL, ended REAL"
                ") STRICT, WITHOUT ROWID",
                "CREATE INDEX attachments_by_end ON attachments (ended)",
                # A segment is a stretch in which a counter only grew. checked: when it was last read.
                "CREATE TABLE segments (attachment TEXT NOT NULL, source TEXT NOT NULL,"
                " segment INTEGER NOT NULL, checked REAL NOT NULL,"
                " PRIMARY KEY (attachment, source, segment)) STRICT, WITHOUT ROWID",
                # bytes and packets are the counter's own absolute totals; what was counted under another
                # class name before this segment is in base_bytes and base_packets.
                "CREATE TABLE usage (attachment TEXT NOT NULL, source TEXT NOT NULL,"
                " segment INTEGER NOT NULL, direction INTEGER NOT NULL, class_index INTEGER NOT NULL,"
                " kind INTEGER NOT NULL, class_name TEXT NOT NULL, bytes INTEGER NOT NULL,"
                " packets INTEGER NOT NULL, base_bytes INTEGER NOT NULL, base_packets INTEGER NOT NULL,"
                " PRIMARY KEY (attachment, source, segment, direction, class_index, kind)"
                ") STRICT, WITHOUT ROWID",
                "CREATE TABLE gaps (attachment TEXT, started REAL, ended REAL NOT NULL,"
                " reason TEXT NOT NULL) STRICT",
                "CREATE INDEX gaps_by_attachment ON gaps (attachment)",
            ),
        ),
        # Counters of the device's own, by name: see driver.journal.stretches. holder NULL: the device's,
        # while several attachments had it. The release before leaves these tables alone.
        database.Migration(
            version=2,
            readable_by=1,
            statements=(
                "CREATE TABLE stretches (subject TEXT NOT NULL, source TEXT NOT NULL, port INTEGER NOT NULL,"
                " stretch INTEGER NOT NULL, holder TEXT, instance TEXT NOT NULL, started REAL NOT NULL,"
                " checked REAL, living INTEGER NOT NULL,"
                " PRIMARY KEY (subject, source, port, stretch)) STRICT, WITHOUT ROWID",
                "CREATE INDEX stretches_by_holder ON stretches (holder)",
                "CREATE INDEX living_stretches ON stretches (subject) WHERE living",
                "CREATE TABLE counters (subject TEXT NOT NULL, source TEXT NOT NULL, port INTEGER NOT NULL,"
                " stretch INTEGER NOT NULL, name TEXT NOT NULL, base INTEGER NOT NULL,"
                " value INTEGER NOT NULL, PRIMARY KEY (subject, source, port, stretch, name)"
                ") STRICT, WITHOUT ROWID",
                "ALTER TABLE gaps ADD COLUMN subject TEXT",
                "ALTER TABLE gaps ADD COLUMN source TEXT",
            ),
        ),
        database.Migration(
            version=3,
            readable_by=1,
            statements=(
                *buckets.STATEMENTS,
                "CREATE TABLE labels (attachment TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,"
                " PRIMARY KEY (attachment, name)) STRICT, WITHOUT ROWID",
                # When an agent began to write here, and by how many seconds the wall clock was set.
                "CREATE TABLE restarts (at REAL NOT NULL) STRICT",
                "CREATE TABLE clock_steps (at REAL NOT NULL, seconds REAL NOT NULL) STRICT",
            ),
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageOwner:
    """Whom traffic belongs to. started: seconds since the epoch, to show and to select by only."""

    attachment: AttachmentId
    pod: PodRef
    claim: ClaimRef
    device: DeviceName
    interface: IfName
    sandbox: SandboxId
    started: float
    labels: tuple[tuple[str, str], ...] = ()
    """The pod's, as far as the policy chose them: sorted pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An owner and when its attachment ended; None while it lives."""

    owner: UsageOwner
    ended: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """Totals of an attachment's whole life, for one class, kind, direction and source.

    class_name is the name the class had while this was counted: a renamed class has two rows.
    """

    owner: UsageOwner
    ended: float | None
    source: str
    direction: Direction
    class_index: int
    class_name: str
    kind: TrafficKind
    bytes: int
    packets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageGap:
    """What was not counted. start None: nobody knows since when.

    attachment None: the ledger as a whole or, with a subject, a device that several attachments had. subject
    and source name the device's own counters that are missing; "" means what BPF counts.
    """

    attachment: AttachmentId | None
    start: float | None
    end: float
    reason: str
    subject: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class ClockStep:
    """At this wall time, seconds since the epoch, the clock had been set by so many seconds."""

    at: float
    seconds: float


ACCOUNT = (
    "a.id, a.pod_namespace, a.pod_name, a.pod_uid, a.claim_namespace, a.claim_name, a.claim_uid,"
    " a.device, a.interface, a.sandbox, a.started, a.ended,"
    " (SELECT json_group_array(json_array(name, value)) FROM"
    " (SELECT name, value FROM labels l WHERE l.attachment = a.id ORDER BY name))"
)
ACCOUNT_COLUMNS = 13
SELECTED = (
    "(:since IS NULL OR a.ended IS NULL OR a.ended >= :since)"
    " AND (:until IS NULL OR a.started < :until)"
    " AND (:namespace IS NULL OR a.pod_namespace = :namespace)"
    " AND (:pod IS NULL OR a.pod_name = :pod)"
)
OF_DEVICES = "(:namespace IS NULL AND :pod IS NULL)"
"""What several attachments had together is no pod's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which attachments: those that lived in [since, until), of a namespace, of a pod's name."""

    since: float | None = None
    until: float | None = None
    namespace: str | None = None
    pod: str | None = None

    def parameters(self) -> dict[str, object]:
        return {"since": self.since, "until": self.until, "namespace": self.namespace, "pod": self.pod}


def read_accounts(connection: sqlite3.Connection, selection: Selection) -> tuple[Account, ...]:
    rows = connection.execute(
        f"SELECT {ACCOUNT} FROM attachments a WHERE {SELECTED} ORDER BY a.started, a.id",  # noqa: S608 - constants
        selection.parameters(),
    ).fetchall()
    return tuple(account(row) for row in rows)


def read_usage(connection: sqlite3.Connection, selection: Selection) -> tuple[UsageRow, ...]:
    rows = connection.execute(
        f"SELECT {ACCOUNT}, u.source, u.direction, u.class_index, u.class_name, u.kind,"  # noqa: S608 - constants
        " SUM(u.bytes - u.base_bytes), SUM(u.packets - u.base_packets)"
        f" FROM attachments a JOIN usage u ON u.attachment = a.id WHERE {SELECTED}"
        " GROUP BY a.id, u.source, u.direction, u.class_index, u.class_name, u.kind"
        " ORDER BY a.started, a.id, u.source, u.direction, u.class_index, u.class_name, u.kind",
        selection.parameters(),
    ).fetchall()
    return tuple(_usage_row(row) for row in rows)


def read_period(
    connection: sqlite3.Connection, selection: Selection, period: buckets.Period
) -> tuple[UsageRow, ...]:
    """What was read in a period, of the attachments that selection is about, whenever they lived."""
    inside = (
        "(:start IS NULL OR b.start + b.seconds > :start) AND (:end IS NULL OR b.start < :end)"
        " AND (:namespace IS NULL OR a.pod_namespace = :namespace) AND (:pod IS NULL OR a.pod_name = :pod)"
    )
    rows = connection.execute(
        f"SELECT {ACCOUNT}, b.source, b.direction, b.class_index, b.class_name, b.kind,"  # noqa: S608 - constants
        " SUM(b.bytes), SUM(b.packets) FROM attachments a JOIN buckets b ON b.attachment = a.id"
        f" WHERE {inside}"
        " GROUP BY a.id, b.source, b.direction, b.class_index, b.class_name, b.kind"
        " ORDER BY a.started, a.id, b.source, b.direction, b.class_index, b.class_name, b.kind",
        {**selection.parameters(), "start": period.start, "end": period.end},
    ).fetchall()
    return tuple(_usage_row(row) for row in rows)


def read_gaps(connection: sqlite3.Connection, selection: Selection) -> tuple[UsageGap, ...]:
    """Of the selected attachments, and those of the ledger as a whole; where no pod is asked for also those
    of devices that several had."""
    rows = connection.execute(
        "SELECT g.attachment, g.started, g.ended, g.reason, g.subject, g.source FROM gaps g"  # noqa: S608 - constants
        " LEFT JOIN attachments a ON a.id = g.attachment"
        f" WHERE (g.attachment IS NULL AND (g.subject IS NULL OR {OF_DEVICES}))"
        f" OR (a.id IS NOT NULL AND {SELECTED})"
        " ORDER BY g.ended, g.attachment",
        selection.parameters(),
    ).fetchall()
    return tuple(
        UsageGap(
            attachment=None if attachment is None else AttachmentId(attachment),
            start=start,
            end=end,
            reason=reason,
            subject=subject or "",
            source=source or "",
        )
        for attachment, start, end, reason, subject, source in rows
    )


def insert_account(connection: sqlite3.Connection, owner: UsageOwner) -> None:
    """Nothing happens if the attachment has one."""
    connection.execute(
        "INSERT OR IGNORE INTO attachments (id, pod_namespace, pod_name, pod_uid, claim_namespace,"
        " claim_name, claim_uid, device, interface, sandbox, started, ended)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
        (
            owner.attachment,
            owner.pod.namespace,
            owner.pod.name,
            owner.pod.uid,
            owner.claim.namespace,
            owner.claim.name,
            owner.claim.uid,
            owner.device,
            owner.interface,
            owner.sandbox,
            owner.started,
        ),
    )
    # Also where there is an account: a pod that nobody knew yet when it was opened has its labels later.
    connection.executemany(
        "INSERT OR IGNORE INTO labels (attachment, name, value) VALUES (?, ?, ?)",
        [(owner.attachment, name, value) for name, value in owner.labels],
    )


def read_clock_steps(connection: sqlite3.Connection, period: buckets.Period) -> tuple[ClockStep, ...]:
    rows = connection.execute(
        "SELECT at, seconds FROM clock_steps WHERE (:start IS NULL OR at >= :start)"
        " AND (:end IS NULL OR at < :end) ORDER BY at",
        {"start": period.start, "end": period.end},
    ).fetchall()
    return tuple(ClockStep(*row) for row in rows)


def read_restarts(connection: sqlite3.Connection, period: buckets.Period) -> tuple[float, ...]:
    """When agents began to write, seconds since the epoch."""
    rows = connection.execute(
        "SELECT at FROM restarts WHERE (:start IS NULL OR at >= :start) AND (:end IS NULL OR at < :end)"
        " ORDER BY at",
        {"start": period.start, "end": period.end},
    ).fetchall()
    return tuple(at for (at,) in rows)


def insert_gap(connection: sqlite3.Connection, gap: UsageGap) -> None:
    """Nothing happens if the same gap is there, so that a retry does not double it."""
    about = (gap.subject or None, gap.source or None)
    values = (gap.attachment, gap.start, gap.end, gap.reason, *about)
    connection.execute(
        "INSERT INTO gaps (attachment, started, ended, reason, subject, source) SELECT ?, ?, ?, ?, ?, ?"
        " WHERE NOT EXISTS (SELECT 1 FROM gaps WHERE attachment IS ? AND started IS ? AND ended = ?"
        " AND reason = ? AND subject IS ? AND source IS ?)",
        (*values, *values),
    )


def account(row: tuple[Any, ...]) -> Account:
    """The tables are STRICT: a column has the type it was declared with."""
    owner = UsageOwner(
        attachment=AttachmentId(row[0]),
        pod=PodRef(row[1], row[2], PodUid(row[3])),
        claim=ClaimRef(row[4], row[5], ClaimUid(row[6])),
        device=DeviceName(row[7]),
        interface=IfName(row[8]),
        sandbox=SandboxId(row[9]),
        started=row[10],
        labels=tuple((name, value) for name, value in json.loads(row[12])),
    )
    return Account(owner=owner, ended=row[11])


def _usage_row(row: tuple[Any, ...]) -> UsageRow:
    found = account(row[:ACCOUNT_COLUMNS])
    source, direction, class_index, class_name, kind, total_bytes, total_packets = row[ACCOUNT_COLUMNS:]
    try:
        return UsageRow(
            owner=found.owner,
            ended=found.ended,
            source=source,
            direction=Direction(direction),
            class_index=class_index,
            class_name=class_name,
            kind=TrafficKind(kind),
            bytes=total_bytes,
            packets=total_packets,
        )
    except ValueError as error:
        raise database.Damaged(f"has a usage row that cannot be read: {error}") from error
