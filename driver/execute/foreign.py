"""Programs of others on a device that is given away: what the policy wants done with them, done.

Invariant: whatever a pod had, the device's owner finds its own programs at their places when it is home; what
cannot be put back is not taken off, and the claim is refused with the reason. tc filters are another matter:
the kernel drops them when a device changes its network namespace, which is told or refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Set

from bpf.attach import TcxPrograms
from bpf.errors import Ambiguous, CallRefused
from bpf.foreign import Own
from bpf.parked import Parked
from bpf.sys import LinkId
from driver.errors import NotNow, Refusal
from driver.execute.target import Target
from driver.model import DeviceName
from driver.policy import ForeignChoice
from hw.model import IfIndex, LinkInfo
from hw.netlink import LinkSocket

log = logging.getLogger(__name__)

CANNOT = "ForeignProgram"
_FILTERS = frozenset({"clsact", "ingress"})


def filters_on(links: LinkSocket, ifindex: IfIndex) -> tuple[str, ...]:
    """The qdiscs that tc filters hang on, of a device that has none of ours."""
    return tuple(sorted(_FILTERS & set(links.qdiscs(ifindex))))


class Foreign:
    """Bound to this node. programs None: the hook is clsact, and nothing of ours is at home."""

    def __init__(
        self, parked: Parked, programs: TcxPrograms | None, choice: Callable[[], ForeignChoice]
    ) -> None:
        self._parked = parked
        self._programs = programs
        self._choice = choice

    def note(self, target: Target) -> None:
        """Before anything else is done to it. NotNow if it is not at home; Refusal where it is to be without
        them and could not have them back."""
        link = target.find_at_home()
        if link is None:
            raise NotNow(f"{target.device} is not in the host's network namespace")
        off = self._choice() is ForeignChoice.DETACH
        if off:
            self._check_filters(target, link)
        own = Own(self._links(target.device))
        try:
            self._parked.note(target.device, link.ifindex, own, off=off)
        except (Ambiguous, CallRefused, OSError) as error:
            if not off:
                raise
            raise Refusal(
                CANNOT,
                f"{target.device} has programs of others that could not be put back if they were taken off: "
                f"{error}; take them off, or have the node policy say foreignPrograms: keep or report",
            ) from error

    def _check_filters(self, target: Target, link: LinkInfo) -> None:
        found = filters_on(target.home, link.ifindex)
        if found:
            raise Refusal(
                CANNOT,
                f"{target.device} has tc filters of others ({', '.join(found)}), which the kernel "
                "drops when it goes into a pod, and nobody puts them back: take the qdisc off, or have the "
                "node policy say foreignPrograms: keep or report",
            )

    def forget(self, target: Target) -> None:
        """Its netdev is no more, and so is all that anybody had on it. What is on the next one cannot be a
        pod's, and nobody takes that off."""
        self._parked.forget(target.device)

    def put_back(self, target: Target) -> None:
        link = target.find_at_home()
        self._parked.put_back(target.device, link.ifindex if link is not None else None)

    def own(self, device: str) -> Own:
        """What whoever cleans the device leaves alone: ours, and what was there before; all of a device that
        went no further than to where that is noted."""
        noted = self._parked.own(device)
        everything = not self._parked.is_noted(device)
        return Own(noted.links | self._links(device), noted.programs, everything)

    def note_anew(self, target: Target) -> None:
        """Of a prepared device in no pod: records end with a boot, and older releases made none. As note."""
        if not target.preparation.by_file and not self._parked.is_noted(target.device):
            self.note(target)

    def adopt(self, in_pods: Set[DeviceName], withheld: Set[DeviceName]) -> None:
        """Of devices that an older release gave to pods, when this one starts: whatever they have, they may
        have from there. withheld: not home or not clean since. Only at the first start is that an older
        release's doing; later it may be a device whose programs could not be noted."""
        for device in in_pods | withheld if self._parked.is_new() else in_pods:
            self._parked.mark(device)
        self._parked.make_folder()

    def told(self, target: Target) -> str:
        """About what others have on a device that was prepared and is at home; "" if that is nothing, or the
        policy wants to hear nothing."""
        if self._choice() is ForeignChoice.KEEP:
            return ""
        told, device = [], target.device
        if found := self._parked.described(device):
            off = self._parked.is_off(device)
            what = "are off until it is home" if off else "go into the pod with it"
            told.append(f"programs of others on {device} {what}: {', '.join(found)}")
        link = None if target.preparation.by_file else target.find_at_home()
        if link is not None and (filters := filters_on(target.home, link.ifindex)):
            told.append(
                f"tc filters of others on {device} end when it goes into the pod ({', '.join(filters)})"
            )
        return "; ".join(told)

    def sweep(self, device: str, ifindex: int | None) -> None:
        """Of a device that nobody holds any more; ifindex None: it is not at home."""
        self._parked.put_back(device, ifindex)
        self._parked.forget(device)

    def devices(self) -> frozenset[DeviceName]:
        """With something on record."""
        return frozenset(DeviceName(name) for name in self._parked.names())

    def _links(self, device: str) -> frozenset[LinkId]:
        """Those of this device alone: the pins of a whole node are many."""
        return self._programs.links_of(device) if self._programs is not None else frozenset()
