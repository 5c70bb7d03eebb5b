"""Acts that keep an interface in its pod to its limits, and that take this off again.

Invariant: shape makes what driver.limits says of what there is, however often it is run: a limit changes in
place, with nothing lost of what waits or was counted, and by the same means as long as there is one. What is
made is in the pod's netns and dies with it; the qdisc goes with the move home, and the one link made is known
by the rules, which no tenant can change.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping

from bpf.accounting import Accounting
from bpf.limits import NO_RULES
from driver import limits
from driver.errors import NotNow
from driver.execute.target import Target
from driver.qos import EgressShaper, QosPolicy
from hw.errors import NotFound, Refused, Unsupported
from hw.model import IfIndex, IfName, LinkInfo
from hw.netlink import LinkSocket
from hw.qdisc import FqQueue, HtbTree, NoDepartures, NoFairQueues

log = logging.getLogger(__name__)

_IFB = "ifb"
_DETOUR = "kndi"
"""And an index of nine digits, a hyphen and a digit: IFNAMSIZ has room for 15."""
_NAMES = 4


class Shaper:
    """Bound to this node's maps and policy. One for all devices: what the kernel has is found out once."""

    def __init__(self, accounting: Accounting, policy: Callable[[], QosPolicy]) -> None:
        self._accounting = accounting
        self._policy = policy
        self._fair = True
        self._departures = True

    def shape(self, target: Target) -> None:
        """Everything that the config and the policy say of the interface's traffic, as the policy is now."""
        link = target.find_in_pod()
        if link is None or target.pod is None:
            raise NotNow(f"{target.device} left the pod's network namespace")
        preparation = target.preparation
        wanted = self._wanted(target, link)
        slot = preparation.slot
        if isinstance(wanted.egress, FqQueue) and not self._depart(target.pod, link.ifindex, wanted.egress):
            wanted = self._wanted(target, link)
        before = _detour_of(target.pod, self._accounting.limits.detour(slot))
        if isinstance(wanted.egress, HtbTree):
            self._queue(target.pod, link.ifindex, wanted.egress)
        detour = (
            self._detour(target.pod, link, before, wanted.ingress) if wanted.ingress is not None else None
        )
        _set_gso(target, link, wanted.gso_max_size)
        self._accounting.limits.set(slot, wanted.rules_with(detour.ifindex if detour is not None else 0))
        if wanted.egress is None:
            target.pod.shaping.unshape(link.ifindex)
        if wanted.ingress is None and before is not None:
            target.pod.delete(before.ifindex)

    def unshape(self, target: Target) -> None:
        """No rules, and no link of ours in the pod. The queue of a link that moves goes by itself."""
        slot = target.preparation.slot
        ifindex = self._accounting.limits.detour(slot)
        self._accounting.limits.set(slot, NO_RULES)
        detour = _detour_of(target.pod, ifindex) if target.pod is not None else None
        if detour is not None and target.pod is not None:
            target.pod.delete(detour.ifindex)

    def dropped(self, target: Target) -> Mapping[str, int]:
        """Packets that were counted and then dropped, by POLICED and QUEUE_DROPPED: by the programs since the
        attach, by the queues since they were made, modulo 2**32. A queue that cannot be reached is left out.
        HwError, BpfError."""
        slot, maps = target.preparation.slot, self._accounting.limits
        found = dict(zip(limits.POLICED, maps.dropped([slot])[slot].packets, strict=True))
        link = target.find_in_pod()
        places = (link.ifindex if link is not None else 0, maps.detour(slot))
        for name, handle, ifindex in zip(limits.QUEUE_DROPPED, maps.queues(slot), places, strict=True):
            if not handle:
                found[name] = 0
            elif link is not None and target.pod is not None:
                root = target.pod.shaping.root(IfIndex(ifindex))
                found[name] = root.drops if root is not None and root.handle == handle else 0
        return found

    def is_shaped(self, target: Target) -> bool:
        """Whether the queues are as shape made them. An interface that is not there has nothing to keep."""
        link = target.find_in_pod()
        if link is None or target.pod is None:
            return True
        wanted = self._wanted(target, link)
        if not _has(target.pod, link.ifindex, wanted.egress):
            return False
        detour = self._accounting.limits.detour(target.preparation.slot)
        if wanted.ingress is None or not detour:
            return True
        found = _detour_of(target.pod, detour)
        return found is not None and found.up and _has(target.pod, found.ifindex, wanted.ingress)

    def _wanted(self, target: Target, link: LinkInfo) -> limits.Shaping:
        preparation, policy, maps = target.preparation, self._policy(), self._accounting.limits
        out, _ = maps.queues(preparation.slot)
        departs = maps.departs(preparation.slot) if out else policy.shaper is EgressShaper.FQ
        return limits.shaping(preparation.config, policy, mtu=link.mtu, departs=departs and self._departures)

    def _depart(self, pod: LinkSocket, ifindex: IfIndex, queue: FqQueue) -> bool:
        """False where the kernel has no such queue."""
        try:
            pod.shaping.queue(ifindex, queue)
        except NoDepartures as error:
            log.warning("limits are kept by htb on this node, though its policy says fq (shaper): %s", error)
            self._departures = False
        return self._departures

    def _queue(self, pod: LinkSocket, ifindex: IfIndex, tree: HtbTree) -> None:
        if self._fair:
            try:
                pod.shaping.shape(ifindex, tree, fair=True)
                return
            except NoFairQueues as error:
                log.info("limits have plain queues on this node: %s", error)
                self._fair = False
        pod.shaping.shape(ifindex, tree, fair=False)

    def _detour(
        self, pod: LinkSocket, link: LinkInfo, before: LinkInfo | None, tree: HtbTree
    ) -> LinkInfo | None:
        """An ifb beside the interface, up and with tree on it; None where the kernel has none."""
        detour = before
        if detour is None:
            try:
                detour = _make_detour(pod, link.ifindex)
            except Unsupported as error:
                log.warning("what comes in is policed, which TCP does badly with: %s", error)
                return None
        self._queue(pod, detour.ifindex, tree)
        if not detour.up:
            pod.set_up(detour.ifindex)
        return detour


