"""Counted equals sent, to the byte: what senders know of themselves, held against the counters.

Each case has more than one thing that goes wrong easily: segments with odd tails, losses and what TCP sends
again, fragments, several classes from several CPUs while others read.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys as python
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from bpf import sys
from bpf.layout import Cell, Slot, TrafficKind
from kndsim.links import SimNetns
from kndsim.waiting import wait_until
from tests.kernel.counted_wire import (
    BLAST,
    NOBODY,
    NOBODY6,
    PEER,
    PEER6,
    SLOT,
    UDP_SEGMENT,
    Cells,
    Wire,
    family_of,
    standing_still,
    udp_socket,
)

_, IP, TCP, ROCE = TrafficKind
ETHERNET, UDP = 14, 8
MTU = 9000
_GET_PRANDOM_U32 = 7
_SHOT, _NEXT = 2, -1
_TCP_INFO = struct.Struct("=B99xI32xI60xQQ")
"""Of struct tcp_info (uapi linux/tcp.h): state, retransmitted segments, segments sent, bytes of payload sent,
and how many of those were sent again."""
_FIN_WAIT_2 = 5
"""All was sent and acknowledged, its end included; the peer has not ended yet."""


def ip_bytes(address: str) -> int:
    return 40 if ":" in address else 20


# --- segments ---------------------------------------------------------------------------------------

TAILS = ((999, 999), (1000, 999), (1998, 999), (10_000, 999), (13_333, 1400), (60_001, 8900), (63, 1))
"""Bytes given to one call, and the segments they leave in."""


@pytest.mark.parametrize("address", [NOBODY, NOBODY6])
@pytest.mark.parametrize("direction", [0, 1], ids=["egress", "ingress"])
def test_segments_with_any_tail_are_counted_in_their_class(wire: Wire, address: str, direction: int) -> None:
    """Each with a class of its own, 1 to 7, one after the other over one wire."""
    header, calls = ETHERNET + ip_bytes(address) + UDP, 20

    def send() -> None:
        for number, (size, segment) in enumerate(TAILS):
            with udp_socket(address, 4791, 8 * (number + 1)) as made:
                made.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
                for _ in range(calls):
                    made.send(bytes(size))

    (wire.peer if direction else wire.pod).run(send)
    want = {}
    for number, (size, segment) in enumerate(TAILS):
        packets = -(-size // segment)
        want[direction, number + 1, ROCE] = (calls * (size + packets * header), calls * packets)
    assert classed(wire, want) == want


@pytest.mark.parametrize("address", [NOBODY, NOBODY6])
def test_fragments_are_counted_each_with_its_headers(wire: Wire, address: str) -> None:
    """The first says that it is UDP; of the others only that they are IP is known."""
    size, count, six = 20_000, 10, ":" in address
    ip = ip_bytes(address) + (8 if six else 0)
    room = (MTU - ip) // 8 * 8

    def send() -> None:
        with udp_socket(address, 4791, 40) as made:
            for _ in range(count):
                made.send(bytes(size))

    wire.pod.run(send)
    fragments, first = -(-(size + UDP) // room), room + ip + ETHERNET
    rest = size + UDP - room + (fragments - 1) * (ip + ETHERNET)
    want = {(0, 5, ROCE): (count * first, count), (0, 5, IP): (count * rest, count * (fragments - 1))}
    assert classed(wire, want) == want


def classed(wire: Wire, want: Cells) -> Cells:
    """What was counted outside of class 0, which has the kernel's own chatter in it, once it is all there."""
    for (direction, traffic_class, kind), (_, packets) in want.items():
        wire.settled(direction=direction, packets=packets, traffic_class=traffic_class, kind=kind)
    return {key: value for key, value in wire.cells().items() if key[1] > 0}


# --- losses -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TcpTold:
    """What a connection says that it sent; wire bytes are to be made of it."""

    done: bool
    again: int
    segments: int
    payload: int
    payload_again: int

    @classmethod
    def of(cls, connection: socket.socket) -> TcpTold:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        state, again, segments, payload, payload_again = _TCP_INFO.unpack_from(told)
        return cls(state == _FIN_WAIT_2, again, segments, payload, payload_again)


LEAST, MOST = 8 << 20, 1 << 30
"""Bytes to send until enough was lost."""


@contextmanager
def losing(where: SimNetns, ifindex: int, *, one_in: int) -> Iterator[None]:
    """Packets that arrive there are dropped at random; one_in is a power of two."""
    code = struct.pack("=BBhi", 0x85, 0, 0, _GET_PRANDOM_U32)
    code += struct.pack("=BBhi", 0x57, 0, 0, one_in - 1)
    code += struct.pack("=BBhi", 0x15, 0, 2, 0)
    code += struct.pack("=BBhiBBhi", 0xB7, 0, 0, _NEXT, 0x95, 0, 0, 0)
    code += struct.pack("=BBhiBBhi", 0xB7, 0, 0, _SHOT, 0x95, 0, 0, 0)
    with (
        sys.prog_load(sys.ProgramType.SCHED_CLS, code, name="losing") as program,
        where.run(lambda: sys.link_create(program, ifindex, sys.AttachType.TCX_INGRESS)),
    ):
        yield


