"""Limits on real traffic: never above, both ways, TCP and UDP, whatever the pod does; and all of it counted.

How near a limit traffic comes is for the benchmark to say: here is only what a busy machine cannot spoil.
"""

from __future__ import annotations

import socket
import time

import pytest

from bpf.program import CompiledPrograms
from hw.qdisc import ROOT_HANDLE
from kndsim.waiting import wait_until
from tests.kernel.limit_traffic import Counted, tcp, udp
from tests.kernel.limited_pair import HOST_ADDRESS, POD_ADDRESS, SLOT, Pair, limited_pairs
from tests.kernel.limits_apart import nothing_lost_beside_a_flood

pytestmark = [pytest.mark.usefixtures("tcx_kernel"), pytest.mark.timeout(120)]

LIMIT = 10
SECONDS = 1.5
ABOVE = 1.1
"""A burst comes on top."""


def goes_on(arriving: Counted) -> None:
    """For long enough that a burst does not matter."""
    wait_until(lambda: arriving.bytes > 0, within=20.0, what="the first byte")
    before = arriving.bytes
    arriving.rate(SECONDS)
    wait_until(lambda: arriving.bytes > before, within=20.0, what="more bytes")


def on_wire(pair: Pair, arriving: Counted) -> float:
    """Mb/s that leave the pod, from when those are through that were on their way."""
    arriving.rate(0.3)
    started, before = time.monotonic(), pair.on_wire()
    arriving.rate(SECONDS)
    return (pair.on_wire() - before) * 8 / 1e6 / (time.monotonic() - started)


@pytest.mark.parametrize("flows", [1, 8])
@pytest.mark.parametrize("way", ["egress", "ingress"])
def test_tcp_is_never_above_its_limit_and_goes_on(pair: Pair, way: str, flows: int) -> None:
    pair.limit(**{way: LIMIT})
    ends = (pair.pod, pair.host, HOST_ADDRESS) if way == "egress" else (pair.host, pair.pod, POD_ADDRESS)
    with tcp(*ends, flows) as arriving:
        goes_on(arriving)
        assert arriving.overall() < LIMIT * 1e6 * ABOVE


@pytest.mark.parametrize("way", ["egress", "ingress"])
def test_udp_is_never_above_its_limit(pair: Pair, way: str) -> None:
    pair.limit(**{way: LIMIT})
    ends = (pair.pod, pair.host, HOST_ADDRESS) if way == "egress" else (pair.host, pair.pod, POD_ADDRESS)
    with udp(*ends) as arriving:
        goes_on(arriving)
        assert arriving.overall() < LIMIT * 1e6 * ABOVE


def test_a_limit_that_changes_does_so_under_traffic_and_one_that_ends_leaves_nothing(pair: Pair) -> None:
    baseline = pair.target.preparation.baseline
    with tcp(pair.pod, pair.host, HOST_ADDRESS, 2) as arriving:
        pair.limit(egress=4 * LIMIT)
        assert pair.shaper.is_shaped(pair.target)
        goes_on(arriving)
        pair.limit(egress=LIMIT)
        assert pair.shaper.is_shaped(pair.target)
        assert 0 < on_wire(pair, arriving) < LIMIT * ABOVE
        pair.limit()
        assert on_wire(pair, arriving) > 1.5 * LIMIT
    assert pair.target.pod is not None
    link = pair.target.pod.by_index(pair.ifindex)
    root = pair.target.pod.shaping.root(pair.ifindex)
    assert link is not None
    assert link.gso_max_size == baseline.gso_max_size
    assert root is None or root.handle != ROOT_HANDLE


def test_a_pod_that_took_its_queue_off_has_a_quarter_more_and_is_seen(pair: Pair) -> None:
    pair.limit(egress=LIMIT)
    assert pair.target.pod is not None
    pair.target.pod.shaping.unshape(pair.ifindex)
    assert not pair.shaper.is_shaped(pair.target)
    with udp(pair.pod, pair.host, HOST_ADDRESS) as arriving:
        goes_on(arriving)
        # All that the backstop lets through at once is through by then.
        assert 0 < on_wire(pair, arriving) < LIMIT * 1.25 * ABOVE
        assert pair.accounting.limits.dropped([SLOT])[SLOT].packets[0] > 0
        pair.shaper.shape(pair.target)
        assert pair.shaper.is_shaped(pair.target)


def test_a_pod_that_took_the_queue_of_what_comes_in_off_gets_a_quarter_more_and_is_seen(pair: Pair) -> None:
    pair.limit(ingress=LIMIT)
    assert pair.target.pod is not None
    (detour,) = (link for link in pair.target.pod.dump() if link.kind == "ifb")
    pair.target.pod.shaping.unshape(detour.ifindex)
    assert not pair.shaper.is_shaped(pair.target)
    with udp(pair.host, pair.pod, POD_ADDRESS) as arriving:
        goes_on(arriving)
        assert 0 < arriving.rate(SECONDS) < LIMIT * 1e6 * 1.25 * ABOVE
        assert pair.accounting.limits.dropped([SLOT])[SLOT].packets[1] > 0
        pair.shaper.shape(pair.target)
        assert pair.shaper.is_shaped(pair.target)


def test_a_pod_with_a_link_of_our_name_is_limited_all_the_same(pair: Pair) -> None:
    pair.limit(ingress=LIMIT)
    assert pair.target.pod is not None
    (detour,) = (link for link in pair.target.pod.dump() if link.kind == "ifb")
    pair.target.pod.delete(detour.ifindex)
    pair.pod.netlink(lambda ipr: ipr.link("add", ifname=detour.name, kind="bridge", index=detour.ifindex))
    assert not pair.shaper.is_shaped(pair.target)
    pair.shaper.shape(pair.target)
    assert pair.shaper.is_shaped(pair.target)
    with udp(pair.host, pair.pod, POD_ADDRESS) as arriving:
        goes_on(arriving)
    pair.limit()
    assert not [link for link in pair.target.pod.dump() if link.kind == "ifb"]


def test_without_the_link_that_it_waits_on_nothing_comes_in(pair: Pair) -> None:
    pair.limit(ingress=LIMIT)
    assert pair.target.pod is not None
    (detour,) = (link for link in pair.target.pod.dump() if link.kind == "ifb")
    with udp(pair.host, pair.pod, POD_ADDRESS) as arriving:
        goes_on(arriving)
        pair.target.pod.delete(detour.ifindex)
        wait_until(lambda: arriving.rate(0.5) == 0, within=20.0, what="nothing to come in")
        assert not pair.shaper.is_shaped(pair.target)
        pair.shaper.shape(pair.target)
        goes_on(arriving)


def test_every_byte_is_counted_whatever_becomes_of_it(pair: Pair) -> None:
    """Sent at once, so that some wait, some find the queue full and some are above the backstop."""
    pair.limit(egress=1)
    assert pair.target.pod is not None
    sender = pair.pod.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sink = pair.host.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with sender, sink:
        sink.bind((HOST_ADDRESS, 9))
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        sender.connect((HOST_ADDRESS, 9))
        # The neighbour is found first, so that nothing waits for it.
        sender.send(b"0")
        wait_until(lambda: pair.egress_bytes() > 0, within=20.0, what="the first packet")
        before = pair.egress_bytes()
        sent = sum(sender.send(bytes(1000)) + 42 for _ in range(2000))
    dropped = pair.accounting.limits.dropped([SLOT])[SLOT]
    assert dropped.packets[0] > 0
    told = pair.shaper.dropped(pair.target)
    assert told["tx_policed"] == dropped.packets[0]
    assert told["tx_queue_dropped"] > 0
    assert told["rx_policed"] == told["rx_queue_dropped"] == 0
    # ARP and IPv6 say a little of their own meanwhile.
    assert 0 <= pair.egress_bytes() - before - sent < 2000


def test_a_pod_far_above_its_limit_costs_another_no_packet(compiled: CompiledPrograms) -> None:
    with limited_pairs(compiled, 2) as (flooding, other):
        nothing_lost_beside_a_flood(flooding, other)


def test_of_two_limits_each_holds_for_its_own_pod(compiled: CompiledPrograms) -> None:
    with limited_pairs(compiled, 2) as (slow, fast):
        slow.limit(egress=LIMIT)
        fast.limit(egress=10 * LIMIT)
        with (
            tcp(slow.pod, slow.host, slow.host_address, 8) as little,
            tcp(fast.pod, fast.host, fast.host_address, 8) as much,
        ):
            goes_on(little)
            goes_on(much)
            assert little.overall() < LIMIT * 1e6 * ABOVE
            assert much.overall() < 10 * LIMIT * 1e6 * ABOVE
            assert much.bytes > 2 * little.bytes