def _make_detour(pod: LinkSocket, ifindex: IfIndex) -> LinkInfo:
    """Under another name where a pod has something else by the first."""
    for attempt in range(_NAMES):
        name = IfName(f"{_DETOUR}{ifindex}" + (f"-{attempt}" if attempt else ""))
        try:
            pod.shaping.add_ifb(name)
        except Refused as error:
            if error.errno != errno.EEXIST:
                raise
        # One that was there is ours, of an attempt that was cut off before the rules named it.
        made = next((link for link in pod.dump() if link.kind == _IFB and link.name == name), None)
        if made is not None:
            return made
    raise NotFound(f"no ifb link could be made in the pod: it has others by the name {_DETOUR}{ifindex}")


def _has(pod: LinkSocket, ifindex: IfIndex, wanted: HtbTree | FqQueue | None) -> bool:
    match wanted:
        case HtbTree():
            return pod.shaping.is_shaped(ifindex, wanted)
        case FqQueue():
            return pod.shaping.is_queued(ifindex, wanted)
    return True


def _detour_of(pod: LinkSocket, ifindex: int) -> LinkInfo | None:
    found = pod.by_index(IfIndex(ifindex)) if ifindex else None
    return found if found is not None and found.kind == _IFB else None


def _set_gso(target: Target, link: LinkInfo, most: int | None) -> None:
    """Lower than the device had it, or as it had it."""
    had = target.preparation.baseline.gso_max_size
    if had is None or target.pod is None:
        return
    size = min(most or had, had)
    if size != link.gso_max_size:
        target.pod.change(link.ifindex, gso_max_size=size)
