"""What should be and what was, in memory, written through to the journal.

Invariant: a record is in the journal before it is here, and both before the kernel is touched. Only
the lifecycle writes here; readers get immutable snapshots, may be on any thread, and never wait for a
disk: the lock they share with writers is not held while the journal is written. On a full disk homeward
changes go ahead of the journal; nothing else is written before it has caught up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from bpf.layout import Slot
from driver.errors import DriverError, NotNow
from driver.journal.store import Journal, Quarantine
from driver.lifecycle.states import ImpossibleTransition, check_attachment, check_preparation
from driver.model import (
    Attachment,
    AttachmentId,
    AttachmentState,
    ClaimUid,
    DeviceName,
    Preparation,
    PreparationKey,
    PreparationState,
    SandboxId,
)
from hw.model import IfIndex, SoftwareIdentity

log = logging.getLogger(__name__)

Changes = Mapping[Hashable, Callable[[], None]]
"""By the record that each changes."""


class Book:
    """All live records of this node."""

    def __init__(self, journal: Journal, *, slots: int) -> None:
        state = journal.state()
        self._journal = journal
        self._slots = slots
        self._lock = threading.Lock()
        self._writing = threading.RLock()
        self._reserved: frozenset[Slot] = frozenset()
        self._late: dict[Hashable, Callable[[], None]] = {}
        self._preparations = {p.key: p for p in state.preparations}
        self._attachments = {a.id: a for a in state.attachments}
        self._quarantines = {q.device: q for q in state.quarantines}
        generations = [p.generation for p in state.preparations]
        generations += [a.generation for a in state.attachments]
        self._generation = max(generations, default=0)
        self.state: object = object()
        """Another one whenever a preparation or an attachment changed. Ask for it before something is made of
        these: that is good while it is the same."""
        self._listener: Callable[[], None] | None = None

    def listen(self, told: Callable[[], None]) -> None:
        """Have told called after each such change, by the thread that made it, which has a lock of
        this book's: it must be quick."""
        self._listener = told

    def _changed(self) -> None:
        self.state = object()
        if self._listener is not None:
            self._listener()

    # --- reading ------------------------------------------------------------------------------------

    def preparations(self) -> tuple[Preparation, ...]:
        with self._lock:
            return tuple(self._preparations.values())

    def attachments(self) -> tuple[Attachment, ...]:
        with self._lock:
            return tuple(self._attachments.values())

    def quarantines(self) -> dict[DeviceName, Quarantine]:
        with self._lock:
            return dict(self._quarantines)

    def preparation(self, key: PreparationKey) -> Preparation | None:
        with self._lock:
            return self._preparations.get(key)

    def attachment(self, id: AttachmentId) -> Attachment | None:
        with self._lock:
            return self._attachments.get(id)

    def of_claim(self, uid: ClaimUid) -> tuple[Preparation, ...]:
        return tuple(p for p in self.preparations() if p.key.claim_uid == uid)

    def of_device(self, name: DeviceName) -> tuple[Preparation, ...]:
        """Who has the device, or the share of one, or any share of the device."""
        return tuple(p for p in self.preparations() if name in (p.key.unit, p.key.device))

    def indices(self) -> frozenset[IfIndex]:
        """Of interfaces that are known by them, wherever they are."""
        identities = (p.identity for p in self.preparations())
        return frozenset(each.ifindex for each in identities if isinstance(each, SoftwareIdentity))

    def in_namespace(self, namespace: str) -> tuple[Preparation, ...]:
        """Prepared ones only: the claims that a pod of this namespace could name."""
        return tuple(
            p
            for p in self.preparations()
            if p.claim.namespace == namespace and p.state is PreparationState.PREPARED
        )

    def of_sandbox(self, id: SandboxId) -> tuple[Attachment, ...]:
        return tuple(a for a in self.attachments() if a.sandbox == id)

    def attachments_of(self, key: PreparationKey) -> tuple[Attachment, ...]:
        return tuple(a for a in self.attachments() if a.preparation == key)

    def next_generation(self) -> int:
        with self._lock:
            self._generation += 1
            return self._generation

    def _free_slots(self, count: int) -> list[Slot]:
        """The lowest slots no preparation has; NotNow when so many are not left."""
        taken = {p.slot for p in self.preparations()} | self._reserved
        free = [slot for number in range(self._slots) if (slot := Slot(number)) not in taken][:count]
        if len(free) < count:
            raise NotNow(f"all {self._slots} accounting slots of this node are in use")
        return free

    # --- writing ------------------------------------------------------------------------------------

    def reserve(self, slots: frozenset[Slot]) -> None:
        """Slots that are given to nobody, in place of those named before."""
        self._reserved = slots

    @property
    def behind(self) -> bool:
        """Whether the journal lacks changes that were made here."""
        return bool(self._late)

    def catch_up(self) -> None:
        """Write what the journal did not take before."""
        with self._writing:
            if self._late:
                self._write({}, insist=False)

    def open_preparations(self, preparations: Sequence[Preparation]) -> tuple[Preparation, ...]:
        """Journal the intent, durably and as one, and take a slot for each; returns them as written.

        As one, so that what is on record of a claim is always the whole of it or on its way home.
        """
        with self._writing:
            for each in preparations:
                if (known := self.preparation(each.key)) is not None:
                    raise ImpossibleTransition(f"preparation {each.key.unit}: it is {known.state} already")
                check_preparation(None, each.state, each.key.unit)
            written = tuple(
                replace(each, slot=slot, generation=self.next_generation())
                for each, slot in zip(preparations, self._free_slots(len(preparations)), strict=True)
            )
            put = self._journal.put_preparation
            self._write({p.key: partial(put, p, durable=True) for p in written}, insist=True)
            with self._lock:
                self._preparations.update({p.key: p for p in written})
                self._changed()
            return written

    def amend_preparation(self, preparation: Preparation) -> Preparation:
        """Another config for a preparation that is under way: what it was journalled with cannot be had."""
        with self._writing:
            current = self.preparation(preparation.key)
            if current is None or current.generation != preparation.generation:
                raise ImpossibleTransition(f"preparation {preparation.key.unit}: its record was made anew")
            put = partial(self._journal.put_preparation, preparation, durable=True)
            self._write({preparation.key: put}, insist=True)
            with self._lock:
                self._preparations[preparation.key] = preparation
                self._changed()
            return preparation

    def advance_preparations(
        self, preparations: Iterable[Preparation], state: PreparationState, *, insist: bool = True
    ) -> tuple[Preparation, ...]:
        """All in one transaction, so that a claim is prepared as a whole or not at all.

        ImpossibleTransition also where a record is no longer there or was made anew meanwhile.
        """
        with self._writing:
            written = []
            for each in preparations:
                self._check(each, state)
                written.append(replace(each, state=state))
            self._write({p.key: partial(self._journal.put_preparation, p) for p in written}, insist)
            with self._lock:
                self._preparations.update({p.key: p for p in written})
                self._changed()
            return tuple(written)

    def close_preparation(self, preparation: Preparation) -> None:
        """The device is clean or no more: its record goes, and a quarantine with it."""
        with self._writing:
            current = self.preparation(preparation.key)
            if current is None:
                return
            self._check(preparation, None)
            device = preparation.key.unit
            drops: dict[Hashable, Callable[[], None]] = {
                preparation.key: partial(self._journal.drop_preparation, preparation.key)
            }
            if device in self._quarantines:
                drops[_Withheld(device)] = partial(self._journal.drop_quarantine, device)
            self._write(drops, insist=False)
            with self._lock:
                del self._preparations[preparation.key]
                self._changed()
                self._quarantines.pop(device, None)

    def _check(self, preparation: Preparation, state: PreparationState | None) -> None:
        """Against the record there is now, not against what the caller remembers of it."""
        current = self.preparation(preparation.key)
        if current is not None and current.generation != preparation.generation:
            raise ImpossibleTransition(f"preparation {preparation.key.unit}: its record was made anew")
        check_preparation(current.state if current else None, state, preparation.key.unit)

    def open_attachment(self, attachment: Attachment) -> Attachment:
        with self._writing:
            check_attachment(None, attachment.state, attachment.id)
            self._write({attachment.id: partial(self._journal.put_attachment, attachment)}, insist=True)
            with self._lock:
                self._attachments[attachment.id] = attachment
                self._changed()
            return attachment

    def advance_attachments(
        self, attachments: Iterable[Attachment], state: AttachmentState, *, insist: bool = True
    ) -> tuple[Attachment, ...]:
        """All in one transaction, so that a sandbox is attached as a whole or not at all."""
        with self._writing:
            written = []
            for attachment in attachments:
                current = self.attachment(attachment.id)
                check_attachment(current.state if current else None, state, attachment.id)
                written.append(replace(attachment, state=state))
            self._write({a.id: partial(self._journal.put_attachment, a) for a in written}, insist)
            with self._lock:
                self._attachments.update({a.id: a for a in written})
                self._changed()
            return tuple(written)

    def close_attachment(self, attachment: Attachment) -> None:
        with self._writing:
            current = self.attachment(attachment.id)
            if current is None:
                return
            check_attachment(current.state, None, attachment.id)
            self._write({attachment.id: partial(self._journal.drop_attachment, attachment.id)}, insist=False)
            with self._lock:
                del self._attachments[attachment.id]
                self._changed()

    def quarantine(
        self, device: DeviceName, reason: str, wall: float, *, held: PreparationKey | None = None
    ) -> bool:
        """Withhold the device until it is clean; False if it is for that reason already. held: only while
        there is this preparation, which may be closed by another thread meanwhile."""
        with self._writing:
            known = self._quarantines.get(device)
            if (known is not None and known.reason == reason) or (held and self.preparation(held) is None):
                return False
            record = Quarantine(device=device, reason=reason, since_wall=wall)
            self._write({_Withheld(device): partial(self._journal.put_quarantine, record)}, insist=False)
            with self._lock:
                self._quarantines[device] = record
            return True

    def release(self, device: DeviceName) -> None:
        with self._writing:
            if device not in self._quarantines:
                return
            self._write({_Withheld(device): partial(self._journal.drop_quarantine, device)}, insist=False)
            with self._lock:
                del self._quarantines[device]

    def _write(self, changes: Changes, insist: bool) -> None:
        """In one transaction with what is late. Homeward changes (not insist) go on in memory when the disk
        is full, and are written before anything else is: the records of a device that went home must not
        come back, at the next start, beside those of its next holder."""
        try:
            with self._journal.transaction():
                for change in (*self._late.values(), *changes.values()):
                    change()
        except DriverError as error:
            if insist:
                raise
            log.warning("%s", error)
            for record, change in changes.items():
                self._late.pop(record, None)
                self._late[record] = change
        else:
            self._late.clear()


@dataclass(frozen=True, slots=True)
class _Withheld:
    """Names a quarantine's record."""

    device: DeviceName
