"""What InfiniBand has beyond RoCE: GUIDs that are given, partitions, ports that a subnet manager brings up.

Invariant: reads only. Held to trees written after the kernel's documents; no InfiniBand hardware has run it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from hw.errors import HwError
from hw.model import Guid, MacAddress, RdmaName
from hw.rdma.discovery import DEVICES
from hw.rdma.nldev import NldevPort, PortState
from hw.sysfs import Sysfs

_IPOIB_BYTES = 20
_GUID_BYTES = 8
_FULL_MEMBER = 0x8000
_PAUSE = 0.1

COMES_UP = frozenset({PortState.INIT, PortState.ARMED, PortState.ACTIVE})
"""A port whose link is there; ACTIVE needs the subnet manager."""


@dataclass(frozen=True, slots=True)
class Partition:
    """An entry of a port's partition table. Traffic goes by index 0 unless a program chooses another."""

    index: int
    key: int
    """15 bits; 0x7fff is the default partition."""
    full: bool
    """Limited members reach full ones only."""

    @property
    def pkey(self) -> int:
        """As it is on the wire and in IPoIB interfaces' names."""
        return self.key | (_FULL_MEMBER if self.full else 0)


def parse_guid(text: str) -> Guid:
    """A GUID in sysfs's form or as eight bytes with colons; ValueError if it is none, or one that stands for
    none."""
    digits = text.strip().lower()
    if not re.fullmatch(r"([0-9a-f]{4}:){3}[0-9a-f]{4}|([0-9a-f]{2}:){7}[0-9a-f]{2}", digits):
        raise ValueError(f"{text!r} is not a GUID like 0211:22ff:fe33:4455")
    digits = digits.replace(":", "")
    if set(digits) <= {"0"} or set(digits) <= {"f"}:
        raise ValueError(f"{text!r} stands for no GUID")
    return Guid(":".join(digits[at : at + 4] for at in range(0, 16, 4)))


def guid_number(guid: Guid) -> int:
    return int(guid.replace(":", ""), 16)


def guid_of_number(number: int) -> Guid:
    """ValueError for a number that is no GUID's."""
    return parse_guid(number.to_bytes(_GUID_BYTES).hex(":"))


def guid_of(mac: MacAddress) -> Guid | None:
    """The port GUID in an IPoIB interface's address (its last eight bytes); None for other addresses."""
    data = bytes.fromhex(mac.replace(":", ""))
    try:
        return parse_guid(data[-_GUID_BYTES:].hex(":")) if len(data) == _IPOIB_BYTES else None
    except ValueError:
        return None


def port_guid(sysfs: Sysfs, device: RdmaName, port: int) -> Guid | None:
    """Of an InfiniBand port: its first GID is the subnet's prefix and this. None: it has none (yet)."""
    gid = sysfs.text(f"{DEVICES}/{device}/ports/{port}/gids/0") or ""
    try:
        return parse_guid(gid[-19:])
    except ValueError:
        return None


def partitions(sysfs: Sysfs, device: RdmaName, port: int) -> tuple[Partition, ...]:
    """A port's partition table without its empty entries, by index. HwError where it makes no sense."""
    base = f"{DEVICES}/{device}/ports/{port}/pkeys"
    found: list[Partition] = []
    for index in sorted(int(name) for name in sysfs.names(base) or () if name.isdecimal()):
        value = sysfs.integer(f"{base}/{index}", base=16)
        if value is not None and not 0 <= value <= 0xFFFF:
            raise HwError(f"{sysfs.root / base}/{index} holds {value:#x}, which is no partition key")
        if value is not None and value & ~_FULL_MEMBER:
            found.append(Partition(index, value & ~_FULL_MEMBER, bool(value & _FULL_MEMBER)))
    return tuple(found)


def wait_for_port(
    ask: Callable[[], NldevPort], wanted: Collection[PortState], *, within: float, what: str
) -> NldevPort:
    """The port, once it is in one of the states. HwError, with the state it is in and who would change it, if
    it is not within so many seconds. what names the port in the error."""
    give_up = time.monotonic() + within
    while True:
        port = ask()
        if port.state in wanted:
            return port
        if time.monotonic() > give_up:
            raise HwError(f"{what} is {port.state.name} after {within:g} s: {_missing(port)}")
        time.sleep(_PAUSE)


def _missing(port: NldevPort) -> str:
    if port.state in (PortState.INIT, PortState.ARMED):
        return "its link is up, but no subnet manager has made it active; does one run, and know its GUID?"
    return "it has no link; is its cable in, and for a VF, are its GUID and link state set on the PF?"
