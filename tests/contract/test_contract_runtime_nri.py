"""How a container runtime treats an NRI plugin: registration, a pod's life, refusals, silence, restarts."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from driver.pb.nri.v1 import api_pb2 as pb
from kndsim.waiting import wait_until_async as until
from tests.contract.conftest import Opened
from tests.contract.nri_probe import Probe
from tests.contract.runtime_forms import Pod, Refused, RuntimePeer, new_name

Case = Callable[[RuntimePeer], Coroutine[Any, Any, None]]


def play(runtime: Opened, case: Case, seconds: float = 50.0) -> None:
    async def whole() -> None:
        async with asyncio.timeout(seconds), runtime() as peer:
            await case(peer)

    asyncio.run(whole())


async def synchronized(probe: Probe, times: int = 1) -> None:
    await until(lambda: len(probe.inventories) >= times, 10.0, "the plugin was synchronized")


def named(probe: Probe) -> set[str]:
    """Names of the pods of the last inventory."""
    return {pod.name for pod in probe.inventories[-1][0]}


def paths(pod: pb.PodSandbox) -> list[str]:
    """Of its network namespace: one, or none."""
    return [each.path for each in pod.linux.namespaces if each.type == "network"]


async def gone(peer: RuntimePeer, *pods: Pod) -> None:
    for pod in pods:
        await peer.stop(pod)
        await peer.remove(pod)


def test_a_plugin_is_configured_with_names_versions_and_timeouts_and_then_synchronized(
    runtime: Opened,
) -> None:
    async def case(peer: RuntimePeer) -> None:
        async with Probe().connected(peer.socket) as probe:
            await synchronized(probe)
            assert probe.registered is not None
            assert (await probe.registered).code == 0
        (told,) = probe.configured
        assert told.runtime_name == "containerd"
        assert told.runtime_version
        assert (told.registration_timeout, told.request_timeout) == (5000, 2000)
        assert bool(told.NRI_version) == peer.pod_calls
        assert probe.inventories == [([], [])]

    play(runtime, case)


@pytest.mark.parametrize(
    ("index", "name"), [("1", "probe"), ("100", "probe"), ("ab", "probe"), ("", "probe"), ("10", "")]
)
def test_a_plugin_with_a_bad_index_or_no_name_is_refused_with_words(
    runtime: Opened, index: str, name: str
) -> None:
    async def case(peer: RuntimePeer) -> None:
        async with Probe().connected(peer.socket, index=index, name=name) as probe:
            assert probe.registered is not None
            answer = await asyncio.wait_for(probe.registered, 8.0)
            assert answer.code == 2
            assert re.match(r"invalid .*plugin (index|name)", answer.text)
            assert probe.configured == []

    play(runtime, case)


@pytest.mark.parametrize("events", [0x4000, 0x8000, -1])
def test_a_plugin_that_asks_for_events_that_there_are_not_is_dropped(runtime: Opened, events: int) -> None:
    async def case(peer: RuntimePeer) -> None:
        async with Probe(events=events).connected(peer.socket) as probe:
            await asyncio.wait_for(probe.closed.wait(), 8.0)
            assert probe.inventories == []

    play(runtime, case)


def test_a_silent_connection_ends_after_the_registration_timeout_and_holds_the_next_up(
    runtime: Opened,
) -> None:
    async def case(peer: RuntimePeer) -> None:
        began = time.monotonic()
        silent, second = Probe(), Probe()
        async with silent.connected(peer.socket, register=False), second.connected(peer.socket):
            await synchronized(second)
            assert time.monotonic() - began > 4.0
            await asyncio.wait_for(silent.closed.wait(), 3.0)

    play(runtime, case)


def test_a_pods_life_is_told_in_order_with_its_netns_until_it_is_removed(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe(look=peer.netns_there)
        async with probe.connected(peer.socket):
            await synchronized(probe)
            pod = await peer.run(new_name())
            await peer.container(pod, "main")
            await gone(peer, pod)
            await until(lambda: "remove" in probe.of(pod.id))
        assert probe.of(pod.id) == ["run", "create", "stop", "remove"]
        run, create, stop, remove = (each for each in probe.told if each.pod.id == pod.id)
        via = [each.via for each in (run, stop, remove)]
        calls = ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"]
        assert via == (calls if peer.pod_calls else ["StateChange"] * 3)
        assert (create.via, create.container) == ("CreateContainer", "main")
        assert [each.there for each in (run, create, stop, remove)] == [True, True, True, False]
        assert run.netns.startswith("/")
        assert create.netns == run.netns
        assert (run.pod.name, run.pod.uid, run.pod.namespace) == (pod.name, pod.uid, "contract")
        assert run.pod.pid > 0
        assert remove.pod.id == pod.id
        assert remove.netns == ""

    play(runtime, case)


def test_a_stop_says_which_netns_it_was(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe()
        async with probe.connected(peer.socket):
            await synchronized(probe)
            pod = await peer.run(new_name())
            await gone(peer, pod)
        run, stop, _ = probe.told
        assert stop.netns == run.netns
        assert list(run.pod.ips) == list(stop.pod.ips)
        assert run.pod.ips

    play(runtime, case)


def test_a_plugin_that_has_no_calls_for_pods_is_told_by_state_change(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe(without={"RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"})
        async with probe.connected(peer.socket):
            await synchronized(probe)
            pod = await peer.run(new_name())
            await gone(peer, pod)
        assert probe.of(pod.id) == ["run", "stop", "remove"]
        assert {each.via for each in probe.told} == {"StateChange"}

    play(runtime, case)


def test_events_that_were_not_asked_for_are_not_told(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe(events=0x2)
        async with probe.connected(peer.socket):
            await synchronized(probe)
            pod = await peer.run(new_name())
            await peer.container(pod, "main")
            await gone(peer, pod)
        assert probe.of(pod.id) == ["stop"]

    play(runtime, case)


def test_an_inventory_lists_pods_and_their_containers(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        pod, stopped = await peer.run(new_name()), await peer.run(new_name())
        container = await peer.container(pod, "main")
        await peer.stop(stopped)
        async with Probe(look=peer.netns_there).connected(peer.socket) as probe:
            await synchronized(probe)
        pods, containers = probe.inventories[0]
        assert {each.id for each in pods} == {pod.id, stopped.id}
        assert [(each.id, each.pod_sandbox_id, each.name) for each in containers] == [
            (container, pod.id, "main")
        ]
        (listed,) = (each for each in pods if each.id == pod.id)
        assert listed.uid == pod.uid
        assert [peer.netns_there(path) for path in paths(listed)] == [True]
        await gone(peer, pod, stopped)

    play(runtime, case)


def test_a_refused_pod_is_stopped_and_removed_and_its_words_reach_the_caller(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe(refuse={"run": "the device is on its way home"})
        async with probe.connected(peer.socket):
            await synchronized(probe)
            before = await peer.pods()
            name = new_name()
            with pytest.raises(Refused, match="the device is on its way home"):
                await peer.run(name)
            assert [each.kind for each in probe.told] == ["run", "stop", "remove"]
            assert len({each.pod.id for each in probe.told}) == 1
            assert await peer.pods() == before
            probe.refuse.clear()
            pod = await peer.run(name)
            assert pod.id != probe.told[0].pod.id
            assert probe.of(pod.id) == ["run"]
            await gone(peer, pod)

    play(runtime, case)


def test_a_refused_container_leaves_its_pod_and_may_come_again(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe(refuse={"create": "not attached"})
        async with probe.connected(peer.socket):
            await synchronized(probe)
            pod = await peer.run(new_name())
            with pytest.raises(Refused, match="not attached"):
                await peer.container(pod, "main")
            probe.refuse.clear()
            await peer.container(pod, "main")
            assert probe.of(pod.id) == ["run", "create", "create"]
            await gone(peer, pod)

    play(runtime, case)


def test_a_plugin_that_refuses_a_stop_or_a_removal_is_not_heard(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe(refuse={"stop": "no", "remove": "no"})
        async with probe.connected(peer.socket):
            await synchronized(probe)
            pod = await peer.run(new_name())
            await gone(peer, pod)
            assert probe.of(pod.id) == ["run", "stop", "remove"]
            assert pod.id not in await peer.pods()

    play(runtime, case)


def test_a_plugin_that_is_too_late_is_dropped_and_the_pod_runs_without_it(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe(silent={"run"})
        async with probe.connected(peer.socket):
            await synchronized(probe)
            began = time.monotonic()
            pod = await peer.run(new_name())
            assert time.monotonic() - began > 1.9
            await asyncio.wait_for(probe.closed.wait(), 5.0)
            await peer.container(pod, "main")
            assert probe.of(pod.id) == ["run"]
        async with Probe().connected(peer.socket) as again:
            await synchronized(again)
            assert pod.name in named(again)
            await gone(peer, pod)
            assert again.of(pod.id) == ["stop", "remove"]

    play(runtime, case)


def test_what_happens_while_no_plugin_is_connected_is_never_told(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe()
        async with probe.connected(peer.socket):
            await synchronized(probe)
            first, second = await peer.run(new_name()), await peer.run(new_name())
        await peer.stop(first)
        async with probe.connected(peer.socket):
            await synchronized(probe, 2)
            assert {first.name, second.name} <= named(probe)
            await peer.remove(first)
            await gone(peer, second)
        assert probe.of(first.id) == ["run", "remove"]
        assert probe.of(second.id) == ["run", "stop", "remove"]

    play(runtime, case)


def test_after_a_restart_old_pods_are_listed_and_their_end_is_not_told(runtime: Opened) -> None:
    async def case(peer: RuntimePeer) -> None:
        probe = Probe()
        async with probe.connected(peer.socket):
            await synchronized(probe)
            old = await peer.run(new_name())
            container = await peer.container(old, "main")
            await peer.restart()
            await asyncio.wait_for(probe.closed.wait(), 5.0)
        async with probe.connected(peer.socket):
            await synchronized(probe, 2)
            pods, containers = probe.inventories[-1]
            # containerd 2.1 also brings back sandboxes that it had refused, without a netns.
            alive = [each.id for each in pods if any(map(peer.netns_there, paths(each)))]
            assert alive == [old.id]
            assert container in [each.id for each in containers]
            young = await peer.run(new_name())
            await gone(peer, old, young)
        assert probe.of(old.id) == ["run", "create"]
        assert probe.of(young.id) == ["run", "stop", "remove"]

    play(runtime, case)


@pytest.mark.timeout(240)
@pytest.mark.since("1.37", "containerd 2.1 does not start again: its refused sandboxes keep their names")
def test_a_pod_that_was_refused_200_times_does_not_keep_the_runtime_from_starting(runtime: Opened) -> None:
    async def refused(peer: RuntimePeer, name: str, times: int) -> None:
        for _ in range(times):
            with pytest.raises(Refused, match="not yet"):
                await peer.run(name)

    async def case(peer: RuntimePeer) -> None:
        async with Probe(refuse={"run": "not yet"}).connected(peer.socket) as probe:
            await synchronized(probe)
            names = [new_name() for _ in range(4)]
            await asyncio.gather(*(refused(peer, name, 50) for name in names))
            await comes_up_again(peer)

    play(runtime, case, 200.0)


@pytest.mark.timeout(240)
def test_a_pod_whose_container_was_refused_200_times_does_not_keep_the_runtime_from_starting(
    runtime: Opened,
) -> None:
    async def case(peer: RuntimePeer) -> None:
        async with Probe(refuse={"create": "not attached"}).connected(peer.socket) as probe:
            await synchronized(probe)
            pod = await peer.run(new_name())
            for _ in range(200):
                with pytest.raises(Refused, match="not attached"):
                    await peer.container(pod, "main")
            await gone(peer, pod)
            await comes_up_again(peer)

    play(runtime, case, 200.0)


async def comes_up_again(peer: RuntimePeer) -> None:
    await peer.restart()
    async with Probe().connected(peer.socket) as probe:
        await synchronized(probe)
        assert await peer.pods() == set()
        await gone(peer, await peer.run(new_name()))
