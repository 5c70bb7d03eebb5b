"""What devlink knows of the node's embedded switches: their modes, and which netdev is whose end in a switch.

Invariant: reads only. A kernel without devlink has none of this, and a device that does not answer costs what
is known of it and nothing else: whoever uses this has names of ports to go by.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hw.devlink import Devlink
from hw.devlink_codec import REPRESENTING, DevlinkHandle, DevlinkPort, PortFlavour
from hw.errors import HwError, Unsupported
from hw.model import EswitchMode, IfIndex, LinkInfo
from hw.sysfs import Sysfs

log = logging.getLogger(__name__)

_REPRESENTOR = re.compile(r"(c[0-9]+)?pf([0-9]+)(hpf|(vf|sf)([0-9]+))?")
"""What the kernel's devlink, or a driver without it, calls the switch's end of a PF, VF or SF."""


@dataclass(frozen=True, slots=True)
class Eswitches:
    """modes by device; ports by the netdev they have in the namespace that was asked, read only where some
    device is in switchdev mode: that is a firmware query for each."""

    modes: Mapping[DevlinkHandle, EswitchMode] = field(default_factory=dict)
    ports: Mapping[IfIndex, DevlinkPort] = field(default_factory=dict)

    def mode_of(self, bus: str, device: str) -> EswitchMode | None:
        """None where it has no mode, or nobody was asked."""
        return self.modes.get(DevlinkHandle(bus, device))


NO_ESWITCHES = Eswitches()


def read_eswitches(sysfs: Sysfs) -> Eswitches:
    """Of the devices that can have VFs: a VF may be a device of devlink's too, and has no switch."""
    try:
        with Devlink() as devlink:
            modes = {}
            for handle in devlink.devices():
                if _can_have_vfs(sysfs, handle) and (mode := _mode(devlink, handle)) is not None:
                    modes[handle] = mode
            ports = devlink.ports() if EswitchMode.SWITCHDEV in modes.values() else ()
    except Unsupported:
        return NO_ESWITCHES
    except HwError as error:
        log.warning("eswitch modes are not known, and representors are told by their ports' names: %s", error)
        return NO_ESWITCHES
    return Eswitches(modes, {port.ifindex: port for port in ports if port.ifindex is not None})


def _can_have_vfs(sysfs: Sysfs, handle: DevlinkHandle) -> bool:
    file = "sriov_numvfs" if handle.bus == "netdevsim" else "sriov_totalvfs"
    entries = sysfs.names(f"bus/{handle.bus}/devices/{handle.device}")
    return entries is not None and file in entries


def _mode(devlink: Devlink, handle: DevlinkHandle) -> EswitchMode | None:
    try:
        return devlink.eswitch_mode(handle)
    except HwError as error:
        log.warning("%s", error)
        return None


def is_representor(link: LinkInfo, eswitches: Eswitches = NO_ESWITCHES) -> bool:
    """Whether it is a switch's end of a function, not the function's own netdev."""
    port = eswitches.ports.get(link.ifindex)
    if port is not None and port.flavour is not None:
        return port.flavour in REPRESENTING
    return link.phys_switch_id is not None and bool(_REPRESENTOR.fullmatch(link.phys_port_name or ""))


def representors(links: Iterable[LinkInfo], eswitches: Eswitches) -> Mapping[tuple[str, int], LinkInfo]:
    """The representor of each VF of this host, by its PF's name on its bus and the VF's index."""
    found: dict[tuple[str, int], LinkInfo] = {}
    for link in links:
        if link.parent_device is None or not is_representor(link, eswitches):
            continue
        port = eswitches.ports.get(link.ifindex)
        if port is not None and port.flavour is PortFlavour.PCI_VF and port.vf is not None:
            if not port.external:
                found[port.handle.device, port.vf] = link
            continue
        named = _REPRESENTOR.fullmatch(link.phys_port_name or "")
        if port is None and named and named[1] is None and named[4] == "vf":
            found.setdefault((link.parent_device, int(named[5])), link)
    return found
