"""What RDMA devices are like right now, whole: state, rate and GIDs of their ports, beside what is lasting.

Invariant: libibverbs is asked first, and sysfs for every device that it does not tell of; both say the same
in the same words. Either makes the hardware run commands, so this is for people who ask, never for a scan or
a pod's start.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hw.errors import HwError
from hw.model import RdmaName
from hw.rdma.discovery import DEVICES
from hw.rdma.gids import GidEntry, gid_table
from hw.rdma.nldev import PhysState, PortState
from hw.rdma.wire import known
from hw.sysfs import Sysfs

_NO_GUID = "0000:0000:0000:0000"
_NUMBERED = re.compile(r"([0-9]+): ")
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?) Gb/sec\b")


class Source(enum.StrEnum):
    VERBS = "verbs"
    SYSFS = "sysfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortDetails:
    number: int
    link_layer: str
    """`Ethernet`, `InfiniBand`, or "" if unknown."""
    state: PortState
    phys_state: PhysState
    rate_mbps: int | None
    """Of all its lanes; a RoCE port without a carrier says anything."""
    lid: int
    """With sm_lid: 0 but for InfiniBand, and there until the subnet manager came."""
    sm_lid: int
    gids: tuple[GidEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDetails:
    name: RdmaName
    node_guid: str | None
    sys_image_guid: str | None
    firmware: str | None
    ports: tuple[PortDetails, ...]
    source: Source


def by_sysfs(sysfs: Sysfs, name: RdmaName) -> DeviceDetails:
    """HwError where the device says what makes no sense."""
    base = f"{DEVICES}/{name}"
    numbers = sorted(int(port) for port in sysfs.names(f"{base}/ports") or () if port.isdecimal())
    return DeviceDetails(
        name=name,
        node_guid=guid(sysfs.text(f"{base}/node_guid")),
        sys_image_guid=guid(sysfs.text(f"{base}/sys_image_guid")),
        firmware=sysfs.text(f"{base}/fw_ver") or None,
        ports=tuple(_port(sysfs, name, number) for number in numbers),
        source=Source.SYSFS,
    )


def every_device(
    sysfs: Sysfs, ask_verbs: Callable[[], Mapping[RdmaName, DeviceDetails]]
) -> tuple[tuple[DeviceDetails, ...], tuple[str, ...]]:
    """All devices that sysfs lists, by name, as libibverbs has them where it does; and sentences about those
    that could not be read."""
    found: list[DeviceDetails] = []
    problems: list[str] = []
    names = sorted(sysfs.names(DEVICES) or (), key=lambda name: (len(name), name))
    told = ask_verbs() if names else {}
    for name in map(RdmaName, names):
        try:
            found.append(told.get(name) or by_sysfs(sysfs, name))
        except HwError as error:
            problems.append(f"RDMA device {name!a} cannot be read: {error}")
    return tuple(found), tuple(problems)


def guid(text: str | None) -> str | None:
    return None if not text or text == _NO_GUID else text


def _port(sysfs: Sysfs, name: RdmaName, number: int) -> PortDetails:
    base = f"{DEVICES}/{name}/ports/{number}"
    rate = _RATE.match(sysfs.text(f"{base}/rate") or "")
    return PortDetails(
        number=number,
        link_layer=sysfs.text(f"{base}/link_layer") or "",
        state=known(PortState, _number(sysfs.text(f"{base}/state")), PortState.UNKNOWN),
        phys_state=known(PhysState, _number(sysfs.text(f"{base}/phys_state")), PhysState.UNKNOWN),
        rate_mbps=round(float(rate[1]) * 1000) if rate else None,
        lid=sysfs.integer(f"{base}/lid", base=16) or 0,
        sm_lid=sysfs.integer(f"{base}/sm_lid", base=16) or 0,
        gids=gid_table(sysfs, name, number),
    )


def _number(text: str | None) -> int | None:
    """Of `4: ACTIVE`."""
    found = _NUMBERED.match(text or "")
    return int(found[1]) if found else None
