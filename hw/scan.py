"""All devices of the node as one list: PCI functions, RDMA devices, netdevsim ports, software links.

Invariant: pure over sysfs and one dump of the host's links. Each device is yielded once, with the
reason in withheld where it must not be given away: what the host itself needs, what others use, what
cannot be moved. A representor is never taken for the netdev of its function.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hw import netdevsim
from hw.errors import HwError
from hw.eswitch import NO_ESWITCHES, Eswitches, is_representor, representors
from hw.ipoib import is_ipoib
from hw.links import Links
from hw.model import (
    DeviceKind,
    EswitchMode,
    HwDevice,
    Identity,
    IfIndex,
    IfName,
    InterfaceAddress,
    LinkInfo,
    NetdevsimIdentity,
    PciAddress,
    PciIdentity,
    PortState,
    RdmaFacts,
    SoftwareIdentity,
)
from hw.rdma.discovery import Asked, RdmaDevices
from hw.rdma.discovery import discover as discover_rdma
from hw.sriov.discovery import DEVICES, PciFunction
from hw.sriov.discovery import discover as discover_pci
from hw.sysfs import Sysfs

log = logging.getLogger(__name__)

_LOOPBACK = 772
USERSPACE_DRIVERS = frozenset({"vfio-pci", "uio_pci_generic", "igb_uio", "pci-stub"})
_ALIVE_MBPS = 10_000_000
"""A speed over 10 Tb/s is the kernel's unknown (-1 as unsigned)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uplinks:
    """What ties links to the host, by ifindex in the host's netns."""

    routes: frozenset[IfIndex] = frozenset()
    """Carry a default route."""
    addressed: frozenset[IfIndex] = frozenset()
    """Have an address that is not loopback, link-local or multicast."""


def uplinks_of(links: Links) -> Uplinks:
    """Read it from the host's namespace."""
    addressed = (ifindex for ifindex, address in links.all_addresses() if _is_global(address))
    return Uplinks(routes=links.default_route_links(), addressed=frozenset(addressed))


def scan(
    sysfs: Sysfs,
    links: Sequence[LinkInfo],
    uplinks: Uplinks,
    eswitches: Eswitches = NO_ESWITCHES,
    asked: Asked | None = None,
) -> tuple[HwDevice, ...]:
    """Every device of this node. What cannot be read of one device is logged and costs that one. asked: who
    tells of RDMA devices what sysfs does not."""
    rdma = discover_rdma(sysfs, asked)
    pci = discover_pci(sysfs, also=rdma.by_pci)
    simulated, problems = netdevsim.discover(sysfs, links, eswitches)
    for problem in (*rdma.problems, *problems):
        log.warning("%s", problem)
    view = _View(sysfs, links, rdma, reserved(links, uplinks), pci.functions, eswitches)
    found = [device for function in pci.functions.values() for device in view.of_function(function)]
    found += [_unreadable(address, reason) for address, reason in pci.unreadable.items()]
    found += [view.checked(_with_rdma(device, rdma.of(None, device.link))) for device in simulated]
    found += [view.checked(_software(link, rdma)) for link in links if _is_software(link)]
    return tuple(found)


def reserved(links: Sequence[LinkInfo], uplinks: Uplinks) -> Mapping[IfIndex, str]:
    """Links that others need, with the reason as a sentence.

    The host's own uplinks; every link below or above one of them, by master or lower device in the same
    namespace; every link that is in a bridge or bond, is one, or carries others.
    """
    reasons: dict[IfIndex, str] = {}
    by_index = {link.ifindex: link for link in links}
    for index in uplinks.addressed & by_index.keys():
        reasons[index] = "in use by the host: it has an address"
    for index in uplinks.routes & by_index.keys():
        reasons[index] = "in use by the host: it has a default route"
    neighbours = _neighbours(links)
    queue = [index for index in reasons if by_index[index].link_type != _LOOPBACK]
    while queue:
        index = queue.pop()
        for other in neighbours[index] - reasons.keys():
            reasons[other] = f"in use by the host: it is below or above {by_index[index].name!a}"
            queue.append(other)
    for link in links:
        if link.link_type == _LOOPBACK:
            reasons.setdefault(link.ifindex, "it is the loopback interface")
        if link.master is not None:
            master = by_index.get(link.master)
            name = f"{master.name!a}" if master else f"link {link.master}"
            reasons.setdefault(link.ifindex, f"in use by others: it belongs to {name}")
            reasons.setdefault(link.master, f"in use by others: {link.name!a} belongs to it")
        elif link.is_stacked and link.peer in by_index:
            reasons.setdefault(link.peer, f"in use by others: {link.name!a} is on top of it")
    return reasons


def _neighbours(links: Iterable[LinkInfo]) -> Mapping[IfIndex, set[IfIndex]]:
    known = {link.ifindex for link in links}
    neighbours: defaultdict[IfIndex, set[IfIndex]] = defaultdict(set)
    for link in links:
        for other in (link.master, link.peer if link.peer_nsid is None else None):
            if other is not None and other in known and other != link.ifindex:
                neighbours[link.ifindex].add(other)
                neighbours[other].add(link.ifindex)
    return neighbours


