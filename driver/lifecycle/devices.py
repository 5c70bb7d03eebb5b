"""The devices of this node, as last seen, and how to look again.

Invariant: a scan reads; it changes nothing. What it found replaces the old picture whole.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from driver import inventory
from driver.errors import NotNow
from driver.model import (
    Device,
    DeviceName,
    Preparation,
)
from driver.policy import NodePolicy
from hw.eswitch import read_eswitches
from hw.ipoib import is_ipoib
from hw.model import (
    DeviceKind,
    Guid,
    HwDevice,
    Identity,
    IfIndex,
    LinkInfo,
    LinkSettings,
    MacAddress,
    PciAddress,
    PciIdentity,
    PfAddress,
    PortBaseline,
    PortVf,
    SoftwareIdentity,
    VfSettings,
    card_of,
    is_at_home,
)
from hw.netlink import LinkSocket
from hw.pf import read_vf
from hw.rdma import verbs
from hw.rdma.netlink import rdma_if_any
from hw.scan import pf_link, scan, uplinks_of
from hw.sriov import binding
from hw.sriov.abilities import Asked, ask
from hw.sriov.discovery import DEVICES
from hw.sysfs import Sysfs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """rescan: the picture may be another. returned: devices that were in pods and are at home now."""

    rescan: bool
    returned: frozenset[DeviceName] = frozenset()


class Devices:
    """Scans in whatever thread calls rescan(); reads are snapshots."""

    def __init__(self, sysfs: Sysfs, policy: Callable[[], NodePolicy]) -> None:
        self._sysfs = sysfs
        self._policy = policy
        self._lock = threading.Lock()
        self._current = inventory.Inventory()
        self._by_index: Mapping[IfIndex, Device] = {}
        self.abilities: Mapping[PciAddress, Asked] = {}
        """What the drivers of PFs answered about their VFs."""
        self._held_back: Mapping[PfAddress, str] = {}
        self._said = False

    def current(self) -> Mapping[DeviceName, Device]:
        return self._current.by_name

    def get(self, name: DeviceName) -> Device | None:
        return self.current().get(name)

    def hint(self, preparation: Preparation) -> IfIndex | None:
        """Where the device is at home, if it is: the index it keeps for life, or had when last seen there.
        To be verified by identity."""
        if isinstance(preparation.identity, SoftwareIdentity):
            return preparation.identity.ifindex
        device = self.get(preparation.key.unit)
        return device.ifindex if device is not None else None

    def is_at_home(self, preparation: Preparation) -> bool:
        """By one look-up, where the last scan or its identity says it would be."""
        ifindex = self.hint(preparation)
        if ifindex is None:
            return False
        with LinkSocket(None) as links:
            link = links.by_index(ifindex)
        return link is not None and is_at_home(preparation.identity, link)

    def vfio_files(self, address: PciAddress) -> tuple[Path, ...]:
        """What a process opens to drive a function that is bound to vfio-pci. The group's number is asked for
        each time: it is another one after a reboot. NotNow without one."""
        group = binding.group_of(self._sysfs, address)
        if group is None:
            raise NotNow(f"{address} has no IOMMU group (any more)")
        prefix = "noiommu-" if binding.is_without_iommu(self._sysfs, group) else ""
        return (Path("/dev/vfio/vfio"), Path(f"/dev/vfio/{prefix}{group}"))

    def hold_back(self, reasons: Mapping[PfAddress, str]) -> None:
        """From the next look on nothing of these PFs, whole or VFs, is given away, until another call."""
        self._held_back = reasons

    def held_back(self, identity: Identity) -> str:
        """Why hold_back keeps a device from being given away; "" if it does not."""
        card = card_of(identity)
        return self._held_back.get(card, "") if card is not None else ""

    def rescan(self) -> inventory.InventoryDiff:
        """Look at everything again; returns what changed."""
        with self._lock, LinkSocket(None) as links, rdma_if_any() as asked:
            eswitches = read_eswitches(self._sysfs)
            seen = scan(self._sysfs, links.dump(), uplinks_of(links), eswitches, asked)
            self._say_what_is_missing(seen)
            found = [self._checked(each) for each in seen]
            old = self._current
            new = inventory.build(found, self._policy(), old)
            for problem in new.problems:
                if problem not in old.problems:
                    log.warning("%s", problem)
            self._current = new
            self._by_index = {d.ifindex: d for d in new.by_name.values() if d.ifindex is not None}
            return inventory.diff(old, new)

    def _say_what_is_missing(self, seen: Sequence[HwDevice]) -> None:
        """Once, and only where there is RDMA: the agent needs no more than netlink and sysfs."""
        if not self._said and any(each.rdma for each in seen):
            self._said = True
            if why := verbs.why_not():
                log.info("RDMA devices are read by netlink and sysfs alone: %s", why)

    def _checked(self, device: HwDevice) -> HwDevice:
        asked = self.abilities.get(pf_address(device.identity) or PciAddress(""))
        if asked is not None and device.kind is DeviceKind.VF:
            device = replace(
                device,
                pf_driver=asked.driver,
                vf_can=str(asked.abilities),
                vf_cannot=frozenset(map(str, asked.abilities.cannot)),
            )
        reason = "" if device.withheld else self.held_back(device.identity)
        return replace(device, withheld=reason) if reason else device

    def see_home(self, preparation: Preparation) -> None:
        """Look again if the picture does not have the device at home and clean: it is from while a pod had
        it, or from before it was put in order or probed anew, and an offer made from it would be wrong. A
        share is in no offer."""
        if preparation.share is not None:
            return
        device = self.get(preparation.key.unit)
        known = device is not None and device.settings == preparation.baseline
        hardware = preparation.rdma is not None and preparation.rdma.software is None
        known = known and not (hardware and device is not None and device.rdma is None)
        if not known or not self.is_at_home(preparation):
            self.rescan()

    def has_netdev(self, address: PciAddress) -> bool:
        """Whether a function's driver has made a netdev, in whatever namespace that is."""
        return self._sysfs.names(f"{DEVICES}/{address}/net") is not None

    def as_it_is(self, device: Device) -> Device:
        """The device with the settings it has now, on its PF too, not those when the picture was taken: they
        become its next baseline. Without ifindex if it is not at home; withheld if someone has taken it into
        use."""
        if device.kind is DeviceKind.RDMA:
            return replace(device, withheld=self._withheld_now(device))
        with LinkSocket(None) as links:
            link = links.by_index(device.ifindex) if device.ifindex is not None else None
            if link is None or not is_at_home(device.identity, link):
                return replace(device, ifindex=None, settings=None)
            addressed = any(not address.ip.is_link_local for address in links.addresses(link.ifindex))
            vf, pf_mtu = _on_pf(device.identity, links) if device.kind is DeviceKind.VF else (None, None)
            port = _port(link, links) if device.kind is DeviceKind.PF else None
        withheld = self._withheld_now(device)
        if device.kind is DeviceKind.SHARED:
            # What the host uses it for stays as it is.
            return replace(device, settings=LinkSettings.of(link, kind=device.kind), withheld=withheld)
        if addressed:
            withheld = withheld or "in use by the host: it has an address"
        elif link.master is not None:
            withheld = withheld or f"in use by others: it belongs to link {link.master}"
        settings = LinkSettings.of(link, kind=device.kind)
        return replace(device, settings=settings, withheld=withheld, vf=vf, pf_mtu=pf_mtu, port=port)

    def ask_abilities(self, device: Device, *, own: bool) -> bool:
        """Ask the driver of a VF's PF what it can set of it, if it may have more to say than it said;
        whether there was an answer. To be called with the VF in hand; own: it may be tried out."""
        identity = device.identity
        pf = pf_address(identity)
        if not isinstance(identity, PciIdentity) or pf is None or identity.vf_index is None:
            return False
        driver = binding.driver_of(self._sysfs, pf)
        with LinkSocket(None) as links:
            link = pf_link(identity, links.dump())
            if link is None or driver is None:
                return False
            asked = self.abilities.get(pf)
            if asked is not None and asked.is_enough(driver, own=own, carrier=link.carrier):
                return False
            known = asked.abilities if asked is not None and asked.driver == driver else None
            found = ask(links, link, identity.vf_index, own=own, known=known)
        answer = Asked(driver=driver, own=own, carrier=link.carrier, abilities=found)
        self.abilities = {**self.abilities, pf: answer}
        return True

    def who_else_has(self, mac: MacAddress, device: Device) -> str:
        """What in the host's namespace has an address, or is told it by the device's PF, in words; "" if
        nothing but the device itself."""
        with LinkSocket(None) as links:
            found = links.dump()
            for link in found:
                # Of a device that is given out in parts none can have its own.
                itself = link.ifindex == device.ifindex and device.kind is not DeviceKind.SHARED
                if link.mac == mac and not itself:
                    return f"{link.name!a} has it"
            pf = pf_link(device.identity, found)
            told = links.all_vf_settings(pf.ifindex) if pf is not None else {}
        own = None if isinstance(device.identity, SoftwareIdentity) else device.identity.vf_index
        for vf, settings in told.items():
            if settings.mac == mac and vf != own:
                return f"VF {vf} of the same PF is given it"
        return ""

    def guids_of_others(self, device: Device) -> frozenset[Guid]:
        """GUIDs that anything but the device has or is to have, as far as this node can tell: RDMA devices at
        home, and what PFs on InfiniBand hold of their VFs."""
        own = device.identity
        told: list[str | None] = []
        with LinkSocket(None) as links, rdma_if_any() as asked:
            found = links.dump()
            pf = pf_link(own, found)
            for link in filter(is_ipoib, found):
                for index, settings in links.all_vf_settings(link.ifindex).items():
                    is_own = isinstance(own, PciIdentity) and (link, index) == (pf, own.vf_index)
                    told += () if is_own else (settings.node_guid, settings.port_guid)
            mine = device.rdma.name if device.rdma is not None else None
            if asked is not None:
                told += [each.node_guid for each in asked.devices() if each.name != mine]
        return frozenset(Guid(guid) for guid in told if guid)

    def _withheld_now(self, device: Device) -> str:
        """Work on it may have been waited for: what was offered then may not be any more."""
        newest = self.get(device.name)
        return device.withheld or (newest.withheld if newest is not None else "")

    def is_strange(self, link: LinkInfo) -> bool:
        """Whether look would find nothing in a link that is like this now. Asks nobody."""
        return link.ifindex not in self._by_index and not _matters(link, None, self._policy())

    def look(self, changed: frozenset[IfIndex], away: Callable[[], Mapping[DeviceName, Identity]]) -> Look:
        """What changed links mean. Most link events of a node are the CNI's veths coming and going, and
        our own moves: one of those costs one look-up each, however many devices there are, and no scan.

        away: devices that are in pods, so that their leaving is no news and their return is. Asked only
        when a device of ours changed.
        """
        policy = self._policy()
        pods = away() if self._by_index.keys() & changed else {}
        rescan = False
        returned = set()
        with LinkSocket(None) as links:
            for ifindex in changed:
                link = links.by_index(ifindex)
                known = self._by_index.get(ifindex)
                if known is not None and known.name in pods:
                    if link is not None and is_at_home(pods[known.name], link):
                        returned.add(known.name)
                elif _matters(link, known, policy):
                    rescan = True
        return Look(rescan=rescan, returned=frozenset(returned))


