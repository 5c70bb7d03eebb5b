"""Promise 1, the right sandbox: an event changes what its own sandbox has, and nothing of another."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from driver.pb.nri.v1 import api_pb2 as pb
from kndsim.demo.devices import Devices, changes, dump
from kndsim.netns import in_netns
from kndsim.node import SimNode, SimPod
from kndsim.runtime import HookOutcome, PodSpec, RuntimeMode, SimSandbox
from tests.node import seen_outside as seen
from tests.node.node_stage import claim, play, running

pytestmark = pytest.mark.timeout(120)

EVERY_MODE = pytest.mark.parametrize("mode", list(RuntimeMode))
ADDRESS = "198.18.0.2/24"
STOP, REMOVE, RUN = int(pb.STOP_POD_SANDBOX), int(pb.REMOVE_POD_SANDBOX), int(pb.RUN_POD_SANDBOX)


async def nic_pod(sim: SimNode, name: str = "p") -> SimPod:
    return await running(sim, name, name="net1", addresses=[ADDRESS])


async def recreated(sim: SimNode, pod: SimPod) -> SimPod:
    """kubelet stops the sandbox and makes another; the driver is not asked to prepare again."""
    assert pod.sandbox is not None
    await sim.runtime.stop_pod(pod.sandbox)
    return await sim.start_pod(seen.fresh(pod))


def netns_of(pod: SimPod) -> Path:
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    return pod.sandbox.netns_path


def send_frames(pod: SimPod, count: int) -> None:
    """UDP to the broadcast address: frames that need no answer from anyone."""

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.bind((ADDRESS.partition("/")[0], 0))
            for _ in range(count):
                sock.sendto(b"x" * 100, ("198.18.0.255", 9000))

    in_netns(netns_of(pod), send)


def counted(sim: SimNode, pod: SimPod) -> float:
    return seen.metric(sim, "knd_pod_network_packets_total", pod=pod.spec.name, direction="egress")


def usage(sim: SimNode, pod: SimPod) -> list[Mapping[str, Any]]:
    rows = json.loads(sim.knd("usage", "-o", "json", "--pod", pod.spec.name, "--by", "attachment").stdout)[
        "rows"
    ]
    return [row for row in rows if row["direction"] == "egress"]


@dataclass(frozen=True, slots=True)
class Living:
    """All that a living pod has of the driver, seen from outside."""

    links: Mapping[int, seen.SeenLink]
    specs: Mapping[str, bytes]
    live_files: Mapping[str, bytes]
    containers: tuple[bool, ...]


def living(sim: SimNode, pod: SimPod) -> Living:
    return Living(
        links=seen.links_in(netns_of(pod)),
        specs=seen.specs(sim),
        live_files=seen.live_files(sim),
        containers=tuple(seen.runs(container) for container in pod.containers),
    )


async def end_and_compare(sim: SimNode, pod: SimPod, sandboxes: Mapping[str, SimSandbox]) -> None:
    """Stop and Remove of every one of these, each twice, while the pod lives and counts."""
    before, packets = living(sim, pod), counted(sim, pod)
    home = dump()
    for what, sandbox in sandboxes.items():
        for event in (STOP, STOP, REMOVE, REMOVE, STOP):
            record = await sim.runtime.send_event(event, sandbox)
            assert record.outcome is HookOutcome.OK, what
            assert seen.is_attached(sim, pod), f"{record.event} of a sandbox that is {what}"
        send_frames(pod, 3)
        packets += 3
        assert counted(sim, pod) == packets, what
        assert living(sim, pod) == before, what
        assert changes(home, dump()) == [], what


@EVERY_MODE
def test_the_end_of_another_sandbox_changes_nothing_of_the_living_one(mode: RuntimeMode) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        seen.raise_peers(made.far)
        first = await nic_pod(sim)
        pod = await recreated(sim, first)
        assert first.sandbox is not None
        await sim.runtime.remove_pod(first.sandbox)

        # Replaced without a word to the agent: the runtime was restarted, and forgot what it had told.
        await sim.runtime.restart()
        await sim.runtime.wait_plugin()
        await seen.until(sim.agent.ready, "ready again")
        replaced = pod
        pod = await recreated(sim, pod)
        assert replaced.sandbox is not None

        other = replace(sim.add_pod("q", pod.claims), devices=pod.devices)
        other = await sim.run_sandbox(other)
        await seen.refused(sim, other)
        assert other.sandbox is not None

        nobody = SimSandbox(
            id=uuid.uuid4().hex, pod=pod.spec, netns_path=first.sandbox.netns_path, pid=first.sandbox.pid
        )
        stranger = PodSpec(namespace="elsewhere", name="x", uid=str(uuid.uuid4()))
        await end_and_compare(
            sim,
            pod,
            {
                "older": first.sandbox,
                "replaced": replaced.sandbox,
                "refused": other.sandbox,
                "unknown": nobody,
                "unknown, of an unknown pod": replace(nobody, id=uuid.uuid4().hex, pod=stranger),
            },
        )
        seen.never_late(sim)

    play(1, story, mode=mode)


@EVERY_MODE
def test_late_run_and_create_of_an_ended_sandbox_take_nothing_from_the_living_one(mode: RuntimeMode) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        first = await nic_pod(sim)
        pod = await recreated(sim, first)
        assert first.sandbox is not None
        before = living(sim, pod)
        for event in (RUN, int(pb.CREATE_CONTAINER), RUN):
            name = "main" if event == int(pb.CREATE_CONTAINER) else None
            # Also where its namespace is still there, as when the runtime has yet to remove it.
            for path in (None, Path(f"/proc/{pod.containers[0].pid}/ns/net")):
                record = await sim.runtime.send_event(event, first.sandbox, container=name, netns_path=path)
                assert record.outcome is HookOutcome.ERROR
        assert living(sim, pod) == before
        assert seen.is_attached(sim, pod)
        seen.never_late(sim)

    play(1, story, mode=mode)


@EVERY_MODE
def test_a_recreated_sandbox_gets_the_device_from_the_old_one(mode: RuntimeMode) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        seen.raise_peers(made.far)
        before = dump()
        first = await nic_pod(sim)
        asked = seen.prepares(sim)
        send_frames(first, 5)
        assert first.sandbox is not None
        await sim.runtime.stop_pod(first.sandbox)
        pod = await sim.start_pod(seen.fresh(first))
        assert seen.is_attached(sim, pod)
        seen.container_has(pod, pod.containers[0], "net1", ADDRESS)
        send_frames(pod, 7)
        await sim.runtime.remove_pod(first.sandbox)
        assert seen.is_attached(sim, pod)
        assert seen.prepares(sim) == asked
        await sim.delete_pod(pod)
        assert sorted(row["packets"] for row in usage(sim, pod)) == [5, 7]
        assert changes(before, dump()) == []
        seen.never_late(sim)

    play(1, story, mode=mode)


@EVERY_MODE
def test_run_twice_for_one_sandbox_is_run_once(mode: RuntimeMode) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        seen.raise_peers(made.far)
        pod = await nic_pod(sim)
        assert pod.sandbox is not None
        send_frames(pod, 2)
        before = living(sim, pod)
        for _ in range(2):
            record = await sim.runtime.send_event(RUN, pod.sandbox)
            assert record.outcome is HookOutcome.OK
        assert living(sim, pod) == before
        send_frames(pod, 1)
        assert counted(sim, pod) == 3
        await sim.delete_pod(pod)
        assert [row["packets"] for row in usage(sim, pod)] == [3]

    play(1, story, mode=mode)


@EVERY_MODE
@pytest.mark.parametrize("agent", ["up", "away"])
def test_a_pod_on_the_hosts_network_lives_and_its_containers_are_told_why_they_do_not(
    mode: RuntimeMode, agent: str
) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        wanted = sim.schedule("p", [claim("p-nic", name="net1")])
        sim.api.delete("pods", "p", "default")
        pod = await sim.prepare(sim.add_pod("h", wanted.claims, host_network=True))
        if agent == "away":
            await sim.kill_agent()
        pod = await sim.run_sandbox(pod)
        if agent == "away":
            assert (await seen.refused(sim, pod)).reason == "CreateContainerError"
            await sim.start_agent()

        async def reason() -> str:
            return (await seen.refused(sim, pod, name="sidecar", with_claims=False)).text

        await seen.until_async(reason, "network namespace|host's network")
        # The runtime asks nobody about a container whose spec is not there.
        assert "unresolvable CDI devices" in (await seen.refused(sim, pod)).text
        assert seen.specs(sim) == {}
        assert changes(before, dump()) == []
        await seen.until(
            lambda: bool(
                seen.events(sim, "HostNetwork", pod.spec.uid)
                + seen.events(sim, "BadNetworkNamespace", pod.spec.uid)
            ),
            "told on the pod",
        )
        assert pod.sandbox in sim.runtime.sandboxes
        await sim.delete_pod(pod)
        assert changes(before, dump()) == []
        seen.never_late(sim)

    play(1, story, mode=mode)
