"""What the programs do beside counting: classes, marks, places in queues, and the end of what is too much.

A packet is counted first: whatever becomes of it, the cell it is in is the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from bpf import sys
from bpf.accounting import Accounting
from bpf.layout import LEAF, Slot, TrafficKind
from bpf.limits import NO_MARK, Police, Rules
from tests.bpf import frames as f

SLOT, OTHER = Slot(6), Slot(7)
EGRESS, INGRESS = 0, 1
UNSPEC, SHOT, REDIRECT = -1, 2, 7
HANDLE = 0x4B4E0000
V4 = f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT, payload=bytes(100)), dscp=26))
V6 = f.ethernet(f.IPV6, f.ipv6(f.UDP, f.udp(f.ROCE_PORT, payload=bytes(100)), dscp=26))
TAGGED = f.ethernet(
    f.IPV4, f.ipv4(f.UDP, f.udp(f.ROCE_PORT, payload=bytes(100)), dscp=26), (f.CTAG, f.tci(3))
)
ARP = f.ethernet(f.ARP, bytes(46))
MARK_3_AS_46 = (NO_MARK, NO_MARK, NO_MARK, 46, NO_MARK, NO_MARK, NO_MARK, NO_MARK)


@pytest.fixture(autouse=True)
def fresh(accounting: Accounting) -> Iterator[None]:
    for slot in (SLOT, OTHER):
        accounting.zero(slot)
    yield
    accounting.zero(SLOT)


def run(accounting: Accounting, frame: bytes, direction: int = EGRESS, repeat: int = 1) -> sys.TestRun:
    with accounting.load(SLOT, direction) as program:
        return sys.prog_test_run(program, frame, repeat=repeat)


def checksum_of(header: bytes) -> int:
    """RFC 1071, over a whole header: 0 where its checksum is right."""
    total = sum(int.from_bytes(header[at : at + 2], "big") for at in range(0, len(header), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def with_checksum(frame: bytes, at: int = 14) -> bytes:
    right = checksum_of(frame[at : at + 10] + bytes(2) + frame[at + 12 : at + 20])
    return frame[: at + 10] + right.to_bytes(2, "big") + frame[at + 12 :]


@pytest.mark.parametrize("direction", [EGRESS, INGRESS])
@pytest.mark.parametrize("frame", [V4, V6, TAGGED, ARP], ids=["v4", "v6", "tagged", "arp"])
def test_without_rules_nothing_of_a_packet_is_touched(
    accounting: Accounting, frame: bytes, direction: int
) -> None:
    ran = run(accounting, frame, direction)
    assert (ran.result, ran.packet, ran.priority) == (UNSPEC, frame, 0)


def test_a_class_chooses_the_queue_in_each_direction(accounting: Accounting) -> None:
    accounting.limits.set(SLOT, Rules(queues=(HANDLE, HANDLE + 0x10000)))
    assert run(accounting, V4, EGRESS).priority == HANDLE | LEAF + 3
    assert run(accounting, V4, INGRESS).priority == HANDLE + 0x10000 | LEAF + 3
    assert run(accounting, ARP, EGRESS).priority == HANDLE | LEAF


@pytest.mark.parametrize("frame", [V4, V6, ARP], ids=["v4", "v6", "arp"])
def test_one_class_takes_every_packet(accounting: Accounting, frame: bytes) -> None:
    accounting.limits.set(SLOT, Rules(one_class=2, queues=(HANDLE, 0)))
    assert run(accounting, frame).priority == HANDLE | LEAF + 2
    (cell,) = accounting.read(SLOT)
    assert cell.traffic_class == 2


@pytest.mark.parametrize(("frame", "at"), [(V4, 14), (TAGGED, 18)], ids=["v4", "tagged"])
def test_an_ipv4_packet_is_marked_with_its_checksum_right_and_its_ecn_kept(
    accounting: Accounting, frame: bytes, at: int
) -> None:
    accounting.limits.set(SLOT, Rules(marks=MARK_3_AS_46))
    sent = with_checksum(frame, at)
    left = run(accounting, sent).packet
    assert left[at + 1] == 46 << 2 | sent[at + 1] & 3
    assert checksum_of(left[at : at + 20]) == 0
    assert left[: at + 1] + left[at + 2 : at + 10] + left[at + 12 :] == (
        sent[: at + 1] + sent[at + 2 : at + 10] + sent[at + 12 :]
    )


def test_an_ipv6_packet_is_marked_and_keeps_ecn_and_flow_label(accounting: Accounting) -> None:
    accounting.limits.set(SLOT, Rules(marks=MARK_3_AS_46))
    left = run(accounting, V6).packet
    before, after = (int.from_bytes(each[14:18], "big") for each in (V6, left))
    assert after >> 22 & 0x3F == 46
    assert after & ~(0x3F << 22) == before & ~(0x3F << 22)
    assert left[:14] + left[18:] == V6[:14] + V6[18:]


@pytest.mark.parametrize("dscp", range(0, 64, 7))
def test_every_mark_is_right_in_both_versions(accounting: Accounting, dscp: int) -> None:
    accounting.limits.set(SLOT, Rules(marks=(dscp,) * 8))
    v4, v6 = (run(accounting, frame).packet for frame in (with_checksum(V4), V6))
    assert v4[15] >> 2 == dscp
    assert checksum_of(v4[14:34]) == 0
    assert int.from_bytes(v6[14:16], "big") >> 6 & 0x3F == dscp


def test_marks_are_for_what_leaves_and_for_what_has_an_ip_header(accounting: Accounting) -> None:
    accounting.limits.set(SLOT, Rules(marks=(46,) * 8))
    assert run(accounting, V4, INGRESS).packet == V4
    assert run(accounting, ARP).packet == ARP


def test_what_is_marked_is_counted_in_the_class_it_came_in(accounting: Accounting) -> None:
    accounting.limits.set(SLOT, Rules(marks=MARK_3_AS_46))
    run(accounting, V4)
    (cell,) = accounting.read(SLOT)
    assert (cell.traffic_class, cell.kind) == (3, TrafficKind.ROCE)


def test_what_comes_in_takes_the_detour_and_what_leaves_does_not(accounting: Accounting) -> None:
    accounting.limits.set(SLOT, Rules(detour=1))
    assert run(accounting, V4, INGRESS).result == REDIRECT
    assert run(accounting, V4, EGRESS).result == UNSPEC


@pytest.mark.parametrize("direction", [EGRESS, INGRESS])
def test_what_is_above_the_limit_is_dropped_and_all_of_it_is_counted(
    accounting: Accounting, direction: int
) -> None:
    """A burst of ten packets at a rate at which the eleventh would have to wait for days."""
    size = len(V4)
    police = Police(rate=1, burst=10 * size)
    accounting.limits.set(SLOT, Rules(police=(police, None) if direction == EGRESS else (None, police)))
    results = [run(accounting, V4, direction).result for _ in range(30)]
    assert results == [UNSPEC] * 10 + [SHOT] * 20
    dropped = accounting.limits.dropped([SLOT, OTHER])
    assert dropped[SLOT].packets[direction] == 20
    assert dropped[SLOT].bytes[direction] == 20 * size
    assert (dropped[OTHER].packets, dropped[SLOT].packets[1 - direction]) == ((0, 0), 0)
    (cell,) = accounting.read(SLOT)
    assert (cell.packets, cell.bytes) == (30, 30 * size)


@pytest.mark.parametrize("direction", [EGRESS, INGRESS])
def test_beside_large_packets_that_fill_the_burst_a_small_one_has_room(
    accounting: Accounting, direction: int
) -> None:
    large, small = f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(9, payload=bytes(1400)))), V4
    police = Police(rate=1, burst=3 * len(large) + len(large) // 2)
    accounting.limits.set(SLOT, Rules(police=(police, None) if direction == EGRESS else (None, police)))
    assert [run(accounting, large, direction).result for _ in range(9)] == [UNSPEC] * 3 + [SHOT] * 6
    assert [run(accounting, small, direction).result for _ in range(3)] == [UNSPEC] * 3


def test_what_is_larger_than_the_burst_has_its_turn_while_that_is_half_empty(accounting: Accounting) -> None:
    large, small = f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(9, payload=bytes(1400)))), V4
    accounting.limits.set(SLOT, Rules(police=(Police(rate=1, burst=4 * len(small)), None)))
    results = [run(accounting, frame).result for frame in (small, small, large, large, small)]
    assert results == [UNSPEC] * 3 + [SHOT] * 2


def test_below_the_limit_nothing_is_dropped(accounting: Accounting) -> None:
    accounting.limits.set(SLOT, Rules(police=(Police(rate=1 << 50, burst=1 << 30), None)))
    run(accounting, V4, repeat=10_000)
    assert accounting.limits.dropped([SLOT])[SLOT].packets == (0, 0)


def test_new_rules_forget_nothing_that_was_dropped_and_a_new_owner_starts_without(
    accounting: Accounting,
) -> None:
    accounting.limits.set(SLOT, Rules(police=(Police(rate=1, burst=1), None)))
    run(accounting, V4, repeat=5)
    accounting.limits.set(SLOT, Rules(queues=(HANDLE, 0), detour=9))
    assert accounting.limits.dropped([SLOT])[SLOT].packets == (4, 0)
    assert accounting.limits.detour(SLOT) == 9
    assert accounting.limits.queues(SLOT) == (HANDLE, 0)
    accounting.forget(SLOT)
    assert accounting.limits.dropped([SLOT])[SLOT].packets == (0, 0)
    assert accounting.read(SLOT) == ()
    assert accounting.limits.detour(SLOT) == 9
    accounting.zero(SLOT)
    assert accounting.limits.queues(SLOT) == (0, 0)
    assert accounting.limits.detour(SLOT) == 0
    assert run(accounting, V4).priority == 0


def test_the_flood_of_one_class_costs_no_other_what_it_is_guaranteed(accounting: Accounting) -> None:
    best_effort = f.ethernet(f.IPV4, f.ipv4(f.UDP, f.udp(9, payload=bytes(100))))
    police, nothing = Police(rate=1, burst=1), (0,) * 8
    guaranteed = (0, 0, 0, 1 << 40, 0, 0, 0, 0)
    for direction in (EGRESS, INGRESS):
        ways = (guaranteed, nothing) if direction == EGRESS else (nothing, guaranteed)
        accounting.limits.set(SLOT, Rules(police=(police, police), guaranteed=ways))
        flood = [run(accounting, best_effort, direction).result for _ in range(20)]
        assert flood == [UNSPEC] + [SHOT] * 19
        assert [run(accounting, V4, direction).result for _ in range(20)] == [UNSPEC] * 20
        assert run(accounting, best_effort, direction).result == SHOT
        assert accounting.limits.dropped([SLOT])[SLOT].packets[direction] == 20


def test_beyond_what_it_is_guaranteed_a_class_is_like_the_others(accounting: Accounting) -> None:
    guaranteed = ((0, 0, 0, 1, 0, 0, 0, 0), (0,) * 8)
    accounting.limits.set(SLOT, Rules(police=(Police(rate=1, burst=1), None), guaranteed=guaranteed))
    # The first goes by its share and is charged to the whole, so nothing is left for the second.
    assert [run(accounting, V4).result for _ in range(5)] == [UNSPEC] + [SHOT] * 4


FAR = 1 << 62
"""A time to leave, in ns, that is centuries away."""


@pytest.mark.parametrize("frame", [V4, V6, ARP], ids=["v4", "v6", "arp"])
def test_packets_are_told_to_leave_one_after_the_other_and_of_a_full_queue_first(
    accounting: Accounting, frame: bytes
) -> None:
    """At a rate of one byte in a second: a packet's place in the queue is told by whole seconds."""
    size, started = len(frame), time.monotonic_ns()
    police = Police(rate=1, burst=10 * size)
    accounting.limits.set(SLOT, Rules(queues=(HANDLE, 0), police=(police, None), credit=2 * size))
    sent = with_checksum(frame) if frame is V4 else frame
    ran = [run(accounting, sent) for _ in range(14)]
    assert [each.result for each in ran] == [UNSPEC] * 10 + [SHOT] * 4
    waiting = accounting.limits.waiting(SLOT)
    assert waiting is not None
    assert waiting / size == pytest.approx(8, abs=0.5)
    # The first three begin within the credit.
    assert [each.departure for each in ran[:3]] == [0] * 3
    places = [(each.departure - started) / (size * 1e9) for each in ran[3:10]]
    assert places == pytest.approx(range(1, 8), abs=0.5)
    # The queue has room for eight; from the third on it is more than a quarter full.
    told = [each.packet != sent for each in ran[:10]]
    assert told == [False] * 5 + [frame is not ARP] * 5
    if frame is V4:
        assert (ran[9].packet[15] & 3, checksum_of(ran[9].packet[14:34])) == (3, 0)
    if frame is V6:
        assert ran[9].packet[15] >> 4 & 3 == 3