def pf_address(identity: Identity) -> PciAddress | None:
    return identity.pf if isinstance(identity, PciIdentity) else None


def _on_pf(identity: Identity, links: LinkSocket) -> tuple[VfSettings | None, int | None]:
    """What its PF holds of a VF, and the PF's own MTU."""
    pf = pf_link(identity, links.dump())
    if pf is None or isinstance(identity, SoftwareIdentity) or identity.vf_index is None:
        return None, None
    return read_vf(links, pf, identity.vf_index), pf.mtu


def _port(link: LinkInfo, links: LinkSocket) -> PortBaseline | None:
    """What a PF holds of its VFs; None for one that has none."""
    told = links.all_vf_settings(link.ifindex)
    if not told:
        return None
    return PortBaseline(up=link.up, vfs=tuple(PortVf(index=n, settings=told[n]) for n in sorted(told)))


def _matters(link: LinkInfo | None, known: Device | None, policy: NodePolicy) -> bool:
    if link is None:
        return known is not None
    if known is not None:
        taken = link.up or link.master is not None
        settings = LinkSettings.of(link, kind=known.kind)
        if known.kind is DeviceKind.SHARED:
            # It is up, and the host's: that is nothing new.
            taken = False
        same = is_at_home(known.identity, link) and known.settings == settings
        return taken or bool(known.withheld) or not same
    return link.kind is None or policy.selects(link)
