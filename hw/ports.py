"""PFs as whoever makes VFs has to see them: what they can have, what they have, who uses them.

Invariant: reads only. A PF that cannot be read is a sentence in problems and costs itself alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hw import netdevsim
from hw.errors import HwError
from hw.eswitch import NO_ESWITCHES, Eswitches, is_representor
from hw.model import EswitchMode, IfIndex, LinkInfo, NsimName, PciAddress, PciFacts, PfAddress
from hw.scan import USERSPACE_DRIVERS, Uplinks, reserved
from hw.sriov.discovery import DEVICES, Discovery, PciFunction, discover
from hw.sysfs import Sysfs


@dataclass(frozen=True, slots=True, kw_only=True)
class SriovPort:
    """A PF that can have VFs. links are its netdevs in the host's namespace, oldest first. facts are None for
    a simulated one, whose VFs are no functions either.

    in_use says in a sentence what the host does with the PF itself, vfs_in_use what others do with its VFs;
    "" is nothing. What this driver gave away is not known here.
    """

    address: PfAddress
    facts: PciFacts | None
    total_vfs: int
    num_vfs: int
    vfs: Mapping[int, PciAddress]
    links: tuple[LinkInfo, ...] = ()
    in_use: str = ""
    vfs_in_use: str = ""
    instance: int | None = None
    """Of its first VF: another one each time its VFs are made."""
    bond: IfIndex | None = None
    """The bond that it is a port of."""
    eswitch: EswitchMode | None = None
    """None: it has no switch whose mode could be changed."""

    @property
    def link(self) -> LinkInfo | None:
        return self.links[0] if self.links else None

    @property
    def driver(self) -> str:
        return "netdevsim" if self.facts is None else self.facts.driver or "no driver"

    @property
    def shown(self) -> str:
        """For sentences: the interface, which people know it by, and the address, which is sure."""
        return f"PF {self.address}" + (f" ({self.link.name!a})" if self.link else "")


@dataclass(frozen=True, slots=True)
class Ports:
    by_address: Mapping[PfAddress, SriovPort]
    problems: tuple[str, ...] = ()


def sriov_ports(
    sysfs: Sysfs, links: Sequence[LinkInfo], uplinks: Uplinks, eswitches: Eswitches = NO_ESWITCHES
) -> Ports:
    """Every PF of the node that is capable of SR-IOV."""
    found = discover(sysfs)
    reasons = reserved(links, uplinks)
    netdevs: defaultdict[PciAddress, list[LinkInfo]] = defaultdict(list)
    for link in sorted(links, key=lambda link: link.ifindex):
        if link.parent_bus == "pci" and link.parent_device and not is_representor(link, eswitches):
            netdevs[PciAddress(link.parent_device)].append(link)
    ports: dict[PfAddress, SriovPort] = {}
    bonds = frozenset(link.ifindex for link in links if link.kind == "bond")
    problems = [f"{address} cannot be read: {why}" for address, why in found.unreadable.items()]
    for address, function in sorted(found.functions.items()):
        if function.is_vf or function.total_vfs is None:
            continue
        try:
            port = _port(sysfs, function, found, netdevs, reasons)
            bond = next((link.master for link in port.links if link.master in bonds), None)
            ports[address] = replace(port, bond=bond, eswitch=eswitches.mode_of("pci", address))
        except HwError as error:
            problems.append(f"{address} cannot be read: {error}")
    for name in sysfs.names(netdevsim.DEVICES) or ():
        try:
            simulated = _simulated(sysfs, NsimName(name), links, reasons, eswitches)
        except HwError as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        if simulated is not None:
            ports[simulated.address] = simulated
    return Ports(ports, tuple(problems))


_SIMULATED_VFS = 4
"""What netdevsim makes at most, where it does not tell another number."""


def _simulated(
    sysfs: Sysfs,
    name: NsimName,
    links: Sequence[LinkInfo],
    reasons: Mapping[IfIndex, str],
    eswitches: Eswitches,
) -> SriovPort | None:
    """None where no port of it is here: the bus shows every namespace's devices."""
    mine = [link for link in links if (link.parent_bus, link.parent_device) == ("netdevsim", name)]
    own = tuple(sorted((x for x in mine if not is_representor(x, eswitches)), key=lambda x: x.ifindex))
    number = sysfs.integer(f"{netdevsim.DEVICES}/{name}/sriov_numvfs")
    if not own or number is None:
        return None
    vfs = [link for link in mine if is_representor(link, eswitches)]
    mode = eswitches.mode_of("netdevsim", name)
    vfs_in_use = next((f"its VF {x.name!a} is {why}" for x in vfs if (why := reasons.get(x.ifindex))), "")
    if mode is EswitchMode.SWITCHDEV and len(vfs) < number:
        vfs_in_use = vfs_in_use or "the netdev of a VF is in another network namespace"
    return SriovPort(
        address=name,
        facts=None,
        total_vfs=_most(sysfs, name),
        num_vfs=number,
        vfs={},
        links=own,
        in_use=next((why for link in own if (why := reasons.get(link.ifindex))), ""),
        vfs_in_use=vfs_in_use,
        eswitch=mode,
    )


def _most(sysfs: Sysfs, name: NsimName) -> int:
    try:
        return sysfs.integer(f"kernel/debug/netdevsim/{name}/max_vfs") or _SIMULATED_VFS
    except HwError:
        return _SIMULATED_VFS


def _port(
    sysfs: Sysfs,
    function: PciFunction,
    found: Discovery,
    netdevs: Mapping[PciAddress, Sequence[LinkInfo]],
    reasons: Mapping[IfIndex, str],
) -> SriovPort:
    address = function.facts.address
    base = f"{DEVICES}/{address}"
    number = sysfs.integer(f"{base}/sriov_numvfs")
    if number is None or number < 0:
        raise HwError(f"{sysfs.root / base}/sriov_numvfs tells no number of VFs")
    vfs = {
        other.vf_index: vf
        for vf, other in found.functions.items()
        if other.pf == address and other.vf_index is not None
    }
    links = tuple(netdevs.get(address, ()))
    used = [reason for link in links if (reason := reasons.get(link.ifindex))]
    assert function.total_vfs is not None
    return SriovPort(
        address=address,
        facts=function.facts,
        total_vfs=function.total_vfs,
        num_vfs=number,
        vfs=dict(sorted(vfs.items())),
        instance=found.functions[vfs[0]].facts.instance if 0 in vfs else None,
        links=links,
        in_use=used[0] if used else "",
        vfs_in_use=next(
            (why for vf in vfs.values() if (why := _vf_use(found.functions[vf], netdevs, reasons))), ""
        ),
    )


def _vf_use(
    vf: PciFunction, netdevs: Mapping[PciAddress, Sequence[LinkInfo]], reasons: Mapping[IfIndex, str]
) -> str:
    """What others do with a VF, as far as can be seen from here."""
    address = vf.facts.address
    links = netdevs.get(address, ())
    for link in links:
        if link.ifindex in reasons:
            return f"its VF {address} is {reasons[link.ifindex]}"
    if vf.has_netdev and not links:
        return f"the netdev of its VF {address} is in another network namespace"
    if vf.facts.driver in USERSPACE_DRIVERS:
        return f"its VF {address} is bound to {vf.facts.driver}"
    return ""