def test_a_sender_that_asked_to_leave_later_does_but_not_later_than_a_full_queue(
    accounting: Accounting,
) -> None:
    seconds = 10 * len(V4)
    accounting.limits.set(SLOT, Rules(police=(Police(rate=1, burst=seconds), None), credit=1))
    started = time.monotonic_ns()

    def asking(departure: int) -> int:
        context = bytes(152) + departure.to_bytes(8, "little")
        with accounting.load(SLOT, EGRESS) as program:
            return sys.prog_test_run(program, V4, context=context).departure

    halfway = started + seconds * 10**9 // 2
    assert [asking(halfway) for _ in range(3)] == [halfway] * 3
    # What nobody asked for later is in its own place, and what was asked for too late at the queue's end.
    for asked in (halfway + seconds * 10**9, FAR):
        assert (asking(asked) - started) / (seconds * 1e9) == pytest.approx(1, abs=0.05)


def test_who_is_not_told_of_congestion_is_not_marked(accounting: Accounting) -> None:
    deaf = bytearray(V4)
    deaf[15] &= ~3
    accounting.limits.set(SLOT, Rules(police=(Police(rate=1, burst=10 * len(V4)), None), credit=1))
    ran = [run(accounting, bytes(deaf)) for _ in range(9)]
    assert {each.packet for each in ran} == {bytes(deaf)}


