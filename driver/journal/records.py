"""What the journal keeps, and what it fails with.

Invariant: frozen values only; nothing here touches a file. A record's key is also the owner of its
steps, so that dropping a record drops exactly its own.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from driver.errors import DriverError, NotNow
from driver.journal import codec
from driver.model import Attachment, DeviceName, Preparation, attachment_owner, preparation_owner


class JournalUnusable(DriverError):
    """The journal can neither be opened nor replaced; the text says what to do."""


class JournalWriteFailed(NotNow):
    """A change was not journalled, so it must not be made. The journal is as it was before."""


class StepPhase(enum.StrEnum):
    INTENT = "intent"
    """Journalled before the step's first change."""
    DONE = "done"
    UNDONE = "undone"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    owner: str
    generation: int
    step: str
    phase: StepPhase


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A device that is withheld until it is clean. since_wall: seconds since the epoch, to show only."""

    device: DeviceName
    reason: str
    since_wall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalState:
    """What the journal says, as of one commit.

    boot_changed: this boot's leftovers were not dealt with yet (Journal.boot_done says they were).
    recovery: "" normally, else the sentence why the journal cannot be trusted.
    """

    preparations: tuple[Preparation, ...] = ()
    attachments: tuple[Attachment, ...] = ()
    quarantines: tuple[Quarantine, ...] = ()
    boot_changed: bool = False
    recovery: str = ""


class RecordKind(enum.StrEnum):
    PREPARATION = "preparation"
    ATTACHMENT = "attachment"
    QUARANTINE = "quarantine"


RecordValue = Preparation | Attachment | Quarantine


@dataclass(frozen=True, slots=True)
class Record:
    """One row, and one file of the mirror. body is the value as canonical JSON."""

    kind: RecordKind
    key: str
    """Also the owner of its steps."""
    body: str


def to_record(value: RecordValue) -> Record:
    kind, key = _kind_and_key(value)
    return Record(kind, key, codec.encode(value))


def _kind_and_key(value: RecordValue) -> tuple[RecordKind, str]:
    if isinstance(value, Preparation):
        return RecordKind.PREPARATION, preparation_owner(value.key)
    if isinstance(value, Attachment):
        return RecordKind.ATTACHMENT, attachment_owner(value.id)
    return RecordKind.QUARANTINE, str(value.device)


def from_record(record: Record) -> RecordValue:
    """CodecError if the body is not a value of its kind or is filed under a key not its own."""
    value: RecordValue
    match record.kind:
        case RecordKind.PREPARATION:
            value = codec.decode(Preparation, record.body)
        case RecordKind.ATTACHMENT:
            value = codec.decode(Attachment, record.body)
        case RecordKind.QUARANTINE:
            value = codec.decode(Quarantine, record.body)
    if _kind_and_key(value)[1] != record.key:
        raise codec.CodecError(f"a {record.kind} is filed under the key {record.key!r} that is not its own")
    return value


def collect(values: tuple[RecordValue, ...], *, boot_changed: bool, recovery: str) -> JournalState:
    return JournalState(
        preparations=tuple(value for value in values if isinstance(value, Preparation)),
        attachments=tuple(value for value in values if isinstance(value, Attachment)),
        quarantines=tuple(value for value in values if isinstance(value, Quarantine)),
        boot_changed=boot_changed,
        recovery=recovery,
    )
