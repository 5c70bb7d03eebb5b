"""From counters in the kernel to numbers with an owner.

Invariant: a slot is read only for the attachment that has it now; totals are absolute, so writing them
twice changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from bpf.accounting import Accounting
from bpf.layout import CLASSES, Cell, Hook, Slot, TrafficKind
from driver.clock import Clock
from driver.errors import DriverError
from driver.journal.ledger import Ledger, UsageOwner
from driver.lifecycle.book import Book
from driver.model import Attachment, AttachmentId, AttachmentState, PodSample, PodUid, Preparation
from driver.policy import UsagePolicy
from hw.model import Direction, IfName

log = logging.getLogger(__name__)

_DAY = 86400.0
_STEP = 5.0
"""Seconds that the wall clock may go astray from the monotonic one between two checkpoints before that counts
as set by somebody: far above what ntpd slews in a minute (30 ms)."""
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
        policy: Callable[[], UsagePolicy],
        labels_of: Callable[[PodUid], Mapping[str, str]],
    ) -> None:
        """labels_of: the labels of a pod of this node, as far as they are known."""
        self._book = book
        self._ledger = ledger
        self._accounting = accounting
        self._clock = clock
        self._hook = hook
        self._class_names = class_names
        self._policy = policy
        self._labels_of = labels_of
        self._clocks = (clock.monotonic(), clock.wall())
        self._unlabelled: set[AttachmentId] = set()
        self._shown: dict[AttachmentId, tuple[object, list[PodSample]]] = {}
        """What the last scrape showed of each, behind what it was made of: most devices of a node rest."""

    def started(self) -> None:
        """Put it on record that an agent begins here."""
        try:
            self._ledger.restarted(self._clock.wall())
        except DriverError as error:
            log.error("%s", error)

    def machine_restarted(self) -> None:
        """Before anything is read again: what was counted since the last checkpoint went with the machine."""
        try:
            self._ledger.machine_restarted(self._clock.wall())
        except DriverError as error:
            log.error("%s", error)

    def begin(self, attachment: Attachment, preparation: Preparation) -> None:
        """Open the attachment's account, before its first packet can be."""
        labels = self._labels(attachment)
        if labels:
            self._unlabelled.discard(attachment.id)
        else:
            self._unlabelled.add(attachment.id)
        self._ledger.begin(owner_of(attachment, preparation, self._clock.wall(), labels))

    def _labels(self, attachment: Attachment) -> tuple[tuple[str, str], ...]:
        wanted = self._policy().pod_labels
        labels = self._labels_of(attachment.pod.uid) if wanted else {}
        return tuple((name, labels[name]) for name in sorted(set(wanted)) if name in labels)

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
        self._unlabelled.discard(attachment.id)

    def prune(self) -> None:
        """Forget accounts that were closed longer ago than the policy keeps them, and make days of old
        hours."""
        days, now = self._policy().keep_days, self._clock.wall()
        try:
            forgotten = self._ledger.forget(now - days * _DAY)
            self._ledger.roll_up(now)
        except DriverError as error:
            log.error("pruning the usage ledger: %s", error)
            return
        if forgotten:
            log.info("forgot %d accounts that were closed over %d days ago", forgotten, days)

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
            self._look_at_the_clock()
            skipped = self._ledger.checkpoint(
                {attachment.id: cells for attachment, _, cells in rows},
                source=self._hook,
                class_names=self._class_names,
                wall=self._clock.wall(),
            )
            for attachment, preparation, _ in rows:
                # Skipped: the ledger was lost; totals are absolute, so a new account misses nothing. Without
                # labels: the pod was not known when its account was opened, or has none.
                if attachment.id in skipped or (
                    attachment.id in self._unlabelled and self._labels(attachment)
                ):
                    self.begin(attachment, preparation)
        except DriverError as error:
            log.error("usage checkpoint: %s", error)

    def _look_at_the_clock(self) -> None:
        """Put it on record if somebody set the wall clock: times of what was read before differ from it."""
        before, now = self._clocks, (self._clock.monotonic(), self._clock.wall())
        self._clocks = now
        astray = (now[1] - before[1]) - (now[0] - before[0])
        if abs(astray) > _STEP:
            log.warning("the clock was set by %+.0f s; the usage ledger says so", astray)
            self._ledger.clock_stepped(now[1], astray)

    def samples(self) -> tuple[PodSample, ...]:
        """What a scrape shows: one sample per attachment and cell with traffic."""
        labels = self._labels_of_cells()
        # Not by PodSample's own constructor, which takes as long again.
        new = tuple.__new__
        found: list[PodSample] = []
        before = self._shown
        shown: dict[AttachmentId, tuple[object, list[PodSample]]] = {}
        for attachment, preparation, cells in self._read():
            pod, interface = attachment.pod, preparation.pod_ifname or ""
            owner = (pod.namespace, pod.name, preparation.claim.name, preparation.key.device, interface)
            of = (cells, owner, self._class_names)
            known = before.get(attachment.id)
            if known is None or known[0] != of:
                made = [
                    new(PodSample, owner + labels[cell[0]][cell[1]][cell[2]] + cell[3:]) for cell in cells
                ]
                known = (of, made)
            shown[attachment.id] = known
            found += known[1]
        self._shown = shown
        return tuple(found)

    def _labels_of_cells(self) -> Sequence[Sequence[Sequence[tuple[str, str, str, str]]]]:
        """Direction, class, kind and source, of every cell that there can be: there are far more samples."""
        source = self._hook.value
        return [
            [
                [
                    (way.name.lower(), self._class_name(index), kind.name.lower(), source)
                    for kind in TrafficKind
                ]
                for index in range(CLASSES)
            ]
            for way in Direction
        ]

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


def owner_of(
    attachment: Attachment,
    preparation: Preparation,
    started: float,
    labels: tuple[tuple[str, str], ...] = (),
) -> UsageOwner:
    return UsageOwner(
        attachment=attachment.id,
        pod=attachment.pod,
        claim=preparation.claim,
        device=preparation.key.unit,
        interface=preparation.pod_ifname or IfName(""),
        sandbox=attachment.sandbox,
        started=started,
        labels=labels,
    )
