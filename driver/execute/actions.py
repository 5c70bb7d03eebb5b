"""What each act of a plan does to the node.

Invariant: every act is safe to repeat and safe where it does not apply, and finds the device by its
identity, wherever it is; a name is only ever set, never looked up.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from bpf.accounting import Accounting
from bpf.attach import TcxPrograms
from bpf.foreign import Own, detach_foreign, foreign_programs
from bpf.layout import Hook
from bpf.sys import LinkId, ProgramId
from driver.errors import NotNow, Refusal
from driver.execute import filters, infiniband, port, probe, rdma, rdma_given, vf, vfio
from driver.execute.foreign import Foreign
from driver.execute.ipoib import IpoibActs
from driver.execute.shape import Shaper
from driver.execute.share import ShareActs
from driver.execute.target import NotClean, Target, Vanished
from driver.model import Attachment, Preparation
from driver.plan import Act
from hw.errors import Busy, Refused
from hw.ipoib import is_ipoib
from hw.model import (
    DeviceKind,
    IfName,
    LinkFlags,
    LinkInfo,
    LinkSettings,
    SoftwareIdentity,
)
from hw.netlink import LinkSocket
from hw.netns import run_in

log = logging.getLogger(__name__)

Fold = Callable[[Attachment, Preparation], None]
"""Put the final counters of an attachment into the ledger, in one transaction."""


class Meters(Protocol):
    """The counters that a device keeps itself. DriverError where the ledger does not take them."""

    def begin(self, target: Target) -> None:
        """They count for the target's attachment from now on."""

    def leave(self, target: Target) -> None:
        """They do no more."""

    def leave_child(self, target: Target) -> None:
        """Those of the IPoIB interface that was made on it do no more."""


_NOTHING = Own()
_RESTORABLE = (
    *("name", "mtu", "broadcast", "txqlen", "group", "alias", "link_mode"),
    *("gso_max_size", "gro_max_size", "gso_max_segs", "gso_ipv4_max_size", "gro_ipv4_max_size"),
)
"""Of LinkSettings, what one message sets; flags, altnames and MAC go their own ways."""


def differences(
    link: LinkInfo, baseline: LinkSettings, kind: DeviceKind, own: Own = _NOTHING
) -> tuple[str, ...]:
    """What keeps a link at home from being clean: every field that is not as in its baseline."""
    now = LinkSettings.of(link, kind=kind)
    found = [
        f"{name} is {getattr(now, name)!r}, should be {wanted!r}"
        for name in LinkSettings.__slots__
        if (wanted := getattr(baseline, name)) is not None and getattr(now, name) != wanted
        if name != "mac" or not is_ipoib(link)
    ]
    if link.mac != baseline.mac and not is_ipoib(link):
        found.append(f"address is {link.mac}, should be {baseline.mac}")
    if link.up:
        found.append("it is up")
    if not own.everything and not own.programs.issuperset(map(ProgramId, link.xdp_prog_ids)):
        found.append("an XDP program is attached")
    return tuple(found)


