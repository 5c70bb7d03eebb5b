"""Changes of links are heard once and together; what was lost is looked at anew."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Iterator

import pytest

from hw.model import IfIndex, IfName
from hw.monitor import RESCAN, LinkMonitor
from hw.netlink import LinkSocket
from hw.netns import open_netns
from kndsim.links import SimNetns, netns, private_host, veth_pair


@pytest.fixture(autouse=True)
def host() -> Iterator[SimNetns]:
    with private_host() as made:
        yield made


@pytest.fixture
def monitor() -> Iterator[LinkMonitor]:
    with LinkMonitor(settle=0.01, uevents=False) as made:
        yield made


async def first(monitor: LinkMonitor, seconds: float = 5) -> frozenset[IfIndex] | None:
    stream = aiter(monitor)
    try:
        return await asyncio.wait_for(anext(stream), seconds)
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


def test_links_that_come_change_move_and_go_are_heard_of(monitor: LinkMonitor) -> None:
    with veth_pair("vh0", "vp0") as (index, peer):
        assert monitor.read() == {index, peer}
        with LinkSocket(None) as links, netns() as made, open_netns(made.path) as pod:
            links.change(IfIndex(peer), name=IfName("vp1"))
            assert monitor.read() == {peer}
            links.add_address(IfIndex(index), ipaddress.ip_interface("192.0.2.1/24"))
            assert monitor.read() == {index}
            links.move(IfIndex(index), pod, name=IfName("eth0"))
            assert index in (monitor.read() or ())
    assert peer in (monitor.read() or ())
    assert monitor.read() == frozenset()


def test_events_that_come_together_are_told_together() -> None:
    async def scenario() -> None:
        with (
            LinkMonitor(settle=0.1, uevents=False) as monitor,
            veth_pair("a0", "a1") as first_pair,
            veth_pair("b0", "b1") as second_pair,
        ):
            assert await first(monitor) == {*first_pair, *second_pair}

    asyncio.run(scenario())


def test_waiting_costs_nothing_and_wakes_at_once(monitor: LinkMonitor) -> None:
    async def scenario() -> None:
        waiting = asyncio.ensure_future(first(monitor))
        before = time.process_time()
        done, _ = await asyncio.wait({waiting}, timeout=0.2)
        assert not done
        assert time.process_time() - before < 0.1
        with LinkSocket(None) as links:
            links.change(IfIndex(1), alias="wake")
        assert await waiting == {1}

    asyncio.run(scenario())


def test_an_overrun_means_look_at_everything_and_hearing_goes_on(monitor: LinkMonitor) -> None:
    """A buffer of the smallest size runs over after a few changes."""
    monitor._links.setsockopt(1, 33, 1)
    with LinkSocket(None) as links:
        for number in range(200):
            links.change(IfIndex(1), alias=f"n{number}")
        assert monitor.read() is RESCAN
        assert monitor.read() == frozenset()
        links.change(IfIndex(1), alias="after")
        assert monitor.read() == {1}


def test_other_namespaces_are_not_heard(monitor: LinkMonitor) -> None:
    with netns() as made, open_netns(made.path) as pod, LinkSocket(pod) as links:
        links.change(IfIndex(1), alias="there")
        assert monitor.read() == frozenset()


def test_uevents_can_be_listened_to() -> None:
    with LinkMonitor() as monitor:
        assert monitor._uevents is not None
        assert monitor.read() in (RESCAN, frozenset())


def test_an_event_costs_the_same_on_a_node_with_many_links(monitor: LinkMonitor, host: SimNetns) -> None:
    def fill(ipr: object) -> None:
        for number in range(100):
            ipr.link("add", ifname=f"many{number}", kind="ifb")  # type: ignore[attr-defined]

    host.netlink(fill)
    monitor.read()
    with LinkSocket(None) as links:
        links.change(IfIndex(1), alias="one")
        started = time.process_time()
        assert monitor.read() == {1}
        print(f"one event among 101 links: {(time.process_time() - started) * 1e3:.3f} ms of CPU")
