"""A port's GID table, from sysfs.

Invariant: reads only. The table is sparse and an entry's place depends on what was there when it came, so an
index is looked up by what it stands for, never computed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from hw.errors import HwError
from hw.model import IfName, InterfaceAddress, RdmaName
from hw.rdma.discovery import DEVICES
from hw.sysfs import Sysfs

ROCE_V2 = "RoCE v2"
_EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"


@dataclass(frozen=True, slots=True)
class GidEntry:
    """type is the kernel's word: `RoCE v2`, `IB/RoCE v1`. netdev is its name in the namespace it is in."""

    index: int
    address: ipaddress.IPv6Address
    type: str
    netdev: IfName | None


def gid_table(sysfs: Sysfs, device: RdmaName, port: int) -> tuple[GidEntry, ...]:
    """Entries in use, by index; none without the device. sysfs must be of a namespace that sees it."""
    base = f"{DEVICES}/{device}/ports/{port}"
    indexes = sorted(int(name) for name in sysfs.names(f"{base}/gids") or () if name.isdecimal())
    entries = (_entry(sysfs, base, index) for index in indexes)
    return tuple(entry for entry in entries if entry is not None)


def _entry(sysfs: Sysfs, base: str, index: int) -> GidEntry | None:
    text = sysfs.text(f"{base}/gids/{index}")
    if not text or text == _EMPTY:
        return None
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError as error:
        raise HwError(f"{sysfs.root / base}/gids/{index} holds {text[:64]!a}, which is no GID") from error
    netdev = sysfs.text(f"{base}/gid_attrs/ndevs/{index}")
    return GidEntry(
        index,
        address,
        sysfs.text(f"{base}/gid_attrs/types/{index}") or "",
        IfName(netdev) if netdev else None,
    )


def roce_v2(
    table: Sequence[GidEntry], netdev: IfName, addresses: Sequence[InterfaceAddress]
) -> GidEntry | None:
    """The RoCE v2 entry of an interface's address: of the first in addresses that has one; where none was
    given, of the link-local one. None: not there (yet)."""
    own = {entry.address: entry for entry in table if entry.type == ROCE_V2 and entry.netdev == netdev}
    for address in addresses:
        entry = own.get(_as_gid(address))
        if entry is not None:
            return entry
    if addresses:
        return None
    return next((entry for entry in own.values() if entry.address.is_link_local), None)


def _as_gid(address: InterfaceAddress) -> ipaddress.IPv6Address:
    """IPv4 in IPv6's mapped form, as the kernel writes it into the table."""
    if isinstance(address, ipaddress.IPv6Interface):
        return address.ip
    return ipaddress.IPv6Address(f"::ffff:{address.ip}")
