"""The devices of this node, as last seen, and how to look again.

Invariant: a scan reads; it changes nothing. What it found replaces the old picture whole.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from driver import inventory
from driver.model import Device, DeviceName
from driver.policy import NodePolicy
from hw.model import IfIndex, LinkInfo, SoftwareIdentity, is_at_home
from hw.netlink import LinkSocket
from hw.scan import scan, uplinks_of
from hw.sysfs import Sysfs

log = logging.getLogger(__name__)


class Devices:
    """Scans in whatever thread calls rescan(); reads are snapshots."""

    def __init__(self, sysfs: Sysfs, policy: Callable[[], NodePolicy]) -> None:
        self._sysfs = sysfs
        self._policy = policy
        self._lock = threading.Lock()
        self._current = inventory.Inventory()

    def current(self) -> Mapping[DeviceName, Device]:
        return self._current.by_name

    def get(self, name: DeviceName) -> Device | None:
        return self.current().get(name)

    def ifindex_of(self, name: DeviceName) -> IfIndex | None:
        """Where the device was last seen at home, or the index it keeps for life; a hint, to be verified."""
        device = self.get(name)
        if device is None:
            return None
        if device.ifindex is None and isinstance(device.identity, SoftwareIdentity):
            return device.identity.ifindex
        return device.ifindex

    def rescan(self) -> inventory.InventoryDiff:
        """Look at everything again; returns what changed."""
        with self._lock, LinkSocket(None) as links:
            found = scan(self._sysfs, links.dump(), uplinks_of(links))
            old = self._current
            new = inventory.build(found, self._policy(), old)
            for problem in new.problems:
                if problem not in old.problems:
                    log.warning("%s", problem)
            self._current = new
            return inventory.diff(old, new)

    def concerned(self, changed: frozenset[IfIndex]) -> bool:
        """Whether links that changed could change the picture. Most link events of a node are the
        CNI's veths coming and going; one of those costs one look-up each, not a scan."""
        policy = self._policy()
        by_index = {d.ifindex: d for d in self.current().values() if d.ifindex is not None}
        with LinkSocket(None) as links:
            for ifindex in changed:
                known = by_index.get(ifindex)
                link = links.by_index(ifindex)
                if _matters(link, known, policy):
                    return True
        return False


def _matters(link: LinkInfo | None, known: Device | None, policy: NodePolicy) -> bool:
    if link is None:
        return known is not None
    if known is not None:
        return (
            not is_at_home(known.identity, link) or known.settings is None or link.name != known.settings.name
        )
    return link.kind is None or policy.selects(link)