class NodeActs:
    """The acts, bound to this node's maps, programs and ledger."""

    def __init__(
        self,
        *,
        hook: Hook,
        accounting: Accounting,
        programs: TcxPrograms | None,
        fold: Fold,
        meters: Meters,
        host: probe.Host,
        shaper: Shaper,
        foreign: Foreign,
    ) -> None:
        self._foreign = foreign
        self._hook = hook
        self._shaper = shaper
        self._host = host
        self._accounting = accounting
        self._programs = programs
        self._ipoib = IpoibActs(programs)
        self._share = ShareActs(programs)
        self._fold = fold
        self._meters = meters

    def table(self) -> dict[Act, Callable[[Target], None]]:
        return {
            Act.ARM: self.arm,
            Act.DISARM: self.disarm,
            Act.ZERO_SLOT: self.zero_slot,
            Act.MOVE_IN: move_in,
            Act.FILTER: partial(filters.attach, accounting=self._accounting),
            Act.SHAPE: self._shaper.shape,
            Act.UNSHAPE: self._shaper.unshape,
            Act.ADDRESS: add_addresses,
            Act.UP: link_up,
            Act.DOWN: link_down,
            Act.FOLD: self.fold,
            Act.METER: self.meter,
            Act.STRIP: self.strip,
            Act.MOVE_HOME: move_home,
            Act.RESTORE: self.restore,
            Act.TIDY: self.tidy,
            Act.VERIFY: self.verify,
            Act.TO_VFIO: partial(vfio.to_vfio, sysfs=self._host.sysfs),
            Act.SET_VF: self.set_vf,
            Act.RESTORE_VF: partial(vf.restore_vf, host=self._host),
            Act.VERIFY_VF: vf.verify_vf,
            Act.UNBIND: self.unbind,
            Act.TO_KERNEL: partial(probe.to_kernel, host=self._host),
            Act.VERIFY_VFIO: partial(vfio.verify_vfio, sysfs=self._host.sysfs),
            Act.RESTORE_PORT: self.restore_port,
            Act.NOTE_FOREIGN: self._foreign.note,
            Act.PUT_FOREIGN_BACK: self._foreign.put_back,
            Act.RDMA_IN: partial(rdma.move_in, host=self._host),
            Act.RDMA_HOME: partial(rdma.move_home, host=self._host),
            Act.RDMA_ADD: partial(rdma.add, host=self._host),
            Act.RDMA_REMOVE: partial(rdma.remove, host=self._host),
            Act.RDMA_FILES: partial(rdma_given.note, host=self._host),
            Act.RDMA_RESTORE: partial(rdma.restore_name, host=self._host),
            Act.RDMA_VERIFY: partial(rdma.verify, host=self._host),
            Act.PARTITION: partial(infiniband.find_partition, host=self._host),
            Act.IPOIB_MAKE: self._ipoib.make,
            Act.IPOIB_IN: self._ipoib.move_in,
            Act.IPOIB_UP: self._ipoib.up,
            Act.IPOIB_FOLD: self.fold_ipoib,
            Act.IPOIB_REMOVE: self._ipoib.remove,
            Act.SHARE_MAKE: self._share.make,
            Act.SHARE_REMOVE: self._share.remove,
            Act.PORT_ACTIVE: partial(infiniband.port_active, host=self._host),
        }

    def arm(self, target: Target) -> None:
        if self._programs is None:
            return
        link = target.find_at_home()
        if link is None:
            raise NotNow(f"{target.device} is not in the host's network namespace")
        preparation = target.preparation
        self._programs.attach(target.device, link.ifindex, preparation.slot, preparation.framing)

    def disarm(self, target: Target) -> None:
        if self._programs is not None:
            self._programs.detach(target.device)

    def zero_slot(self, target: Target) -> None:
        self._accounting.zero(target.preparation.slot)

    def meter(self, target: Target) -> None:
        self._meters.begin(target)

    def fold(self, target: Target) -> None:
        """A slot is zero again once its counts are in the ledger: an attach that is cut off before it has
        zeroed its slot must not be given what the slot's last holder sent."""
        assert target.attachment is not None
        self._meters.leave(target)
        self._fold(target.attachment, target.preparation)
        # What limits it is known by its rules, which go when that does.
        self._accounting.forget(target.preparation.slot)

    def fold_ipoib(self, target: Target) -> None:
        """Its own counters end with it; down, so that they are final."""
        self._ipoib.down(target)
        self._meters.leave_child(target)

    def strip(self, target: Target) -> None:
        """What would travel with the device: altnames (they may clash at home), others' programs,
        and NOARP, which a namespace makes a setting of its own from when the device arrives."""
        link = target.find_in_pod()
        if link is None or target.pod is None or target.pod_netns is None:
            return
        if link.altnames:
            target.pod.remove_altnames(link.ifindex, link.altnames)
        if LinkFlags.NOARP in link.flags and not target.preparation.baseline.noarp:
            target.pod.change(link.ifindex, clear_flags=LinkFlags.NOARP)
        own = self._foreign.own(target.device)
        run_in(target.pod_netns, lambda: detach_foreign(link.ifindex, own=own))

    def restore(self, target: Target) -> None:
        """Everything a pod could have left on the device, off; every compared field as it was."""
        link = self._put_in_order(target)
        if link is not None:
            detach_foreign(link.ifindex, own=self._foreign.own(target.device))

    def tidy(self, target: Target) -> None:
        self._put_in_order(target)

    def unbind(self, target: Target) -> None:
        probe.release(target, self._host)
        self._foreign.forget(target)

    def set_vf(self, target: Target) -> None:
        """What was probed anew has its own name and settings again."""
        vf.set_vf(target, self._host)
        infiniband.take_up(target, self._host)
        link = target.find_at_home()
        if link is not None:
            _restore_settings(target.home, link, target.preparation.baseline)

    def _put_in_order(self, target: Target) -> LinkInfo | None:
        """Down, and every compared field back that differs. Vanished if the device is nowhere; None if it is
        still in its pod."""
        link = target.find_at_home()
        if link is None:
            if target.find_in_pod() is None:
                raise Vanished(f"{target.device} is neither in the host's network namespace nor in its pod's")
            return None
        if link.up:
            target.home.set_down(link.ifindex)
        self._host.udev.wait(link.ifindex)
        link = target.find_at_home() or link
        _restore_settings(target.home, link, target.preparation.baseline)
        return self._restore_mac(target, link)

    def _restore_mac(self, target: Target, link: LinkInfo) -> LinkInfo:
        """Last and alone: the kernel stops at what a driver refuses, and a VF's does not give up an address
        that it was given on the PF, nor take up another one given there until it is probed."""
        preparation, mac = target.preparation, target.preparation.baseline.mac
        if mac is None or mac == link.mac or is_ipoib(link):
            return link
        try:
            target.home.change(link.ifindex, mac=mac)
        except Refused as error:
            given = target.given_mac()
            if error.errno not in vf.KEEPS_ADDRESS or given is None:
                raise
            if link.mac == given:
                log.info("%s keeps the address %s, which it was given on its PF", target.device, link.mac)
            elif preparation.can_be_probed and self._is_unarmed(target):
                link = probe.again(target, self._host)
                _restore_settings(target.home, link, preparation.baseline)
            else:
                raise
        return link

    def _is_unarmed(self, target: Target) -> bool:
        """Programs would not outlive its netdev."""
        return self._programs is None or not self._own_links(target)

    def verify(self, target: Target) -> None:
        """NotClean or Vanished unless the device is at home exactly as its baseline says; NotNow if it is
        still in its pod, from where it can be brought home another time."""
        link = target.find_at_home()
        if link is None:
            if target.find_in_pod() is not None:
                raise NotNow(f"{target.device} is still in the pod's network namespace")
            raise Vanished(f"{target.device} did not come home")
        preparation = target.preparation
        baseline = preparation.baseline
        if link.mac != baseline.mac and link.mac is not None and link.mac == target.given_mac():
            baseline = replace(baseline, mac=link.mac)
        own = self._foreign.own(target.device)
        problems = list(differences(link, baseline, preparation.kind, own))
        if target.home.addresses(link.ifindex):
            problems.append("it has addresses")
        if foreign_programs(link.ifindex, own=own):
            problems.append("programs of others are attached")
        if problems:
            raise NotClean(target.device, tuple(problems))

    def restore_port(self, target: Target) -> None:
        """Of a PF: its VFs as they were; and up again, once it is clean."""
        baseline = target.preparation.port
        if baseline is None:
            return
        link = target.find_at_home()
        if link is None or not link.up:
            self.verify(target)
        port.restore_vfs(target, self._host, baseline)
        port.set_up_again(target, baseline)

    def _own_links(self, target: Target) -> frozenset[LinkId]:
        """Those of this device alone: the pins of a whole node are many."""
        return self._programs.links_of(target.device) if self._programs is not None else frozenset()


