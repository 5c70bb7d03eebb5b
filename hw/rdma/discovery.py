"""RDMA devices and what they hang on, from sysfs, with what only NETLINK_RDMA tells.

Invariant: reads only, and nothing here makes the hardware run a command, but for devices whose netdev is not
plain from their place. A device belongs to a PCI function only if it is that function's direct child (one of
a sub-function is not the function's own), or to the netdev it is made of (software). What one device's files
say wrong costs that device only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hw.errors import HwError
from hw.model import IfIndex, IfName, LinkInfo, PciAddress, RdmaFacts, RdmaIndex, RdmaName, RdmaPort
from hw.rdma.nldev import NldevDevice, NldevPort
from hw.sysfs import Sysfs

DEVICES = "class/infiniband"
_BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_NO_GUID = "0000:0000:0000:0000"
_LINK_LAYERS = ("Ethernet", "InfiniBand")

Devices = tuple[RdmaFacts, ...]


class Asked(Protocol):
    """What is asked of NETLINK_RDMA; hw.rdma.netlink.RdmaSocket answers."""

    def devices(self) -> Sequence[NldevDevice]: ...

    def ports(self, index: RdmaIndex) -> Sequence[NldevPort]: ...


@dataclass(frozen=True, slots=True)
class RdmaDevices:
    """What was found, by what it hangs on; several on one in the order of their names. problems are sentences
    about devices that were left out."""

    by_pci: Mapping[PciAddress, Devices]
    software: Devices
    problems: tuple[str, ...] = ()

    def of(self, address: PciAddress | None, link: LinkInfo | None) -> Devices:
        """All that belong to a function or to a netdev, first the one that goes with the netdev, if any is
        known to, with its port."""
        own = self.by_pci.get(address, ()) if address is not None else ()
        if link is None:
            return own
        found = [*own, *(one for one in self.software if any(port.carries(link) for port in one.ports))]
        # The one port of a function's one device is plain from its place, whatever is made on the netdev.
        plain = own if len(own) == 1 and len(own[0].ports) == 1 else ()
        carrying = ((one, port) for one in found for port in one.ports if one in plain or port.carries(link))
        first, port = next(carrying, (None, None))
        if first is None or port is None:
            return tuple(found)
        others = (one for one in found if one is not first)
        return (replace(first, port=port.number, link_layer=port.link_layer), *others)


def discover(sysfs: Sysfs, asked: Asked | None = None) -> RdmaDevices:
    """All RDMA devices this namespace sees. asked must be of the same namespace as sysfs."""
    on_pci: defaultdict[PciAddress, list[RdmaFacts]] = defaultdict(list)
    software: list[RdmaFacts] = []
    problems: list[str] = []
    names = sorted(sysfs.names(DEVICES) or (), key=lambda name: (len(name), name))
    told = _told(asked, problems) if names else {}
    for name in names:
        try:
            facts = _facts(sysfs, name, told.get(name))
            parents = (sysfs.target(f"{DEVICES}/{name}") or "").split("/")
            # .../0000:3b:00.0/infiniband/mlx5_0
            if len(parents) >= 3 and _BDF.fullmatch(parents[-3]):
                on_pci[PciAddress(parents[-3])].append(facts)
            elif "virtual" in parents:
                software.append(_placed(sysfs, asked, replace(facts, software=True), problems))
        except HwError as error:
            problems.append(f"RDMA device {name!a} is left out: {error}")
    by_pci = {
        # A part of another device (kernel 6.11) comes after what it is a part of.
        address: tuple(
            _placed(sysfs, asked, one, problems) if len(found) > 1 or len(one.ports) > 1 else one
            for one in sorted(found, key=lambda one: one.name in told and told[one.name].parent is not None)
        )
        for address, found in on_pci.items()
    }
    return RdmaDevices(by_pci, tuple(software), tuple(problems))


def _told(asked: Asked | None, problems: list[str]) -> Mapping[str, NldevDevice]:
    try:
        return {device.name: device for device in asked.devices()} if asked is not None else {}
    except HwError as error:
        problems.append(f"of RDMA devices only sysfs tells: {error}")
        return {}


def _facts(sysfs: Sysfs, name: str, told: NldevDevice | None) -> RdmaFacts:
    base = f"{DEVICES}/{name}"
    numbers = sorted(int(port) for port in sysfs.names(f"{base}/ports") or () if port.isdecimal())
    ports = tuple(RdmaPort(number, _link_layer(sysfs, base, number)) for number in numbers)
    if not ports:
        raise HwError(f"{sysfs.root / base} has no port")
    guid = sysfs.text(f"{base}/node_guid")
    return RdmaFacts(
        name=RdmaName(name),
        link_layer=ports[0].link_layer,
        node_guid=guid if guid and guid != _NO_GUID else None,
        firmware=sysfs.text(f"{base}/fw_ver") or None,
        ports=ports,
        port=ports[0].number,
        index=told.index if told else None,
        protocol=told.protocol if told else None,
        sys_image_guid=told.sys_image_guid if told else None,
    )


def _link_layer(sysfs: Sysfs, base: str, number: int) -> str:
    layer = sysfs.text(f"{base}/ports/{number}/link_layer")
    if layer not in _LINK_LAYERS:
        raise HwError(f"{sysfs.root / base}: the link layer of its port {number} is {layer!a}")
    return layer


def _placed(sysfs: Sysfs, asked: Asked | None, facts: RdmaFacts, problems: list[str]) -> RdmaFacts:
    """With the netdevs of its ports: as netlink tells them, else by the names in sysfs."""
    netdevs: Mapping[int, IfIndex | None] = {}
    if asked is not None and facts.index is not None:
        try:
            netdevs = {port.number: port.netdev_index for port in asked.ports(facts.index)}
        except HwError as error:
            problems.append(f"the netdevs of RDMA device {facts.name!a} are taken from sysfs: {error}")
    names = {} if netdevs else {port.number: _netdev(sysfs, facts.name, port.number) for port in facts.ports}
    ports = (
        replace(port, netdev_index=netdevs.get(port.number), netdev_name=names.get(port.number))
        for port in facts.ports
    )
    return replace(facts, ports=tuple(ports))


def _netdev(sysfs: Sysfs, name: RdmaName, port: int) -> IfName | None:
    """Where software says what it is made of, and else what the first GID belongs to."""
    base = f"{DEVICES}/{name}"
    found = sysfs.text(f"{base}/parent") or sysfs.text(f"{base}/ports/{port}/gid_attrs/ndevs/0")
    return IfName(found) if found else None