@contextmanager
def connected(wire: Wire, address: str) -> Iterator[socket.socket]:
    """From the pod to a peer that reads all and says nothing, and that stays until the end."""
    with ExitStack() as stack:
        listener = stack.enter_context(
            wire.peer.run(lambda: socket.create_server((address, 5001), family=family_of(address)))
        )
        sender = stack.enter_context(wire.pod.run(lambda: socket.create_connection((address, 5001))))
        reader = stack.enter_context(listener.accept()[0])

        def read() -> None:
            while reader.recv(1 << 20):
                pass

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield sender
        finally:
            sender.close()
            thread.join()


@pytest.mark.usefixtures("tcx_kernel")
@pytest.mark.parametrize("address", [PEER, PEER6])
def test_what_tcp_sends_again_is_counted_again(wire: Wire, address: str) -> None:
    """The wire loses a part behind the count. The sender knows its segments and bytes; the interface counted
    what it was handed, unsegmented: that many headers fewer."""
    header, whole, block = ETHERNET + ip_bytes(address) + 32, 0, bytes(1 << 16)
    stats_before, cells_before = standing_still(wire)
    with connected(wire, address) as sender, losing(wire.peer, wire.peer_device, one_in=32):
        # Large packets are few, and none of them may be among the lost for a while.
        while whole < LEAST or (TcpTold.of(sender).again <= 10 and whole < MOST):
            sender.sendall(block)
            whole += len(block)
        sender.shutdown(socket.SHUT_WR)
        wait_until(lambda: TcpTold.of(sender).done, within=30.0, what="all bytes acknowledged")
        stats, cells = standing_still(wire)
        told = TcpTold.of(sender)
    assert told.again > 10, "the test needs losses to say anything"
    assert told.payload == whole + told.payload_again
    # The first segment has eight bytes more of options.
    assert cells[0, 0, TCP] == (told.payload + told.segments * header + 8, told.segments)
    sent = {name: stats[name] - stats_before[name] for name in ("tx_bytes", "tx_packets")}
    size, packets = (
        sum(value[part] for key, value in cells.items() if key[0] == 0)
        - sum(value[part] for key, value in cells_before.items() if key[0] == 0)
        for part in (0, 1)
    )
    assert size - sent["tx_bytes"] == (packets - sent["tx_packets"]) * header
    assert packets > sent["tx_packets"], "the test needs segmentation to say anything"


# --- many at once -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stream:
    address: str
    dscp: int
    payload: int
    cpu: int

    @property
    def frame(self) -> int:
        return self.payload + UDP + ip_bytes(self.address) + ETHERNET


def blast(stream: Stream, count: int) -> subprocess.Popen[bytes]:
    """From the main thread, whose netns the child gets: the pod's."""
    arguments = (stream.address, 4791, count, stream.payload, stream.dscp, stream.cpu)
    return subprocess.Popen(
        [python.executable, "-I", str(BLAST), *map(str, arguments)], stdout=subprocess.DEVNULL
    )


@contextmanager
def read_all_the_time(wire: Wire, problems: list[str]) -> Iterator[None]:
    """As scrapes and checkpoints do; a cell that shows less than before is a problem."""
    done = threading.Event()

    def read() -> None:
        last: dict[tuple[int, int, TrafficKind], Cell] = {}
        while not done.is_set():
            for cell in wire.accounting.read_slots([Slot(n) for n in range(4)])[SLOT]:
                key = (cell.direction, cell.traffic_class, cell.kind)
                before = last.get(key, cell)
                if cell.bytes < before.bytes or cell.packets < before.packets:
                    problems.append(f"{cell} after {before}")
                last[key] = cell

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_several_classes_from_two_cpus_are_exact_while_others_read(wire: Wire) -> None:
    """Two classes are each sent from both CPUs, in frames of different sizes and of both kinds of IP."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    streams = (
        Stream(NOBODY, 26, 64, first),
        Stream(NOBODY6, 26, 65, second),
        Stream(NOBODY, 40, 1000, second),
        Stream(NOBODY6, 40, 1, first),
        Stream(NOBODY, 56, 333, first),
        Stream(NOBODY, 8, 8000, second),
    )
    count, problems = 30_000, list[str]()
    with read_all_the_time(wire, problems):
        senders = [blast(each, count) for each in streams]
        assert [sender.wait(60) for sender in senders] == [0] * len(streams)
    assert problems == []
    assert classed(wire, (want := sums(streams, count))) == want


def sums(streams: Sequence[Stream], count: int) -> Cells:
    want: Cells = {}
    for each in streams:
        key = (0, each.dscp >> 3, ROCE)
        size, packets = want.get(key, (0, 0))
        want[key] = (size + count * each.frame, packets + count)
    return want
