"""What packets of an IPoIB interface are counted as: the same as on Ethernet, behind another header."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bpf import loaded, sys
from bpf.accounting import Accounting
from bpf.layout import Cell, Framing, TrafficKind
from bpf.loaded import Place
from tests.bpf import frames as f
from tests.bpf.conftest import SLOT, Run, context
from tests.bpf.test_bpf_packets import ROCE_V4, ROCE_V6, TCP_V4

_RECEIVER = bytes.fromhex("00000052fe80000000000000021122fffe000007")
"""A queue pair and a GID: what ipoib_hard_header() puts before a packet. Before one that came it is zeros."""
_ETHERNET_BYTES = 14
OTHER_PROTOCOL = f.ethernet(0x88B5, bytes(40))


def over_ipoib(frame: bytes, *, receiver: bytes = _RECEIVER) -> bytes:
    """The same packet behind the kernel's pseudo header and IPoIB's, the type and 2 reserved bytes."""
    return receiver + frame[12:14] + bytes(2) + frame[_ETHERNET_BYTES:]


@pytest.fixture
def run_ipoib(accounting: Accounting) -> Iterator[Run]:
    programs = [accounting.load(SLOT, direction, Framing.IPOIB) for direction in (0, 1)]

    def once(frame: bytes, *, direction: int = 0, gso_segs: int = 0, gso_size: int = 0) -> Cell:
        accounting.zero(SLOT)
        ran = sys.prog_test_run(programs[direction], frame, context=context(gso_segs, gso_size))
        assert ran.result == -1
        (cell,) = accounting.read(SLOT)
        return cell

    yield once
    for program in programs:
        program.close()


@pytest.mark.parametrize("frame", [TCP_V4, ROCE_V4, ROCE_V6, OTHER_PROTOCOL])
@pytest.mark.parametrize(("direction", "receiver"), [(0, _RECEIVER), (1, bytes(20))])
def test_class_and_kind_are_those_on_ethernet_and_bytes_have_ipoibs_own_header(
    run: Run, run_ipoib: Run, frame: bytes, direction: int, receiver: bytes
) -> None:
    on_ethernet = run(frame, direction=direction)
    cell = run_ipoib(over_ipoib(frame, receiver=receiver), direction=direction)
    assert (cell.direction, cell.traffic_class, cell.kind, cell.packets) == (
        on_ethernet.direction,
        on_ethernet.traffic_class,
        on_ethernet.kind,
        on_ethernet.packets,
    )
    assert cell.bytes == on_ethernet.bytes - _ETHERNET_BYTES + 4


def test_a_receiver_whose_address_looks_like_an_ethertype_is_not_read_as_one(run_ipoib: Run) -> None:
    receiver = _RECEIVER[:12] + b"\x86\xdd" + _RECEIVER[14:]
    assert run_ipoib(over_ipoib(TCP_V4, receiver=receiver)).kind is TrafficKind.TCP


def test_segments_repeat_what_is_on_the_wire_alone(run_ipoib: Run) -> None:
    frame = over_ipoib(f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(bytes(3000)))))
    cell = run_ipoib(frame, gso_segs=3, gso_size=1000)
    assert (cell.packets, cell.bytes) == (3, 3 * (4 + 20 + 20) + 3000)


def test_what_is_too_short_for_a_header_is_counted_whole_as_other(run_ipoib: Run) -> None:
    cell = run_ipoib(bytes(20))
    assert (cell.kind, cell.packets, cell.bytes) == (TrafficKind.OTHER, 1, 20)


def test_the_kernel_tells_what_a_program_reads(accounting: Accounting) -> None:
    for framing in Framing:
        with accounting.load(SLOT, 1, framing) as program:
            assert loaded.place_of(program) == Place(SLOT, 1, framing)