def test_times_to_leave_are_for_what_leaves(accounting: Accounting) -> None:
    police = Police(rate=1, burst=10 * len(V4))
    before = accounting.limits.state
    accounting.limits.set(SLOT, Rules(police=(police, police), credit=1))
    assert accounting.limits.state is not before
    assert accounting.limits.departs(SLOT)
    assert accounting.limits.departing([SLOT, OTHER, Slot(0)]) == {SLOT}
    assert accounting.limits.departing([OTHER, Slot(0), Slot(accounting.capacity)]) == frozenset()
    ran = [run(accounting, V4, INGRESS) for _ in range(5)]
    assert {(each.packet, each.departure) for each in ran} == {(V4, 0)}
    accounting.limits.set(SLOT, Rules(police=(police, police)))
    assert not accounting.limits.departs(SLOT)
    assert accounting.limits.waiting(SLOT) is None
    ran = [run(accounting, V4, EGRESS) for _ in range(5)]
    assert {(each.packet, each.departure) for each in ran} == {(V4, 0)}


@pytest.mark.parametrize("police", [None, Police(rate=1, burst=5)])
def test_times_to_leave_need_a_rate_and_room_to_wait(police: Police | None) -> None:
    with pytest.raises(ValueError, match="times of departure"):
        Rules(police=(police, None), credit=5)
