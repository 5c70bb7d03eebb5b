"""Reading netlink: messages, attributes, and the links, addresses, routes and filters in them.

Invariant: pure, and total over what a kernel or a tenant can put in a message. Names and aliases are
bytes that whoever held the device chose: they are decoded so that encoding gives the same bytes
(surrogateescape, like file names), and never fail. A message that breaks the framing raises HwError.

Reading is ours and only writing is pyroute2's, for speed: one link takes 0.02 ms here and 0.15 ms
there, and a node may have a thousand.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from hw.errors import HwError
from hw.model import Direction, IfIndex, IfName, InterfaceAddress, LinkFlags, LinkInfo, MacAddress

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_DUMP_INTR = 0x10
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200

RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_NEWADDR = 20
RTM_NEWROUTE = 24
RTM_NEWQDISC = 36
RTM_NEWTFILTER = 44
RTM_NEWNEXTHOP = 104

TC_EGRESS = 0xFFFFFFF3
TC_INGRESS = 0xFFFFFFF2
RT_TABLE_MAIN = 254

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBi")
_ROUTE = struct.Struct("=BBBBBBBBI")
_HOP = struct.Struct("=HBBi")
_NEXTHOP = struct.Struct("=BBBBI")
_GROUP_MEMBER = struct.Struct("=IBBH")
_TC = struct.Struct("=BxxxiIII")
_TYPE_MASK = 0x3FFF
_IFLA_IFNAME, _IFLA_LINK, _IFLA_LINKINFO = 3, 5, 18
_INFO_KIND, _INFO_DATA = 1, 2
_ACK_HEADER = 4 + _HEADER.size


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message without its header."""

    type: int
    flags: int
    sequence: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route, as far as finding uplinks needs it. nexthop is the id of a nexthop object."""

    table: int
    default: bool
    links: tuple[IfIndex, ...]
    nexthop: int | None


@dataclass(frozen=True, slots=True)
class Nexthop:
    """A nexthop object: a link, or a group of other nexthops' ids."""

    id: int
    link: IfIndex | None
    group: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QdiscInfo:
    ifindex: IfIndex
    kind: str
    handle: int
    parent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BpfFilter:
    """A cls_bpf filter on a clsact qdisc."""

    direction: Direction
    name: str
    prog_id: int
    handle: int
    priority: int
    direct_action: bool


def text(raw: bytes) -> str:
    """A kernel string up to its terminator. May hold surrogates: escape before showing or storing."""
    return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def raw(value: str) -> bytes:
    """The inverse of text(), without the terminator."""
    return value.encode("utf-8", "surrogateescape")


def messages(data: bytes) -> Iterator[Message]:
    """Split one datagram. HwError where a length does not fit."""
    offset = 0
    while offset < len(data):
        if len(data) - offset < _HEADER.size:
            raise HwError(f"netlink: {len(data) - offset} bytes left where a message header was expected")
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            raise HwError(
                f"netlink: a message says it is {length} bytes long, {len(data) - offset} are there"
            )
        yield Message(kind, flags, sequence, data[offset + _HEADER.size : offset + length])
        offset += (length + 3) & ~3


def attribute_list(data: bytes, offset: int = 0) -> list[tuple[int, bytes]]:
    """(type without flag bits, payload) in order. HwError where a length does not fit."""
    found: list[tuple[int, bytes]] = []
    # Locals and numbers: a dump of a thousand links is fifty thousand turns.
    end, last, unpack_from, append = len(data), len(data) - 4, _ATTRIBUTE.unpack_from, found.append
    while offset <= last:
        length, kind = unpack_from(data, offset)
        after = offset + length
        if length < 4 or after > end:
            raise HwError(f"netlink: attribute {kind & _TYPE_MASK} does not fit in its message")
        append((kind & _TYPE_MASK, data[offset + 4 : after]))
        offset += (length + 3) & ~3
    return found


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """As attribute_list; of repeated types the last."""
    return dict(attribute_list(data, offset))


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to where the next begins."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)


