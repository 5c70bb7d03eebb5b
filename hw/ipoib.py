"""IP over InfiniBand: interfaces for partitions, in rtnetlink messages.

Invariant: pure. Attribute numbers are IFLA_IPOIB_* of uapi linux/if_link.h. Held to that header's words; no
InfiniBand hardware has run it.
"""

from __future__ import annotations

import struct

from hw import wire
from hw.model import IfIndex, IfName, LinkInfo

KIND = "ipoib"
_ARPHRD_INFINIBAND = 32
_IFLA_IFNAME = 3
_IFLA_LINK = 5
_IFLA_LINKINFO = 18
_INFO_KIND = 1
_INFO_DATA = 2
_PKEY = 1
_FULL_MEMBER = 0x8000


def is_ipoib(link: LinkInfo) -> bool:
    """Whether it is an interface of InfiniBand. Its address has a queue pair's number in it, which is another
    one whenever its driver begins anew."""
    return link.link_type == _ARPHRD_INFINIBAND


def child_request(parent: IfIndex, name: IfName, pkey: int) -> bytes:
    """Payload of an RTM_NEWLINK that makes an interface of a partition on a port's own one.

    ValueError for a key that the kernel takes for none. Its membership bit is set by the kernel anyway: a
    broadcast group has full members alone.
    """
    if not 0 <= pkey <= 0xFFFF or not pkey & ~_FULL_MEMBER:
        raise ValueError(f"{pkey:#06x} is not a partition key: 0x0001 to 0x7fff, or the same with 0x8000")
    data = wire.attribute(_PKEY, struct.pack("=H", pkey | _FULL_MEMBER))
    info = wire.attribute(_INFO_KIND, KIND.encode()) + wire.attribute(_INFO_DATA, data)
    return (
        struct.pack("=BxHiII", 0, 0, 0, 0, 0)
        + wire.attribute(_IFLA_IFNAME, wire.raw(name) + b"\0")
        + wire.attribute(_IFLA_LINK, struct.pack("=I", parent))
        + wire.attribute(_IFLA_LINKINFO, info)
    )


def pkey_of(payload: bytes) -> int | None:
    """The partition of an interface, from its RTM_NEWLINK; None if it is not IPoIB's."""
    info = wire.attributes(wire.attributes(payload, 16).get(_IFLA_LINKINFO, b""))
    if wire.text(info.get(_INFO_KIND, b"")) != KIND:
        return None
    value = wire.attributes(info.get(_INFO_DATA, b"")).get(_PKEY, b"")
    return int(struct.unpack_from("=H", value)[0]) if len(value) >= 2 else None
