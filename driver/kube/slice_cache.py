"""This driver's ResourceSlices on this node, as last seen or written.

Invariant: what the agent has written itself is never undone by news that is older, so that a plan made
from here does not create twice or update what it has just updated. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from driver.kube.slice_plan import Existing
from driver.kube.watch import Change

DELETED_MAX = 512
"""UIDs deleted by us that are remembered. UIDs do not come back; the bound is for memory."""


class SliceCache:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slices: dict[str, Existing] = {}
        self._deleted: OrderedDict[str, None] = OrderedDict()
        self.synced = False
        """A whole list has been seen."""

    def snapshot(self) -> tuple[Existing, ...]:
        with self._lock:
            return tuple(self._slices.values())

    def replaced(self, items: Sequence[Existing], version: str) -> bool:
        """Take a whole list made at version. True: it told something that was not known."""
        with self._lock:
            fresh = {each.name: each for each in items if each.uid not in self._deleted}
            for name, known in self._slices.items():
                listed = fresh.get(name)
                if _newer(known.version, version if listed is None else listed.version):
                    fresh[name] = known
            news = not self.synced or _versions(fresh) != _versions(self._slices)
            self._slices = fresh
            self.synced = True
            return news

    def changed(self, change: Change, item: Existing) -> bool:
        """Take a watch event. True: somebody else did something."""
        with self._lock:
            known = self._slices.get(item.name)
            if change is Change.DELETED:
                if item.uid in self._deleted:
                    del self._deleted[item.uid]
                    return False
                if known is None or known.uid != item.uid:
                    return False
                del self._slices[item.name]
                return True
            if item.uid in self._deleted:
                return False
            if known is not None and known.uid == item.uid and not _newer(item.version, known.version):
                return False
            self._slices[item.name] = item
            return True

    def wrote(self, item: Existing) -> None:
        """The answer to a create or update of ours."""
        with self._lock:
            known = self._slices.get(item.name)
            if known is None or known.uid != item.uid or not _newer(known.version, item.version):
                self._slices[item.name] = item

    def removed(self, item: Existing) -> None:
        """Deleted by us, or found to be gone."""
        with self._lock:
            known = self._slices.get(item.name)
            if known is not None and known.uid == item.uid:
                del self._slices[item.name]
            self._deleted[item.uid] = None
            while len(self._deleted) > DELETED_MAX:
                self._deleted.popitem(last=False)


def _newer(version: str, than: str) -> bool:
    """resourceVersions of one resource are comparable numbers; anything else counts as newer unless equal."""
    if version.isdigit() and than.isdigit():
        return int(version) > int(than)
    return version != than


def _versions(slices: dict[str, Existing]) -> dict[str, tuple[str, str]]:
    return {name: (each.uid, each.version) for name, each in slices.items()}