def new_link(kind: str, data: bytes, *, parent: IfIndex, name: IfName, index: int = 0) -> bytes:
    """Payload of an RTM_NEWLINK that makes a link of a kind on another one. data: the kind's own attributes;
    index 0: the kernel's choice."""
    info = attribute(_INFO_KIND, kind.encode()) + attribute(_INFO_DATA, data)
    return (
        _LINK.pack(0, 0, index, 0, 0)
        + attribute(_IFLA_IFNAME, raw(name) + b"\0")
        + attribute(_IFLA_LINK, struct.pack("=I", parent))
        + attribute(_IFLA_LINKINFO, info)
    )


def error_of(message: Message) -> tuple[int, str]:
    """errno (positive; 0 is an ack) and the kernel's words, of an NLMSG_ERROR or NLMSG_DONE."""
    if len(message.payload) < 4:
        return 0, ""
    (code,) = struct.unpack_from("=i", message.payload)
    words = ""
    if message.flags & NLM_F_ACK_TLVS:
        start = 4
        if message.type == NLMSG_ERROR:
            start = _ACK_HEADER
            if not message.flags & NLM_F_CAPPED and len(message.payload) >= _ACK_HEADER:
                (length,) = struct.unpack_from("=I", message.payload, 4)
                start = 4 + ((length + 3) & ~3)
        words = text(attributes(message.payload, start).get(1, b""))
    return -code, words


def _u32(raw_value: bytes | None) -> int | None:
    return int.from_bytes(raw_value[:4], sys.byteorder) if raw_value else None


def _int(raw_value: bytes | None) -> int:
    return _u32(raw_value) or 0


def _index(raw_value: bytes | None) -> IfIndex | None:
    value = _u32(raw_value)
    return IfIndex(value) if value else None


def _mac(raw_value: bytes | None) -> MacAddress | None:
    return MacAddress(raw_value.hex(":")) if raw_value and any(raw_value) else None


def _text_or_none(raw_value: bytes | None) -> str | None:
    return text(raw_value) if raw_value else None


def _nsid(raw_value: bytes | None) -> int | None:
    return struct.unpack("=i", raw_value)[0] if raw_value and len(raw_value) == 4 else None


@functools.lru_cache(maxsize=256)
def _flags(bits: int) -> LinkFlags:
    """A node's links have a few combinations, and enum takes a fifth of a message's time to make one."""
    return LinkFlags(bits)


def link(payload: bytes) -> LinkInfo:
    """An RTM_NEWLINK (or DELLINK) as LinkInfo. Attribute numbers are IFLA_* of uapi linux/if_link.h."""
    if len(payload) < _LINK.size:
        raise HwError("netlink: a link message without its header")
    _, link_type, index, flags, _ = _LINK.unpack_from(payload)
    found = attributes(payload, _LINK.size)
    kind = attributes(found[18]).get(1) if 18 in found else None
    names = tuple(text(value) for kind_, value in attribute_list(found.get(52, b"")) if kind_ == 53)
    xdp = attributes(found.get(43, b""))
    return LinkInfo(
        ifindex=IfIndex(index),
        name=IfName(text(found.get(3, b""))),
        flags=_flags(flags),
        link_type=link_type,
        mtu=_int(found.get(4)),
        kind=_text_or_none(kind),
        mac=_mac(found.get(1)),
        permanent_mac=_mac(found.get(54)),
        master=_index(found.get(10)),
        peer=_index(found.get(5)),
        peer_nsid=_nsid(found.get(37)),
        alias=text(found.get(20, b"")),
        altnames=names,
        txqlen=_int(found.get(13)),
        group=_int(found.get(27)),
        gso_max_size=_u32(found.get(41)),
        gro_max_size=_u32(found.get(58)),
        gso_max_segs=_u32(found.get(40)),
        gso_ipv4_max_size=_u32(found.get(63)),
        gro_ipv4_max_size=_u32(found.get(64)),
        broadcast=_mac(found.get(2)),
        link_mode=_int(found[17]) if 17 in found else None,
        min_mtu=_u32(found.get(50)),
        max_mtu=_u32(found.get(51)) or None,
        operstate=_int(found.get(16)),
        carrier=bool(_int(found.get(33))),
        xdp_prog_ids=tuple(sorted({_int(xdp[number]) for number in (4, 5, 6, 7) if number in xdp} - {0})),
        parent_bus=_text_or_none(found.get(57)),
        parent_device=_text_or_none(found.get(56)),
        phys_switch_id=found[36].hex() if found.get(36) else None,
        phys_port_name=_text_or_none(found.get(38)),
        vf_count=_int(found.get(21)),
    )


