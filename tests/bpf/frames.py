"""Frames by hand, and a second opinion on what they count as.

Invariant: `expected` shares no code and no constants with the C programs; it is written from the RFCs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bpf.layout import TrafficKind

MACS = bytes.fromhex("02000000000102000000000f")
IPV4, IPV6, ARP = 0x0800, 0x86DD, 0x0806
CTAG, STAG = 0x8100, 0x88A8
TCP, UDP, ICMP, SCTP = 6, 17, 1, 132
HOPOPTS, ROUTING, FRAGMENT, AH, NONE, DSTOPTS = 0, 43, 44, 51, 59, 60
ROCE_PORT = 4791


def ethernet(ethertype: int, payload: bytes, *tags: tuple[int, int]) -> bytes:
    """tags: (ethertype, tag control information), outermost first."""
    between = b"".join(struct.pack("!HH", kind, tci) for kind, tci in tags)
    return MACS + between + struct.pack("!H", ethertype) + payload


def tci(pcp: int, vlan: int = 7) -> int:
    return pcp << 13 | vlan


def ipv4(proto: int, payload: bytes, *, dscp: int = 0, options: bytes = b"", fragment: int = 0) -> bytes:
    """fragment: the flags and offset field."""
    assert len(options) % 4 == 0
    header = 20 + len(options)
    fixed = struct.pack(
        "!BBHHHBBHII",
        0x40 | header // 4,
        dscp << 2 | 1,
        header + len(payload),
        1,
        fragment,
        64,
        proto,
        0,
        0x0A000001,
        0x0A000002,
    )
    return fixed + options + payload


def ipv6(next_header: int, payload: bytes, *, dscp: int = 0, length: int | None = None) -> bytes:
    word = 6 << 28 | (dscp << 2 | 2) << 20 | 0xABCDE
    size = len(payload) if length is None else length
    return struct.pack("!IHBB", word, size, next_header, 64) + bytes(range(32)) + payload


def extension(next_header: int, body: bytes = bytes(6)) -> bytes:
    """Hop-by-hop, routing or destination options: a body of 6 + 8n bytes."""
    assert len(body) % 8 == 6
    return bytes([next_header, len(body) // 8]) + body


def fragment(next_header: int, offset: int, more: bool) -> bytes:
    return struct.pack("!BBHI", next_header, 0, offset << 3 | more, 9)


def authentication(next_header: int, words: int = 4) -> bytes:
    return bytes([next_header, words - 2]) + bytes(4 * words - 2)


def udp(destination: int, payload: bytes = b"", source: int = 40000) -> bytes:
    return struct.pack("!HHHH", source, destination, 8 + len(payload), 0) + payload


def tcp(payload: bytes = b"", options: bytes = b"") -> bytes:
    assert len(options) % 4 == 0
    offset = (20 + len(options)) // 4
    return struct.pack("!HHIIBBHHH", 1, 2, 3, 4, offset << 4, 0x10, 100, 0, 0) + options + payload


@dataclass(frozen=True, slots=True)
class Expected:
    """header: bytes before the payload, as far as known."""

    dscp: int
    pcp: int | None
    kind: TrafficKind
    header: int


def expected(frame: bytes) -> Expected:
    """What an Ethernet frame is, read with nothing but the frame."""
    at, pcp = 14, None
    ethertype = int.from_bytes(frame[12:14], "big")
    for _ in range(2):
        if ethertype not in (CTAG, STAG):
            break
        if len(frame) < at + 4:
            return _other(frame, at, pcp)
        pcp = frame[at] >> 5 if pcp is None else pcp
        ethertype = int.from_bytes(frame[at + 2 : at + 4], "big")
        at += 4
    if ethertype == IPV4:
        return _expected_ipv4(frame, at, pcp)
    if ethertype == IPV6:
        return _expected_ipv6(frame, at, pcp)
    return Expected(0, pcp, TrafficKind.OTHER, at)


def _other(frame: bytes, at: int, pcp: int | None) -> Expected:
    return Expected(0, pcp, TrafficKind.OTHER, at)


def _expected_ipv4(frame: bytes, at: int, pcp: int | None) -> Expected:
    packet = frame[at:]
    if len(packet) < 20 or packet[0] >> 4 != 4 or packet[0] & 15 < 5:
        return _other(frame, at, pcp)
    size = (packet[0] & 15) * 4
    later = int.from_bytes(packet[6:8], "big") & 0x1FFF
    return _transport(frame, at + size, packet[1] >> 2, pcp, None if later else packet[9])


def _expected_ipv6(frame: bytes, at: int, pcp: int | None) -> Expected:
    packet = frame[at:]
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return _other(frame, at, pcp)
    dscp = (int.from_bytes(packet[:2], "big") >> 4 & 0xFF) >> 2
    proto: int | None = packet[6]
    at += 40
    for _ in range(6):
        if proto not in (HOPOPTS, ROUTING, FRAGMENT, AH, DSTOPTS, 135):
            break
        if len(frame) < at + 4:
            proto = None
            break
        following, length, rest = struct.unpack_from("!BBH", frame, at)
        at += 8 if proto == FRAGMENT else (length + 2) * 4 if proto == AH else (length + 1) * 8
        if proto == FRAGMENT and rest >> 3:
            proto = None
            break
        proto = following
    if proto in (HOPOPTS, ROUTING, FRAGMENT, AH, DSTOPTS, 135):
        proto = None
    return _transport(frame, at, dscp, pcp, proto)


def _transport(frame: bytes, at: int, dscp: int, pcp: int | None, proto: int | None) -> Expected:
    if proto == TCP:
        offset = frame[at + 12] >> 4 if len(frame) > at + 12 else 5
        return Expected(dscp, pcp, TrafficKind.TCP, at + max(offset, 5) * 4)
    if proto == UDP:
        port = frame[at + 2 : at + 4]
        roce = port == ROCE_PORT.to_bytes(2, "big")
        return Expected(dscp, pcp, TrafficKind.ROCE if roce else TrafficKind.IP, at + 8)
    return Expected(dscp, pcp, TrafficKind.IP, at + (12 if proto == SCTP else 0))
