"""Real traffic over a veth, counted to the packet and the byte, and held against what was sent."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys as python
import threading
from collections.abc import Callable, Iterator

import pytest

from bpf import sys
from bpf.layout import Cell, Slot, TrafficKind
from kndsim.links import netns
from tests.bpf import frames as f
from tests.kernel.bpf_traffic import Sender, virtio_header
from tests.kernel.counted_wire import (
    BLAST,
    NOBODY,
    NOBODY6,
    PEER,
    PEER6,
    SLOT,
    UDP_SEGMENT,
    Wire,
    attach_filters,
    family_of,
    standing_still,
    udp_socket,
)

OTHER, IP, TCP, ROCE = TrafficKind
_BPF_FUNC_SKB_VLAN_PUSH = 18


@pytest.mark.parametrize("address", [NOBODY, NOBODY6])
@pytest.mark.parametrize("direction", [0, 1], ids=["egress", "ingress"])
def test_udp_is_counted_exactly_per_dscp_class(wire: Wire, address: str, direction: int) -> None:
    """Each class gets its own number of packets of its own size; class 0 has the kernel's chatter in it."""
    header = 14 + (40 if ":" in address else 20) + 8
    where = wire.peer if direction else wire.pod
    plan = {dscp: (dscp + 10, 20 * dscp) for dscp in range(8, 64)}

    def send() -> None:
        for dscp, (count, size) in plan.items():
            with udp_socket(address, 4791 if dscp % 2 else 53, dscp) as made:
                for _ in range(count):
                    made.send(bytes(size))

    where.run(send)
    want: dict[tuple[int, int, TrafficKind], tuple[int, int]] = {}
    for dscp, (count, size) in plan.items():
        key = (direction, dscp >> 3, ROCE if dscp % 2 else IP)
        before = want.get(key, (0, 0))
        want[key] = (before[0] + count * (size + header), before[1] + count)
    for (_, traffic_class, kind), (_, packets) in want.items():
        wire.settled(direction=direction, packets=packets, traffic_class=traffic_class, kind=kind)
    assert {key: value for key, value in wire.cells().items() if key[1] > 0} == want


@pytest.mark.parametrize("direction", [0, 1], ids=["egress", "ingress"])
def test_udp_segmentation_is_counted_as_packets_of_the_wire(wire: Wire, direction: int) -> None:
    """10 000 bytes in segments of 999: ten full ones and a tail of ten bytes."""

    def send() -> None:
        with udp_socket(NOBODY, 4791, 40) as made:
            made.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 999)
            for _ in range(50):
                made.send(bytes(10_000))

    (wire.peer if direction else wire.pod).run(send)
    cell = wire.settled(direction=direction, packets=50 * 11, traffic_class=5, kind=ROCE)
    assert (cell.packets, cell.bytes) == (50 * 11, 50 * (10_000 + 11 * (14 + 20 + 8)))


def exchange(wire: Wire, address: str, size: int) -> None:
    """Send size bytes by TCP from the pod to the peer, and wait until they were read."""
    listener = wire.peer.run(lambda: socket.create_server((address, 5001), family=family_of(address)))
    with listener:
        received = 0

        def receive() -> None:
            nonlocal received
            connection, _ = listener.accept()
            with connection:
                while block := connection.recv(1 << 20):
                    received += len(block)

        reader = threading.Thread(target=receive)
        reader.start()
        with wire.pod.run(lambda: socket.create_connection((address, 5001))) as sender:
            block = bytes(1 << 16)
            for _ in range(size // len(block)):
                sender.sendall(block)
        reader.join(30)
        assert received == size // (1 << 16) * (1 << 16)


@pytest.mark.parametrize(("address", "header"), [(PEER, 14 + 20 + 32), (PEER6, 14 + 40 + 32)])
def test_tcp_adds_up_with_the_interfaces_statistics(wire: Wire, address: str, header: int) -> None:
    """The interface counts what it was handed, unsegmented. Every further segment has one more header, so
    the two differ by exactly that many headers; retransmissions and acknowledgements are in both."""
    # What was sent while the other end was still down is counted, and then dropped by the driver.
    stats_before, cells_before = standing_still(wire)
    exchange(wire, address, 64 << 20)
    stats, cells = standing_still(wire)
    for direction, (bytes_name, packets_name) in enumerate(
        [("tx_bytes", "tx_packets"), ("rx_bytes", "rx_packets")]
    ):
        size, packets = (
            sum(value[part] for key, value in cells.items() if key[0] == direction)
            - sum(value[part] for key, value in cells_before.items() if key[0] == direction)
            for part in (0, 1)
        )
        extra = packets - (stats[packets_name] - stats_before[packets_name])
        assert size - (stats[bytes_name] - stats_before[bytes_name]) == extra * header, (cells, stats)
        if direction == 0:
            assert extra > 1000, "the test needs segmentation to say anything"
    assert cells[0, 0, TCP][0] > 64 << 20


# --- frames as they are -----------------------------------------------------------------------------

ROCE_FRAME = f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT, bytes(64)), dscp=26))
LARGE = f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT, bytes(6000)), dscp=26))
LARGE6 = f.ethernet(
    f.IPV6,
    f.ipv6(f.HOPOPTS, f.extension(f.TCP, bytes(14)) + f.tcp(bytes(6000), bytes(8)), dscp=26),
    (f.CTAG, f.tci(6)),
)