def address(payload: bytes) -> tuple[IfIndex, InterfaceAddress] | None:
    """An RTM_NEWADDR; None for families other than IPv4 and IPv6."""
    if len(payload) < _ADDRESS.size:
        raise HwError("netlink: an address message without its header")
    family, prefix, _, _, index = _ADDRESS.unpack_from(payload)
    found = attributes(payload, _ADDRESS.size)
    value = found.get(2) or found.get(1)
    if value is None or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        interface = ipaddress.ip_interface((value, prefix))
    except ValueError as error:
        raise HwError(f"netlink: an address message that holds no address: {error}") from error
    return IfIndex(index), interface


def route(payload: bytes) -> Route | None:
    """An RTM_NEWROUTE; None unless it is a unicast route."""
    if len(payload) < _ROUTE.size:
        raise HwError("netlink: a route message without its header")
    _, prefix, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(payload)
    if kind != 1:
        return None
    found = attributes(payload, _ROUTE.size)
    links = [index] if (index := _index(found.get(4))) else []
    hops = found.get(9, b"")
    while len(hops) >= _HOP.size:
        length, _, _, hop_index = _HOP.unpack_from(hops)
        if length < _HOP.size:
            raise HwError("netlink: a multipath route with a hop of no length")
        links.append(IfIndex(hop_index))
        hops = hops[(length + 3) & ~3 :]
    return Route(_u32(found.get(15)) or table, prefix == 0, tuple(links), _u32(found.get(30)))


def nexthop(payload: bytes) -> Nexthop:
    """An RTM_NEWNEXTHOP."""
    found = attributes(payload, _NEXTHOP.size)
    members = found.get(2, b"")
    usable = len(members) - len(members) % _GROUP_MEMBER.size
    group = tuple(member[0] for member in _GROUP_MEMBER.iter_unpack(members[:usable]))
    return Nexthop(_int(found.get(1)), _index(found.get(5)), group)


def qdisc(payload: bytes) -> QdiscInfo:
    """An RTM_NEWQDISC."""
    if len(payload) < _TC.size:
        raise HwError("netlink: a qdisc message without its header")
    _, index, handle, parent, _ = _TC.unpack_from(payload)
    return QdiscInfo(IfIndex(index), text(attributes(payload, _TC.size).get(1, b"")), handle, parent)


def bpf_filter(payload: bytes) -> tuple[IfIndex, BpfFilter] | None:
    """An RTM_NEWTFILTER; None unless it is a cls_bpf filter of a clsact qdisc with a program."""
    if len(payload) < _TC.size:
        raise HwError("netlink: a filter message without its header")
    _, index, handle, parent, info = _TC.unpack_from(payload)
    found = attributes(payload, _TC.size)
    options = attributes(found.get(2, b""))
    if text(found.get(1, b"")) != "bpf" or parent not in (TC_EGRESS, TC_INGRESS) or 11 not in options:
        return None
    return IfIndex(index), BpfFilter(
        direction=Direction.EGRESS if parent == TC_EGRESS else Direction.INGRESS,
        name=text(options.get(7, b"")),
        prog_id=_int(options[11]),
        handle=handle,
        priority=info >> 16,
        direct_action=bool(_int(options.get(8)) & 1),
    )