def _is_global(address: InterfaceAddress) -> bool:
    ip = address.ip
    return not (ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified)


def _is_software(link: LinkInfo) -> bool:
    return link.kind is not None and link.parent_bus is None


def pf_link(identity: Identity, links: Iterable[LinkInfo]) -> LinkInfo | None:
    """The netdev on which a VF's settings are made, among the host's links; None if it is no VF, or its PF
    is not there (in a virtual machine it never is)."""
    if isinstance(identity, SoftwareIdentity) or identity.vf_index is None:
        return None
    bus, parent = "pci", str(identity.pf) if isinstance(identity, PciIdentity) else ""
    if isinstance(identity, NetdevsimIdentity):
        bus, parent = "netdevsim", f"netdevsim{identity.bus_id}"
    found = (
        link
        for link in links
        if (link.parent_bus, link.parent_device) == (bus, parent)
        and not (is_representor(link) or link.is_stacked)
    )
    return min(found, key=lambda link: link.ifindex, default=None)


def _unreadable(address: PciAddress, reason: str) -> HwDevice:
    return HwDevice(
        kind=DeviceKind.PF, identity=PciIdentity(address), link=None, withheld=f"it cannot be read: {reason}"
    )


def _software(link: LinkInfo, rdma: RdmaDevices) -> HwDevice:
    assert link.kind is not None
    identity = SoftwareIdentity(link.kind, link.ifindex, link.peer, link.peer_nsid)
    return _with_rdma(HwDevice(kind=DeviceKind.NETDEV, identity=identity, link=link), rdma.of(None, link))


def _with_rdma(device: HwDevice, found: Sequence[RdmaFacts]) -> HwDevice:
    """found: the first goes with the device."""
    if not found:
        return device
    others = tuple(one.name for one in found[1:])
    return replace(device, rdma=found[0], more_rdma=others, rdma_capable=True)