@pytest.mark.parametrize("frame", [ROCE_FRAME, f.ethernet(f.IPV6, f.ipv6(f.TCP, f.tcp(), dscp=26))])
def test_a_frame_cut_anywhere_is_counted_both_ways(wire: Wire, frame: bytes) -> None:
    lengths = range(14, len(frame))
    want: dict[tuple[int, TrafficKind], tuple[int, int]] = {}
    for length in lengths:
        reading = f.expected(frame[:length])
        key = (reading.dscp >> 3, reading.kind)
        before = want.get(key, (0, 0))
        want[key] = (before[0] + length, before[1] + 1)
    wire.accounting.zero(SLOT)
    for where, name in ((wire.pod, "kdev"), (wire.peer, "kwire")):
        with Sender(where, name) as sender:
            for length in lengths:
                sender.send(frame[:length])
    for direction in (0, 1):
        for (traffic_class, kind), (size, packets) in want.items():
            cell = wire.settled(direction=direction, packets=packets, traffic_class=traffic_class, kind=kind)
            assert (cell.bytes, cell.packets) == (size, packets), (direction, traffic_class, kind)


@pytest.mark.parametrize("direction", [0, 1], ids=["egress", "ingress"])
@pytest.mark.parametrize("linear", [14, 20, 40, 60])
@pytest.mark.parametrize(("frame", "traffic_class", "kind"), [(LARGE, 3, ROCE), (LARGE6, 6, TCP)])
def test_headers_outside_the_linear_part_are_read_all_the_same(
    wire: Wire, frame: bytes, traffic_class: int, kind: TrafficKind, linear: int, direction: int
) -> None:
    where, name = (wire.peer, "kwire") if direction else (wire.pod, "kdev")
    with Sender(where, name, vnet=True) as sender:
        sender.send(frame, 5, header=virtio_header(header=linear))
    cell = wire.settled(direction=direction, packets=5, traffic_class=traffic_class, kind=kind)
    assert (cell.bytes, cell.packets) == (5 * len(frame), 5)


def test_segments_of_an_untrusted_sender_are_worked_out(wire: Wire) -> None:
    """A packet socket gives a segment size and no number of segments."""
    size, payload, header = 700, 6000, 14 + 20 + 32
    frame = f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(bytes(payload), bytes(12)), dscp=40))
    about = struct.pack("=BBHHHH", 1, 1, header, size, 34, 16)
    with Sender(wire.pod, "kdev", vnet=True) as sender:
        sender.send(frame, 3, header=about)
    segments = -(-payload // size)
    cell = wire.settled(direction=0, packets=3 * segments, traffic_class=5, kind=TCP)
    assert (cell.packets, cell.bytes) == (3 * segments, 3 * (payload + segments * header))


def test_a_tag_counts_alike_in_the_frame_and_beside_it(wire: Wire) -> None:
    """Out, a packet socket puts the tag into the frame; in, the kernel has moved it beside the frame."""
    frame = f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT, bytes(40)), dscp=26), (f.CTAG, f.tci(5)))
    for direction, (where, name) in enumerate([(wire.pod, "kdev"), (wire.peer, "kwire")]):
        with Sender(where, name) as sender:
            sender.send(frame, 4)
        cell = wire.settled(direction=direction, packets=4, traffic_class=5, kind=ROCE)
        assert (cell.bytes, cell.packets) == (4 * len(frame), 4)


def test_the_inner_of_two_tags_is_passed_over(wire: Wire) -> None:
    tags = ((f.STAG, f.tci(2)), (f.CTAG, f.tci(7)))
    frame = f.ethernet(f.IPV6, f.ipv6(f.TCP, f.tcp(), dscp=26), *tags)
    for direction, (where, name) in enumerate([(wire.pod, "kdev"), (wire.peer, "kwire")]):
        with Sender(where, name) as sender:
            sender.send(frame, 4)
        cell = wire.settled(direction=direction, packets=4, traffic_class=2, kind=TCP)
        assert (cell.bytes, cell.packets) == (4 * len(frame), 4)


