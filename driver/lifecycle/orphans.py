"""Devices that pods hold and no record tells of: journal and mirror were lost while the node was in use.

Invariant: an orphan is a quarantined device without a preparation. It stays in its pod, up and counted, and
its CDI spec and live file stand, until its claim is unprepared; its accounting slot is given to nobody else
while its programs live; and it is never given away before someone said that it is as it should be.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from bpf.errors import BpfError
from bpf.foreign import detach_foreign
from driver.errors import DriverError
from driver.journal.ledger import Account
from driver.lifecycle.context import Context
from driver.lifecycle.projections import Projections
from driver.lifecycle.shares import owner_of
from driver.lifecycle.usage import Usage
from driver.model import ClaimUid, Device, DeviceName
from hw.errors import HwError
from hw.model import LinkFlags
from hw.netlink import LinkSocket
from hw.subinterface import is_ours

log = logging.getLogger(__name__)

UNKNOWN = (
    "it was in a pod when the records were lost, so what it was like before is not known: when the pod is "
    "gone, set it as it should be and run `knd cleanup --force`, or reboot"
)
NOT_COUNTED = "the records were lost: what was counted after the last checkpoint has no owner"


class Orphans:
    """Found again at every start; all methods are for worker threads and may be repeated."""

    def __init__(self, context: Context, projections: Projections, usage: Usage) -> None:
        self._context = context
        self._projections = projections
        self._usage = usage

    def devices(self) -> frozenset[DeviceName]:
        book = self._context.book
        return frozenset(book.quarantines()) - {p.key.unit for p in book.preparations()}

    def claims(self) -> frozenset[ClaimUid]:
        """Whose files must stand."""
        devices = self.devices()
        cdi = self._context.cdi
        return frozenset(uid for uid in cdi.claims() if cdi.devices(uid) & devices)

    def find(self) -> None:
        """After the records were lost: withhold every device that anything but a record tells of."""
        context = self._context
        names = {device for uid in context.cdi.claims() for device in context.cdi.devices(uid)}
        if context.programs is not None:
            names.update(DeviceName(name) for name in context.programs.names())
        for name in sorted(names - {p.key.unit for p in context.book.preparations()}):
            log.error("%s is withheld: %s", name, UNKNOWN)
            context.book.quarantine(name, UNKNOWN, context.clock.wall())
        self.keep_slots()

    def keep_slots(self) -> None:
        """Whose programs still count must not share their slot with a new holder."""
        self._context.book.reserve(self._context.accounting.busy_slots() if self.devices() else frozenset())

    def end(self, uid: ClaimUid) -> None:
        """The claim of a pod that is gone: its account is closed, its programs and files go."""
        devices = self._context.cdi.devices(uid) & self.devices()
        for account in self._accounts():
            if account.owner.claim.uid == uid:
                devices |= {account.owner.device}
                self._close(account)
        self._projections.publish_claim(uid)
        if devices:
            self._let_go(devices)
            self.forget_gone()
            self.keep_slots()

    def end_all(self) -> None:
        """Whatever lives: for a node that is to be without an agent. What is at home is taken as it is."""
        for uid in self.claims() | {account.owner.claim.uid for account in self._accounts()}:
            self.end(uid)
        self.end_shares()
        self.forget_gone()
        self._context.devices.rescan()
        for name in self.devices():
            device = self._context.devices.get(name)
            if device is not None and device.ifindex is not None:
                self._neutralise(device)
                self._context.book.release(name)

    def _accounts(self) -> list[Account]:
        """Of the ledger, that are open and of no attachment on record."""
        return [
            account
            for account in self._context.ledger.accounts(since=self._context.clock.wall())
            if account.ended is None and self._context.book.attachment(account.owner.attachment) is None
        ]

    def _close(self, account: Account) -> None:
        programs = self._context.programs
        try:
            slot = programs.slot(account.owner.device) if programs is not None else None
            self._usage.close_orphan(account.owner, slot, NOT_COUNTED)
        except (BpfError, DriverError) as error:
            log.error("closing the account of %s: %s", account.owner.device, error)

    def forget_gone(self) -> bool:
        """Withhold no longer what is no more, as its programs say; True if there was any. Without tcx nothing
        tells: such a device is withheld until the next boot."""
        programs = self._context.programs
        if programs is None:
            return False
        pairs = {device: programs.state(device) for device in self.devices()}
        gone = [device for device, pair in pairs.items() if pair is not None and not pair.alive]
        for device in gone:
            programs.detach(device)
            self._context.foreign.sweep(device, None)
            self._context.book.release(device)
        if gone:
            self._context.devices.rescan()
            self.keep_slots()
        return bool(gone)

    def _let_go(self, devices: Iterable[DeviceName]) -> None:
        """Programs off those that are home; the others' tell when they are no more."""
        context = self._context
        context.devices.rescan()
        for name in devices:
            device = context.devices.get(name)
            if context.programs is not None and device is not None and device.ifindex is not None:
                context.programs.detach(name)

    def end_shares(self) -> None:
        """Interfaces that were made for claims, are in no pod, and are on no record: no claim will have
        them."""
        known = self._context.book.indices()
        owner = owner_of(self._context.driver, self._context.pool)
        with LinkSocket(None) as links:
            for link in filter(is_ours, links.dump()):
                if link.ifindex not in known and link.alias == owner:
                    log.info("removing %a, which was made for a claim that no record tells of", link.name)
                    links.delete(link.ifindex)

    def _neutralise(self, device: Device) -> None:
        """What a pod could have left and is never right, off; the rest is for whoever forces it to know."""
        assert device.ifindex is not None
        try:
            with LinkSocket(None) as links:
                links.set_down(device.ifindex)
                links.change(
                    device.ifindex,
                    alias="",
                    mac=device.settings.mac if device.settings is not None else None,
                    clear_flags=LinkFlags.PROMISC | LinkFlags.ALLMULTI | LinkFlags.NOARP,
                )
            detach_foreign(device.ifindex, own=self._context.foreign.own(device.name))
            self._context.foreign.sweep(device.name, device.ifindex)
        except (HwError, BpfError, OSError) as error:
            log.error("%s: %s", device.name, error)
