"""The simulated runtime's pods are real network namespaces, in each mode's order, and nothing of them stays.

Invariant: every test compares the machine's mounts, processes and own namespace before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from driver.errors import NotNow
from driver.nri import mux, ttrpc
from driver.pb.nri.v1 import api_pb2 as pb
from kndsim import netns
from kndsim.runtime import (
    HookOutcome,
    PodSpec,
    Runtime,
    RuntimeMode,
    SandboxFailed,
)
from tests.kernel.sim_support import (
    CONTAINERD,
    MODES,
    POD,
    alive,
    in_pod,
    ipv6_knobs,
    machine_unchanged,
    mounts_below,
    network_id,
    node,
    own_links,
)
from tests.unit.nri_support import run, until


@pytest.fixture
def root(short_tmp: Path) -> Iterator[Path]:
    with machine_unchanged(short_tmp):
        yield short_tmp


# --- the namespaces themselves ----------------------------------------------------------------------


def test_a_new_netns_is_another_one_with_lo_up_and_no_ipv6(root: Path) -> None:
    path = root / "var/run/netns/cni-x"
    netns.create_netns(path)
    try:
        assert network_id(path) != network_id("/proc/self/ns/net")

        def look() -> tuple[list[str], str, str]:
            flags = Path("/proc/thread-self/net/if_inet6")
            with socket.create_server(("127.0.0.1", 0)) as server:
                socket.create_connection(server.getsockname()).close()
            return own_links(), flags.read_text() if flags.exists() else "", ipv6_knobs()[0]

        links, addresses, disabled = netns.in_netns(path, look)
        assert (links, addresses, disabled.strip()) == (["lo"], "", "1")
    finally:
        netns.delete_netns(path)
    assert not path.exists()
    netns.delete_netns(path)


def test_work_in_a_netns_that_fails_raises_here_and_moves_nobody(root: Path) -> None:
    path = root / "var/run/netns/cni-x"
    netns.create_netns(path)
    try:
        with pytest.raises(ZeroDivisionError):
            netns.in_netns(path, lambda: 1 // 0)
        with pytest.raises(FileExistsError):
            netns.create_netns(path)
    finally:
        netns.delete_netns(path)
    with pytest.raises(FileNotFoundError):
        netns.in_netns(path, lambda: None)
    (root / "file").touch()
    with pytest.raises(OSError, match="entering"):
        netns.in_netns(root / "file", lambda: None)


def test_a_process_in_a_pod_is_in_its_netns_and_ends_when_told(root: Path) -> None:
    path = root / "var/run/netns/cni-x"
    netns.create_netns(path)
    try:
        process = netns.PodProcess(path)
        try:
            assert network_id(f"/proc/{process.pid}/ns/net") == network_id(path)
            assert process.alive
        finally:
            process.end()
        assert not process.alive
        process.end()
    finally:
        netns.delete_netns(path)


# --- a pod's life in each mode ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_pods_life_in_the_modes_order(root: Path, mode: RuntimeMode) -> None:
    there: list[tuple[str, bool]] = []

    async def test() -> None:
        async with node(root, mode) as (runtime, handler):
            sandbox = await runtime.run_pod(POD)
            path = sandbox.netns_path
            assert path is not None
            assert network_id(path) != network_id("/proc/self/ns/net")
            handler.look = lambda kind, _: there.append((kind, path.exists()))
            container = await runtime.create_container(sandbox, "main")
            assert network_id(f"/proc/{container.pid}/ns/net") == network_id(path)
            await runtime.stop_pod(sandbox)
            await runtime.stop_pod(sandbox)
            await runtime.remove_pod(sandbox)
            assert not path.exists()
            assert not alive(container.pid)
            assert runtime.sandboxes == ()
            seen = [(kind, told.id, told.netns_path, told.pid) for kind, told in handler.seen]
        pid = 0 if mode is RuntimeMode.CRIO else sandbox.pid
        assert (sandbox.pid == 0) == (mode is RuntimeMode.CRIO)
        stop = {
            RuntimeMode.STATE_CHANGE: [("stop", sandbox.id, path, pid)],
            RuntimeMode.POD_RPC: [("stop", sandbox.id, path, pid)],
            RuntimeMode.CRIO: [("stop", sandbox.id, path, 0)] * 2,
        }[mode]
        assert seen == [
            ("run", sandbox.id, path, pid),
            ("create main", sandbox.id, path, pid),
            *stop,
            ("remove", sandbox.id, None, 0),
        ]
        still_there = mode is not RuntimeMode.CRIO
        assert there == [("create main", True)] + [("stop", still_there)] * len(stop) + [("remove", False)]

    run(test())


@pytest.mark.parametrize("mode", MODES)
def test_a_refused_sandbox_is_stopped_removed_and_gone(root: Path, mode: RuntimeMode) -> None:
    async def test() -> None:
        async with node(root, mode) as (runtime, handler):
            handler.refuse["run"] = NotNow("the device is on its way home")
            with pytest.raises(SandboxFailed, match="the device is on its way home"):
                await runtime.run_pod(POD)
            assert [kind for kind, _ in handler.seen] == ["run", "stop", "remove"]
            assert runtime.sandboxes == ()
            assert mounts_below(root) == []
            del handler.refuse["run"]
            again = await runtime.run_pod(POD)
            assert again.id != handler.seen[0][1].id

    run(test())


@pytest.mark.parametrize("mode", MODES)
def test_a_plugin_that_is_too_late_or_absent_leaves_the_pod_running(root: Path, mode: RuntimeMode) -> None:
    async def test() -> None:
        async with Runtime(root, mode, request_timeout=0.5) as runtime:
            sandbox = await runtime.run_pod(POD)
            assert runtime.log[-1].outcome is HookOutcome.ABSENT
            await runtime.create_container(sandbox, "main")
            async with node_of_silence(runtime):
                await runtime.run_pod(POD)
                assert runtime.log[-1].outcome is HookOutcome.TIMEOUT_OPEN
                assert 0.5 <= runtime.log[-1].seconds < 2
                assert runtime.plugins == ()
            assert len(runtime.sandboxes) == 2

    run(test())


@contextlib.asynccontextmanager
async def node_of_silence(runtime: Runtime) -> AsyncIterator[None]:
    """A plugin that has registered and answers no event."""
    payload = pb.RegisterPluginRequest(plugin_name="silent", plugin_idx="10").SerializeToString()
    register = ttrpc.Request(service="nri.pkg.api.v1alpha1.Runtime", method="RegisterPlugin", payload=payload)
    reader, writer = await asyncio.open_unix_connection(runtime.socket)

    def send(connection: int, message: bytes) -> None:
        writer.write(b"".join(mux.encode(connection, message)))

    async def answer_the_handshake() -> None:
        demux, decoder = mux.Demux(), ttrpc.FrameDecoder()
        answers = {"Configure": b"\x10\x0f", "Synchronize": b""}
        while data := await reader.read(4096):
            for chunk in demux.feed(data):
                for frame in decoder.feed(chunk.data) if chunk.connection == 1 else ():
                    payload = answers.get(ttrpc.decode_request(frame.body).method)
                    if payload is not None:
                        send(1, ttrpc.encode_response(frame.stream, ttrpc.Response(payload)))

    send(2, ttrpc.encode_request(1, register))
    task = asyncio.create_task(answer_the_handshake())
    try:
        await runtime.wait_plugin()
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize("mode", MODES)
def test_a_host_network_pod_has_the_hosts_netns_or_none(root: Path, mode: RuntimeMode) -> None:
    async def test() -> None:
        async with node(root, mode) as (runtime, handler):
            pod = PodSpec(namespace="ns", name="h", uid="u2", host_network=True)
            sandbox = await runtime.run_pod(pod)
            ((_, told),) = handler.seen
            if mode is RuntimeMode.CRIO:
                assert told.netns_path is not None
                assert network_id(told.netns_path) == network_id("/proc/self/ns/net")
            else:
                assert told.netns_path is None
                assert network_id(f"/proc/{sandbox.pid}/ns/net") == network_id("/proc/self/ns/net")
            await runtime.remove_pod(sandbox)

    run(test())


@pytest.mark.parametrize("mode", CONTAINERD)
def test_after_a_restart_containerd_never_stops_old_pods_for_plugins(root: Path, mode: RuntimeMode) -> None:
    async def test() -> None:
        async with node(root, mode) as (runtime, handler):
            sandbox = await runtime.run_pod(POD)
            container = await runtime.create_container(sandbox, "main")
            await runtime.restart()
            await runtime.wait_plugin()
            await until(lambda: len(handler.synchronized) == 2)
            sandboxes, containers = handler.synchronized[-1]
            assert [told.id for told in sandboxes] == [sandbox.id]
            assert containers == {sandbox.id: ["main"]}
            assert alive(container.pid)
            await runtime.stop_pod(sandbox)
            await runtime.remove_pod(sandbox)
            assert [kind for kind, _ in handler.seen] == ["run", "create main"]
            assert mounts_below(root) == []
            young = await runtime.run_pod(POD)
            await runtime.remove_pod(young)
            assert [kind for kind, _ in handler.seen][2:] == ["run", "stop", "remove"]

    run(test())


def test_after_a_restart_cri_o_stops_old_pods_all_the_same(root: Path) -> None:
    async def test() -> None:
        async with node(root, RuntimeMode.CRIO) as (runtime, handler):
            sandbox = await runtime.run_pod(POD)
            await runtime.restart()
            await runtime.wait_plugin()
            await runtime.remove_pod(sandbox)
            assert [kind for kind, _ in handler.seen] == ["run", "stop", "remove"]

    run(test())


@pytest.mark.parametrize("mode", CONTAINERD)
def test_a_dead_sandbox_keeps_its_netns_until_it_is_stopped(root: Path, mode: RuntimeMode) -> None:
    async def test() -> None:
        async with node(root, mode) as (runtime, handler):
            sandbox = await runtime.run_pod(POD)
            await runtime.kill_pause(sandbox)
            assert not alive(sandbox.pid)
            assert in_pod(sandbox, own_links) == ["lo"]
            await runtime.stop_pod(sandbox)
            assert [kind for kind, _ in handler.seen] == ["run", "stop"]
            await runtime.drop_plugins()
            await runtime.wait_plugin()
            await until(lambda: len(handler.synchronized) == 2)
            # Stopped but not removed: still listed.
            assert [told.id for told in handler.synchronized[-1][0]] == [sandbox.id]

    run(test())


# --- the end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_leaving_after_a_failure_leaves_nothing(root: Path, mode: RuntimeMode) -> None:
    pids: list[int] = []

    async def test() -> None:
        async with node(root, mode) as (runtime, _):
            for number in range(3):
                sandbox = await runtime.run_pod(PodSpec(namespace="ns", name=f"p{number}", uid=str(number)))
                container = await runtime.create_container(sandbox, "main")
                pids.extend(pid for pid in (sandbox.pid, container.pid) if pid)
            assert len(mounts_below(root)) == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(test())
    assert not (root / "var/run/nri/nri.sock").exists()
    assert pids
    assert [pid for pid in pids if alive(pid)] == []


def test_pods_run_side_by_side_and_their_events_one_after_another(root: Path) -> None:
    busy: list[str] = []

    async def test() -> None:
        async with node(root, RuntimeMode.POD_RPC) as (runtime, handler):
            handler.look = lambda kind, sandbox: busy.append(sandbox.id)
            pods = [PodSpec(namespace="ns", name=f"p{n}", uid=str(n)) for n in range(8)]
            await asyncio.gather(*(runtime.run_pod(pod) for pod in pods))
            records = runtime.log
            assert all(record.outcome is HookOutcome.OK for record in records)
            ends = [record.started + record.seconds for record in records]
            starts = [record.started for record in records]
            assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True))
            assert len({network_id(str(sandbox.netns_path)) for sandbox in runtime.sandboxes}) == 8

    run(test())


@pytest.mark.parametrize("mode", MODES)
def test_being_cancelled_in_the_middle_leaves_nothing(root: Path, mode: RuntimeMode) -> None:
    async def test() -> None:
        async with Runtime(root, mode) as runtime:
            pods = [PodSpec(namespace="ns", name=f"p{n}", uid=str(n)) for n in range(6)]
            starting = [asyncio.create_task(runtime.run_pod(pod)) for pod in pods]
            await until(lambda: len(runtime.sandboxes) == 6)
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)

    run(test())
