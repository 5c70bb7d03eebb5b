"""Pods with one device each and traffic both ways, counted by the sender and held against the ledger.

Invariant: what was sent is known from the sender alone. Neighbours are static and IPv6 is off, so nothing
but the flows is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from kndsim.agent import dying_with_parent
from kndsim.demo.devices import Devices
from kndsim.netns import in_netns
from kndsim.node import REPOSITORY, SimNode, SimPod
from kndsim.traffic import Flow, encode
from tests.node.node_stage import running

IFNAME = "net1"
PAYLOAD = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A running pod whose one device is wired to the far side."""

    pod: SimPod
    device: str
    netns: Path
    number: int

    @property
    def address(self) -> str:
        return f"198.18.{self.number}.2"

    @property
    def peer_address(self) -> str:
        return f"198.18.{self.number}.1"


async def stations(sim: SimNode, made: Devices, count: int, first: int = 0) -> list[Station]:
    """So many pods, each with an interface of its own name, MTU, MAC and address."""
    return [await station(sim, made, number) for number in range(first, first + count)]


async def station(sim: SimNode, made: Devices, number: int, name: str = "") -> Station:
    pod = await running(
        sim,
        name or f"pod-{number}",
        name=IFNAME,
        mtu=1400 - number,
        hardwareAddress=f"02:00:5e:10:00:{number + 1:02x}",
        addresses=[f"198.18.{number}.2/24"],
    )
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    ((given,),) = pod.devices.values()
    made_station = Station(pod=pod, device=given.device, netns=pod.sandbox.netns_path, number=number)
    await asyncio.to_thread(_wire, made_station, made)
    return made_station


def _wire(station: Station, made: Devices) -> None:
    """Addresses at the far end and static neighbours at both: no ARP."""

    def near() -> tuple[str, int, int]:
        with IPRoute() as ipr:
            index = ipr.link_lookup(ifname=IFNAME)[0]
            (link,) = ipr.get_links(index)
            return str(link.get_attr("IFLA_ADDRESS")), int(index), int(link.get_attr("IFLA_LINK"))

    near_mac, near_index, far_index = in_netns(station.netns, near)

    def far(ipr: IPRoute) -> str:
        ipr.flush_addr(index=far_index)
        ipr.addr("add", index=far_index, address=station.peer_address, prefixlen=24)
        ipr.link("set", index=far_index, state="up")
        ipr.neigh("replace", dst=station.address, lladdr=near_mac, ifindex=far_index, state="permanent")
        return str(ipr.get_links(far_index)[0].get_attr("IFLA_ADDRESS"))

    far_mac = made.far.netlink(far)

    def answer() -> None:
        with IPRoute() as ipr:
            ipr.neigh(
                "replace", dst=station.peer_address, lladdr=far_mac, ifindex=near_index, state="permanent"
            )

    in_netns(station.netns, answer)


@dataclass(slots=True)
class Traffic:
    """Flows under way; sent is known once they have ended."""

    flows: Mapping[tuple[str, str], Flow]
    process: asyncio.subprocess.Process
    sent: dict[tuple[str, str], int] = field(default_factory=dict)
    """Bytes by pod and direction."""

    async def mark(self) -> dict[tuple[str, str], int]:
        return self._bytes(await self._ask("mark"))

    async def end(self) -> dict[tuple[str, str], int]:
        """Stop sending; bytes by pod and direction. Every frame has arrived then: veths keep no queue."""
        if not self.sent:
            self.sent = self._bytes(await self._ask("stop"))
            await self.process.wait()
        return self.sent

    def _bytes(self, answer: Mapping[str, Any]) -> dict[tuple[str, str], int]:
        frames = answer["frames"]
        return {key: frames[flow.name] * flow.frame for key, flow in self.flows.items()}

    async def _ask(self, line: str) -> Mapping[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        await self.process.stdin.drain()
        return dict(json.loads(await asyncio.wait_for(self.process.stdout.readline(), 20)))


@contextlib.asynccontextmanager
async def traffic(made: Devices, among: Sequence[Station]) -> AsyncIterator[Traffic]:
    """One flow each way for every station, from here until Traffic.end or the end of the context."""
    flows = {
        (each.pod.spec.name, direction): _flow(each, direction, made.far.path)
        for each in among
        for direction in ("egress", "ingress")
    }
    process = await asyncio.create_subprocess_exec(
        *dying_with_parent([sys.executable, "-m", "kndsim.traffic"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "ci/kind-sriov-sim")},
    )
    try:
        made_traffic = Traffic(flows, process)
        await made_traffic._ask(encode(list(flows.values())))
        yield made_traffic
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _flow(station: Station, direction: str, far: Path) -> Flow:
    out = direction == "egress"
    return Flow(
        name=f"{station.pod.spec.name}/{direction}",
        sender=station.netns if out else far,
        receiver=far if out else station.netns,
        source=station.address if out else station.peer_address,
        destination=station.peer_address if out else station.address,
        port=9000,
        dscp=0,
        payload=PAYLOAD,
    )


def counted(sim: SimNode) -> dict[tuple[str, str], int]:
    """The ledger's word: bytes by pod and direction."""
    found: dict[tuple[str, str], int] = {}
    for row in json.loads(knd(sim, "usage", "-o", "json"))["rows"]:
        key = (row["pod"], row["direction"])
        found[key] = found.get(key, 0) + int(row["bytes"])
    return found


def knd(sim: SimNode, *arguments: str) -> str:
    done = sim.knd(*arguments)
    assert done.returncode == 0, f"knd {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout
