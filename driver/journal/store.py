"""The journal: what should be and what was, on disk before it is done.

Invariant: a change is in memory, and visible to anyone, only after its transaction is on disk; a change
that failed left nothing behind. A journal that contradicts its mirror, or itself, is never believed:
it is set aside, and the state says in `recovery` why, until the caller has compared it with the node.

One process writes (whoever holds the takeover lock); in it every thread may.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from driver.errors import OutOfTime
from driver.journal import database
from driver.journal.mirror import Mirror
from driver.journal.opening import Opened, open_journal
from driver.journal.reader import JournalReader
from driver.journal.records import (
    JournalState,
    JournalUnusable,
    JournalWriteFailed,
    Quarantine,
    Record,
    RecordKind,
    RecordValue,
    StepPhase,
    StepRecord,
    collect,
    to_record,
)
from driver.journal.schema import Meta, put_record, read_steps, write_meta
from driver.model import (
    Attachment,
    AttachmentId,
    BootId,
    DeviceName,
    Preparation,
    PreparationKey,
    attachment_owner,
    preparation_owner,
)

__all__ = [
    "Journal",
    "JournalReader",
    "JournalState",
    "JournalUnusable",
    "JournalWriteFailed",
    "Quarantine",
    "StepPhase",
    "StepRecord",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Put:
    record: Record
    value: RecordValue


@dataclass(frozen=True, slots=True)
class _Drop:
    kind: RecordKind
    key: str


_Change = _Put | _Drop | StepRecord


@dataclass(slots=True)
class _Batch:
    changes: list[_Change] = field(default_factory=list)
    durable: bool = False


class Journal(database.Closes):
    """Made by open(); a context manager that closes the file.

    Writers raise JournalWriteFailed when the disk does not take the change; nothing has changed then.
    They block for the commit: call them from worker threads.
    """

    def __init__(self, path: Path, mirror: Mirror, opened: Opened, boot_id: BootId) -> None:
        """Use open()."""
        contents = opened.contents
        self._path = path
        self._mirror = mirror
        self._connection = opened.connection
        self._boot_id = boot_id
        self._lock = threading.RLock()
        self._batch: _Batch | None = None
        self._meta = contents.meta
        self._records = {(record.kind, record.key): (record, value) for record, value in contents.records}
        self._state: JournalState | None = None
        self._mirror_problem = ""
        if not opened.mirrored:
            self._replace_mirror()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        mirror: Path,
        boot_id: BootId,
        wall: Callable[[], float] = time.time,
        traces: Callable[[], str] = lambda: "",
    ) -> Journal:
        """Open, make or recover the journal at path. mirror is a folder on a tmpfs.

        traces is asked where there is neither: what else tells that there was a journal in this boot, the
        end of a sentence, or "".

        JournalUnusable: the file is from a later release, or the disk does not let us read or replace it.
        """
        witness = Mirror(mirror)
        try:
            opened = open_journal(path, witness, boot_id, int(wall()), traces)
            return cls(path, witness, opened, boot_id)
        except (OSError, sqlite3.Error) as error:
            raise JournalUnusable(
                f"the journal {path} cannot be opened: {database.explain(error)}"
            ) from error

    @staticmethod
    def open_read_only(path: Path, boot_id: BootId | None = None) -> JournalReader:
        """For the command line, beside a running agent. JournalUnusable says why it cannot be read."""
        return JournalReader(path, boot_id)

    # --- reading --------------------------------------------------------------------------------------

    def state(self) -> JournalState:
        """As of the last commit, this thread's open transaction not included.

        Waits for a commit that is under way; the same object until the next one.
        """
        with self._lock:
            if self._state is None:
                self._state = collect(
                    tuple(value for _, value in self._records.values()),
                    boot_changed=self._meta.boot != self._boot_id,
                    recovery=self._meta.recovery,
                )
            return self._state

    def steps(self, owner: str) -> tuple[StepRecord, ...]:
        """The owner's steps of its latest generation, in the order they were begun. JournalUnusable."""
        with self._lock:
            try:
                return read_steps(self._connection, owner)
            except database.Damaged as error:
                raise JournalUnusable(f"the journal {self._path} {error}") from error
            except sqlite3.Error as error:
                raise JournalUnusable(
                    f"the journal {self._path} cannot be read: {database.explain(error)}"
                ) from error

    @property
    def used(self) -> bool:
        """Whether anything was ever journalled on this node."""
        return self._meta.counter > 0 or bool(self._meta.recovery)

    @property
    def mirror_problem(self) -> str:
        """Why the mirror is behind, a sentence, or "". The next commit tries again."""
        return self._mirror_problem

    # --- writing --------------------------------------------------------------------------------------

    def put_preparation(self, preparation: Preparation, durable: bool = False) -> None:
        """durable: it survives a power cut from now on, which costs a flush of the disk."""
        self._put(preparation, durable)

    def drop_preparation(self, key: PreparationKey) -> None:
        """With its steps. Nothing happens if it is not there."""
        self._change(_Drop(RecordKind.PREPARATION, preparation_owner(key)))

    def put_attachment(self, attachment: Attachment) -> None:
        self._put(attachment)

    def drop_attachment(self, attachment: AttachmentId) -> None:
        """With its steps. Nothing happens if it is not there."""
        self._change(_Drop(RecordKind.ATTACHMENT, attachment_owner(attachment)))

    def put_quarantine(self, quarantine: Quarantine) -> None:
        self._put(quarantine)

    def drop_quarantine(self, device: DeviceName) -> None:
        self._change(_Drop(RecordKind.QUARANTINE, str(device)))

    def step(self, owner: str, generation: int, step: str, phase: StepPhase) -> None:
        """Note how far a step is. The first one of a newer generation drops the older ones.

        OutOfTime: the owner has steps of a newer generation, so this one was overtaken. owner is from
        driver.model.preparation_owner or attachment_owner.
        """
        self._change(StepRecord(owner=owner, generation=generation, step=step, phase=phase))

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[Journal]:
        """Writers called in the block, by this thread, become one commit at its end: all or nothing.

        Nested blocks join the outer one. Others wait meanwhile, so nothing slow and no await in it.
        """
        with self._lock:
            outer = self._batch
            batch = self._batch = outer or _Batch()
            batch.durable |= durable
            begun = len(batch.changes)
            try:
                yield self
            except BaseException:
                del batch.changes[begun:]
                raise
            finally:
                self._batch = outer
            if outer is None:
                self._commit(batch)

    def recovery_done(self) -> None:
        """The caller has compared runtime, claims and node: the journal can be trusted again."""
        with self._lock:
            self._note(replace(self._meta, recovery=""))

    def boot_done(self) -> None:
        """The caller has dealt with what the reboot left: boot_changed is False from now on."""
        with self._lock:
            self._note(replace(self._meta, boot=self._boot_id))

    # --- life -----------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # --- within ---------------------------------------------------------------------------------------

    def _put(self, value: RecordValue, durable: bool = False) -> None:
        self._change(_Put(to_record(value), value), durable)

    def _change(self, change: _Change, durable: bool = False) -> None:
        with self._lock:
            if self._batch is None:
                self._commit(_Batch([change], durable))
            else:
                self._batch.changes.append(change)
                self._batch.durable |= durable

    def _commit(self, batch: _Batch) -> None:
        if not batch.changes:
            return
        records_changed = any(not isinstance(change, StepRecord) for change in batch.changes)
        meta = replace(self._meta, counter=self._meta.counter + 1) if records_changed else self._meta
        with self._writing(batch.durable):
            for change in batch.changes:
                _write(self._connection, change)
            if records_changed:
                self._connection.execute(
                    "UPDATE meta SET value = ? WHERE name = 'counter'", (str(meta.counter),)
                )
        if records_changed:
            self._meta = meta
            self._remember(batch.changes)
            self._state = None
            self._follow(batch.changes)

    def _remember(self, changes: list[_Change]) -> None:
        for change in changes:
            if isinstance(change, _Put):
                self._records[change.record.kind, change.record.key] = (change.record, change.value)
            elif isinstance(change, _Drop):
                self._records.pop((change.kind, change.key), None)

    def _follow(self, changes: list[_Change]) -> None:
        """Bring the mirror after a commit. What it misses is made good by the next one."""
        if self._mirror_problem:
            self._replace_mirror()
            return
        touched = {
            (change.record.kind, change.record.key) if isinstance(change, _Put) else (change.kind, change.key)
            for change in changes
            if not isinstance(change, StepRecord)
        }
        put = [self._records[key][0] for key in touched if key in self._records]
        dropped = [key for key in touched if key not in self._records]
        try:
            self._mirror.apply(self._meta, put, dropped)
        except OSError:
            self._replace_mirror()

    def _replace_mirror(self) -> None:
        try:
            self._mirror.replace(self._meta, [record for record, _ in self._records.values()])
        except OSError as error:
            problem = f"the journal's mirror is behind: {database.explain(error)}"
            if not self._mirror_problem:
                _log.warning("%s", problem)
            self._mirror_problem = problem
        else:
            self._mirror_problem = ""

    def _note(self, meta: Meta) -> None:
        with self._writing(durable=True):
            write_meta(self._connection, meta)
        self._meta = meta
        self._state = None
        self._replace_mirror()

    @contextlib.contextmanager
    def _writing(self, durable: bool) -> Iterator[None]:
        try:
            with database.transaction(self._connection, durable=durable):
                yield
        except sqlite3.Error as error:
            raise JournalWriteFailed(
                f"the journal {self._path} did not take a change: {database.explain(error)}"
            ) from error


def _write(connection: sqlite3.Connection, change: _Change) -> None:
    match change:
        case _Put(record=record):
            put_record(connection, record)
        case _Drop(kind=kind, key=key):
            connection.execute("DELETE FROM records WHERE kind = ? AND key = ?", (kind.value, key))
            connection.execute("DELETE FROM steps WHERE owner = ?", (key,))
        case StepRecord():
            _write_step(connection, change)


def _write_step(connection: sqlite3.Connection, step: StepRecord) -> None:
    row = connection.execute("SELECT max(generation) FROM steps WHERE owner = ?", (step.owner,)).fetchone()
    latest = row[0]
    if latest is not None and latest > step.generation:
        raise OutOfTime(
            f"step {step.step} of generation {step.generation} was overtaken by generation {latest}"
        )
    if latest is not None and latest < step.generation:
        connection.execute("DELETE FROM steps WHERE owner = ?", (step.owner,))
    connection.execute(
        "INSERT INTO steps (owner, generation, step, phase) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (owner, step) DO UPDATE SET phase = excluded.phase",
        (step.owner, step.generation, step.step, step.phase.value),
    )