def move_in(target: Target) -> None:
    """One message moves, renames, and sets MTU and address: the kernel's wait is paid once."""
    preparation = target.preparation
    assert target.pod_netns is not None
    link = target.find_at_home()
    if link is None:
        if target.find_in_pod() is not None:
            return
        raise NotNow(f"{target.device} is not in the host's network namespace")
    if link.up:
        target.home.set_down(link.ifindex)
    asked = preparation.config.interface.hardware_address
    # A software device is known by its index, so it must not be given another one there.
    known_by_index = isinstance(preparation.identity, SoftwareIdentity)
    try:
        target.home.move(
            link.ifindex,
            target.pod_netns,
            name=preparation.ifname,
            mtu=preparation.mtu if preparation.mtu != link.mtu else None,
            mac=asked if asked != link.mac else None,
            new_ifindex=link.ifindex if known_by_index else None,
        )
    except Busy:
        other = target.pod.by_index(link.ifindex) if target.pod is not None and known_by_index else None
        if other is None or preparation.identity.matches(other):
            raise
        raise Refusal(
            "IndexTaken",
            f"{target.device} keeps interface index {link.ifindex} wherever it is, and in the pod "
            f"{other.name!a} has it: give that one another index, or the pod another device",
        ) from None
    except Refused as error:
        if error.errno not in vf.KEEPS_ADDRESS or asked in (None, link.mac):
            raise
        raise Refusal(
            "AddressRefused",
            f"{target.device} cannot have the address {asked}: its driver keeps it at {link.mac}, "
            "as it does where an address was set on the PF for it; leave hardwareAddress out of the claim",
        ) from error


