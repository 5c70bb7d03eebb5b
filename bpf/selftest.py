"""Packets whose counts and fate are known, run through the programs before any pod depends on them.

Invariant: nothing here touches a device or a pinned map: the caller gives programs on maps of their own, with
the default classes. A program that passes is laid out as bpf.layout says and does what c/*.h say, on this
kernel and its JIT.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bpf import layout
from bpf.errors import BpfError
from bpf.layout import Cell, TrafficKind
from bpf.limits import NO_RULES, Police, Rules
from bpf.sys import TestRun

_MACS = bytes.fromhex("020000000001020000000002")
_UDP_TO_ROCE = struct.pack("!HHHH", 1024, 4791, 20, 0) + bytes(12)
_TCP_SYN = struct.pack("!HHIIBBHHH", 1024, 80, 0, 0, 0x50, 2, 1024, 0, 0)
_HANDLE = 0x4B4E0000
_MARK = 46
_UNSPEC, _SHOT = -1, 2


def _ipv4(proto: int, dscp: int, payload: bytes) -> bytes:
    """With its checksum right."""
    before = struct.pack("!BBHHHBB", 0x45, dscp << 2, 20 + len(payload), 0, 0, 64, proto)
    addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
    right = checksum(before + bytes(2) + addresses)
    return before + right.to_bytes(2, "big") + addresses + payload


def _ipv6(proto: int, dscp: int, payload: bytes) -> bytes:
    return struct.pack("!IHBB", 6 << 28 | dscp << 22, len(payload), proto, 64) + bytes(32) + payload


def checksum(header: bytes) -> int:
    """RFC 1071; 0 over a header whose checksum is right."""
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@dataclass(frozen=True, slots=True)
class Golden:
    """A frame and what it is counted as. ip_at is where its IP header begins; None where it has none."""

    name: str
    frame: bytes
    traffic_class: int
    kind: TrafficKind
    ip_at: int | None
    version: int = 4


GOLDEN = (
    Golden("RoCEv2 over IPv4", _MACS + b"\x08\x00" + _ipv4(17, 26, _UDP_TO_ROCE), 3, TrafficKind.ROCE, 14),
    Golden("RoCEv2 over IPv6", _MACS + b"\x86\xdd" + _ipv6(17, 26, _UDP_TO_ROCE), 3, TrafficKind.ROCE, 14, 6),
    Golden("TCP", _MACS + b"\x08\x00" + _ipv4(6, 8, _TCP_SYN), 1, TrafficKind.TCP, 14),
    # Priority 5 in the tag, which wins.
    Golden("a VLAN tag", _MACS + b"\x81\x00\xa0\x07\x08\x00" + _ipv4(1, 8, bytes(8)), 5, TrafficKind.IP, 18),
    Golden("ARP", _MACS + b"\x08\x06" + bytes(28), 0, TrafficKind.OTHER, None),
)

Run = Callable[[int, bytes], TestRun]
"""A packet through the program of a direction."""


def check(run: Run, set_rules: Callable[[Rules], None], counts: Callable[[], Sequence[Cell]]) -> None:
    """BpfError that names the first packet that is not counted, marked, queued or dropped as it should be.

    counts gives what was counted since it was last asked.
    """
    for golden in GOLDEN:
        for direction in range(layout.DIRECTIONS):
            set_rules(NO_RULES)
            ran = run(direction, golden.frame)
            _is("the fate", golden, ran.result, _UNSPEC)
            _is("the packet", golden, ran.packet, golden.frame)
            size = len(golden.frame)
            cell = Cell(direction, golden.traffic_class, golden.kind, size, 1)
            _is("the count", golden, tuple(counts()), (cell,))
        _check_rules(golden, run, set_rules)
        counts()
    set_rules(NO_RULES)


def _check_rules(golden: Golden, run: Run, set_rules: Callable[[Rules], None]) -> None:
    set_rules(Rules(queues=(_HANDLE, 0), marks=(_MARK,) * layout.CLASSES))
    ran = run(0, golden.frame)
    _is("the queue", golden, ran.priority, _HANDLE | (layout.LEAF + golden.traffic_class))
    if golden.ip_at is not None:
        word = int.from_bytes(ran.packet[golden.ip_at : golden.ip_at + 2], "big")
        _is("the mark", golden, word >> (2 if golden.version == 4 else 6) & 0x3F, _MARK)
        if golden.version == 4:
            _is("the checksum", golden, checksum(ran.packet[golden.ip_at : golden.ip_at + 20]), 0)
    set_rules(Rules(police=(Police(rate=1, burst=1), None)))
    _is("the end", golden, [run(0, golden.frame).result for _ in range(2)][1], _SHOT)


def _is(what: str, golden: Golden, found: object, expected: object) -> None:
    if found != expected:
        told = f"{what} of {golden.name} is {found} and not {expected}"
        raise BpfError(
            f"the BPF programs do not do what they should on this kernel: {told}; "
            "remove the program cache so that they are compiled anew, and report it if that changes nothing"
        )
