"""A pod with NET_ADMIN works at its interface while it floods both ways: the count goes on to the byte, its
limit is back at once and told, and meanwhile it has at most a quarter more."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from bpf import sys as bpf
from kndsim.demo.devices import Devices
from kndsim.links import SimNetns, netns
from kndsim.netns import in_netns
from kndsim.node import ClaimSpec, SimNode, SimPod, interface
from tests.node import seen_outside as seen
from tests.node.floods import FRAME, Flood, flowing, sink, socket_to_send_by
from tests.node.node_stage import play

pytestmark = pytest.mark.timeout(180)

LIMIT = 2
"""Mb/s each way; several times as much is sent."""
POD, FAR = "198.18.0.2", "198.18.0.1"
MAC, FAR_MAC = "02:00:5e:10:00:01", "02:00:5e:00:00:01"
DSCP, CLASS = 34, "media"
"""What the kernel says for itself is in another class."""
ROOT, OURS = 0xFFFFFFFF, 0x4B4E0000
PASS_XDP = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Scene:
    """The pod, its device's index in it, the far end, and both floods."""

    sim: SimNode
    pod: SimPod
    index: int
    far: SimNetns
    out: Flood
    into: Flood

    @property
    def netns(self) -> Path:
        assert self.pod.sandbox is not None
        assert self.pod.sandbox.netns_path is not None
        return self.pod.sandbox.netns_path

    async def inside(self, deed: Callable[[IPRoute, int], None]) -> None:
        def act() -> None:
            with IPRoute() as ipr:
                deed(ipr, self.index)

        await asyncio.to_thread(in_netns, self.netns, act)

    def counted(self, direction: str, what: str = "packets") -> float:
        labels = {"pod": "p", "direction": direction, "class": CLASS, "kind": "ip"}
        return seen.metric(self.sim, f"knd_pod_network_{what}_total", **labels)

    def told(self) -> float:
        return seen.metric(self.sim, "knd_events_total", reason="LimitRemoved")

    async def lifted(self, deed: Callable[[IPRoute, int], None]) -> None:
        """Done from inside, and told and put back from outside."""
        told = await asyncio.to_thread(self.told)
        await self.inside(deed)
        await seen.until(
            lambda: self.told() > told, f"an event after {deed.__name__}\n{self.sim.agent.tail()}"
        )
        await seen.until(lambda: self.ceilings() == [LIMIT] * 2, f"the limits after {deed.__name__}")
        arrived = self.into.arrived
        await seen.until(lambda: self.into.arrived > arrived, f"what comes in to go on after {deed.__name__}")

    async def goes_on(self, deed: Callable[[IPRoute, int], None]) -> None:
        """Done from inside, while both ways are counted."""
        await self.inside(deed)
        for direction in ("egress", "ingress"):
            counted = await asyncio.to_thread(self.counted, direction)
            await self.grows(direction, counted + 50, deed.__name__)

    async def grows(self, direction: str, beyond: float, after: str) -> None:
        await seen.until(lambda: self.counted(direction) > beyond, f"{direction} counted after {after}")

    def ceilings(self) -> list[int]:
        """The rates of all root classes, Mb/s."""

        def look() -> list[int]:
            with IPRoute() as ipr:
                classes = [
                    each
                    for link in ipr.get_links()
                    if link["flags"] & 1
                    for each in ipr.get_classes(index=link["index"])
                ]
            values = [
                each.get_attr("TCA_OPTIONS").get_attr("TCA_HTB_PARMS")
                for each in classes
                if each["parent"] == ROOT
            ]
            return [each["ceil"] // 125_000 for each in values]

        return in_netns(self.netns, look)


@contextlib.asynccontextmanager
async def flooded(sim: SimNode, made: Devices) -> AsyncIterator[Scene]:
    """A limited pod, and far more than its limit both ways."""
    seen.raise_peers(made.far)
    parameters = interface(name="net1", addresses=[f"{POD}/24"], hardwareAddress=MAC)
    rate = {"rate": f"{LIMIT}M"}
    qos = {"qos": {"egress": rate, "ingress": rate}}
    claim = ClaimSpec(name="p-nic", parameters={"": parameters | qos})
    pod = await sim.start_pod(sim.schedule("p", [claim]))
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    path = pod.sandbox.netns_path
    peer = made.wires[0].peer
    made.far.netlink(lambda ipr: address(ipr, peer))
    neighbours(made.far, path, peer)
    out = Flood(in_netns(path, lambda: socket_to_send_by(DSCP)), FAR, made.far.run(sink))
    into = Flood(made.far.run(lambda: socket_to_send_by(DSCP)), POD, in_netns(path, sink))
    with flowing([out, into]):
        yield Scene(sim, pod, seen.indexes(pod)[0], made.far, out, into)


def address(ipr: IPRoute, name: str) -> None:
    index = ipr.link_lookup(ifname=name)[0]
    ipr.link("set", index=index, address=FAR_MAC)
    ipr.addr("add", index=index, address=FAR, prefixlen=24)


def neighbours(far: SimNetns, pod: Path, peer: str) -> None:
    """Static at both ends: no frame is asked for or lost for one."""

    def work(name: str, address: str, mac: str) -> None:
        with IPRoute() as ipr:
            index = ipr.link_lookup(ifname=name)[0]
            ipr.neigh("replace", dst=address, lladdr=mac, ifindex=index, state="permanent")

    far.run(lambda: work(peer, POD, MAC))
    in_netns(pod, lambda: work("net1", FAR, FAR_MAC))


# --- what a pod does to its limit -------------------------------------------------------------------


def detour(ipr: IPRoute) -> tuple[int, str]:
    (found,) = (
        link
        for link in ipr.get_links()
        if (info := link.get_attr("IFLA_LINKINFO")) and info.get_attr("IFLA_INFO_KIND") == "ifb"
    )
    return int(found["index"]), str(found.get_attr("IFLA_IFNAME"))


def qdisc_off(ipr: IPRoute, index: int) -> None:
    ipr.tc("del", index=index, parent=ROOT)


def another_qdisc_under_our_number(ipr: IPRoute, index: int) -> None:
    ipr.tc("del", index=index, parent=ROOT)
    ipr.tc("add", "pfifo", index=index, handle=OURS, limit=1000)


def higher_classes(ipr: IPRoute, index: int) -> None:
    for each in ipr.get_classes(index=index):
        parent = OURS | 1 if each["parent"] != ROOT else ROOT
        ipr.tc("change-class", "htb", index, each["handle"], parent=parent, rate="900mbit", ceil="900mbit")


def queue_of_the_detour_off(ipr: IPRoute, index: int) -> None:
    ipr.tc("del", index=detour(ipr)[0], parent=ROOT)


def detour_gone(ipr: IPRoute, index: int) -> None:
    ipr.link("del", index=detour(ipr)[0])


def detour_down(ipr: IPRoute, index: int) -> None:
    ipr.link("set", index=detour(ipr)[0], state="down")


def another_link_in_its_place(ipr: IPRoute, index: int) -> None:
    number, name = detour(ipr)
    ipr.link("del", index=number)
    ipr.link("add", ifname=name, kind="bridge", index=number)


LIFTING = (
    qdisc_off,
    another_qdisc_under_our_number,
    higher_classes,
    queue_of_the_detour_off,
    detour_gone,
    detour_down,
    another_link_in_its_place,
)


def test_what_a_pod_does_to_its_queues_is_put_back_and_told_and_gains_it_a_quarter_at_most() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        async with flooded(sim, made) as scene:
            await seen.until(lambda: bool(scene.out.arrived and scene.into.arrived), "traffic both ways")
            before = [(flood, flood.arrived) for flood in (scene.out, scene.into)]
            began = time.monotonic()
            for deed in LIFTING:
                await scene.lifted(deed)
            took = time.monotonic() - began
            for flood, was in before:
                most = LIMIT * 125_000 * 1.25 * took + BURST
                assert 0 < flood.arrived - was < most, f"in {took:.1f} s, to {flood.to}"
            assert scene.out.sent * FRAME > 2 * scene.out.arrived, "more was to be sent than the limit"
            await stands_still(scene)
            assert await asyncio.to_thread(scene.counted, "egress") == scene.out.sent

    play(1, story)


BURST = 1 << 20
"""Bytes that may come at once on top: what the backstops let through, and what a queue holds."""


async def stands_still(scene: Scene) -> None:
    """Nothing is sent any more, and all that was is counted."""
    for flood in (scene.out, scene.into):
        flood.stop.set()
    last = -1.0

    def still() -> bool:
        nonlocal last
        now = scene.counted("egress") + scene.counted("ingress")
        same, last = now == last, now
        return same

    await seen.until(still, "the counters to stand still")


# --- what a pod does to the interface ---------------------------------------------------------------


def everything_but_traffic(ipr: IPRoute, index: int) -> None:
    """Settings, a name, an address, filters, things on top, a program in front."""
    ipr.link("set", index=index, txqlen=0, gso_max_size=65536)
    ipr.link("set", index=index, state="down")
    ipr.link("set", index=index, ifname="mine", address="02:66:66:66:66:66")
    ipr.link("set", index=index, state="up", address=MAC)
    ipr.tc("add", "clsact", index=index)
    for parent in (0xFFFFFFF2, 0xFFFFFFF3):
        ipr.tc("add-filter", "u32", index, parent=parent, target=0x10020, keys=["0x0/0x0+0"], protocol=0x0003)
    for name, kind, fields in (
        ("child", "macvlan", {"link": index, "macvlan_mode": "bridge"}),
        ("br0", "bridge", {}),
    ):
        ipr.link("add", ifname=name, kind=kind, **fields)
        ipr.link("set", index=ipr.link_lookup(ifname=name)[0], state="up")
    ipr.neigh("replace", dst=FAR, lladdr=FAR_MAC, ifindex=index, state="permanent")


def xdp_in_front(ipr: IPRoute, index: int) -> None:
    with bpf.prog_load(bpf.ProgramType.XDP, PASS_XDP, name="tenant") as program:
        ipr.link("set", index=index, xdp={"attrs": [("IFLA_XDP_FD", program.fd), ("IFLA_XDP_FLAGS", 2)]})


def bridged(ipr: IPRoute, index: int) -> None:
    ipr.link("del", index=ipr.link_lookup(ifname="child")[0])
    ipr.link("set", index=index, master=ipr.link_lookup(ifname="br0")[0])


def test_nothing_that_a_pod_does_to_its_interface_stops_the_count_or_lifts_its_limit() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        async with flooded(sim, made) as scene:
            await seen.until(lambda: bool(scene.out.arrived and scene.into.arrived), "traffic both ways")
            began, was = time.monotonic(), scene.out.arrived
            for deed in (everything_but_traffic, xdp_in_front, bridged):
                await scene.goes_on(deed)
            took = time.monotonic() - began
            assert 0 < scene.out.arrived - was < LIMIT * 125_000 * 1.25 * took + BURST
            await stands_still(scene)
            assert await asyncio.to_thread(scene.counted, "egress") == scene.out.sent
            assert await asyncio.to_thread(all_that_came_in, scene) == statistics(scene)["rx_bytes"]
            assert await asyncio.to_thread(scene.told) == 0

    play(1, story)


def all_that_came_in(scene: Scene) -> float:
    return seen.metric(scene.sim, "knd_pod_network_bytes_total", pod="p", direction="ingress")


def statistics(scene: Scene) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        with IPRoute() as ipr:
            return dict(ipr.get_links(scene.index)[0].get_attr("IFLA_STATS64"))

    return in_netns(scene.netns, look)


def test_a_device_that_its_pod_moved_on_is_limited_and_counted_there_and_told() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        async with flooded(sim, made) as scene:
            await seen.until(lambda: bool(scene.out.arrived and scene.into.arrived), "traffic both ways")
            with netns() as nested:

                def move(ipr: IPRoute, index: int) -> None:
                    ipr.link("set", index=index, net_ns_fd=nested.fd)

                await scene.inside(move)
                with frames_from(nested, scene.index) as flood:
                    counted = await asyncio.to_thread(scene.counted, "egress")
                    await seen.until(lambda: scene.told() > 0, "an event")
                    await seen.until(lambda: scene.counted("egress") > counted, "the count to go on")
                    dropped = "knd_pod_network_dropped_packets_total"
                    await seen.until(lambda: seen.metric(sim, dropped, direction="egress") > 0, "what is cut")
                    assert flood.sent > 0

    play(1, story)


@contextlib.contextmanager
def frames_from(where: SimNetns, index: int) -> Iterator[Flood]:
    """A flood out of a link of that namespace."""

    def set_up(ipr: IPRoute) -> None:
        ipr.link("set", index=index, state="up")
        ipr.addr("add", index=index, address=POD, prefixlen=24)
        ipr.neigh("replace", dst=FAR, lladdr=FAR_MAC, ifindex=index, state="permanent")

    where.netlink(set_up)
    flood = Flood(where.run(lambda: socket_to_send_by(DSCP)), FAR)
    with flowing([flood]):
        yield flood