def add_addresses(target: Target) -> None:
    link = target.find_in_pod()
    if link is None or target.pod is None:
        raise NotNow(f"{target.device} left the pod's network namespace")
    for address in target.preparation.config.interface.addresses:
        target.pod.add_address(link.ifindex, address)


def link_up(target: Target) -> None:
    link = target.find_in_pod()
    if link is None or target.pod is None:
        raise NotNow(f"{target.device} left the pod's network namespace")
    target.pod.set_up(link.ifindex)


def link_down(target: Target) -> None:
    """What stands on it goes first: it would come along, and of a link that is down the kernel does not
    take back what it set for it."""
    link = target.find_in_pod()
    if link is None or target.pod is None:
        return
    for child in target.pod.dump():
        if child.is_stacked and child.peer == link.ifindex:
            target.pod.delete(child.ifindex)
    if link.up:
        target.pod.set_down(link.ifindex)


def move_home(target: Target) -> None:
    """Under its baseline name, or, where someone took that, under one of ours until it is free."""
    link = target.find_in_pod()
    if link is None or target.pod is None:
        return
    baseline = target.preparation.baseline
    if link.up:
        target.pod.set_down(link.ifindex)
    try:
        target.pod.move(link.ifindex, target.home_netns, name=baseline.name)
    except Refused as error:
        if error.errno != errno.EEXIST:
            raise
        # The kernel moves before it renames: it may be at home by now, under the name a pod gave it.
        came = target.find_at_home()
        if came is not None:
            target.home.change(came.ifindex, name=stand_in_name(came))
        else:
            target.pod.move(link.ifindex, target.home_netns, name=stand_in_name(link))


def stand_in_name(link: LinkInfo) -> IfName:
    return IfName(f"knd{link.ifindex}")


def _restore_settings(home: LinkSocket, link: LinkInfo, baseline: LinkSettings) -> None:
    strange = tuple(name for name in link.altnames if name not in baseline.altnames)
    if strange:
        home.remove_altnames(link.ifindex, strange)
    wanted = _flags(baseline)
    mask = LinkFlags.NOARP | LinkFlags.PROMISC | LinkFlags.ALLMULTI | LinkFlags.MULTICAST
    changes = {
        name: value
        for name in _RESTORABLE
        if (value := getattr(baseline, name)) is not None and value != getattr(link, name)
    }
    if changes or (link.flags & mask) != wanted:
        home.change(
            link.ifindex,
            set_flags=wanted & ~link.flags,
            clear_flags=mask & link.flags & ~wanted,
            **changes,
        )
    missing = tuple(name for name in baseline.altnames if name not in link.altnames)
    if missing:
        home.add_altnames(link.ifindex, missing)


def _flags(settings: LinkSettings) -> LinkFlags:
    flags = LinkFlags(0)
    for value, flag in (
        (settings.noarp, LinkFlags.NOARP),
        (settings.promisc, LinkFlags.PROMISC),
        (settings.allmulti, LinkFlags.ALLMULTI),
        (settings.multicast, LinkFlags.MULTICAST),
    ):
        if value:
            flags |= flag
    return flags
