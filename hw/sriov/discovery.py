"""PCI network functions and which is whose VF, from sysfs.

Invariant: reads only, each file once. A VF's index is the N of its PF's virtfnN and nothing else, and
everything about a PF may be missing: in a virtual machine a VF has none. What one function's files say
wrong costs that function only.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hw.errors import HwError
from hw.model import PciAddress, PciFacts, parse_pci_address
from hw.sysfs import Sysfs

DEVICES = "bus/pci/devices"
_NETWORK_CLASS = 0x02
_BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_ROOT = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
_VIRTFN = re.compile(r"virtfn([0-9]+)")
_VIRTIO = re.compile(r"virtio[0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class PciFunction:
    """A PCI function that is a NIC, or was asked for by address."""

    facts: PciFacts
    pf: PciAddress | None = None
    """Set for a VF whose PF this node can see."""
    vf_index: int | None = None
    is_vf: bool = False
    """Has a physfn, whether or not its PF tells the index."""
    total_vfs: int | None = None
    """What the hardware can have; None: not capable of SR-IOV."""
    has_netdev: bool = False
    """Its driver has made a netdev, in whatever namespace that is now."""
    has_rdma: bool = False
    """The same of an RDMA device."""
    virtio: tuple[str, ...] = ()
    """Its virtio children, which netdevs hang on instead of on the function."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """functions by address; unreadable ones by address too, with what was wrong."""

    functions: Mapping[PciAddress, PciFunction]
    unreadable: Mapping[PciAddress, str]


def discover(sysfs: Sysfs, also: Iterable[PciAddress] = ()) -> Discovery:
    """All network functions, and those in also of whatever class (RDMA devices without a netdev)."""
    chains = _chains(sysfs)
    forks = _forks(chains.values())
    wanted = frozenset(also)
    unreadable: dict[PciAddress, str] = {}
    found: dict[PciAddress, PciFunction] = {}
    vfs: dict[PciAddress, tuple[PciAddress, int]] = {}
    for address, chain in chains.items():
        try:
            if address not in wanted and not _is_network(sysfs, address):
                continue
            function, own_vfs = _function(sysfs, address, chain, forks)
        except HwError as error:
            unreadable[address] = str(error)
            continue
        found[address] = function
        vfs.update(own_vfs)
    return Discovery({key: _placed(value, vfs.get(key)) for key, value in found.items()}, unreadable)


def _chains(sysfs: Sysfs) -> dict[PciAddress, tuple[str, ...]]:
    """Address to the names from its root complex down to it."""
    chains: dict[PciAddress, tuple[str, ...]] = {}
    for name in sysfs.names(DEVICES) or ():
        try:
            address = parse_pci_address(name)
        except ValueError:
            continue
        parts = (sysfs.target(f"{DEVICES}/{name}") or "").split("/")
        roots = [number for number, part in enumerate(parts) if _ROOT.fullmatch(part)]
        # Without a root in the link (VMD and other nested domains) the chain is what can be seen.
        chains[address] = tuple(parts[roots[-1] :]) if roots else (name,)
    return chains


def _forks(chains: Iterable[tuple[str, ...]]) -> frozenset[str]:
    """Bridges with more than one bridge or device directly below them."""
    below: dict[str, set[str]] = {}
    for chain in chains:
        for parent, child in itertools.pairwise(chain):
            below.setdefault(parent, set()).add(child)
    return frozenset(parent for parent, children in below.items() if len(children) > 1)


def _is_network(sysfs: Sysfs, address: PciAddress) -> bool:
    number = sysfs.integer(f"{DEVICES}/{address}/class", base=16)
    return number is not None and number >> 16 == _NETWORK_CLASS


def _function(
    sysfs: Sysfs, address: PciAddress, chain: tuple[str, ...], forks: frozenset[str]
) -> tuple[PciFunction, dict[PciAddress, tuple[PciAddress, int]]]:
    base = f"{DEVICES}/{address}"
    entries = frozenset(sysfs.names(base) or ())
    # Many functions, each with many files: few of those are worth a look.
    kin = [name for name in entries if name.startswith("virt")]
    vfs = _virtual_functions(sysfs, address, kin)
    total = sysfs.integer(f"{base}/sriov_totalvfs") if "sriov_totalvfs" in entries else None
    function = PciFunction(
        facts=PciFacts(
            address=address,
            vendor=_hex_id(sysfs, f"{base}/vendor"),
            product=_hex_id(sysfs, f"{base}/device"),
            driver=sysfs.target_name(f"{base}/driver") if "driver" in entries else None,
            numa_node=_numa_node(sysfs, base, entries),
            pcie_root=chain[0] if _ROOT.fullmatch(chain[0]) else None,
            pcie_switch=_switch(chain, forks),
            iommu_group=_iommu_group(sysfs, base, entries),
            instance=sysfs.instance(base),
        ),
        is_vf="physfn" in entries,
        total_vfs=total or None,
        has_netdev="net" in entries,
        has_rdma="infiniband" in entries,
        virtio=tuple(sorted(name for name in kin if _VIRTIO.fullmatch(name))),
    )
    return function, vfs


def _placed(function: PciFunction, place: tuple[PciAddress, int] | None) -> PciFunction:
    """The function as a VF, where a PF names it as one of its own."""
    if place is None:
        return function
    pf, index = place
    return replace(function, pf=pf, vf_index=index, is_vf=True)


def _virtual_functions(
    sysfs: Sysfs, pf: PciAddress, entries: Iterable[str]
) -> dict[PciAddress, tuple[PciAddress, int]]:
    found: dict[PciAddress, tuple[PciAddress, int]] = {}
    for entry in entries:
        match = _VIRTFN.fullmatch(entry)
        name = sysfs.target_name(f"{DEVICES}/{pf}/{entry}") if match else None
        if match and name and _BDF.fullmatch(name):
            found[PciAddress(name)] = (pf, int(match[1]))
    return found


def _switch(chain: tuple[str, ...], forks: frozenset[str]) -> str | None:
    """The nearest bridge that has others below it too. The direct parent does not count: it is the
    port that belongs to this device alone, its several functions included."""
    for name in reversed(chain[1:-2]):
        if name in forks and _BDF.fullmatch(name):
            return name
    return None


def _hex_id(sysfs: Sysfs, path: str) -> str:
    number = sysfs.integer(path, base=16)
    if number is None or not 0 <= number <= 0xFFFF:
        raise HwError(f"{posixpath.join(sysfs.root, path)} holds no PCI id")
    return f"{number:04x}"


def _numa_node(sysfs: Sysfs, base: str, entries: frozenset[str]) -> int | None:
    """None where the machine has no answer, which the kernel says as -1."""
    node = sysfs.integer(f"{base}/numa_node") if "numa_node" in entries else None
    return node if node is not None and node >= 0 else None


def _iommu_group(sysfs: Sysfs, base: str, entries: frozenset[str]) -> int | None:
    name = sysfs.target_name(f"{base}/iommu_group") if "iommu_group" in entries else None
    return int(name) if name and name.isdecimal() else None
