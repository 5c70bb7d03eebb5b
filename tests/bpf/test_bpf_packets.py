"""What single packets are counted as, by running the programs on them without a device."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bpf.accounting import Accounting
from bpf.layout import Cell, TrafficKind
from tests.bpf import frames as f
from tests.bpf.conftest import Run

OTHER, IP, TCP, ROCE = TrafficKind
EF, AF31 = 46, 26

ROCE_V4 = f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT, bytes(64)), dscp=AF31))
ROCE_V6 = f.ethernet(f.IPV6, f.ipv6(f.UDP, f.udp(f.ROCE_PORT, bytes(64)), dscp=AF31))
TCP_V4 = f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(bytes(100)), dscp=EF))


def over_ipv6(*headers: bytes, first: int, last: bytes = b"") -> bytes:
    return f.ethernet(f.IPV6, f.ipv6(first, b"".join(headers) + last, dscp=AF31))


GOLDEN = {
    "udp over IPv4": (f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(53, bytes(30)))), 0, IP),
    "icmp": (f.ethernet(f.IPV4, f.ipv4(f.ICMP, bytes(8), dscp=8)), 1, IP),
    "sctp": (f.ethernet(f.IPV4, f.ipv4(f.SCTP, bytes(20), dscp=63)), 7, IP),
    "tcp over IPv4": (TCP_V4, 5, TCP),
    "tcp over IPv6": (f.ethernet(f.IPV6, f.ipv6(f.TCP, f.tcp(bytes(9)), dscp=48)), 6, TCP),
    "roce over IPv4": (ROCE_V4, 3, ROCE),
    "roce over IPv6": (ROCE_V6, 3, ROCE),
    "roce behind IPv4 options": (
        f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT), dscp=AF31, options=bytes(40))),
        3,
        ROCE,
    ),
    "roce's port as the source is not roce": (
        f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(53, source=f.ROCE_PORT))),
        0,
        IP,
    ),
    "tcp behind IPv4 options": (
        f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(), dscp=EF, options=bytes(4))),
        5,
        TCP,
    ),
    "first fragment, IPv4": (
        f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT, bytes(8)), dscp=AF31, fragment=0x2000)),
        3,
        ROCE,
    ),
    "later fragment, IPv4": (
        f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT, bytes(8)), dscp=AF31, fragment=0x0001)),
        3,
        IP,
    ),
    "don't-fragment is no fragment": (
        f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT), fragment=0x4000)),
        0,
        ROCE,
    ),
    "first fragment, IPv6": (
        over_ipv6(f.fragment(f.UDP, 0, True), first=f.FRAGMENT, last=f.udp(f.ROCE_PORT)),
        3,
        ROCE,
    ),
    "later fragment, IPv6": (
        over_ipv6(f.fragment(f.UDP, 5, False), first=f.FRAGMENT, last=f.udp(f.ROCE_PORT)),
        3,
        IP,
    ),
    "roce behind four kinds of IPv6 extension": (
        over_ipv6(
            f.extension(f.ROUTING),
            f.extension(f.DSTOPTS, bytes(14)),
            f.extension(f.AH, bytes(30)),
            f.authentication(f.UDP),
            first=f.HOPOPTS,
            last=f.udp(f.ROCE_PORT),
        ),
        3,
        ROCE,
    ),
    "tcp behind six IPv6 extensions": (
        over_ipv6(*[f.extension(f.DSTOPTS)] * 5, f.extension(f.TCP), first=f.DSTOPTS, last=f.tcp()),
        3,
        TCP,
    ),
    "more IPv6 extensions than are followed": (
        over_ipv6(*[f.extension(f.DSTOPTS)] * 6, f.extension(f.TCP), first=f.DSTOPTS, last=f.tcp()),
        3,
        IP,
    ),
    "no next header": (over_ipv6(first=f.NONE), 3, IP),
    "tagged roce counts by its priority": (
        f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT), dscp=AF31), (f.CTAG, f.tci(6))),
        6,
        ROCE,
    ),
    "priority 0 wins too": (
        f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(), dscp=AF31), (f.CTAG, f.tci(0))),
        0,
        TCP,
    ),
    "two tags: the outer priority, the inner packet": (
        f.ethernet(f.IPV6, f.ipv6(f.TCP, f.tcp(), dscp=AF31), (f.STAG, f.tci(2)), (f.CTAG, f.tci(5))),
        2,
        TCP,
    ),
    "three tags are not followed": (
        f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp()), *[(f.CTAG, f.tci(4))] * 3),
        4,
        OTHER,
    ),
    "tagged arp": (f.ethernet(f.ARP, bytes(28), (f.CTAG, f.tci(3))), 3, OTHER),
    "arp": (f.ethernet(f.ARP, bytes(28)), 0, OTHER),
    "version 5 in IPv4": (f.ethernet(f.IPV4, b"\x55" + f.ipv4(f.TCP, f.tcp())[1:]), 0, OTHER),
    "IPv4 header of 16 bytes": (f.ethernet(f.IPV4, b"\x44" + f.ipv4(f.TCP, f.tcp())[1:]), 0, OTHER),
    "version 4 in IPv6": (f.ethernet(f.IPV6, b"\x40" + f.ipv6(f.TCP, f.tcp())[1:]), 0, OTHER),
    "nothing behind a tag": (f.ethernet(f.IPV4, b"", (f.CTAG, f.tci(1))), 1, OTHER),
    "a length for a type": (f.ethernet(60, bytes(60)), 0, OTHER),
}


@pytest.mark.parametrize("direction", [0, 1], ids=["egress", "ingress"])
@pytest.mark.parametrize(("frame", "traffic_class", "kind"), GOLDEN.values(), ids=GOLDEN.keys())
def test_a_frame_is_counted_once_by_class_and_kind(
    run: Run, frame: bytes, traffic_class: int, kind: TrafficKind, direction: int
) -> None:
    assert run(frame, direction=direction) == Cell(direction, traffic_class, kind, len(frame), 1)


@pytest.mark.parametrize("dscp", range(64))
def test_every_dscp_is_mapped_in_both_ip_versions(run: Run, dscp: int) -> None:
    assert run(f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(), dscp=dscp))).traffic_class == dscp >> 3
    assert run(f.ethernet(f.IPV6, f.ipv6(f.TCP, f.tcp(), dscp=dscp))).traffic_class == dscp >> 3


def test_the_class_maps_are_the_callers(run: Run, accounting: Accounting) -> None:
    dscp, pcp = [7 - (value >> 3) for value in range(64)], [(value + 1) % 8 for value in range(8)]
    default = [value >> 3 for value in range(64)]
    tagged = f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(), dscp=EF), (f.CTAG, f.tci(6)))
    try:
        accounting.set_classes(dscp, pcp)
        assert run(TCP_V4).traffic_class == 2
        assert run(tagged).traffic_class == 7
        assert run(f.ethernet(f.ARP, bytes(28))).traffic_class == 7, "no IP: the class of DSCP 0"
        accounting.set_classes(dscp, pcp, pcp_wins=False)
        assert run(tagged).traffic_class == 2, "the DSCP decides although there is a tag"
    finally:
        accounting.set_classes(default, range(8))


def is_runnable(frame: bytes) -> bool:
    """A trial needs more than an Ethernet header, and newer kernels want the header of an untagged IP packet.
    Shorter ones are sent for real in tests/kernel."""
    least = {b"\x08\x00": 14 + 20, b"\x86\xdd": 14 + 40}.get(frame[12:14], 15)
    return len(frame) >= least


@pytest.mark.parametrize("tags", [(), ((f.CTAG, f.tci(4)),)], ids=["untagged", "tagged"])
@pytest.mark.parametrize("whole", [ROCE_V4, ROCE_V6, TCP_V4], ids=["roce4", "roce6", "tcp4"])
def test_a_frame_cut_anywhere_is_still_counted(
    run: Run, whole: bytes, tags: tuple[tuple[int, int], ...]
) -> None:
    whole = f.ethernet(int.from_bytes(whole[12:14], "big"), whole[14:], *tags)
    for frame in filter(is_runnable, (whole[:length] for length in range(15, len(whole) + 1))):
        cell, want = run(frame), f.expected(frame)
        traffic_class = want.dscp >> 3 if want.pcp is None else want.pcp
        assert cell == Cell(0, traffic_class, want.kind, len(frame), 1), len(frame)


# --- packets that stand for several -----------------------------------------------------------------

TCP_OPTIONS = 12
PAYLOAD = 2000
GSO = {
    "tcp": (f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(bytes(PAYLOAD), bytes(TCP_OPTIONS)))), 14 + 20 + 32),
    "tcp without options": (f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(bytes(PAYLOAD)))), 14 + 20 + 20),
    "tcp over IPv6": (f.ethernet(f.IPV6, f.ipv6(f.TCP, f.tcp(bytes(PAYLOAD)))), 14 + 40 + 20),
    "udp": (f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(53, bytes(PAYLOAD)))), 14 + 20 + 8),
    "udp, tagged": (
        f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(53, bytes(PAYLOAD))), (f.CTAG, f.tci(0))),
        18 + 20 + 8,
    ),
    "sctp": (f.ethernet(f.IPV4, f.ipv4(f.SCTP, bytes(12 + PAYLOAD))), 14 + 20 + 12),
    "roce behind options": (
        f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT, bytes(PAYLOAD)), options=bytes(8))),
        14 + 28 + 8,
    ),
}


@pytest.mark.parametrize("size", [1, 499, 500, 501, 1448, 1999])
@pytest.mark.parametrize("told", [True, False], ids=["segments given", "only their size given"])
@pytest.mark.parametrize(("frame", "header"), GSO.values(), ids=GSO.keys())
def test_segments_are_counted_as_the_wire_will_carry_them(
    run: Run, frame: bytes, header: int, told: bool, size: int
) -> None:
    segments = -(-PAYLOAD // size)
    cell = run(frame, gso_size=size, gso_segs=segments if told else 0)
    assert (cell.packets, cell.bytes) == (segments, PAYLOAD + segments * header)


def test_a_jumbo_option_that_never_reaches_the_wire_is_not_counted(run: Run) -> None:
    """Packets over 64 KiB carry it inside the kernel only; here a smaller one that looks the same."""
    option = bytes([f.TCP, 0, 0xC2, 4]) + (2020).to_bytes(4, "big")
    frame = f.ethernet(f.IPV6, f.ipv6(f.HOPOPTS, option + f.tcp(bytes(PAYLOAD)), length=0))
    cell = run(frame, gso_size=500, gso_segs=4)
    assert (cell.kind, cell.packets, cell.bytes) == (TCP, 4, PAYLOAD + 4 * (14 + 40 + 20))
    assert run(frame).bytes == len(frame), "without segmentation it is on the wire"


def test_a_segment_size_without_payload_is_one_packet(run: Run) -> None:
    frame = f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp()))
    assert (run(frame, gso_size=1000).packets, run(frame, gso_size=1000).bytes) == (1, len(frame))


# --- anything at all --------------------------------------------------------------------------------

_fields = {
    12: st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x81\x00", b"\x88\xa8", b"\x08\x06"]),
    16: st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x81\x00", b"\x88\xa8"]),
    14: st.sampled_from([b"\x45", b"\x4f", b"\x60", b"\x44", b"\x65", b"\xe0"]),
    18: st.sampled_from([b"\x45", b"\x60", b"\x47"]),
    20: st.sampled_from([b"\x06", b"\x11", b"\x00", b"\x2b", b"\x2c", b"\x33", b"\x3c", b"\x87", b"\x84"]),
    23: st.sampled_from([b"\x06", b"\x11", b"\x01"]),
    24: st.sampled_from([b"\x06", b"\x11", b"\x00", b"\x2c", b"\x33"]),
    27: st.sampled_from([b"\x06", b"\x11"]),
    36: st.just(b"\x12\xb7"),
    54: st.sampled_from([b"\x06\x00", b"\x11\x00", b"\x2c\x00", b"\x3c\x01", b"\x33\x02"]),
    56: st.just(b"\x12\xb7"),
    64: st.just(b"\x12\xb7"),
}


@st.composite
def odd_frames(draw: st.DrawFn) -> bytes:
    """Random bytes, with plausible values in the places where decisions are made."""
    frame = bytearray(draw(st.binary(min_size=15, max_size=160)))
    for at, values in _fields.items():
        if draw(st.booleans()):
            value = draw(values)
            frame[at : at + len(value)] = value[: max(0, len(frame) - at)]
    return bytes(frame)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frame=odd_frames())
def test_any_frame_is_counted_as_a_second_reader_reads_it(run: Run, frame: bytes) -> None:
    assume(is_runnable(frame))
    cell, want = run(frame), f.expected(frame)
    traffic_class = want.dscp >> 3 if want.pcp is None else want.pcp
    assert cell == Cell(0, traffic_class, want.kind, len(frame), 1)
    size = 7
    payload = max(0, len(frame) - want.header)
    segments = max(1, -(-payload // size))
    cell = run(frame, gso_size=size)
    if want.kind is not OTHER:
        assert (cell.packets, cell.bytes) == (segments, len(frame) + (segments - 1) * want.header)