@pytest.fixture
def tagger(tcx_kernel: None, wire: Wire) -> Iterator[None]:
    """As a VLAN device does it, the tag goes out beside the frame: a program in front of ours sets it."""
    proto, tag = 2, 3
    code = struct.pack("=BBhi", 0xB7, proto, 0, socket.htons(f.CTAG))
    code += struct.pack("=BBhi", 0xB7, tag, 0, f.tci(6))
    code += struct.pack("=BBhi", 0x85, 0, 0, _BPF_FUNC_SKB_VLAN_PUSH)
    code += struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)
    with (
        sys.prog_load(sys.ProgramType.SCHED_CLS, code, name="tagger") as program,
        sys.link_create(program, wire.device, sys.AttachType.TCX_EGRESS, flags=sys.BPF_F_BEFORE),
    ):
        yield


@pytest.mark.usefixtures("tagger")
def test_a_tag_that_goes_out_beside_the_frame_is_counted(wire: Wire) -> None:
    with Sender(wire.pod, "kdev") as sender:
        sender.send(ROCE_FRAME, 4)
    cell = wire.settled(direction=0, packets=4, traffic_class=6, kind=ROCE)
    assert (cell.bytes, cell.packets) == (4 * (len(ROCE_FRAME) + 4), 4)


@pytest.mark.usefixtures("tagger")
def test_a_tag_beside_the_frame_is_counted_for_every_segment(wire: Wire) -> None:
    def send() -> None:
        with udp_socket(NOBODY, 4791, 0) as made:
            made.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 999)
            made.send(bytes(10_000))

    wire.pod.run(send)
    cell = wire.settled(direction=0, packets=11, traffic_class=6, kind=ROCE)
    assert (cell.packets, cell.bytes) == (11, 10_000 + 11 * (14 + 4 + 20 + 8))


@pytest.mark.usefixtures("tcx_kernel")
def test_the_same_programs_count_as_clsact_filters(wire: Wire) -> None:
    """For kernels without tcx: netlink takes the descriptor, which is closed afterwards."""
    slot = Slot(3)
    with netns() as pod:
        wire.pod.netlink(lambda ipr: ipr.link("set", index=wire.device, net_ns_fd=pod.fd))
        attach_filters(pod, wire.accounting, wire.device, slot)
        pod.netlink(lambda ipr: ipr.link("set", index=wire.device, state="up"))
        for where, name in ((pod, "kdev"), (wire.peer, "kwire")):
            with Sender(where, name) as sender:
                sender.send(ROCE_FRAME, 4)
        wire.settled(direction=1, packets=4, traffic_class=3, kind=ROCE)
        want = [Cell(way, 3, ROCE, 4 * len(ROCE_FRAME), 4) for way in (0, 1)]
        for where in (SLOT, slot):
            cells = [cell for cell in wire.accounting.read(where) if cell.kind is ROCE]
            assert cells == want, "tcx and clsact side by side see the same, and neither swallows a frame"


# --- many at once -----------------------------------------------------------------------------------


def start_blast(count: int, payload: int, dscp: int, cpu: int) -> subprocess.Popen[str]:
    """From the main thread, whose netns the child gets: the pod's."""
    arguments = [NOBODY, 4791, count, payload, dscp, cpu]
    return subprocess.Popen(
        [python.executable, "-I", str(BLAST), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def read_until(done: threading.Event, read: Callable[[], tuple[Cell, ...]], problems: list[str]) -> None:
    last = (0, 0)
    while not done.is_set():
        for cell in read():
            if (cell.direction, cell.traffic_class, cell.kind) != (0, 3, ROCE):
                continue
            now = (cell.bytes, cell.packets)
            if now[0] < last[0] or now[1] < last[1]:
                problems.append(f"{now} after {last}")
            last = now


def test_two_senders_on_two_cpus_with_readers_beside_are_exact(wire: Wire) -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    assert len(cpus) == 2, "this needs two CPUs to say anything"
    each, payload = 150_000, 64
    done, problems = threading.Event(), list[str]()
    slots = [Slot(n) for n in range(4)]
    readers = [
        threading.Thread(
            target=read_until, args=(done, lambda: wire.accounting.read_slots(slots)[SLOT], problems)
        )
        for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    try:
        senders = [start_blast(each, payload, 26, cpu) for cpu in cpus]
        assert [sender.wait(50) for sender in senders] == [0, 0]
        for sender in senders:
            assert sender.stdout is not None
            sender.stdout.close()
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not problems
    cell = wire.settled(direction=0, packets=2 * each, traffic_class=3, kind=ROCE)
    assert (cell.packets, cell.bytes) == (2 * each, 2 * each * (payload + 14 + 20 + 8))
