"""A claim's limits, through the whole agent: kept in the pod, told, and gone with the pod without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from kndsim.demo.devices import Devices, changes, dump
from kndsim.netns import in_netns
from kndsim.node import ClaimSpec, SimNode, SimPod, interface
from kndsim.runtime import RuntimeMode
from kndsim.waiting import wait_until_async
from tests.node import seen_outside as seen
from tests.node.departing_pod import asking, kept_by
from tests.node.node_stage import devices, node, play

pytestmark = pytest.mark.timeout(120)

FRAME = 1442
LIMITS = {"egress": {"rate": "100M"}, "ingress": {"rate": "200M"}}


async def limited(sim: SimNode, name: str, qos: dict[str, Any]) -> SimPod:
    parameters = interface(name="net1", addresses=["198.18.0.2/24"]) | {"qos": qos}
    return await sim.start_pod(
        sim.schedule(name, [ClaimSpec(name=f"{name}-nic", parameters={"": parameters})])
    )


def netns_of(pod: SimPod) -> Path:
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    return pod.sandbox.netns_path


def ceilings(netns: Path) -> dict[str, int]:
    """The rate of the root class of each link that has one, in Mb/s."""

    def look() -> dict[str, int]:
        with IPRoute() as ipr:
            found = {}
            for link in ipr.get_links():
                for each in ipr.get_classes(index=link["index"]):
                    if each["parent"] == 0xFFFFFFFF:
                        values = each.get_attr("TCA_OPTIONS").get_attr("TCA_HTB_PARMS")
                        found[link.get_attr("IFLA_IFNAME")] = values["ceil"] // 125_000
            return found

    return in_netns(netns, look)


async def told(sim: SimNode, claim: str) -> str:
    (status,) = await wait_until_async(
        lambda: sim.api.claim("default", claim)["status"].get("devices"), what="the claim's status"
    )
    return str(status["conditions"][0]["message"])


@pytest.mark.parametrize("hook", ["tcx", "clsact"])
def test_limits_are_kept_in_the_pod_told_in_the_status_and_gone_with_the_pod(hook: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await limited(sim, "p", LIMITS)
        netns = netns_of(pod)
        kept = await asyncio.to_thread(ceilings, netns)
        assert kept.pop("net1") == 100
        # The other link is what comes in waits in.
        assert list(kept.values()) == [200]
        message = await told(sim, "p-nic")
        assert (
            "egress at most 100 Mb/s (htb, cooperative); ingress at most 200 Mb/s (ifb, cooperative)"
            in message
        )
        await sim.kill_agent()
        assert await asyncio.to_thread(ceilings, netns) == {"net1": 100} | kept
        await sim.start_agent()
        await sim.delete_pod(pod)
        assert changes(before, dump()) == []

    play(1, story, hook=hook)


def test_a_runtime_that_takes_the_netns_first_leaves_nothing_behind_either() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        await sim.delete_pod(await limited(sim, "p", LIMITS))
        assert changes(before, dump()) == []

    play(1, story, mode=RuntimeMode.CRIO)


def test_the_next_tenant_of_a_device_has_nothing_of_the_limits_of_the_last() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        await sim.delete_pod(await limited(sim, "first", LIMITS))
        second = await limited(sim, "second", {"enforcement": "software"})
        assert await asyncio.to_thread(ceilings, netns_of(second)) == {}
        assert "at most" not in await told(sim, "second-nic")

    play(1, story)


def test_a_new_policy_changes_limits_at_once_and_loses_no_count() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await limited(sim, "p", {"egress": {"rate": "100M"}})
        netns = netns_of(pod)
        with flood(netns) as sent:
            sim.policy_file.write_text(made.policy + "podLimits: {egress: 40M, ingress: 30M}\n")
            await wait_until_async(
                lambda: sorted(ceilings(netns).values()) == [30, 40], within=20.0, what="the new limits"
            )
            assert await asyncio.to_thread(seen.metric, sim, "knd_pod_network_limit_bits_per_second") == 7e7
            sim.policy_file.write_text(made.policy)
            await wait_until_async(
                lambda: ceilings(netns) == {"net1": 100}, within=20.0, what="the claim's own limit"
            )
        await wait_until_async(
            lambda: "egress at most 100 Mb/s" in status_of(sim, "p-nic"), within=20.0, what="its status"
        )
        labels = {"pod": "p", "direction": "egress", "kind": "ip"}
        counted = await asyncio.to_thread(seen.metric, sim, "knd_pod_network_bytes_total", **labels)
        # The rest is what IPv6 says for itself, in packets of a hundred bytes.
        assert 0 <= counted - len(sent) * FRAME < FRAME * 10

    play(1, story)


def test_a_pod_that_takes_its_limit_off_does_not_get_far_and_is_told_on() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await limited(sim, "p", {"egress": {"rate": "1M"}})
        netns = netns_of(pod)
        with flood(netns):
            await asyncio.to_thread(in_netns, netns, take_the_qdisc_off)
            await wait_until_async(
                lambda: seen.events(sim, "LimitRemoved", pod.spec.uid), within=20.0, what="an event"
            )
            await wait_until_async(lambda: ceilings(netns) == {"net1": 1}, within=20.0, what="the limit")
        assert await asyncio.to_thread(seen.metric, sim, "knd_pod_network_dropped_packets_total") > 0

    play(1, story)


def test_what_a_limit_dropped_is_in_the_ledger_when_the_pod_is_gone() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        # A queue is in use where there is a carrier.
        seen.raise_peers(made.far)
        pod = await limited(sim, "p", {"egress": {"rate": "1M"}})
        other = await limited(sim, "q", {"egress": {"rate": "1M"}})
        with flood(netns_of(pod)):
            await wait_until_async(
                lambda: seen.metric(sim, "knd_pod_network_dropped_packets_total") > 0,
                within=20.0,
                what="drops by the program",
            )
        shown = await asyncio.to_thread(seen.metric, sim, "knd_pod_network_dropped_packets_total")
        await sim.delete_pod(pod)
        await sim.delete_pod(other)
        rows = json.loads(sim.knd("usage", "--counters", "-o", "json").stdout)
        dropped = {
            (row["pod"], row["counter"]): row["total"] for row in rows["rows"] if row["source"] == "limits"
        }
        assert dropped.keys() == {("p", "tx_policed"), ("p", "tx_queue_dropped")}
        assert dropped["p", "tx_policed"] == shown
        assert rows["gaps"] == []

    play(2, story)


def test_times_of_departure_are_kept_by_htb_and_it_is_said_where_there_is_no_fq() -> None:
    async def story(made: Devices) -> None:
        async with node(made) as sim:
            kind = await kept_by(sim, made, 20.0)
            said = "limits are kept by htb on this node" in sim.agent.tail(1000)
            assert said == (kind == "htb")

    with devices(1) as made:
        asyncio.run(story(asking(made)))


def status_of(sim: SimNode, claim: str) -> str:
    devices = sim.api.claim("default", claim)["status"].get("devices") or [{"conditions": [{"message": ""}]}]
    return str(devices[0]["conditions"][0]["message"])


def take_the_qdisc_off() -> None:
    with IPRoute() as ipr:
        ipr.tc("del", index=ipr.link_lookup(ifname="net1")[0], parent=0xFFFFFFFF)


@contextlib.contextmanager
def flood(netns: Path) -> Iterator[list[int]]:
    """Datagrams to nowhere in particular, some ten megabits a second; yields their sizes."""
    stop = threading.Event()

    def open_socket() -> socket.socket:
        with IPRoute() as ipr:
            index = ipr.link_lookup(ifname="net1")[0]
            ipr.neigh(
                "replace", dst="198.18.0.1", lladdr="02:00:5e:00:00:01", ifindex=index, state="permanent"
            )
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    sender = in_netns(netns, open_socket)
    sent: list[int] = []

    def send() -> None:
        while not stop.wait(0.001):
            sent.append(sender.sendto(bytes(FRAME - 42), ("198.18.0.1", 9)))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        stop.set()
        thread.join()
        sender.close()
