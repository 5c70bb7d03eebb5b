"""A device that is given out in parts: each pod has its own interface, its own limit and its own account, and
the device stays the host's."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from hw.subinterface import FIRST_INDEX
from kndsim.demo.devices import Devices, changes, disable_ipv6, dump, make_veths
from kndsim.kubelet import PrepareFailed
from kndsim.netns import in_netns, in_thread
from kndsim.node import ClaimSpec, SimNode, SimPod, interface
from kndsim.runtime import RuntimeMode
from kndsim.waiting import wait_until_async
from tests.kernel.bpf_traffic import ARP_FRAME
from tests.node import seen_outside as seen
from tests.node.bypass import by_packet_socket
from tests.node.node_stage import node
from tests.node.test_limited_pods import ceilings, netns_of, told

pytestmark = pytest.mark.timeout(240)

UPLINK = "port0"
START = 300.0
"""Seconds that a start may take where the programs must be compiled first, on an emulated processor."""
SHARED = """\
shared:
  - match: {interfaces: [port0]}
    kind: macvlan
    bandwidth: 1G
    shares: 4
    request: {default: 100M, minimum: 50M, maximum: 800M, step: 50M}
"""
FAR = "198.18.0.1"
HOST = "198.18.0.9"


@contextlib.contextmanager
def uplink() -> Iterator[Devices]:
    """One port that the host uses: up, with an address, wired to somebody who answers."""
    with make_veths(1) as made:
        in_thread(disable_ipv6)
        in_thread(lambda: use(UPLINK, HOST))
        made.far.run(lambda: use(made.wires[0].peer, FAR))
        yield made


def remove_uplink() -> None:
    with IPRoute() as ipr:
        ipr.link("del", index=ipr.link_lookup(ifname=UPLINK)[0])


def use(name: str, address: str) -> None:
    with IPRoute() as ipr:
        (index,) = ipr.link_lookup(ifname=name)
        ipr.addr("add", index=index, address=address, prefixlen=24)
        ipr.link("set", index=index, state="up")


def played(
    story: Callable[[SimNode, Devices], Awaitable[None]],
    *,
    policy: str = SHARED,
    lasting: bool = True,
    **options: Any,
) -> None:
    """lasting: the uplink is there to the end, as it was."""

    async def run(made: Devices) -> None:
        shared = replace(made, policy=made.policy + policy)
        before = dump()
        async with node(shared, start=False, **options) as sim:
            await sim.start_agent(seconds=START)
            await story(sim, made)
            assert list(sim.runtime.violations) == []
        assert not lasting or changes(before, dump()) == []

    with uplink() as made:
        asyncio.run(run(made))


def asking(name: str, address: str, amount: str | None = None, **more: Any) -> ClaimSpec:
    """Of a claim of a part of the device; amount None: it says nothing of it."""
    parameters = interface(name="net1", addresses=[f"{address}/24"]) | more
    amounts = {"net": {"bandwidth": amount}} if amount is not None else {}
    return ClaimSpec(name=f"{name}-nic", parameters={"": parameters}, amounts=amounts)


async def pod_with(sim: SimNode, name: str, address: str, amount: str | None = None, **more: Any) -> SimPod:
    return await sim.start_pod(sim.schedule(name, [asking(name, address, amount, **more)]))


async def stop(sim: SimNode, pod: SimPod) -> None:
    """The sandbox alone, as when it died: the claim stays prepared."""
    assert pod.sandbox is not None
    await sim.runtime.stop_pod(pod.sandbox)


def inside(pod: SimPod) -> dict[str, tuple[str, ...]]:
    """Addresses by name of what the pod has beside its loopback."""
    links = seen.links_in(netns_of(pod))
    return {link.name: link.addresses for link in links.values() if link.name not in ("lo", "eth0")}


def made_at_home() -> list[int]:
    return [index for index in seen.links_at_home() if index >= FIRST_INDEX]


def answers(netns: Path, address: str) -> bool:
    """Whether a TCP question is answered, if only with a refusal: there is a way there and back."""

    def ask() -> bool:
        with socket.socket() as sock:
            sock.settimeout(5.0)
            try:
                sock.connect((address, 9))
            except ConnectionRefusedError:
                return True
            except OSError:
                return False
            return True

    return in_netns(netns, ask)


@pytest.mark.parametrize(
    ("hook", "mode"),
    [("tcx", RuntimeMode.POD_RPC), ("clsact", RuntimeMode.POD_RPC), ("tcx", RuntimeMode.CRIO)],
    ids=str,
)
def test_pods_share_an_uplink_that_the_host_goes_on_using(hook: str, mode: RuntimeMode) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        one = await pod_with(sim, "one", "198.18.0.11", "480M")
        two = await pod_with(sim, "two", "198.18.0.12")
        for pod, address, limit in ((one, "198.18.0.11", 500), (two, "198.18.0.12", 100)):
            assert inside(pod)["net1"] == (f"{address}/24",)
            kept = await asyncio.to_thread(ceilings, netns_of(pod))
            assert kept["net1"] == limit, "what was asked for, rounded up to the policy's step"
            assert sorted(kept.values()) == [limit, limit], "both ways"
            assert await asyncio.to_thread(answers, netns_of(pod), FAR)
        assert await asyncio.to_thread(answers, netns_of(one), "198.18.0.12"), "on one uplink, in bridge mode"
        assert await asyncio.to_thread(answers, seen.HERE, FAR), "the host's own"
        await asyncio.gather(sim.delete_pod(one), sim.delete_pod(two))
        assert made_at_home() == []

    played(story, hook=hook, mode=mode)


def test_what_passes_the_hooks_by_is_told_of_the_pod_whose_share_it_left_by() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        one = await pod_with(sim, "one", "198.18.0.11")
        two = await pod_with(sim, "two", "198.18.0.12")

        def past(pod: str) -> float:
            labels = {"pod": pod, "direction": "egress"}
            return seen.metric(sim, "knd_pod_unaccounted_packets_total", **labels)

        await asyncio.to_thread(in_netns, netns_of(one), lambda: by_packet_socket("net1", ARP_FRAME, 300))
        await wait_until_async(lambda: past("one") >= 300, within=90.0, what="what passed by")
        # Devices are looked at every half minute, in their pods first, and from outside from then on.
        await asyncio.to_thread(in_netns, netns_of(one), lambda: by_packet_socket("net1", ARP_FRAME, 300))
        await wait_until_async(lambda: past("one") >= 600, within=90.0, what="what passed by later")
        assert past("two") == 0
        await asyncio.gather(sim.delete_pod(one), sim.delete_pod(two))

    played(story)


def test_what_a_pod_makes_on_the_device_underneath_is_removed_and_told() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await pod_with(sim, "one", "198.18.0.11")

        def make_past() -> None:
            with IPRoute() as ipr:
                (share,) = ipr.link_lookup(ifname="net1")
                ipr.link("add", ifname="past0", kind="macvlan", link=share, macvlan_mode="bridge")

        await asyncio.to_thread(in_netns, netns_of(pod), make_past)
        assert "past0" in inside(pod)
        await wait_until_async(lambda: "past0" not in inside(pod), within=60.0, what="its end")
        assert "net1" in inside(pod)
        (event,) = await wait_until_async(
            lambda: seen.events(sim, "LimitRemoved", pod.spec.uid), what="an event of it"
        )
        assert "macvlan 'past0', made from inside of the pod" in event["message"]
        await sim.delete_pod(pod)

    played(story)


@pytest.mark.parametrize("away", [False, True], ids=["seen", "while-no-agent-ran"])
def test_containers_of_a_pod_whose_uplink_is_gone_are_refused(away: bool) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await pod_with(sim, "one", "198.18.0.11")
        assert len(seen.specs(sim)) == 1
        if away:
            await sim.kill_agent()
        await asyncio.to_thread(in_netns, seen.HERE, remove_uplink)
        if away:
            await sim.start_agent()
        await wait_until_async(lambda: not seen.specs(sim), within=20.0, what="its spec is withdrawn")
        await seen.refused(sim, pod, name="again")
        await sim.delete_pod(pod)

    played(story, lasting=False)


def test_the_status_says_which_share_it_is_and_what_keeps_it_to_its_size() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await pod_with(sim, "one", "198.18.0.11", "200M")
        message = await told(sim, "one-nic")
        assert "net1 in pod one" in message
        assert "egress at most 200 Mb/s (htb, cooperative); ingress at most 200 Mb/s (ifb, coop" in message
        claim = sim.api.claim("default", "one-nic")["status"]
        (allocated,), (status,) = claim["allocation"]["devices"]["results"], claim["devices"]
        assert (status["device"], status["shareID"]) == (allocated["device"], allocated["shareID"])
        await sim.delete_pod(pod)

    played(story)


def test_a_share_outlives_the_agent_and_a_sandbox_that_is_made_anew() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await pod_with(sim, "one", "198.18.0.11", "200M")
        before = inside(pod)
        await sim.kill_agent()
        assert await asyncio.to_thread(answers, netns_of(pod), FAR)
        await sim.start_agent()
        assert inside(pod) == before
        await stop(sim, pod)
        again = await sim.start_pod(seen.fresh(pod))
        assert inside(again)["net1"] == before["net1"]
        assert await asyncio.to_thread(ceilings, netns_of(again)) | {"net1": 200}
        assert await asyncio.to_thread(answers, netns_of(again), FAR)
        await sim.delete_pod(again)

    played(story)


def test_an_interface_that_its_pod_deleted_is_made_anew_for_the_next_sandbox() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await pod_with(sim, "one", "198.18.0.11")

        def delete() -> None:
            with IPRoute() as ipr:
                (index,) = ipr.link_lookup(ifname="net1")
                ipr.link("del", index=index)

        await asyncio.to_thread(in_netns, netns_of(pod), delete)
        await stop(sim, pod)
        again = await sim.start_pod(seen.fresh(pod))
        assert inside(again)["net1"] == ("198.18.0.11/24",)
        assert await asyncio.to_thread(answers, netns_of(again), FAR)
        await sim.delete_pod(again)

    played(story)


def test_no_more_is_given_out_than_the_policy_says_whatever_was_allocated() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pods = [await pod_with(sim, "one", "198.18.0.11", "800M")]
        with pytest.raises(LookupError):
            sim.schedule("more", [asking("more", "198.18.0.12", "300M")])
        late = sim.schedule("late", [asking("late", "198.18.0.13", "200M")])

        def oversold(obj: dict[str, Any]) -> dict[str, Any]:
            obj["status"]["allocation"]["devices"]["results"][0]["consumedCapacity"]["bandwidth"] = "250M"
            return obj

        sim.api.edit("resourceclaims", "late-nic", oversold, "default")
        with pytest.raises(PrepareFailed, match="gives out 1G, claims have 800M of that, and 250M more"):
            await sim.prepare(late)
        await sim.delete_pod(pods.pop())
        await sim.delete_pod(await sim.start_pod(late))

    played(story)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"qos": {"egress": {"rate": "300M"}}}, r"qos\.egress\.rate: 300M is above 200M, what the claim has"),
        ({"qos": {"ingress": {"rate": "1G"}}}, r"qos\.ingress\.rate: 1000M is above 200M"),
        ({"subinterface": {"vlan": 7}}, r"subinterface\.vlan: .*a macvlan of it has no VLAN id"),
        ({"vf": {"trust": False}}, r"vf\.trust: .* is no VF"),
        ({"qos": {"enforcement": "hardware"}}, r"qos\.enforcement: .* is no VF"),
        ({"rdma": {"nccl": True}}, r"rdma: .* is given out in parts, and none of them has an RDMA device"),
    ],
)
def test_what_a_share_cannot_be_is_refused_with_its_field(more: dict[str, Any], words: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = sim.schedule("one", [asking("one", "198.18.0.11", "200M", **more)])
        with pytest.raises(PrepareFailed, match=words):
            await sim.prepare(pod)
        assert made_at_home() == []

    played(story)


def test_a_claim_may_lower_its_own_limits() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        qos = {"egress": {"rate": "60M"}}
        pod = await pod_with(sim, "one", "198.18.0.11", "200M", qos=qos)
        kept = await asyncio.to_thread(ceilings, netns_of(pod))
        assert kept["net1"] == 60
        assert sorted(kept.values()) == [60, 200]
        await sim.delete_pod(pod)

    played(story)


def test_a_share_at_home_that_no_record_tells_of_is_ended() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await sim.prepare(sim.schedule("one", [asking("one", "198.18.0.11", "300M")]))
        assert len(made_at_home()) == 1
        given = {"port": pod.devices[pod.claims[0].uid][0].device, "part": "given"}
        gauge = "knd_port_bandwidth_bits_per_second"
        assert await asyncio.to_thread(lambda: seen.metric(sim, gauge, **given)) == 3e8
        await sim.kill_agent()
        for path in (sim.root / "var/lib/knd").glob("journal*"):
            path.unlink()
        shutil.rmtree(sim.root / "run/knd")
        await sim.start_agent()
        await wait_until_async(lambda: made_at_home() == [], within=20.0, what="its end")
        await sim.delete_pod(pod)
        await sim.delete_pod(await pod_with(sim, "two", "198.18.0.12"))

    played(story)


def test_a_claim_that_is_taken_back_before_its_pod_came_leaves_nothing() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await sim.prepare(sim.schedule("one", [asking("one", "198.18.0.11")]))
        (index,) = made_at_home()
        assert not seen.links_at_home()[index].up
        await sim.kill_agent()
        await sim.start_agent()
        assert made_at_home() == [index]
        await sim.delete_pod(pod)
        assert made_at_home() == []

    played(story)