class _View:
    """Turns functions into devices; holds what all of them are compared with."""

    def __init__(
        self,
        sysfs: Sysfs,
        links: Sequence[LinkInfo],
        rdma: RdmaDevices,
        in_use: Mapping[IfIndex, str],
        functions: Mapping[PciAddress, PciFunction],
        eswitches: Eswitches,
    ) -> None:
        self._sysfs = sysfs
        self._eswitches = eswitches
        self._representors = representors(links, eswitches)
        self._rdma = rdma
        self._in_use = in_use
        self._functions = functions
        self._netdevs: defaultdict[PciAddress, list[LinkInfo]] = defaultdict(list)
        self._speeds: dict[PciAddress, int | None] = {}
        for link in links:
            # An IPoIB child has its parent's parent device too, and hangs on the parent.
            if (
                link.parent_bus == "pci"
                and link.parent_device
                and not (is_representor(link, eswitches) or link.is_stacked)
            ):
                self._netdevs[PciAddress(link.parent_device)].append(link)

    def of_function(self, function: PciFunction) -> list[HwDevice]:
        """One device per port that is here; one without a link where none is."""
        links = self._netdevs.get(function.facts.address, [])
        try:
            ports = self._ports(function, links)
        except HwError as error:
            return [_unreadable(function.facts.address, str(error))]
        return [self._device(function, identity, link) for identity, link in ports]

    def checked(self, device: HwDevice) -> HwDevice:
        """The device, withheld where its link is needed by others."""
        reason = self._in_use.get(device.link.ifindex, "") if device.link else ""
        if not reason:
            return device
        return replace(device, withheld=device.withheld or reason, taken=True, in_use=reason)

    def _ports(
        self, function: PciFunction, links: Sequence[LinkInfo]
    ) -> list[tuple[PciIdentity, LinkInfo | None]]:
        address = function.facts.address
        if not links:
            return [(PciIdentity(address, function.pf, function.vf_index), None)]
        # The netdevs of one function have the same parent; a PF's permanent MAC is taken even where
        # there is only one, since its neighbour may just be away in a pod.
        by_mac = not function.is_vf or self._several_ports(function)
        return [
            (
                PciIdentity(
                    address,
                    function.pf,
                    function.vf_index,
                    port=self._port_number(address, link) or None,
                    permanent_mac=link.permanent_mac if by_mac else None,
                ),
                link,
            )
            for link in links
        ]

    def _several_ports(self, function: PciFunction) -> bool:
        owners = {function.facts.address, function.pf}
        return any(len(self._netdevs.get(owner, [])) > 1 for owner in owners if owner is not None)

    def _port_number(self, address: PciAddress, link: LinkInfo) -> int:
        return self._sysfs.integer(f"{DEVICES}/{address}/net/{link.name}/dev_port") or 0

    def _device(self, function: PciFunction, identity: PciIdentity, link: LinkInfo | None) -> HwDevice:
        rdma = self._rdma_of(function, link)
        pf = function.pf if function.is_vf else function.facts.address
        pf_link = self._main_link(pf) if pf is not None else None
        device = HwDevice(
            kind=_kind(function, link, rdma),
            identity=identity,
            link=link,
            pci=function.facts,
            rdma_capable=function.has_rdma,
            pf_name=pf_link.name if pf_link and function.is_vf else None,
            pf_eswitch=self._eswitch(pf, pf_link) if pf is not None else None,
            speed_mbps=self._speed(pf, pf_link) if pf is not None and pf_link else None,
            total_vfs=None if function.is_vf else function.total_vfs,
            representor=self._representor(function),
            physical_port=self._port(function, pf_link if function.is_vf else link),
            has_netdev=function.has_netdev,
        )
        device = _with_rdma(device, rdma)
        device = replace(device, withheld=self._reason(function, device), taken=_is_away(function, device))
        return self.checked(device)

    def _rdma_of(self, function: PciFunction, link: LinkInfo | None) -> Sequence[RdmaFacts]:
        address = function.facts.address
        found = self._rdma.of(address, link)
        others = [other for other in self._netdevs.get(address, []) if other is not link]
        theirs = {one.name for other in others for one in self._rdma.of(address, other)[:1]}
        if not found or found[0].name not in theirs:
            return found
        return (replace(found[0], shared=True), *found[1:])

    def _main_link(self, address: PciAddress) -> LinkInfo | None:
        links = self._netdevs.get(address, [])
        return min(links, key=lambda link: link.ifindex, default=None)

    def _eswitch(self, pf: PciAddress, link: LinkInfo | None) -> EswitchMode | None:
        function = self._functions.get(pf)
        if function is None or function.total_vfs is None:
            return None
        told = self._eswitches.mode_of("pci", pf)
        if told is not None:
            return told
        switched = link is not None and link.phys_switch_id is not None
        return EswitchMode.SWITCHDEV if switched else EswitchMode.LEGACY

    def _representor(self, function: PciFunction) -> IfName | None:
        if function.pf is None or function.vf_index is None:
            return None
        link = self._representors.get((function.pf, function.vf_index))
        return link.name if link is not None else None

    def _port(self, function: PciFunction, link: LinkInfo | None) -> PortState | None:
        """A VF's port is its PF's, which must be up to carry anything. A PF that is down may just be idle;
        and an IPoIB interface that is down says nothing of its port."""
        pf = function.pf if function.is_vf else function.facts.address
        if link is None or pf is None:
            return None
        must_be_up = function.is_vf and not is_ipoib(link)
        return PortState(
            key=pf,
            name=link.name,
            up=link.up,
            carrier=link.carrier if link.up else False if must_be_up else None,
            speed_mbps=self._speed(pf, link),
        )

    def _speed(self, pf: PciAddress, link: LinkInfo) -> int | None:
        """Of the PF's port in Mb/s. One read per PF: it is a query of the driver under the rtnl lock."""
        if pf not in self._speeds:
            try:
                speed = self._sysfs.integer(f"{DEVICES}/{pf}/net/{link.name}/speed")
            except HwError as error:
                log.warning("the speed of %a is not known: %s", link.name, error)
                speed = None
            self._speeds[pf] = speed if speed is not None and 0 < speed <= _ALIVE_MBPS else None
        return self._speeds[pf]

    def _reason(self, function: PciFunction, device: HwDevice) -> str:
        """Why the function as such is not given away, or ""."""
        driver = function.facts.driver
        if driver is None:
            return "it has no driver: bind one to offer it"
        if driver in USERSPACE_DRIVERS:
            return f"in use by others: it is bound to {driver}"
        if device.kind is DeviceKind.RDMA:
            return "" if device.rdma else "its RDMA device is in another network namespace"
        if function.virtio:
            return "its netdev hangs on a virtio device, which cannot be told apart in a pod"
        if device.link is None:
            if function.has_netdev:
                return "its netdev is in another network namespace"
            return f"its driver {driver!a} made no netdev"
        if not function.is_vf and device.pf_eswitch is EswitchMode.SWITCHDEV:
            return "its switch is in switchdev mode, and it is the switch's way out"
        if self._several_ports(function) and device.link.permanent_mac is None:
            return "its function has several netdevs and they have no permanent MAC to tell them apart"
        return ""


def _is_away(function: PciFunction, device: HwDevice) -> bool:
    """Whether a process drives it, or its netdev is in another namespace."""
    return function.facts.driver in USERSPACE_DRIVERS or (device.link is None and function.has_netdev)


def _kind(function: PciFunction, link: LinkInfo | None, rdma: Sequence[RdmaFacts]) -> DeviceKind:
    if link is None and (rdma or function.has_rdma) and not function.has_netdev:
        return DeviceKind.RDMA
    return DeviceKind.VF if function.is_vf else DeviceKind.PF
