"""Traffic goes into and out of a device while its pod is taken down, the agent is killed at each point of it,
and scrapes go on: an account is what the device counted, and nothing is twice or the next pod's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pyroute2 import IPRoute

from kndsim.netns import in_netns, in_thread
from kndsim.node import SimNode, SimPod
from tests.node import seen_outside as seen
from tests.node.crash_stage import (
    ADDRESS,
    CLAIMED,
    FAR,
    Stage,
    devices_that_survive,
    killed,
    point_of,
    stage,
)
from tests.node.floods import FRAME, Flood, flowing, sink, socket_to_send_by
from tests.node.node_stage import devices, running

pytestmark = pytest.mark.timeout(200)

FAR_MAC = "02:00:5e:00:00:fe"
AT = (
    *("link-down", "take-limits-off", "fold-counters", "move-home", "disarm-programs"),
    *("fold", "advance_attachments detaching", "close_attachment", "close_preparation"),
)
"""What lies between the first and the last of a pod's bytes, and what gives its slot away."""


@dataclass(slots=True)
class Scrapes:
    """One after the other, whether or not an agent answers: the most that was shown, by pod and direction."""

    sim: SimNode
    most: dict[tuple[str, str], float] = field(default_factory=dict)
    less: list[str] = field(default_factory=list)
    done: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.wait(0.01):
            # In between there is no agent.
            with contextlib.suppress(OSError):
                status, text = self.sim.agent.get("/metrics")
                if status == 200:
                    self._note(text)

    def _note(self, text: str) -> None:
        self.done += 1
        for family in text_string_to_metric_families(text):
            if family.name != "knd_pod_network_bytes":
                continue
            sums: dict[tuple[str, str], float] = {}
            for sample in family.samples:
                key = (sample.labels["pod"], sample.labels["direction"])
                sums[key] = sums.get(key, 0.0) + sample.value
            for key, value in sums.items():
                if value < self.most.get(key, 0.0):
                    self.less.append(f"{key}: {value} after {self.most[key]}")
                self.most[key] = value

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


class Line:
    """Pods that have the one device after each other, with traffic both ways until each is gone."""

    def __init__(self, on: Stage) -> None:
        self.on = on
        self.pods = 0
        self.totals: dict[tuple[str, str], int] = {}
        peer = on.made.wires[0].peer

        def set_up(ipr: IPRoute) -> None:
            index = ipr.link_lookup(ifname=peer)[0]
            ipr.link("set", index=index, address=FAR_MAC)
            ipr.addr("add", index=index, address=FAR, prefixlen=24)
            mac = CLAIMED["hardwareAddress"]
            ipr.neigh("replace", dst=ADDRESS, lladdr=mac, ifindex=index, state="permanent")

        on.made.far.netlink(set_up)

    def statistics(self) -> dict[str, int]:
        """What the device at home has counted in its life."""

        def look() -> dict[str, int]:
            with IPRoute() as ipr:
                (index,) = ipr.link_lookup(ifname=self.on.made.wires[0].device)
                return dict(ipr.get_links(index)[0].get_attr("IFLA_STATS64"))

        return in_thread(look)

    async def life(self) -> None:
        """One pod, from before it comes until everything is as before, and its account."""
        self.pods += 1
        name = f"p{self.pods}"
        before = await asyncio.to_thread(self.statistics)
        pod = await running(self.on.sim, name, addresses=[f"{ADDRESS}/24"], **CLAIMED)
        out, into = await asyncio.to_thread(self.floods, pod)
        with flowing([out, into]):
            for direction in ("egress", "ingress"):
                await self.shown(name, direction)
            await self.on.delete(pod)
            await self.on.within(self.on.leftovers, "when the pod was gone")
        after = await asyncio.to_thread(self.statistics)
        counted = {way: size for way, (size, _) in self.on.counted()[name].items()}
        assert counted["ingress"] == after["rx_bytes"] - before["rx_bytes"] > 0, f"{name}: {counted}"
        # While the link goes down, the kernel takes what the pod sends and gives it to no device.
        assert counted["egress"] == out.sent * FRAME >= after["tx_bytes"] - before["tx_bytes"] > 0, name
        self.totals |= {(name, way): size for way, size in counted.items()}

    async def shown(self, name: str, direction: str) -> None:
        labels = {"pod": name, "direction": direction}
        series = "knd_pod_network_bytes_total"
        await seen.until(
            lambda: seen.metric(self.on.sim, series, **labels) > 10 * FRAME, f"{direction} of {name} counted"
        )

    def floods(self, pod: SimPod) -> tuple[Flood, Flood]:
        assert pod.sandbox is not None
        assert pod.sandbox.netns_path is not None

        def inside() -> tuple[socket.socket, socket.socket]:
            with IPRoute() as ipr:
                index = ipr.link_lookup(ifname="net1")[0]
                ipr.neigh("replace", dst=FAR, lladdr=FAR_MAC, ifindex=index, state="permanent")
            return socket_to_send_by(), sink()

        far, (sender, receiver) = self.on.made.far, in_netns(pod.sandbox.netns_path, inside)
        # Where nobody listened, each datagram would be answered.
        return Flood(sender, FAR, far.run(sink)), Flood(far.run(socket_to_send_by), ADDRESS, receiver)


def deaths(lines: Sequence[str]) -> list[str]:
    """The points to be killed at, of a life without a death."""
    begin = next(number for number, line in enumerate(lines) if "advance_attachments detaching" in line)
    return [line for line in dict.fromkeys(lines[begin:]) if point_of(line)[1] in AT]


def test_nothing_is_lost_or_twice_or_the_next_pods_wherever_the_agent_dies_on_the_way_home(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    async def run() -> None:
        async with stage(made, "tcx", short_tmp) as on:
            line, scrapes = Line(on), Scrapes(on.sim)
            with scrapes.going_on():
                points = deaths(await killed(on, line.life))
                assert {point_of(each)[1] for each in points} == set(AT)
                for each in points:
                    await killed(on, line.life, each)
                await line.life()
            assert on.deaths >= len(points)
            assert scrapes.less == []
            over = {key: most for key, most in scrapes.most.items() if most > line.totals[key]}
            assert over == {}
            print(f"{len(points)} points, {line.pods} pods, {scrapes.done} scrapes")

    with devices(1) as made, devices_that_survive(monkeypatch):
        asyncio.run(run())
