"""What another version of the agent counted, after an upgrade or a way back.

Invariant: what it counted is in what is read here, or is on record as a gap, before its maps are let go.
Nothing is let go while it is not known who holds which slot.
"""

from __future__ import annotations

import logging

from driver.lifecycle.context import Context
from driver.model import Attachment, AttachmentState

log = logging.getLogger(__name__)

_COUNTED = frozenset({AttachmentState.ATTACHED, AttachmentState.DETACHING})


class Upgrades:
    """All methods are for worker threads and may be repeated."""

    def __init__(self, context: Context) -> None:
        self._context = context
        for path in context.accounting.others.folders:
            log.info("counts that another version of the agent made at %s are read on", path)
        for each in context.accounting.others.unreadable:
            log.error("%s holds counts that cannot be read here: %s", each.path, each.why)

    def begin(self) -> None:
        """Before anything goes home: what is read from now on is not what was read before."""
        for each in self._context.accounting.others.unreadable:
            reason = (
                f"what another version of the agent counted at {each.path.name} cannot be read: {each.why}"
            )
            now = self._context.clock.wall()
            for attachment in self._counted():
                self._context.ledger.begin_anew(attachment.id, self._context.hook, now, reason)

    def finish(self) -> None:
        """Once every device has programs of this version."""
        self._take_orphans_along()
        # Until now the old programs counted on.
        self.begin()
        self._context.accounting.others.forget_unreadable()
        self._tell_unplaced()
        self.let_go()

    def let_go(self) -> None:
        """Of counts that nobody needs any more."""
        others = self._context.accounting.others
        if not others.folders:
            return
        held = {p.slot for p in self._context.book.preparations()} | self._context.accounting.busy_slots()
        for path in others.settle(held):
            log.info("%s is removed: all that another version counted there is in the ledger", path)

    def _take_orphans_along(self) -> None:
        """Devices without a record: their programs say which slot they count into."""
        programs = self._context.programs
        if programs is None:
            return
        known = {p.key.unit for p in self._context.book.preparations()}
        for name in programs.names() - known:
            slot = programs.slot(name)
            if slot is not None:
                programs.repoint_all({name: slot})

    def _tell_unplaced(self) -> None:
        book, others = self._context.book, self._context.accounting.others
        accounts = self._context.ledger.accounts(since=self._context.clock.wall()) if others.folders else ()
        began = {account.owner.attachment: account.owner.started for account in accounts}
        for attachment in self._counted():
            preparation = book.preparation(attachment.preparation)
            lost = others.unplaced(preparation.slot) if preparation is not None else None
            if lost is None or attachment.id not in began:
                continue
            reason = (
                f"another version counted {lost.bytes} bytes in {lost.packets} packets in classes "
                "or kinds of traffic that this one does not have"
            )
            log.error("pod %s/%s: %s", attachment.pod.namespace, attachment.pod.name, reason)
            # The same each time, so that it is on record once.
            self._context.ledger.gap(attachment.id, began[attachment.id], began[attachment.id], reason)

    def _counted(self) -> list[Attachment]:
        return [each for each in self._context.book.attachments() if each.state in _COUNTED]
