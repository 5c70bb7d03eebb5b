"""IP over InfiniBand: interfaces for partitions, in rtnetlink messages.

Invariant: pure. Attribute numbers are IFLA_IPOIB_* of uapi linux/if_link.h. Held to that header's words; no
InfiniBand hardware has run it.
"""

from __future__ import annotations

import enum
import struct

from hw import wire
from hw.model import IfIndex, IfName, LinkInfo, LinkSettings

KIND = "ipoib"
_ARPHRD_INFINIBAND = 32
_ADDRESS_BYTES = 20
_IFLA_LINKINFO = 18
_INFO_KIND = 1
_INFO_DATA = 2
_PKEY = 1
_MODE = 2
_FULL_MEMBER = 0x8000


class IpoibMode(enum.StrEnum):
    """How packets go: each by itself, or over a connection to each peer (RFC 4755)."""

    DATAGRAM = "datagram"
    CONNECTED = "connected"


_MODE_CONNECTED = 1
"""IPOIB_MODE_CONNECTED; what is made new is in the other mode."""


def is_child(link: LinkInfo) -> bool:
    """Whether it is an interface of a partition, made on a port's own one, which has the same kind."""
    return link.kind == KIND and link.peer not in (None, link.ifindex)


def is_ipoib(link: LinkInfo) -> bool:
    """Whether it is an interface of InfiniBand. Its address has a queue pair's number in it, which is another
    one whenever its driver begins anew."""
    return link.link_type == _ARPHRD_INFINIBAND


def has_ipoib_address(settings: LinkSettings) -> bool:
    """The same of what is on record of an interface: 20 bytes are InfiniBand's alone (INFINIBAND_ALEN)."""
    return settings.mac is not None and settings.mac.count(":") == _ADDRESS_BYTES - 1


def full_member(pkey: int) -> int:
    """The key with its membership bit, as the kernel has it of an interface and shows it."""
    return pkey | _FULL_MEMBER


def child_request(parent: IfIndex, name: IfName, pkey: int, mode: IpoibMode = IpoibMode.DATAGRAM) -> bytes:
    """Payload of an RTM_NEWLINK that makes an interface of a partition on a port's own one.

    ValueError for a key that the kernel takes for none. Its membership bit is set by the kernel anyway: a
    broadcast group has full members alone.
    """
    if not 0 <= pkey <= 0xFFFF or not pkey & ~_FULL_MEMBER:
        raise ValueError(f"{pkey:#06x} is not a partition key: 0x0001 to 0x7fff, or the same with 0x8000")
    data = wire.attribute(_PKEY, struct.pack("=H", full_member(pkey)))
    if mode is IpoibMode.CONNECTED:
        data += wire.attribute(_MODE, struct.pack("=H", _MODE_CONNECTED))
    return wire.new_link(KIND, data, parent=parent, name=name)


def pkey_of(payload: bytes) -> int | None:
    """The partition of an interface, from its RTM_NEWLINK; None if it is not IPoIB's."""
    info = wire.attributes(wire.attributes(payload, 16).get(_IFLA_LINKINFO, b""))
    if wire.text(info.get(_INFO_KIND, b"")) != KIND:
        return None
    value = wire.attributes(info.get(_INFO_DATA, b"")).get(_PKEY, b"")
    return int(struct.unpack_from("=H", value)[0]) if len(value) >= 2 else None
