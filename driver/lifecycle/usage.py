"""From counters in the kernel to numbers with an owner.

Invariant: a slot is read only for the attachment that has it now; totals are absolute, so writing them
twice changes nothing.
"""

from __future__ import annotations

import logging

from bpf.accounting import Accounting
from bpf.layout import Cell, Hook, Slot
from driver.clock import Clock
from driver.errors import DriverError
from driver.journal.ledger import Ledger, UsageOwner
from driver.lifecycle.book import Book
from driver.model import Attachment, AttachmentState, PodSample, Preparation
from hw.model import Direction, IfName

log = logging.getLogger(__name__)

KEEP_SECONDS = 400 * 86400
"""A year and a month: the longest that a bill is disputed."""
_COUNTING = frozenset({AttachmentState.ATTACHED, AttachmentState.DETACHING})


class Usage:
    """Reads the accounting map for scrapes, checkpoints and folds. Safe on any thread."""

    def __init__(
        self,
        *,
        book: Book,
        ledger: Ledger,
        accounting: Accounting,
        clock: Clock,
        hook: Hook,
        class_names: tuple[str, ...],
    ) -> None:
        self._book = book
        self._ledger = ledger
        self._accounting = accounting
        self._clock = clock
        self._hook = hook
        self._class_names = class_names

    def begin(self, attachment: Attachment, preparation: Preparation) -> None:
        """Open the attachment's account, before its first packet can be."""
        self._ledger.begin(owner_of(attachment, preparation, self._clock.wall()))

    def fold(self, attachment: Attachment, preparation: Preparation) -> None:
        """Put the final totals into the ledger and close the account. None is made for an attachment that
        got neither an account nor traffic."""
        cells = self._accounting.read(preparation.slot)
        if not cells and not self._ledger.knows(attachment.id):
            return
        self.begin(attachment, preparation)
        self._ledger.fold(
            attachment.id,
            cells,
            source=self._hook,
            class_names=self._class_names,
            ended=self._clock.wall(),
        )

    def prune(self) -> None:
        """Forget accounts that were closed longer ago than anyone bills for."""
        try:
            forgotten = self._ledger.forget(self._clock.wall() - KEEP_SECONDS)
        except DriverError as error:
            log.error("pruning the usage ledger: %s", error)
            return
        if forgotten:
            log.info("forgot %d accounts that were closed over %d days ago", forgotten, KEEP_SECONDS / 86400)

    def set_class_names(self, names: tuple[str, ...]) -> None:
        """The policy's classes changed; what was counted before keeps the old names."""
        self.checkpoint()
        self._class_names = names

    def close_orphan(self, owner: UsageOwner, slot: Slot | None, reason: str) -> None:
        """Close an account whose attachment is on no record. slot None: nobody knows where it was counted,
        and the reason is noted as a gap."""
        now = self._clock.wall()
        if slot is None:
            self._ledger.gap(owner.attachment, owner.started, now, reason)
        cells = self._accounting.read(slot) if slot is not None else ()
        self._ledger.fold(
            owner.attachment, cells, source=self._hook, class_names=self._class_names, ended=now
        )

    def checkpoint(self) -> None:
        """Write the totals of all living attachments, so that a crash loses at most a minute."""
        rows = self._read()
        try:
            skipped = self._ledger.checkpoint(
                {attachment.id: cells for attachment, _, cells in rows},
                source=self._hook,
                class_names=self._class_names,
                wall=self._clock.wall(),
            )
            for attachment, preparation, _ in rows:
                if attachment.id in skipped:
                    # The ledger was lost; totals are absolute, so a new account misses nothing.
                    self.begin(attachment, preparation)
        except DriverError as error:
            log.error("usage checkpoint: %s", error)

    def samples(self) -> tuple[PodSample, ...]:
        """What a scrape shows: one sample per attachment and cell with traffic."""
        return tuple(
            PodSample(
                namespace=attachment.pod.namespace,
                pod=attachment.pod.name,
                claim=preparation.claim.name,
                device=preparation.key.device,
                interface=preparation.pod_ifname or "",
                direction=Direction(cell.direction).name.lower(),
                traffic_class=self._class_name(cell.traffic_class),
                kind=cell.kind.name.lower(),
                source=self._hook.value,
                bytes=cell.bytes,
                packets=cell.packets,
            )
            for attachment, preparation, cells in self._read()
            for cell in cells
        )

    def _class_name(self, index: int) -> str:
        return self._class_names[index] if index < len(self._class_names) else str(index)

    def _read(self) -> list[tuple[Attachment, Preparation, tuple[Cell, ...]]]:
        living = []
        for attachment in self._book.attachments():
            preparation = self._book.preparation(attachment.preparation)
            if attachment.state in _COUNTING and preparation is not None:
                living.append((attachment, preparation))
        cells = self._accounting.read_slots([p.slot for _, p in living])
        # An attachment that was closed during the read may have passed its slot on.
        return [
            (a, p, cells[p.slot])
            for a, p in living
            if p.slot in cells and self._book.attachment(a.id) is not None
        ]


def owner_of(attachment: Attachment, preparation: Preparation, started: float) -> UsageOwner:
    return UsageOwner(
        attachment=attachment.id,
        pod=attachment.pod,
        claim=preparation.claim,
        device=preparation.key.device,
        interface=preparation.pod_ifname or IfName(""),
        sandbox=attachment.sandbox,
        started=started,
    )
