"""What devices in pods counted, asked of all of them at once from here, without a way into each pod.

Invariant: an answer counts only if it is of the device that was meant, by its identity; what is not told of
here is to be read where it is. Remembers values, and no socket or descriptor.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bpf.errors import BpfError
from bpf.limits import Dropped, Limits
from driver.execute.meters import NodeMeters, PfCounters, Shown
from driver.execute.target import Target
from driver.model import Attachment, AttachmentId, Preparation
from hw.elsewhere import Elsewhere, Place, is_of
from hw.errors import HwError
from hw.netlink import LinkSocket

log = logging.getLogger(__name__)

AS_IT_WAS = ()
"""In place of a reading: it would be the same as the last one."""
Held = tuple[Attachment, Preparation]


@dataclass(frozen=True, slots=True)
class _Told:
    """What a reading of one device is made of. link stands for the kernel's whole message: the counters, and
    which device it is that has them."""

    link: bytes
    dropped: Dropped
    vf: Mapping[str, int] | None


class Glance:
    """For one reader, who looks at all devices, and then reads where they are those that were not told of. A
    way into a pod costs ten times as much as what is asked there."""

    def __init__(self, limits: Limits, meters: NodeMeters) -> None:
        self._limits = limits
        self._meters = meters
        self._places: dict[AttachmentId, Place] = {}
        self._told: dict[AttachmentId, _Told] = {}
        """In the last look."""
        self._settled: dict[AttachmentId, _Told] = {}
        """Of what was read and written last."""

    def look(self, held: Sequence[Held], pfs: PfCounters) -> dict[AttachmentId, tuple[Shown, ...]]:
        """Readings of all of which that can be told from here."""
        ids = {attachment.id for attachment, _ in held}
        self._places = {id: place for id, place in self._places.items() if id in ids}
        self._settled = {id: told for id, told in self._settled.items() if id in ids}
        self._told = {}
        known = [pair for pair in held if pair[0].id in self._places]
        try:
            return self._look(known, pfs) if known else {}
        except (HwError, BpfError) as error:
            log.warning("what devices in pods counted is asked of each by itself: %s", error)
            return {}

    def _look(self, held: Sequence[Held], pfs: PfCounters) -> dict[AttachmentId, tuple[Shown, ...]]:
        dropped = self._limits.dropped_without_queues([preparation.slot for _, preparation in held])
        places = [self._places[attachment.id] for attachment, _ in held]
        found = {}
        with Elsewhere() as elsewhere, LinkSocket(None) as home:
            for pair, place, link in zip(held, places, elsewhere.links(places), strict=True):
                drops = dropped.get(pair[1].slot)
                shown = self._shown(pair, place, link, drops, pfs, home) if link and drops else None
                if shown is not None:
                    found[pair[0].id] = shown
        return found

    def _shown(
        self, pair: Held, place: Place, link: bytes, drops: Dropped, pfs: PfCounters, home: LinkSocket
    ) -> tuple[Shown, ...] | None:
        attachment, preparation = pair
        try:
            vf = pfs.of(preparation.identity, home)
        except HwError:
            return None
        told = _Told(_digest(link), drops, vf[1] if vf is not None else None)
        if told == self._settled.get(attachment.id):
            return AS_IT_WAS
        if not is_of(link, place[0]):
            return None
        shown = self._meters.told(preparation, link, drops, vf)
        if shown is not None:
            self._told[attachment.id] = told
        return shown

    def settled(self, attachment: Attachment) -> None:
        """What the last look told of it is written."""
        if attachment.id in self._told:
            self._settled[attachment.id] = self._told[attachment.id]

    def find(self, target: Target) -> None:
        """Remember where it is, if it can be told of from here: what has counters beside its interface's and
        its PF's is read where it is. HwError."""
        attachment, preparation = target.attachment, target.preparation
        assert attachment is not None
        self._places.pop(attachment.id, None)
        link = target.find_in_pod()
        elsewhere_too = preparation.by_file or preparation.rdma is not None
        if link is None or target.pod_netns is None or elsewhere_too or preparation.pod_ifname is None:
            return
        with Elsewhere() as elsewhere:
            number = elsewhere.number_of(target.pod_netns)
        if number is not None:
            self._places[attachment.id] = (number, link.ifindex)


def _digest(message: bytes) -> bytes:
    """Messages are 2 KiB each, and there are hundreds."""
    return hashlib.blake2b(message, digest_size=16).digest()
