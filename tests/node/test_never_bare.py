"""Promise 1 with the agent away: a container that names a claim waits for its NIC; what ran bare is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kndsim.demo.devices import Devices
from kndsim.node import SimNode, SimPod
from kndsim.runtime import HookOutcome, RuntimeMode
from tests.node import seen_outside as seen
from tests.node.node_stage import claim, play, running

pytestmark = pytest.mark.timeout(120)

ADDRESS = "198.18.0.2/24"


async def go_away(sim: SimNode, how: str) -> None:
    if how == "killed":
        await sim.kill_agent()
    else:
        assert await sim.stop_agent() == 0


async def nic_pod(sim: SimNode, name: str = "p") -> SimPod:
    return await running(sim, name, name="net1", addresses=[ADDRESS])


async def recreated(sim: SimNode, pod: SimPod) -> SimPod:
    """The sandbox dies and kubelet makes another, without asking the driver; physical devices come home."""
    assert pod.sandbox is not None
    seen.send_home(pod.sandbox, seen.indexes(pod))
    await sim.runtime.stop_pod(pod.sandbox)
    await sim.runtime.remove_pod(pod.sandbox)
    return await sim.run_sandbox(seen.fresh(pod))


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("stopped", RuntimeMode.POD_RPC),
        ("killed", RuntimeMode.POD_RPC),
        ("killed", RuntimeMode.STATE_CHANGE),
        ("killed", RuntimeMode.CRIO),
    ],
)
def test_a_sandbox_made_while_the_agent_was_away_starts_nothing_before_it_is_attached(
    how: str, mode: RuntimeMode
) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        first = await nic_pod(sim)
        asked = seen.prepares(sim)
        await go_away(sim, how)
        pod = await recreated(sim, first)
        assert seen.specs(sim), "the old sandbox's spec is still there: the hook alone holds the container"
        for _ in range(3):
            failure = await seen.refused(sim, pod)
            assert failure.reason == "StartError"
            assert "knd-netns-check" in failure.text
        assert sim.runtime.log[-1].outcome is HookOutcome.ABSENT
        await sim.start_agent()
        await seen.until_attached(sim, pod)
        pod = await sim.start_pod(pod)
        seen.container_has(pod, pod.containers[0], "net1", ADDRESS)
        assert seen.prepares(sim) == asked
        assert seen.events(sim, "RanWithoutDevices", pod.spec.uid) == []
        seen.never_late(sim)

    play(1, story, mode=mode)


def test_a_second_pod_on_an_exclusive_claim_waits_for_the_first_whether_the_agent_is_there_or_not() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        first = await nic_pod(sim)
        await sim.kill_agent()
        second = replace(sim.add_pod("q", first.claims), devices=first.devices)
        second = await sim.run_sandbox(second)
        assert (await seen.refused(sim, second)).reason == "StartError"

        # In the sandbox that is attached a container may be restarted: its spec and cookie are right.
        await sim.runtime.stop_container(first.containers[0])
        first = await sim.create_container(replace(first, containers=()), "main")
        seen.container_has(first, first.containers[0], "net1", ADDRESS)

        await sim.start_agent()
        await seen.until(lambda: bool(seen.events(sim, "DeviceInUse", second.spec.uid)), "told why")
        for name in ("main", "sidecar"):
            failure = await seen.refused(sim, second, name=name, with_claims=name == "main")
            assert "p" in failure.text
        assert seen.is_attached(sim, first)
        assert seen.runs(first.containers[0])

        await sim.kubelet.prepare(sim.driver, second.claims, pod=second.spec.uid)
        await sim.delete_pod(first, keep_claims=True)
        second = await sim.start_pod(second)
        seen.container_has(second, second.containers[0], "net1", ADDRESS)
        seen.never_late(sim)

    play(1, story)


def test_what_ran_bare_while_the_agent_was_away_is_told_once_and_counted() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        pod = await sim.prepare(sim.schedule("p", [claim("p-nic", name="net1", addresses=[ADDRESS])]))
        await sim.kill_agent()
        pod = await sim.run_sandbox(pod)
        assert (await seen.refused(sim, pod)).reason == "CreateContainerError"
        pod = await sim.create_container(pod, "sidecar", with_claims=False)
        pod = await sim.create_container(pod, "logger", with_claims=False)
        assert all(seen.runs(each) for each in pod.containers), "nothing can hold these back"

        await sim.start_agent()
        await seen.until_attached(sim, pod)
        bystanders = len(pod.containers)
        pod = await sim.start_pod(pod, containers=("sidecar", "logger", "main"))
        assert len(pod.containers) == bystanders + 1
        seen.container_has(pod, pod.containers[-1], "net1", ADDRESS)
        await seen.until(lambda: bool(seen.events(sim, "RanWithoutDevices", pod.spec.uid)), "told")
        assert seen.metric(sim, "knd_bare_containers_total") == 2

        # Neither a reconnect nor a restart tells it again.
        await sim.runtime.drop_plugins()
        await sim.runtime.wait_plugin()
        await seen.until(sim.agent.ready, "ready again")
        await sim.kill_agent()
        await sim.start_agent()
        await seen.until_attached(sim, pod)
        assert seen.metric(sim, "knd_bare_containers_total") == 0
        (event,) = seen.events(sim, "RanWithoutDevices", pod.spec.uid)
        assert event.get("count", 1) == 1
        assert "sidecar" in event["message"]
        assert "logger" in event["message"]
        assert event["involvedObject"]["kind"] == "Pod"
        seen.never_late(sim)

    play(1, story)
