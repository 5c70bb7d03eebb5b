"""RDMA devices and what they hang on, from sysfs.

Invariant: reads only. A device belongs to a PCI function only if it is that function's direct child
(one of a sub-function is not the function's own), or to a netdev where it is made of one (soft RoCE).
What one device's files say wrong costs that device only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hw.errors import HwError
from hw.model import IfName, PciAddress, RdmaFacts, RdmaName
from hw.sysfs import Sysfs

DEVICES = "class/infiniband"
_BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_NO_GUID = "0000:0000:0000:0000"


@dataclass(frozen=True, slots=True)
class RdmaDevices:
    """What was found, by what it hangs on. problems are sentences about devices that were left out."""

    by_pci: Mapping[PciAddress, RdmaFacts]
    by_netdev: Mapping[IfName, RdmaFacts]
    problems: tuple[str, ...] = ()


def discover(sysfs: Sysfs) -> RdmaDevices:
    """All RDMA devices this namespace sees; of several on one function the first by name."""
    by_pci: dict[PciAddress, RdmaFacts] = {}
    by_netdev: dict[IfName, RdmaFacts] = {}
    problems: list[str] = []
    for name in sysfs.names(DEVICES) or ():
        try:
            facts = _facts(sysfs, name)
            parents = (sysfs.target(f"{DEVICES}/{name}") or "").split("/")
            on_pci = len(parents) >= 3 and _BDF.fullmatch(parents[-3]) is not None
            netdev = None if on_pci else sysfs.text(f"{DEVICES}/{name}/parent")
        except HwError as error:
            problems.append(f"RDMA device {name!a} is left out: {error}")
            continue
        # .../0000:3b:00.0/infiniband/mlx5_0
        if on_pci:
            by_pci.setdefault(PciAddress(parents[-3]), facts)
        elif netdev:
            by_netdev.setdefault(IfName(netdev), facts)
    return RdmaDevices(by_pci, by_netdev, tuple(problems))


def _facts(sysfs: Sysfs, name: str) -> RdmaFacts:
    base = f"{DEVICES}/{name}"
    ports = sorted(int(port) for port in sysfs.names(f"{base}/ports") or () if port.isdecimal())
    layer = sysfs.text(f"{base}/ports/{ports[0]}/link_layer") if ports else None
    if layer not in ("Ethernet", "InfiniBand"):
        raise HwError(f"{sysfs.root / base}: its first port's link layer is {layer!a}")
    guid = sysfs.text(f"{base}/node_guid")
    return RdmaFacts(
        name=RdmaName(name),
        link_layer=layer,
        node_guid=guid if guid and guid != _NO_GUID else None,
        firmware=sysfs.text(f"{base}/fw_ver") or None,
    )
