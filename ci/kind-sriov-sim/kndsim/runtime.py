"""A strict simulated container runtime: NRI in the ways real ones speak it, pods as network namespaces.

Invariant: what a mode does is what containerd or CRI-O does there, the faults included; whatever was made
(namespaces, mounts, processes, sockets) is gone when the context ends, also after a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from driver.pb.nri.v1 import api_pb2 as pb
from kndsim import netns, runtime_cdi
from kndsim.netns import PodProcess
from kndsim.runtime_model import (
    ContainerFailed,
    HookOutcome,
    HookRecord,
    PodSpec,
    RuntimeMode,
    SandboxFailed,
    SimContainer,
    SimSandbox,
    StopFailed,
)
from kndsim.runtime_nri import NriServer, NriSettings
from kndsim.runtime_peer import Peer

__all__ = [
    "ContainerFailed",
    "HookOutcome",
    "HookRecord",
    "PodSpec",
    "Runtime",
    "RuntimeMode",
    "SandboxFailed",
    "SimContainer",
    "SimSandbox",
    "StopFailed",
]


P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class _Pod:
    """What the runtime keeps of a sandbox. ran, stopped and removed are containerd's in-memory state of
    which events were sent."""

    sandbox: SimSandbox
    pause: PodProcess | None = None
    containers: dict[str, tuple[SimContainer, PodProcess]] = field(default_factory=dict)
    netns_deleted: bool = False
    listed: bool = False
    """Part of Synchronize: its Run has succeeded."""
    ran: bool = False
    stopped: bool = False


class Runtime:
    """`async with Runtime(root, mode) as runtime`. Needs root's rights for run_pod only.

    request_timeout in seconds; sync_chunk: pods per Synchronize message; eager: see NriSettings.
    """

    def __init__(
        self,
        root: Path,
        mode: RuntimeMode,
        *,
        request_timeout: float = 2.0,
        registration_timeout: float = 5.0,
        sync_chunk: int = 500,
        eager: bool = False,
    ) -> None:
        self.root = root
        self.mode = mode
        self.socket = root / "var/run/nri/nri.sock"
        self._pods: dict[str, _Pod] = {}
        settings = NriSettings(
            mode=mode,
            request_timeout=request_timeout,
            registration_timeout=registration_timeout,
            sync_chunk=sync_chunk,
            eager=eager,
        )
        self._nri = NriServer(self.socket, settings, self._inventory)

    async def __aenter__(self) -> Runtime:
        await self._nri.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._nri.close()
        with contextlib.ExitStack() as stack:
            # Every pod is cleaned up even if cleaning another one fails.
            for pod in self._pods.values():
                stack.callback(self._delete_netns, pod)
                stack.callback(self._end_processes, pod)
        self._pods.clear()

    # --- what tests look at -------------------------------------------------------------------------

    @property
    def plugins(self) -> Sequence[Peer]:
        """Synchronized plugins, in calling order."""
        return tuple(self._nri.plugins)

    @property
    def log(self) -> Sequence[HookRecord]:
        """Every event, in order."""
        return tuple(self._nri.log)

    @property
    def violations(self) -> Sequence[str]:
        """What a real runtime would have dropped a plugin for, or crashed at."""
        return tuple(self._nri.violations + [text for peer in self._nri.plugins for text in peer.violations])

    @property
    def refused(self) -> Sequence[str]:
        """Why plugins were not taken."""
        return tuple(self._nri.refused)

    @property
    def sandboxes(self) -> Sequence[SimSandbox]:
        """Not yet removed ones, stopped ones included."""
        return tuple(pod.sandbox for pod in self._pods.values())

    async def wait_plugin(self, seconds: float = 5.0) -> None:
        """Until a plugin is connected and synchronized; TimeoutError after so many seconds."""
        await self._nri.wait_plugin(seconds)

    async def drop_plugins(self) -> None:
        await self._nri.drop_plugins()

    # --- pods ---------------------------------------------------------------------------------------

    async def run_pod(self, pod: PodSpec) -> SimSandbox:
        """CRI RunPodSandbox. SandboxFailed if a plugin said no; nothing of the sandbox is left then."""
        sandbox_id = uuid.uuid4().hex
        path: Path | None = self.root / f"var/run/netns/cni-{uuid.uuid4()}"
        if pod.host_network and self.mode is not RuntimeMode.CRIO:
            path = None
        record = _Pod(SimSandbox(id=sandbox_id, pod=pod, netns_path=path, pid=0))
        self._pods[sandbox_id] = record
        try:
            await _to_its_end(self._start_sandbox, record)
        except OSError:
            await self._forget(record)
            raise
        record.ran = True
        hook = await self._nri.send(pb.RUN_POD_SANDBOX, self._message(record, pb.RUN_POD_SANDBOX))
        if hook.outcome is HookOutcome.ERROR:
            await self._send(record, pb.STOP_POD_SANDBOX)
            await self._send(record, pb.REMOVE_POD_SANDBOX)
            await self._forget(record)
            raise SandboxFailed(f"NRI RunPodSandbox failed: {hook.detail}")
        record.listed = True
        return record.sandbox

    async def stop_pod(self, sandbox: SimSandbox) -> None:
        """CRI StopPodSandbox; quiet for a sandbox that is not there. StopFailed if a plugin fails CRI-O's."""
        record = self._pods.get(sandbox.id)
        if record is None:
            return
        await _to_its_end(self._end_processes, record)
        if self.mode is RuntimeMode.CRIO:
            await _to_its_end(self._delete_netns, record)
            hook = await self._send(record, pb.STOP_POD_SANDBOX)
            if hook.outcome is HookOutcome.ERROR:
                raise StopFailed(f"stop of sandbox {sandbox.id} failed: {hook.detail}")
            record.stopped = True
            return
        if record.ran and not record.stopped:
            record.stopped = True
            await self._send(record, pb.STOP_POD_SANDBOX)
        await _to_its_end(self._delete_netns, record)

    async def remove_pod(self, sandbox: SimSandbox) -> None:
        """CRI RemovePodSandbox, which stops first. Quiet for a sandbox that is not there."""
        record = self._pods.get(sandbox.id)
        if record is None:
            return
        if not (record.stopped and record.netns_deleted):
            await self.stop_pod(sandbox)
        if record.ran or self.mode is RuntimeMode.CRIO:
            await self._send(record, pb.REMOVE_POD_SANDBOX)
        await self._forget(record)

    async def kill_pause(self, sandbox: SimSandbox) -> None:
        """The sandbox dies by itself; its netns stays until stop_pod."""
        pause = self._pods[sandbox.id].pause
        if pause is not None:
            await _to_its_end(pause.end)

    async def restart(self) -> None:
        """The runtime is restarted: plugins lose their connection, the socket is a new one, pods run on.
        containerd forgets which pods it has sent Run for, and so never sends their Stop and Remove."""
        await self._nri.close()
        for pod in self._pods.values():
            pod.ran = pod.stopped = False
        await self._nri.open()

    # --- containers ---------------------------------------------------------------------------------

    async def create_container(
        self,
        sandbox: SimSandbox,
        name: str,
        cdi_ids: Sequence[str] = (),
        *,
        command: Sequence[str] = ("cat",),
    ) -> SimContainer:
        """CRI CreateContainer and StartContainer. ContainerFailed as kubelet would report it.

        command runs in the pod's netns with a pipe on standard input; the default waits until it is ended.
        """
        record = self._pods[sandbox.id]
        container_id = uuid.uuid4().hex
        # Before plugins are asked, who see what it adds: so do containerd and CRI-O.
        try:
            edits = await _to_its_end(runtime_cdi.inject, self.root / "var/run/cdi", cdi_ids)
        except runtime_cdi.InjectionFailed as error:
            raise ContainerFailed("CreateContainerError", str(error)) from error
        message = pb.Container(
            id=container_id,
            pod_sandbox_id=sandbox.id,
            name=name,
            state=pb.CONTAINER_CREATED,
            env=[f"{key}={value}" for key, value in edits.env.items()],
        )
        hook = await self._nri.send(pb.CREATE_CONTAINER, self._message(record, pb.CREATE_CONTAINER), message)
        if hook.outcome is HookOutcome.ERROR:
            raise ContainerFailed("CreateContainerError", hook.detail)
        container = await _to_its_end(self._start_container, record, message, command, edits, hook.cgroup)
        bundle = self.root / f"run/containers/{container_id}"
        try:
            await _to_its_end(runtime_cdi.run_hooks, edits.hooks, container_id, container.pid, bundle)
        except runtime_cdi.HookFailed as error:
            await self.stop_container(container)
            raise ContainerFailed("StartError", str(error)) from error
        return container

    async def stop_container(self, container: SimContainer) -> None:
        """End it and forget it. May repeat."""
        record = self._pods.get(container.sandbox)
        entry = record.containers.pop(container.id, None) if record is not None else None
        if entry is not None:
            await _to_its_end(entry[1].end)

    # --- events by hand -----------------------------------------------------------------------------

    async def send_event(
        self,
        event: int,
        sandbox: SimSandbox,
        *,
        container: str | None = None,
        netns_path: Path | None = None,
    ) -> HookRecord:
        """Send any event for any sandbox, known or not, whatever was sent before. event is a number of
        NRI's Event; netns_path None: what the mode would say."""
        record = self._pods.get(sandbox.id) or _Pod(sandbox)
        pod = self._message(record, event)
        if netns_path is not None:
            del pod.linux.namespaces[:]
            pod.linux.namespaces.add(type="network", path=str(netns_path))
        message = None
        if container is not None:
            message = pb.Container(id=uuid.uuid4().hex, pod_sandbox_id=sandbox.id, name=container)
        return await self._nri.send(event, pod, message)

    # --- inside -------------------------------------------------------------------------------------

    async def _send(self, record: _Pod, event: int) -> HookRecord:
        return await self._nri.send(event, self._message(record, event))

    def _message(self, record: _Pod, event: int = 0) -> pb.PodSandbox:
        """The sandbox as this mode describes it in that event; 0: in Synchronize."""
        sandbox, pod = record.sandbox, record.sandbox.pod
        message = pb.PodSandbox(
            id=sandbox.id, name=pod.name, uid=pod.uid, namespace=pod.namespace, annotations=pod.annotations
        )
        if not pod.host_network:
            message.ips.append("10.244.0.2")
        stopping = event == pb.STOP_POD_SANDBOX
        if event == pb.REMOVE_POD_SANDBOX:
            return message
        message.pid = sandbox.pid
        message.linux.namespaces.add(type="mount", path="")
        path = sandbox.netns_path
        if path is not None and not (stopping and self.mode is RuntimeMode.POD_RPC and not path.exists()):
            message.linux.namespaces.add(type="network", path=str(path))
        return message

    def _inventory(self) -> tuple[list[pb.PodSandbox], list[pb.Container]]:
        pods = [self._message(record) for record in self._pods.values() if record.listed]
        containers = [
            pb.Container(
                id=container.id,
                pod_sandbox_id=container.sandbox,
                name=container.name,
                state=pb.CONTAINER_RUNNING,
                pid=container.pid,
            )
            for record in self._pods.values()
            for container, process in record.containers.values()
            if process.alive
        ]
        return pods, containers

    def _start_sandbox(self, record: _Pod) -> None:
        path = record.sandbox.netns_path
        if path is not None:
            make = netns.pin_own_netns if record.sandbox.pod.host_network else netns.create_netns
            make(path)
        if self.mode is not RuntimeMode.CRIO:
            record.pause = PodProcess(path)
            record.sandbox = replace(record.sandbox, pid=record.pause.pid)

    @staticmethod
    def _start_container(
        record: _Pod,
        message: pb.Container,
        command: Sequence[str],
        edits: runtime_cdi.Injection,
        cgroup: Mapping[str, str],
    ) -> SimContainer:
        process = PodProcess(record.sandbox.netns_path, command, edits.env)
        container = SimContainer(
            id=message.id,
            name=message.name,
            sandbox=message.pod_sandbox_id,
            pid=process.pid,
            env=edits.env,
            devices=edits.devices,
            cgroup=cgroup,
        )
        record.containers[container.id] = (container, process)
        return container

    async def _forget(self, record: _Pod) -> None:
        await _to_its_end(self._end_processes, record)
        await _to_its_end(self._delete_netns, record)
        self._pods.pop(record.sandbox.id, None)

    @staticmethod
    def _end_processes(record: _Pod) -> None:
        for _, process in list(record.containers.values()):
            process.end()
        record.containers.clear()
        if record.pause is not None:
            record.pause.end()

    @staticmethod
    def _delete_netns(record: _Pod) -> None:
        if not record.netns_deleted and record.sandbox.netns_path is not None:
            netns.delete_netns(record.sandbox.netns_path)
        record.netns_deleted = True


async def _to_its_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """work's result from a thread. Cancelled: still waits for the thread, so that whatever it makes is on
    record before anyone cleans up."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise
