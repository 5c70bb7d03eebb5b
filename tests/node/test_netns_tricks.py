"""What stands where a pod's network namespace should: refused or undone; device and host as before."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from driver.pb.nri.v1 import api_pb2 as pb
from kndsim.demo.devices import Devices, changes, dump
from kndsim.netns import create_netns, delete_netns, pin_own_netns
from kndsim.node import SimNode, SimPod, unmount
from kndsim.runtime import ContainerFailed, HookOutcome, RuntimeMode, SandboxFailed, SimSandbox
from tests.node import seen_outside as seen
from tests.node.node_stage import claim, play

pytestmark = pytest.mark.timeout(120)

CLONE_NEWPID, MS_BIND = 0x20000000, 0x1000
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def plain_file(path: Path) -> Iterator[None]:
    path.write_text("not a namespace")
    yield


@contextlib.contextmanager
def fifo(path: Path) -> Iterator[None]:
    os.mkfifo(path)
    yield


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    path.mkdir()
    yield


@contextlib.contextmanager
def other_namespace(path: Path) -> Iterator[None]:
    """A pid namespace, which is an nsfs file too."""
    path.touch()
    assert _libc.mount(b"/proc/self/ns/pid", os.fsencode(path), None, MS_BIND, None) == 0
    try:
        yield
    finally:
        unmount(path)


@contextlib.contextmanager
def dangling(path: Path) -> Iterator[None]:
    path.symlink_to(path.parent / "nothing-here")
    yield


@contextlib.contextmanager
def the_hosts_own(path: Path) -> Iterator[None]:
    pin_own_netns(path)
    try:
        yield
    finally:
        delete_netns(path)


REFUSED: dict[str, tuple[Callable[[Path], contextlib.AbstractContextManager[None]], str]] = {
    "plain-file": (plain_file, "is not a namespace"),
    "fifo": (fifo, "is not a namespace"),
    "folder": (folder, "is not a namespace"),
    "pid-namespace": (other_namespace, "not a network namespace"),
    "the-hosts-own": (the_hosts_own, "no device is moved for it"),
}


def told(sim: SimNode, uid: str) -> bool:
    return bool(seen.events(sim, "BadNetworkNamespace", uid))


async def prepared(sim: SimNode, name: str, **fields: object) -> SimPod:
    return await sim.prepare(sim.schedule(name, [claim(f"{name}-nic", name="net1", **fields)]))


def test_a_path_that_is_no_namespace_of_a_pod_is_refused_and_the_next_sandbox_is_served() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        for name, (make, reason) in REFUSED.items():
            pod = await prepared(sim, name)
            path = sim.root / name
            with make(path):
                sandbox = SimSandbox(id=uuid.uuid4().hex, pod=pod.spec, netns_path=path, pid=0)
                hook = await sim.runtime.send_event(pb.RUN_POD_SANDBOX, sandbox, netns_path=path)
                assert hook.outcome is HookOutcome.OK, (
                    "it will be refused again: no reason to fail the sandbox"
                )
                hook = await sim.runtime.send_event(
                    pb.CREATE_CONTAINER, sandbox, container="main", netns_path=path
                )
                assert hook.outcome is HookOutcome.ERROR
                assert reason in hook.detail
                assert changes(before, dump()) == []
                assert seen.specs(sim) == {}
                await seen.until(lambda uid=pod.spec.uid: told(sim, uid), "an event says why")  # type: ignore[misc]
                await sim.runtime.send_event(pb.STOP_POD_SANDBOX, sandbox, netns_path=path)
                await sim.runtime.send_event(pb.REMOVE_POD_SANDBOX, sandbox)
            pod = await sim.start_pod(pod)
            assert seen.is_attached(sim, pod)
            await sim.delete_pod(pod)
            assert changes(before, dump()) == []
        assert sim.agent.ready()

    play(1, story)


def test_a_path_that_leads_nowhere_fails_the_sandbox_as_a_retry_may_mend_it() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await prepared(sim, "p")
        path = sim.root / "gone"
        with dangling(path):
            sandbox = SimSandbox(id=uuid.uuid4().hex, pod=pod.spec, netns_path=path, pid=0)
            hook = await sim.runtime.send_event(pb.RUN_POD_SANDBOX, sandbox, netns_path=path)
            assert hook.outcome is HookOutcome.ERROR
            assert "does not exist" in hook.detail
            assert changes(before, dump()) == []
        pod = await sim.start_pod(pod)
        assert seen.is_attached(sim, pod)
        await sim.delete_pod(pod)
        assert changes(before, dump()) == []

    play(1, story)


@pytest.mark.parametrize("mode", [RuntimeMode.POD_RPC, RuntimeMode.CRIO])
def test_a_pod_on_the_hosts_network_starts_no_container_and_changes_no_link(mode: RuntimeMode) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        template = sim.schedule("template", [claim("nic", name="net1")])
        pod = await sim.prepare(sim.add_pod("on-host", template.claims, host_network=True))
        pod = await sim.run_sandbox(pod)
        for _ in range(2):
            with pytest.raises(ContainerFailed):
                await sim.create_container(pod)
        assert changes(before, dump()) == []
        await sim.delete_pod(pod)
        assert changes(before, dump()) == []
        assert sim.agent.ready()

    play(1, story, mode=mode)


# --- between check and use --------------------------------------------------------------------------


class Stalled:
    """Stalls one act of the agent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.asynccontextmanager
    async def at(self, where: str) -> AsyncIterator[None]:
        """Order it; on leaving the context it goes on."""
        (self.folder / "stalled").unlink(missing_ok=True)
        (self.folder / "stall").write_text(where)
        try:
            yield
        finally:
            (self.folder / "stall").unlink()

    async def reached(self) -> None:
        await seen.until((self.folder / "stalled").exists, "the act is reached")


def staged(folder: Path) -> dict[str, object]:
    return {"entry": [sys.executable, "-m", "tests.node.stalled_entry", str(folder)]}


STALLS = [
    "after-intent zero-slot",
    "after-intent move-in",
    "after-act move-in",
    "after-intent add-addresses",
    "after-intent link-up",
]


@pytest.mark.parametrize("hook", ["tcx", "clsact"])
def test_a_namespace_put_under_the_path_meanwhile_never_gets_the_device(short_tmp: Path, hook: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        stalled = Stalled(short_tmp)
        before = dump()
        for number, where in enumerate(STALLS):
            pod = await prepared(sim, f"p{number}", addresses=["198.18.0.2/24"])
            first, path = sim.root / f"first-{number}", sim.root / f"path-{number}"
            create_netns(path)
            _bind(path, first)
            try:
                async with stalled.at(where):
                    sandbox = SimSandbox(id=uuid.uuid4().hex, pod=pod.spec, netns_path=path, pid=0)
                    hook_sent = asyncio.create_task(
                        sim.runtime.send_event(pb.RUN_POD_SANDBOX, sandbox, netns_path=path)
                    )
                    await stalled.reached()
                    delete_netns(path)
                    create_netns(path)
                await hook_sent
                (index,) = seen.indexes(pod)
                assert index not in seen.links_in(path), where
                assert index in seen.links_in(first), where
                await sim.runtime.send_event(pb.STOP_POD_SANDBOX, sandbox, netns_path=path)
                await seen.until(lambda: changes(before, dump()) == [], f"{where}: home")
                assert list(seen.links_in(path)) == [1]
            finally:
                delete_netns(path)
                delete_netns(first)
            await sim.delete_pod(seen.fresh(pod))
            assert changes(before, dump()) == []
        assert sim.agent.ready()

    play(1, story, hook=hook, **staged(short_tmp))


def _bind(source: Path, to: Path) -> None:
    to.touch()
    assert _libc.mount(os.fsencode(source), os.fsencode(to), None, MS_BIND, None) == 0


@pytest.mark.parametrize("mode", [RuntimeMode.POD_RPC, RuntimeMode.CRIO])
def test_a_namespace_that_goes_in_the_middle_costs_neither_device_nor_agent(
    short_tmp: Path, mode: RuntimeMode
) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        stalled = Stalled(short_tmp)
        before = dump()
        for number, where in enumerate(STALLS):
            pod = await prepared(sim, f"p{number}", addresses=["198.18.0.2/24"])
            async with stalled.at(where):
                run = asyncio.create_task(sim.run_sandbox(pod))
                await stalled.reached()
                (sandbox,) = sim.runtime.sandboxes
                assert sandbox.netns_path is not None
                delete_netns(sandbox.netns_path)
            with contextlib.suppress(SandboxFailed):
                pod = await run
                await sim.runtime.stop_pod(sandbox)
                await sim.runtime.remove_pod(sandbox)
            await sim.delete_pod(seen.fresh(pod))
            await seen.until(lambda: changes(before, dump()) == [], f"{where}: home")
            again = await sim.start_pod(sim.schedule(f"q{number}", [claim(f"q{number}-nic", name="net1")]))
            assert seen.is_attached(sim, again)
            await sim.delete_pod(again)
        assert sim.agent.ready()

    play(1, story, mode=mode, **staged(short_tmp))
