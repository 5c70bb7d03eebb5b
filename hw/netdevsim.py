"""Ports of netdevsim devices: simulated NICs with VFs, for tests and for clusters without hardware.

Invariant: pure over a dump of links; yields the same model as real hardware. In switchdev mode the port
of a VF is the netdev that is given away; it comes home when its namespace dies, as a VF does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hw.model import DeviceKind, EswitchMode, HwDevice, IfName, LinkInfo, NetdevsimIdentity

_DEVICE = re.compile(r"netdevsim([0-9]+)")
_PORT = re.compile(r"p([0-9]+)")
_VF_PORT = re.compile(r"pf([0-9]+)vf([0-9]+)")


def discover(links: Iterable[LinkInfo]) -> tuple[tuple[HwDevice, ...], tuple[str, ...]]:
    """Ports and VF ports among the links; and sentences about those that cannot be told apart."""
    found: list[HwDevice] = []
    problems: list[str] = []
    mine = [link for link in links if link.parent_bus == "netdevsim"]
    identities = {link.ifindex: _identity(link) for link in mine}
    with_vfs = {known.bus_id for known in identities.values() if known and known.vf_index is not None}
    names = {
        known.bus_id: link.name for link in mine if (known := identities[link.ifindex]) and known.port == 1
    }
    for link in mine:
        identity = identities[link.ifindex]
        if identity is None:
            problems.append(
                f"netdevsim port {link.name!a} is left out: it is {link.phys_port_name!a} "
                f"of {link.parent_device!a}, which says neither port nor VF"
            )
        else:
            found.append(_device(link, identity, names.get(identity.bus_id), identity.bus_id in with_vfs))
    return tuple(found), tuple(problems)


def _identity(link: LinkInfo) -> NetdevsimIdentity | None:
    device = _DEVICE.fullmatch(link.parent_device or "")
    if device is None:
        return None
    if port := _PORT.fullmatch(link.phys_port_name or ""):
        return NetdevsimIdentity(int(device[1]), int(port[1]))
    if vf := _VF_PORT.fullmatch(link.phys_port_name or ""):
        return NetdevsimIdentity(int(device[1]), int(vf[1]), int(vf[2]))
    return None


def _device(link: LinkInfo, identity: NetdevsimIdentity, pf_name: IfName | None, with_vfs: bool) -> HwDevice:
    is_vf = identity.vf_index is not None
    return HwDevice(
        kind=DeviceKind.VF if is_vf else DeviceKind.PF,
        identity=identity,
        link=link,
        pf_name=pf_name if is_vf else None,
        pf_eswitch=EswitchMode.SWITCHDEV if with_vfs else None,
        withheld="" if is_vf or not with_vfs else "it has VFs, and they are given away instead",
    )
