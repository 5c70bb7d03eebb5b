"""Promise 1 with the kernel, the disk or the API server stalled: an answer in time, and the right end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from driver.pb.nri.v1 import api_pb2 as pb
from driver.plan import Act
from kndsim.agent import AGENT
from kndsim.demo.devices import Devices, changes, dump
from kndsim.netns import create_netns, delete_netns
from kndsim.node import SimNode, SimPod
from kndsim.runtime import ContainerFailed, HookOutcome, RuntimeMode, SandboxFailed, SimSandbox
from tests.node import seen_outside as seen
from tests.node.node_stage import claim, play, running

pytestmark = pytest.mark.timeout(120)

STALLING = (sys.executable, "-m", "tests.node.stalling_agent", AGENT[-1])
ADDRESS = "198.18.0.2/24"
PATIENCE = 1.2
"""Seconds after which the runtime gives up: less than the usual 2, to be done sooner."""
STOP_WITHIN = 0.75
"""Seconds: half a second for the devices, and what a busy machine adds; less than the deadline."""

OUTWARD = (Act.ZERO_SLOT, Act.MOVE_IN, Act.ADDRESS, Act.UP)
HOMEWARD = (Act.DOWN, Act.FOLD, Act.STRIP, Act.MOVE_HOME, Act.RESTORE, Act.VERIFY)


@contextlib.asynccontextmanager
async def stalled(sim: SimNode, name: str) -> AsyncIterator[None]:
    """Hold an act of the agent while the body runs."""
    folder = sim.root / "stall"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.reached").unlink(missing_ok=True)
    (folder / name).touch()
    try:
        yield
        assert (folder / f"{name}.reached").exists(), f"{name} was never begun"
    finally:
        (folder / name).unlink()


async def prepared(sim: SimNode, name: str) -> SimPod:
    return await sim.prepare(sim.schedule(name, [claim(f"{name}-nic", name="net1", addresses=[ADDRESS])]))


def answered_in_time(sim: SimNode) -> None:
    seen.never_late(sim)
    slow = [each for each in sim.runtime.log if each.seconds >= PATIENCE]
    assert slow == []
    assert len(sim.runtime.plugins) == 1
    assert list(sim.runtime.violations) == []


def journal_of(sim: SimNode) -> list[tuple[str, str | None]]:
    """State and sandbox of every preparation, as the journal has them."""
    rows = json.loads(sim.knd("pods", "-o", "json").stdout)
    return [(row["state"], row["sandbox"]) for row in rows.get("rows", rows)]


async def finish(sim: SimNode, pod: SimPod, made: Devices, before: object) -> None:
    """After the stall: the pod runs, in its newest sandbox alone; when it goes the device is as before."""
    pod = await sim.start_pod(pod)
    assert pod.sandbox is not None
    assert seen.is_attached(sim, pod)
    seen.container_has(pod, pod.containers[0], "net1", ADDRESS)
    await seen.until(
        lambda: journal_of(sim) == [("attached", pod.sandbox.id[:12])] if pod.sandbox else False, "one"
    )
    assert len(seen.live_files(sim)) == len(seen.specs(sim)) == 1
    (cookies,) = seen.live_files(sim).values()
    assert len(cookies.splitlines()) == 1
    await sim.delete_pod(pod)
    await seen.until(lambda: changes(before, dump()) == [], "home as before")  # type: ignore[arg-type]
    assert journal_of(sim) == []
    assert seen.specs(sim) == seen.live_files(sim) == {}


@pytest.mark.parametrize("name", [*(act.value for act in OUTWARD), "move-in.after", "link-up.after"])
def test_an_attach_that_stalls_is_refused_in_time_and_ends_in_the_new_sandbox(name: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await prepared(sim, "p")
        async with stalled(sim, name):
            for _ in range(2):
                # The runtime sends Stop and Remove of the sandbox that failed, and kubelet tries again.
                await seen.sandbox_refused(sim, pod)
            assert [each for each in sim.runtime.log if each.outcome is HookOutcome.ERROR]
            assert seen.specs(sim) == {}
        await finish(sim, pod, made, before)
        answered_in_time(sim)

    play(1, story, entry=STALLING, request_timeout=PATIENCE)


@pytest.mark.parametrize("name", [*(act.value for act in HOMEWARD), "move-home.after"])
def test_a_detach_that_stalls_holds_up_neither_the_stop_nor_what_comes_after(name: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await running(sim, "p", name="net1", addresses=[ADDRESS])
        old = pod.sandbox
        assert old is not None
        async with stalled(sim, name):
            await sim.runtime.stop_pod(old)
            assert sim.runtime.log[-1].seconds < STOP_WITHIN
            assert seen.specs(sim) == {}
            await seen.sandbox_refused(sim, seen.fresh(pod))
            await sim.runtime.remove_pod(old)
        await finish(sim, seen.fresh(pod), made, before)
        answered_in_time(sim)

    play(1, story, entry=STALLING, request_timeout=PATIENCE)


@pytest.mark.parametrize("name", [Act.MOVE_IN.value, Act.UP.value, "link-up.after"])
def test_an_attach_that_was_called_failed_is_undone_though_no_stop_follows(name: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await prepared(sim, "p")
        path = sim.root / "var/run/netns/forgotten"
        create_netns(path)
        try:
            sandbox = SimSandbox(id=uuid.uuid4().hex, pod=pod.spec, netns_path=path, pid=0)
            async with stalled(sim, name):
                record = await sim.runtime.send_event(int(pb.RUN_POD_SANDBOX), sandbox)
                assert record.outcome is HookOutcome.ERROR
            await seen.until(lambda: changes(before, dump()) == [], "home as before")
            await seen.until(lambda: journal_of(sim) == [("prepared", None)], "closed")
            assert {link.name for link in seen.links_in(path).values()} == {"lo"}
            assert seen.specs(sim) == seen.live_files(sim) == {}
            await finish(sim, pod, made, before)
        finally:
            delete_netns(path)
        answered_in_time(sim)

    play(1, story, entry=STALLING, request_timeout=PATIENCE)


@pytest.mark.parametrize("mode", [RuntimeMode.STATE_CHANGE, RuntimeMode.CRIO])
def test_the_other_runtimes_see_no_timeout_either(mode: RuntimeMode) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await prepared(sim, "p")
        async with stalled(sim, Act.MOVE_IN.value):
            await seen.sandbox_refused(sim, pod)
        pod = await sim.start_pod(pod)
        assert pod.sandbox is not None
        async with stalled(sim, Act.MOVE_HOME.value):
            await sim.runtime.stop_pod(pod.sandbox)
            await seen.sandbox_refused(sim, seen.fresh(pod))
        await finish(sim, seen.fresh(pod), made, before)
        answered_in_time(sim)

    play(1, story, mode=mode, entry=STALLING, request_timeout=PATIENCE)


def test_a_container_waits_while_a_late_attach_stalls() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await prepared(sim, "p")
        await sim.kill_agent()
        pod = await sim.run_sandbox(pod)
        async with stalled(sim, Act.UP.value):
            await sim.start_agent()
            await seen.until((sim.root / "stall/link-up.reached").exists, "stalled")
            for name in ("main", "sidecar"):
                assert await seen.refused(sim, pod, name=name, with_claims=name == "main")
            assert seen.specs(sim) == {}
        await finish(sim, pod, made, before)
        answered_in_time(sim)

    play(1, story, entry=STALLING, request_timeout=PATIENCE)


def test_a_stalled_disk_is_an_error_in_time_and_other_pods_do_not_feel_it() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await prepared(sim, "p")
        bystander = sim.add_pod("b", [], namespace="elsewhere")
        neighbour = sim.add_pod("n", [])
        async with stalled(sim, "put-attachment"):
            failing = asyncio.create_task(seen.sandbox_refused(sim, pod))
            await failing
            for other in (bystander, neighbour):
                began = time.monotonic()
                other = await sim.create_container(await sim.run_sandbox(other), "main")
                assert time.monotonic() - began < 1.0
            assert sim.agent.get("/metrics")[0] == 200
        await finish(sim, pod, made, before)
        answered_in_time(sim)

    play(1, story, entry=STALLING, request_timeout=PATIENCE)


# --- the API server -----------------------------------------------------------------------------------


def break_pods(sim: SimNode, how: str) -> None:
    """Watches that are open say nothing more; a GET of a pod fails, or is not answered in time."""
    sim.api.hang_watches()
    if how == "failing":
        sim.api.fail(503, times=10_000, verb="get", resource="pods")
    else:
        sim.api.delay(60.0, times=10_000, verb="get", resource="pods")


@pytest.mark.parametrize("how", ["failing", "slow"])
def test_while_pods_cannot_be_known_the_unknown_wait_where_a_claim_could_be_theirs(how: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        first = await running(sim, "p", name="net1", addresses=[ADDRESS])
        break_pods(sim, how)
        unknown = sim.add_pod("u", [])
        # It names the claim of the first, and nobody can know: kubelet had the claim prepared long ago.
        second = sim.add_pod("q", first.claims)
        elsewhere = sim.add_pod("e", [], namespace="elsewhere")
        claimant = await prepared(sim, "c")

        started = await sim.create_container(await sim.run_sandbox(elsewhere), "main")
        assert seen.runs(started.containers[0])
        assert all(each.seconds < 0.5 for each in sim.runtime.log[-2:])

        waiting = [await sim.run_sandbox(pod) for pod in (unknown, second, claimant)]
        for pod in waiting:
            for with_claims in (True, False):
                failure = await seen.refused(sim, pod, with_claims=with_claims)
                assert failure.reason == "CreateContainerError"
        assert len(sim.runtime.plugins) == 1
        # A pod that was known before goes on as it was, and so do its new containers.
        await sim.create_container(first, "restarted")

        asked = [each.name for each in sim.api.requests("get", "pods")]
        assert set(asked) >= {"u", "q"}
        if how == "slow":
            assert sorted(asked) == sorted(set(asked)), "a retry waits for the request that is under way"

        sim.api.clear_faults()
        unknown, second, claimant = waiting
        unknown = await eventually_created(sim, unknown)
        assert "KND" not in " ".join(unknown.containers[0].env)
        claimant = await eventually_created(sim, claimant)
        seen.container_has(claimant, claimant.containers[0], "net1", ADDRESS)
        assert "p" in (await seen.refused(sim, second)).text
        assert seen.is_attached(sim, first)
        answered_in_time(sim)

    play(2, story)


async def eventually_created(sim: SimNode, pod: SimPod) -> SimPod:
    for _ in range(100):
        with contextlib.suppress(ContainerFailed, SandboxFailed):
            return await sim.create_container(pod)
        await asyncio.sleep(0.1)
    raise AssertionError(f"no container of {pod.spec.name} started\n{sim.agent.tail()}")
