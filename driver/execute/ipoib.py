"""Acts for the IPoIB interface of a partition that a pod has beside its port's own one: made at home, counted
from before it has sent anything, moved into the pod, and removed.

Invariant: as for every act, safe to repeat and safe where it does not apply. What it sends passes the port's
own interface by, and the kernel counts it there alone (ipoib_get_stats, mlx5i_get_stats), so programs of its
own count it into the device's slot. It is known by these, which no tenant takes off: from when it has them it
is found by them alone, in the pod and at home, where newer kernels put it when its netns dies (netns_refund
of ipoib_link_ops) and older ones end it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import partial

from bpf.attach import TcxPrograms, child_of
from bpf.layout import Framing
from driver.errors import NotNow, Refusal
from driver.execute.target import Target
from hw.errors import Refused
from hw.ipoib import is_child
from hw.model import IfName, LinkInfo
from hw.netlink import LinkSocket
from hw.netns import NetnsHandle, run_in


class IpoibActs:
    """Bound to this node's programs; None where it has no tcx, and no claim asks for such an interface."""

    def __init__(self, programs: TcxPrograms | None) -> None:
        self._programs = programs

    def make(self, target: Target) -> None:
        """On the port's own interface, which is at home still: the kernel looks for it there."""
        wish, partition = target.preparation.config.rdma.ipoib, target.preparation.config.rdma.partition
        if wish is None:
            return
        assert partition is not None
        if self._programs is None:
            raise NotNow(f"{target.device}: nothing would count its IPoIB interface: this kernel has no tcx")
        parent = target.find_at_home()
        if parent is None:
            raise NotNow(f"{target.device} is not in the host's network namespace")
        self.remove(target)
        name = IfName(f"knd-ib{parent.ifindex}")
        try:
            target.home.add_ipoib(parent.ifindex, name, partition, wish.mode)
        except Refused as error:
            if error.errno != errno.EINVAL:
                raise
            raise Refusal(
                "IpoibRefused",
                f"{target.device} cannot have an IPoIB interface of partition {partition:#06x} in mode "
                f"{wish.mode} (rdma.ipoib): {error}; not every driver has mode connected",
            ) from error
        made = next(_made_on(target.home, parent), None)
        if made is None:
            raise NotNow(f"{target.device}: its new IPoIB interface {name} was removed by others")
        slot = target.preparation.slot
        self._programs.attach(child_of(target.device), made.ifindex, slot, Framing.IPOIB)

    def move_in(self, target: Target) -> None:
        wish = target.preparation.config.rdma.ipoib
        if wish is None or self._in_pod(target) is not None:
            return
        assert target.pod_netns is not None
        link = _find(self._programs, target, target.home, target.home_netns)
        if link is None:
            raise NotNow(f"{target.device}: its IPoIB interface is not at home")
        mtu = wish.mtu if wish.mtu != link.mtu else None
        try:
            target.home.move(link.ifindex, target.pod_netns, name=wish.name, mtu=mtu)
        except Refused as error:
            if error.errno != errno.EINVAL or mtu is None:
                raise
            raise Refusal(
                "IpoibRefused",
                f"{target.device}: its IPoIB interface cannot have an MTU of {mtu} (rdma.ipoib): {error}; it "
                f"has {link.mtu} by itself",
            ) from error

    def up(self, target: Target) -> None:
        wish = target.preparation.config.rdma.ipoib
        if wish is None:
            return
        link = self._in_pod(target)
        if link is None or target.pod is None:
            raise NotNow(f"{target.device}: its IPoIB interface left the pod's network namespace")
        for address in wish.addresses:
            target.pod.add_address(link.ifindex, address)
        target.pod.set_up(link.ifindex)

    def down(self, target: Target) -> None:
        found = find_child(self._programs, target)
        if found is not None:
            links, link = found
            links.set_down(link.ifindex)

    def remove(self, target: Target) -> None:
        """Wherever it is. NotNow where that is a netns of the pod's own: its programs stay on it then."""
        if target.preparation.config.rdma.ipoib is None or self._programs is None:
            return
        link = self._in_pod(target)
        if link is not None and target.pod is not None:
            target.pod.delete(link.ifindex)
        link = _find(self._programs, target, target.home, target.home_netns)
        if link is not None:
            target.home.delete(link.ifindex)
        parent = target.find_at_home()
        # Cut off before it had programs, it never left home; and a device with links of others on it is not
        # given away.
        for each in _made_on(target.home, parent) if parent is not None else ():
            target.home.delete(each.ifindex)
        name = child_of(target.device)
        pair = self._programs.state(name)
        if pair is not None and pair.alive:
            raise NotNow(
                f"{target.device}: its IPoIB interface is in a network namespace that its pod made, which "
                "still lives: end what is left of the pod"
            )
        self._programs.detach(name)

    def _in_pod(self, target: Target) -> LinkInfo | None:
        if target.pod is None or target.pod_netns is None:
            return None
        return _find(self._programs, target, target.pod, target.pod_netns)


def find_child(programs: TcxPrograms | None, target: Target) -> tuple[LinkSocket, LinkInfo] | None:
    """Where it is, and the socket that reaches it there."""
    for links, netns in ((target.pod, target.pod_netns), (target.home, target.home_netns)):
        if links is not None and netns is not None:
            link = _find(programs, target, links, netns)
            if link is not None:
                return links, link
    return None


def _find(
    programs: TcxPrograms | None, target: Target, links: LinkSocket, netns: NetnsHandle
) -> LinkInfo | None:
    """By its programs: a tenant can make such interfaces too, and call them what it likes."""
    if programs is None:
        return None
    for link in filter(is_child, links.dump()):
        if run_in(netns, partial(programs.is_on, child_of(target.device), link.ifindex)):
            return link
    return None


def _made_on(home: LinkSocket, parent: LinkInfo) -> Iterator[LinkInfo]:
    return (link for link in home.dump() if is_child(link) and link.peer == parent.ifindex)
