"""Whose the counters of a device are: from its attachments to the ledger's meters and to a scrape.

Invariant: what a meter counted goes to an attachment only while that alone has the device, else to the
device. A reading and its entry in the ledger are one under a lock, so that readings come in their order; but
for those of a glance, which are of devices that nobody else reads until their attachment ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from bpf.attach import child_of
from bpf.layout import Cell, Framing, Slot
from driver.clock import Clock
from driver.errors import DriverError
from driver.execute.engine import EXPECTED
from driver.execute.glance import AS_IT_WAS, Glance
from driver.execute.meters import INTERFACE, RDMA, VF, NodeMeters, PfCounters, Shown
from driver.execute.target import Target
from driver.journal.ledger import Ledger
from driver.journal.meters import Taken
from driver.journal.stretches import Holder, MeterKey, Reading
from driver.lifecycle.book import Book
from driver.model import Attachment, AttachmentId, AttachmentState, Preparation
from driver.samples import MeterSample, UnaccountedSample
from hw.model import Direction, RdmaIndex

log = logging.getLogger(__name__)

Reach = Callable[[Attachment], AbstractContextManager[Target | None]]
"""The device of an attachment where it is now; None where there is no record of it any more."""

_HOLDING = frozenset({AttachmentState.ATTACHING, AttachmentState.ATTACHED})
_FRAME_EXTRA = {Framing.ETHERNET: 8, Framing.IPOIB: 40}
"""Bytes of a packet that some interfaces count and BPF does not: a frame's checksum and a VLAN tag that was
added behind it; InfiniBand's global route header, which mlx5 counts of what comes."""

Totals = Mapping[str, int]
Owner = tuple[str, str, str, str, str]
Owners = Mapping[Holder, Owner]


@dataclass(frozen=True, slots=True)
class Missed:
    """What an interface or a PF counted in one direction and BPF did not, beyond what headers explain."""

    bytes: int
    packets: int


_Counted = Mapping[tuple[Holder, MeterKey], Totals]
_Shown = tuple[_Counted, Owners, Mapping[str, str], tuple[MeterSample, ...]]
_ShownMissed = tuple[
    Mapping[tuple[AttachmentId, str, Direction], Missed], Owners, tuple[UnaccountedSample, ...]
]


class Metering:
    """Reads devices' own counters at attach, now and then, and at detach. Safe on any thread."""

    def __init__(
        self,
        book: Book,
        ledger: Ledger,
        clock: Clock,
        meters: NodeMeters,
        glance: Glance,
        cells_of: Callable[[Slot], tuple[Cell, ...]],
    ) -> None:
        """cells_of: what BPF has counted in a slot."""
        self._book = book
        self._ledger = ledger
        self._clock = clock
        self._meters = meters
        self._glance = glance
        self._cells_of = cells_of
        self._lock = threading.Lock()
        self._last: dict[MeterKey, tuple[Holder, Reading]] = {}
        self._ended_in: object = None
        """The state of the records in which nobody was left who had gone."""
        self._totals: dict[tuple[Holder, MeterKey], Totals] = {}
        self._missed: dict[tuple[AttachmentId, str, Direction], Missed] = {}
        # What was made for the last scrape, behind what it was made of. Each is put in place as one, and what
        # it was made of is never changed but by another in its place: scrapes need no lock.
        self._known_owners: tuple[object, Owners, Mapping[str, str]] = (None, {}, {})
        self._shown: _Shown = ({}, {}, {}, ())
        self._shown_missed: _ShownMissed = ({}, {}, ())

    # --- the life of an attachment ------------------------------------------------------------------

    def begin(self, target: Target) -> None:
        """The attachment has its device from now on. LedgerWriteFailed: it cannot be counted."""
        assert target.attachment is not None
        with self._lock:
            taken = {}
            for shown in self._meters.read(target):
                holder = _only(self._holders(shown, target.attachment, target.preparation))
                taken[shown.meter] = Taken(holder, shown.reading, shown.reason)
            totals = self._ledger.meters.begin(taken, self._clock.wall())
            for meter, each in taken.items():
                self._remember(meter, each.holder, each.reading)
            self._put_totals({target.attachment.id, *(each.holder for each in taken.values())}, totals)
            if not target.preparation.by_file:
                # A series whose first number is not 0 has no increase that an alert could see.
                nothing = {(target.attachment.id, INTERFACE, each): Missed(0, 0) for each in Direction}
                self._missed = {**self._missed, **nothing}

    def leave(self, target: Target) -> None:
        """It gives the device back: read for the last time, and whoever still has it goes on alone.
        LedgerWriteFailed: to be done again."""
        leaving = target.attachment
        assert leaving is not None
        with self._lock:
            held = {each.meter: each.holder for each in self._ledger.meters.living()}
            mine = {meter for meter, holder in held.items() if holder == leaving.id}
            stay: set[Holder] = {None}
            preparation = target.preparation
            pfs = PfCounters() if any(meter.source == VF for meter in mine) else None
            for shown in self._meters.read(target, pfs):
                if held.get(shown.meter, leaving.id) not in (leaving.id, None):
                    continue
                mine.discard(shown.meter)
                rest = self._holders(shown, leaving, preparation, without=leaving.id)
                self._hand_on(shown, rest)
                stay.update(rest)
            for meter in mine:
                self._release(meter, None, "it was not found when it was given back")
            self._forget(leaving.id)
            self._refresh(stay)

    def leave_child(self, target: Target) -> None:
        """What was made on its interface is about to go, and its counters with it: read for the last time. If
        they cannot be, leave tells of a gap. LedgerWriteFailed: as leave."""
        assert target.attachment is not None
        with self._lock:
            held = {each.meter: each.holder for each in self._ledger.meters.living()}
            for shown in self._meters.read_child(target):
                if shown.reading is not None and held.get(shown.meter) == target.attachment.id:
                    self._release(shown.meter, shown.reading, "")

    def settle(self, reach: Reach, *, all_known: bool) -> None:
        """Read what all attachments have, and put right whose it is: what an earlier agent left, and what
        became of readings that failed. all_known: whoever is not on record has no device; not so while a lost
        journal is being made up for."""
        attached = [
            (attachment, preparation)
            for attachment in self._book.attachments()
            if attachment.state is AttachmentState.ATTACHED
            and (preparation := self._book.preparation(attachment.preparation)) is not None
        ]
        pfs = PfCounters()
        told = self._glance.look(attached, pfs)
        for attachment, preparation in attached:
            shown = told.get(attachment.id)
            try:
                if shown is None:
                    with reach(attachment) as target:
                        if target is not None:
                            self._settle(attachment, preparation, partial(self._meters.read, target, pfs))
                            self._glance.find(target)
                elif shown is not AS_IT_WAS:
                    self._settle(attachment, preparation, partial(tuple, shown))
                    self._glance.settled(attachment)
            except EXPECTED as error:
                log.warning("reading the counters of %s: %s", attachment.preparation.unit, error)
        if all_known:
            self._end_of_the_gone()

    def _settle(
        self, attachment: Attachment, preparation: Preparation, read: Callable[[], tuple[Shown, ...]]
    ) -> None:
        with self._lock:
            current = self._book.attachment(attachment.id)
            if current is None or current.state is not AttachmentState.ATTACHED:
                return
            changed = False
            for shown in read():
                holders = self._holders(shown, attachment, preparation)
                changed |= self._take(shown, holders, late=not shown.cross_check)
            if changed or (attachment.id, MeterKey(preparation.key.unit, INTERFACE)) not in self._totals:
                self._refresh({attachment.id, None})
            self._compare(attachment.id, preparation)

    def _end_of_the_gone(self) -> None:
        """Whoever left without a last reading: with an older agent, or a crash in between."""
        # Before the look: what changes meanwhile is looked at next time.
        state = self._book.state
        if state is self._ended_in:
            return
        with self._lock:
            holders: set[Holder] = set()
            names: set[str] = set()
            for attachment in self._book.attachments():
                preparation = self._book.preparation(attachment.preparation)
                holders.add(attachment.id)
                if preparation is not None and preparation.rdma is not None:
                    names.add(preparation.rdma.name)
            try:
                for living in self._ledger.meters.living():
                    shared = living.holder is None and living.meter.subject in names
                    if living.holder not in holders and not shared:
                        self._release(living.meter, None, "nobody read it when it was given back")
                self._ended_in = state
            except DriverError as error:
                log.error("%s", error)

    # --- whose it is --------------------------------------------------------------------------------

    def _holders(
        self,
        shown: Shown,
        attachment: Attachment,
        preparation: Preparation,
        without: AttachmentId | None = None,
    ) -> tuple[AttachmentId, ...]:
        """The attachments that have what the meter counts."""
        own = attachment.id
        others: set[AttachmentId] = set()
        index = rdma_index(preparation, attachment)
        if shown.meter.source in RDMA and index is not None:
            for other in self._book.attachments():
                its = self._book.preparation(other.preparation)
                if other.state in _HOLDING and its is not None and rdma_index(its, other) == index:
                    others.add(other.id)
        return tuple(sorted((others | {own}) - {without}))

    def _take(self, shown: Shown, holders: tuple[AttachmentId, ...], *, late: bool) -> bool:
        """Whether anything was written: an idle device costs the disk nothing."""
        holder = _only(holders)
        if shown.reading is not None and self._last.get(shown.meter) == (holder, shown.reading):
            return False
        self._ledger.meters.take(
            shown.meter, holder, shown.reading, self._clock.wall(), reason=shown.reason, late=late
        )
        self._remember(shown.meter, holder, shown.reading)
        return True

    def _remember(self, meter: MeterKey, holder: Holder, reading: Reading | None) -> None:
        if reading is not None:
            self._last[meter] = (holder, reading)
        else:
            self._last.pop(meter, None)

    def _hand_on(self, shown: Shown, rest: tuple[AttachmentId, ...]) -> None:
        if rest:
            self._take(shown, rest, late=False)
        else:
            self._release(shown.meter, shown.reading, shown.reason)

    def _release(self, meter: MeterKey, reading: Reading | None, reason: str) -> None:
        self._ledger.meters.release(meter, reading, self._clock.wall(), reason)
        self._last.pop(meter, None)

    # --- for a scrape -------------------------------------------------------------------------------

    def _refresh(self, holders: set[Holder]) -> None:
        self._put_totals(holders, self._ledger.meters.totals(holders))

    def _put_totals(self, holders: set[Holder], found: Mapping[tuple[Holder, MeterKey], Totals]) -> None:
        kept = {key: totals for key, totals in self._totals.items() if key[0] not in holders}
        self._totals = {**kept, **found}

    def _forget(self, gone: AttachmentId) -> None:
        self._totals = {key: totals for key, totals in self._totals.items() if key[0] != gone}
        self._missed = {key: missed for key, missed in self._missed.items() if key[0] != gone}

    def _compare(self, id: AttachmentId, preparation: Preparation) -> None:
        """BPF is read last, so that what passes in between never seems to have passed it by."""
        if preparation.by_file:
            return
        cells = self._cells_of(preparation.slot)
        extra = _FRAME_EXTRA[preparation.framing]
        for source in (INTERFACE, VF):
            totals = self._counted(id, source, preparation.key.unit)
            for direction in Direction if totals is not None else ():
                assert totals is not None
                key = (id, source, direction)
                now, before = missed(totals, cells, direction, extra), self._missed.get(key, Missed(0, 0))
                # What a queue holds or drops makes it smaller again for a while: it was missed all the same.
                self._missed = {
                    **self._missed,
                    key: Missed(max(now.bytes, before.bytes), max(now.packets, before.packets)),
                }

    def _counted(self, id: AttachmentId, source: str, device: str) -> Totals | None:
        """By an interface and what is made on it, which count what passes them each for itself: the slot's
        cells are of both."""
        own = self._totals.get((id, MeterKey(device, source)))
        if own is None:
            return None
        made = self._totals.get((id, MeterKey(child_of(device), source)), {})
        return {name: own.get(name, 0) + made.get(name, 0) for name in own.keys() | made.keys()}

    def samples(self) -> tuple[MeterSample, ...]:
        """Each counter of each meter, as last read: of living attachments and of the devices they share. The
        same tuple as before where nothing is another."""
        totals, shown = self._totals, self._shown
        owners, children = self._whose()
        if not (shown[0] is totals and shown[1:3] == (owners, children)):
            # Mostly nothing was read since the last scrape, and then these are thousands of equal ones.
            made = tuple(_samples(totals, owners, children))
            shown = self._shown = (totals, owners, children, made)
        return shown[3]

    def unaccounted(self) -> tuple[UnaccountedSample, ...]:
        """The same tuple as before where nothing is another."""
        every, shown = self._missed, self._shown_missed
        owners, _ = self._whose()
        if not (shown[0] is every and shown[1] == owners):
            made = tuple(
                UnaccountedSample(*owners[id], direction.name.lower(), source, each.bytes, each.packets)
                for (id, source, direction), each in every.items()
                if id in owners
            )
            shown = self._shown_missed = (every, owners, made)
        return shown[2]

    def _whose(self) -> tuple[Owners, Mapping[str, str]]:
        known = self._known_owners
        state = self._book.state
        if known[0] is not state:
            known = self._known_owners = (state, self._owners(), self._children())
        return known[1:]

    def _owners(self) -> Owners:
        """Namespace, pod, claim, device and interface; all "" for what is a device's."""
        found: dict[Holder, Owner] = {None: ("", "", "", "", "")}
        for attachment in self._book.attachments():
            preparation = self._book.preparation(attachment.preparation)
            if preparation is not None:
                pod, claim = attachment.pod, preparation.claim
                device, interface = preparation.key.device, preparation.pod_ifname or ""
                found[attachment.id] = (pod.namespace, pod.name, claim.name, device, interface)
        return found

    def _children(self) -> dict[str, str]:
        """What pods call the interfaces that are made on their devices', by the subject of their meters."""
        found: dict[str, str] = {}
        for attachment in self._book.attachments():
            preparation = self._book.preparation(attachment.preparation)
            wish = preparation.config.rdma.ipoib if preparation is not None else None
            if wish is not None:
                found[child_of(attachment.preparation.unit)] = wish.name
        return found


def _only(holders: tuple[AttachmentId, ...]) -> Holder:
    return holders[0] if len(holders) == 1 else None


def _samples(counted: _Counted, owners: Owners, children: Mapping[str, str]) -> Iterator[MeterSample]:
    for (holder, meter), totals in counted.items():
        if holder not in owners:
            continue
        owner = (*owners[holder][:4], children.get(meter.subject, owners[holder][4]))
        place = (meter.subject, meter.port, meter.source)
        for name, total in totals.items():
            yield MeterSample(*owner, *place, name, total)


def missed(totals: Totals, cells: tuple[Cell, ...], direction: Direction, extra: int) -> Missed:
    """What these totals show beyond BPF's cells and extra bytes a packet. The pod's egress is what its
    interface sent."""
    way = "tx" if direction is Direction.EGRESS else "rx"
    packets = totals.get(f"{way}_packets", 0)
    counted = [cell for cell in cells if cell.direction == direction]
    beyond = totals.get(f"{way}_bytes", 0) - sum(cell.bytes for cell in counted) - packets * extra
    return Missed(max(beyond, 0), max(packets - sum(cell.packets for cell in counted), 0))


def rdma_index(preparation: Preparation, attachment: Attachment) -> RdmaIndex | None:
    """Of the RDMA device that an attachment has; None where it has none, or one that nobody shares."""
    if preparation.rdma is None:
        return None
    if attachment.rdma is not None:
        return attachment.rdma.index
    return preparation.rdma.index
