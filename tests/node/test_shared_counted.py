"""Of each kind of share each pod's bytes are its own, to the byte, both ways."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from pyroute2 import IPRoute

from kndsim.demo.devices import Devices
from kndsim.netns import in_netns
from kndsim.node import SimNode, SimPod
from kndsim.waiting import wait_until_async
from tests.node import seen_outside as seen
from tests.node.test_limited_pods import netns_of
from tests.node.test_shared_uplink import FAR, HOST, SHARED, UPLINK, played, pod_with

pytestmark = pytest.mark.timeout(300)

PAYLOAD = 1000
FRAME = 14 + 20 + 8 + PAYLOAD
ROCE = 4791
SENT = {"one": (30, 11), "two": (50, 23)}
"""Datagrams by pod: out of it and into it."""


@dataclass(frozen=True, slots=True)
class Way:
    """One kind of share. far: whom each pod talks to; config: what a claim says beside its addresses;
    prepare: in the far end's netns; at_home: in the host's."""

    policy: str
    pods: dict[str, str]
    far: dict[str, str]
    prepare: Callable[[IPRoute, int], None]
    at_home: Callable[[], None] = lambda: None
    config: dict[str, dict[str, Any]] = field(default_factory=dict)


def nothing(ipr: IPRoute, port: int) -> None:
    """The far end is on the same link."""


FAR_ROUTED = "198.18.1.1"


def routed(ipr: IPRoute, port: int) -> None:
    """Nobody answers for a pod's address: the host is its router."""
    ipr.addr("add", index=port, address=FAR_ROUTED, prefixlen=32)
    ipr.route("add", dst="198.18.1.0/24", gateway=HOST)


def route_at_home() -> None:
    """By the host's routes an ipvlan in mode l3 sends."""
    with IPRoute() as ipr:
        ipr.route("add", dst=f"{FAR_ROUTED}/32", oif=ipr.link_lookup(ifname=UPLINK)[0])


def tagged(ipr: IPRoute, port: int) -> None:
    for vlan in (120, 121):
        ipr.link("add", ifname=f"far.{vlan}", kind="vlan", link=port, vlan_id=vlan)
        (index,) = ipr.link_lookup(ifname=f"far.{vlan}")
        ipr.addr("add", index=index, address=f"198.18.{vlan}.1", prefixlen=24)
        ipr.link("set", index=index, state="up")


SAME = {"one": "198.18.0.11", "two": "198.18.0.12"}
WAYS = {
    "macvlan": Way("kind: macvlan", SAME, dict.fromkeys(SAME, FAR), nothing),
    "macvlan-private": Way("kind: macvlan\n    mode: private", SAME, dict.fromkeys(SAME, FAR), nothing),
    "ipvlan": Way("kind: ipvlan", SAME, dict.fromkeys(SAME, FAR), nothing),
    "ipvlan-l3": Way(
        "kind: ipvlan\n    mode: l3",
        {"one": "198.18.1.11", "two": "198.18.1.12"},
        dict.fromkeys(SAME, FAR_ROUTED),
        routed,
        route_at_home,
    ),
    "vlan": Way(
        'kind: vlan\n    vlans: [120, "121-129"]',
        {"one": "198.18.120.11", "two": "198.18.121.12"},
        {"one": "198.18.120.1", "two": "198.18.121.1"},
        tagged,
        config={"one": {"subinterface": {"vlan": 120}}, "two": {"subinterface": {"vlan": 121}}},
    ),
}


ALL = os.environ.get("KND_SHARE_KINDS") == "all"
"""Said where it is known that the kernel has them all: in guests (tests/vm/test_share_kinds.py)."""
CHOSEN = [name for name in WAYS if ALL or name.startswith("macvlan")]


def send(address: str, count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(count):
            sock.sendto(bytes(PAYLOAD), (address, ROCE))


def counted(sim: SimNode, pod: str, direction: str) -> float:
    labels = {"pod": pod, "direction": direction, "kind": "roce", "source": "tcx"}
    return seen.metric(sim, "knd_pod_network_bytes_total", **labels)


@pytest.mark.parametrize("way", CHOSEN)
def test_each_pods_bytes_are_its_own(way: str) -> None:
    chosen = WAYS[way]

    async def talk(sim: SimNode, made: Devices, pods: dict[str, SimPod]) -> None:
        for name, (out, back) in SENT.items():
            netns, there, here = netns_of(pods[name]), chosen.far[name], chosen.pods[name]
            await asyncio.to_thread(in_netns, netns, lambda there=there, out=out: send(there, out))
            await asyncio.to_thread(made.far.run, lambda here=here, back=back: send(here, back))
        for name, (out, back) in SENT.items():
            for direction, count in (("egress", out), ("ingress", back)):
                await wait_until_async(
                    lambda name=name, direction=direction, count=count: (
                        counted(sim, name, direction) == count * FRAME
                    ),
                    within=20.0,
                    what=f"{count} datagrams of {name}, {direction}",
                )

    async def story(sim: SimNode, made: Devices) -> None:
        port = made.far.link_index(made.wires[0].peer)
        made.far.netlink(lambda ipr: chosen.prepare(ipr, port))
        await asyncio.to_thread(in_netns, seen.HERE, chosen.at_home)
        pods = {
            name: await pod_with(sim, name, address, **chosen.config.get(name, {}))
            for name, address in chosen.pods.items()
        }
        await talk(sim, made, pods)
        for name in pods:
            assert seen.metric(sim, "knd_pod_unaccounted_bytes_total", pod=name) == 0
        for pod in pods.values():
            await sim.delete_pod(pod)
        billed = sim.knd("usage", "--by", "pod,kind", "-o", "json")
        rows = {
            (row["pod"], row["direction"]): row["bytes"]
            for row in json.loads(billed.stdout)["rows"]
            if row["kind"] == "roce"
        }
        assert rows == {
            (name, direction): count * FRAME
            for name, counts in SENT.items()
            for direction, count in zip(("egress", "ingress"), counts, strict=True)
        }

    policy = SHARED.replace("kind: macvlan", chosen.policy)
    # Also run on an emulated processor, where all takes its time.
    played(story, hook="tcx", policy=policy, request_timeout=30.0)
