"""Promise 1 after an absence: many pods wait for the agent, and the runtime never waits for it.

KND_MANY_PODS sets how many pods of 8 NICs wait; 100 of them take some minutes.
"""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from kndsim.demo.devices import Devices
from kndsim.netns import in_netns
from kndsim.node import SimNode, SimPod
from kndsim.runtime import ContainerFailed, HookOutcome
from tests.node import seen_outside as seen
from tests.node.node_stage import claim, play

PODS = int(os.environ.get("KND_MANY_PODS", "12"))
NICS = 8
IN_TIME = {HookOutcome.OK, HookOutcome.ERROR}
"""What the runtime makes of an answer that came within the two seconds it allows; none counts as late."""

pytestmark = pytest.mark.timeout(90 + 12 * PODS)


def complete(pod: SimPod) -> bool:
    """All its devices are up in its sandbox; by one look at one namespace."""
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    links = in_netns(pod.sandbox.netns_path, seen.links_here)
    return all(index in links and links[index].up for index in seen.indexes(pod))


async def start_all(sim: SimNode, pods: list[SimPod], seconds: float) -> float:
    """Try each pod's container in turn, as kubelets do, until all run; seconds it took."""
    began = time.monotonic()
    waiting = list(pods)
    while waiting:
        pod = waiting.pop(0)
        try:
            await sim.create_container(pod)
        except ContainerFailed:
            waiting.append(pod)
            await asyncio.sleep(0.02)
        else:
            assert await asyncio.to_thread(complete, pod), pod.spec.name
        assert time.monotonic() - began < seconds, f"{len(waiting)} pods still wait\n{sim.agent.tail()}"
    return time.monotonic() - began


def test_pods_that_waited_are_all_served_and_every_event_is_answered_in_time() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        requests = tuple(f"n{number}" for number in range(NICS))
        pods = [
            await sim.prepare(sim.schedule(f"p{n}", [claim(f"p{n}-nics", *requests)])) for n in range(PODS)
        ]
        await sim.kill_agent()
        pods = [await sim.run_sandbox(pod) for pod in pods]
        began = time.monotonic()
        sim.agent.start()
        await sim.runtime.wait_plugin(20.0 + 0.5 * PODS)
        connected = time.monotonic()
        (peer,) = sim.runtime.plugins
        first = len(sim.runtime.log)
        took = await start_all(sim, pods, 10.0 + 3.0 * PODS)
        answers = sim.runtime.log[first:]
        assert {each.outcome for each in answers} <= IN_TIME
        slowest = max(each.seconds for each in answers)
        print(
            f"{PODS} pods x {NICS} NICs: connected after {connected - began:.2f} s, all running {took:.2f} s "
            f"later; {len(answers)} events, slowest answer {slowest * 1000:.0f} ms"
        )
        assert list(sim.runtime.plugins) == [peer]
        assert sim.agent.ready()
        await remove_all(sim, pods)
        assert {each.outcome for each in sim.runtime.log[first:]} <= IN_TIME
        assert list(sim.runtime.plugins) == [peer]

    play(PODS * NICS, story, agent_flags=(f"--slots={max(512, PODS * NICS)}",))


async def remove_all(sim: SimNode, pods: list[SimPod]) -> None:
    for pod in pods:
        await sim.delete_pod(pod)
    at_home = await asyncio.to_thread(seen.links_at_home)
    assert {index for pod in pods for index in seen.indexes(pod)} <= set(at_home)
    assert not any(at_home[index].up for pod in pods for index in seen.indexes(pod))
