"""Ports of netdevsim devices: simulated NICs with VFs, for tests and for clusters without hardware.

Invariant: reads only; yields the same model as real hardware. A VF has no netdev but its port in the switch,
which is there in switchdev mode alone: there it is what is given away, unlike a real VF's representor, and it
comes home when its namespace dies, as a VF does. In legacy mode a VF is set up on its PF and given to nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hw.devlink_codec import DevlinkPort, PortFlavour
from hw.errors import HwError
from hw.eswitch import Eswitches
from hw.model import DeviceKind, EswitchMode, HwDevice, LinkInfo, NetdevsimIdentity, PortState
from hw.sysfs import Sysfs

DEVICES = "bus/netdevsim/devices"
_DEVICE = re.compile(r"netdevsim([0-9]+)")
_PORT = re.compile(r"p([0-9]+)")
_VF_PORT = re.compile(r"pf([0-9]+)vf([0-9]+)")


def discover(
    sysfs: Sysfs, links: Iterable[LinkInfo], eswitches: Eswitches
) -> tuple[tuple[HwDevice, ...], tuple[str, ...]]:
    """Ports and VF ports among the links; and sentences about those that cannot be told apart."""
    found: list[HwDevice] = []
    problems: list[str] = []
    mine = [link for link in links if link.parent_bus == "netdevsim"]
    identities = {link.ifindex: _identity(link, eswitches.ports.get(link.ifindex)) for link in mine}
    with_vfs = {known.bus_id for known in identities.values() if known and known.vf_index is not None}
    first_ports = {
        known.bus_id: link
        for link in mine
        if (known := identities[link.ifindex]) and known.port == 1 and known.vf_index is None
    }
    for link in mine:
        identity = identities[link.ifindex]
        if identity is None:
            problems.append(
                f"netdevsim port {link.name!a} is left out: it is {link.phys_port_name!a} "
                f"of {link.parent_device!a}, which says neither port nor VF"
            )
            continue
        vfs = identity.bus_id in with_vfs
        mode = eswitches.mode_of("netdevsim", f"netdevsim{identity.bus_id}")
        if mode is None and vfs:
            mode = EswitchMode.SWITCHDEV
        vfs = vfs or _number_of_vfs(sysfs, identity) > 0
        port = first_ports.get(identity.bus_id) if identity.vf_index is not None else link
        found.append(_device(link, identity, port, mode, vfs))
    return tuple(found), tuple(problems)


def _identity(link: LinkInfo, told: DevlinkPort | None) -> NetdevsimIdentity | None:
    """By what devlink says of the port, and where it was not asked by the name that the port has from it."""
    device = _DEVICE.fullmatch(link.parent_device or "")
    if device is None:
        return None
    if told is not None and told.flavour is PortFlavour.PHYSICAL and told.number is not None:
        return NetdevsimIdentity(int(device[1]), told.number)
    if told is not None and told.flavour is PortFlavour.PCI_VF and None not in (told.pf, told.vf):
        return NetdevsimIdentity(int(device[1]), told.pf or 0, told.vf)
    if port := _PORT.fullmatch(link.phys_port_name or ""):
        return NetdevsimIdentity(int(device[1]), int(port[1]))
    if vf := _VF_PORT.fullmatch(link.phys_port_name or ""):
        return NetdevsimIdentity(int(device[1]), int(vf[1]), int(vf[2]))
    return None


def _number_of_vfs(sysfs: Sysfs, identity: NetdevsimIdentity) -> int:
    """0 too where it cannot be read: then VFs are seen by their ports."""
    try:
        return sysfs.integer(f"{DEVICES}/netdevsim{identity.bus_id}/sriov_numvfs") or 0
    except HwError:
        return 0


def _device(
    link: LinkInfo,
    identity: NetdevsimIdentity,
    port: LinkInfo | None,
    mode: EswitchMode | None,
    with_vfs: bool,
) -> HwDevice:
    """port: the link of its physical port, which is its own but for a VF."""
    is_vf = identity.vf_index is not None
    return HwDevice(
        kind=DeviceKind.VF if is_vf else DeviceKind.PF,
        identity=identity,
        link=link,
        pf_name=port.name if is_vf and port is not None else None,
        pf_eswitch=mode,
        physical_port=_port(identity.bus_id, port) if port is not None else None,
        withheld="" if is_vf or not with_vfs else "it has VFs, and they are given away instead",
    )


def _port(bus_id: int, link: LinkInfo) -> PortState:
    """It carries nothing anyway, so a port that is down is nobody's trouble."""
    return PortState(
        key=f"netdevsim{bus_id}/{link.phys_port_name}",
        name=link.name,
        up=link.up,
        carrier=link.carrier if link.up else None,
    )
