"""The runtime's side of NRI: registration, and events sent to every plugin, one at a time on the node.

Invariant: the tables of what fails open and what fails closed are here and nowhere else. No answer in
time and a lost connection: the plugin is dropped and the event goes on; an error in time: the event fails.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from driver.nri.ttrpc import Code, Response
from driver.pb.nri.v1 import api_pb2 as pb
from kndsim.runtime_model import HookOutcome, HookRecord, RuntimeMode
from kndsim.runtime_peer import Peer, PluginError, PluginGone, PluginTimeout

POD_EVENTS = {
    int(pb.RUN_POD_SANDBOX): ("RunPodSandbox", pb.RunPodSandboxRequest),
    int(pb.STOP_POD_SANDBOX): ("StopPodSandbox", pb.StopPodSandboxRequest),
    int(pb.REMOVE_POD_SANDBOX): ("RemovePodSandbox", pb.RemovePodSandboxRequest),
}

Inventory = Callable[[], tuple[Sequence[pb.PodSandbox], Sequence[pb.Container]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NriSettings:
    """Timeouts in seconds. sync_chunk is pods per Synchronize message. eager: the plugin is configured and
    synchronized before its RegisterPlugin is answered, as real runtimes do now and then."""

    mode: RuntimeMode
    request_timeout: float = 2.0
    registration_timeout: float = 5.0
    sync_chunk: int = 500
    eager: bool = False

    @property
    def valid_events(self) -> int:
        return 0x7FF if self.mode is RuntimeMode.STATE_CHANGE else 0x3FFF

    @property
    def name(self) -> tuple[str, str]:
        return {
            RuntimeMode.STATE_CHANGE: ("containerd", "v2.1.0"),
            RuntimeMode.POD_RPC: ("containerd", "v2.3.0"),
            RuntimeMode.CRIO: ("cri-o", "1.36.0"),
        }[self.mode]


class NriServer:
    """The NRI socket and the plugins behind it. An async context manager; may be opened again after it was
    closed, which is what a restart of the runtime is."""

    def __init__(self, socket: Path, settings: NriSettings, inventory: Inventory) -> None:
        self.plugins: list[Peer] = []
        self.log: list[HookRecord] = []
        self.violations: list[str] = []
        self.refused: list[str] = []
        """Why plugins were not taken, or dropped before they were."""
        self._socket = socket
        self._settings = settings
        self._inventory = inventory
        self._server: asyncio.Server | None = None
        self._peers: set[Peer] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._admission = asyncio.Lock()
        self._events = asyncio.Lock()
        self._changed = asyncio.Condition()

    async def open(self) -> None:
        self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, self._socket)

    async def close(self) -> None:
        """Stop listening, drop every plugin, remove the socket. May repeat."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.drop_plugins()
        self._socket.unlink(missing_ok=True)

    async def drop_plugins(self) -> None:
        """Close every connection; the plugins may come again."""
        for peer in list(self._peers):
            await self._drop(peer)

    async def wait_plugin(self, seconds: float) -> None:
        """Until a plugin has been synchronized and is connected; TimeoutError after so many seconds."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(lambda: bool(self.plugins))

    async def send(self, event: int, pod: pb.PodSandbox, container: pb.Container | None = None) -> HookRecord:
        """Send one event to all plugins in order. The record says how it went; nothing is raised."""
        async with self._events:
            started = time.monotonic()
            outcome, detail = HookOutcome.ABSENT, ""
            cgroup: dict[str, str] = {}
            for peer in list(self.plugins):
                if event in range(1, 15) and not peer.events & (1 << (event - 1)):
                    continue
                outcome, detail = await self._send_to(peer, event, pod, container, cgroup)
                if outcome is HookOutcome.ERROR:
                    break
            record = HookRecord(
                event=_name(event),
                sandbox=pod.id,
                started=started,
                seconds=time.monotonic() - started,
                outcome=outcome,
                detail=detail,
                cgroup=cgroup,
            )
            self.log.append(record)
            return record

    async def _send_to(
        self,
        peer: Peer,
        event: int,
        pod: pb.PodSandbox,
        container: pb.Container | None,
        cgroup: dict[str, str],
    ) -> tuple[HookOutcome, str]:
        try:
            async with asyncio.timeout(None) as limit:
                limit.reschedule(asyncio.get_running_loop().time() + self._settings.request_timeout)
                await self._deliver(peer, event, pod, container, cgroup)
        except PluginError as error:
            return HookOutcome.ERROR, error.text
        except (PluginTimeout, TimeoutError) as error:
            await self._drop(peer)
            return HookOutcome.TIMEOUT_OPEN, str(error)
        except PluginGone as error:
            await self._drop(peer)
            return HookOutcome.ABSENT, str(error)
        return HookOutcome.OK, ""

    async def _deliver(
        self,
        peer: Peer,
        event: int,
        pod: pb.PodSandbox,
        container: pb.Container | None,
        cgroup: dict[str, str],
    ) -> None:
        timeout = self._settings.request_timeout
        if event == pb.CREATE_CONTAINER:
            create = pb.CreateContainerRequest(pod=pod, container=container)
            answer = await peer.call("CreateContainer", create.SerializeToString(), timeout)
            self._adjust(pb.CreateContainerResponse.FromString(answer), cgroup)
            return
        began = time.monotonic()
        pod_rpc = self._settings.mode is RuntimeMode.POD_RPC and event in POD_EVENTS
        if pod_rpc and not peer.state_change_only:
            method, kind = POD_EVENTS[event]
            try:
                await peer.call(method, kind(pod=pod).SerializeToString(), timeout)
            except PluginError as error:
                if error.code != Code.UNIMPLEMENTED:
                    raise
                peer.state_change_only = True
            else:
                return
        change = pb.StateChangeEvent(event=cast("pb.Event", event), pod=pod, container=container)
        left = timeout - (time.monotonic() - began)
        await peer.call("StateChange", change.SerializeToString(), left)

    def _adjust(self, answer: pb.CreateContainerResponse, cgroup: dict[str, str]) -> None:
        """Gather what a plugin sets, as the runtime's side of NRI does: two plugins may not set one thing."""
        unified = answer.adjust.linux.resources.unified
        only_this = pb.CreateContainerResponse()
        only_this.adjust.linux.resources.unified.update(unified)
        if answer.ByteSize() and answer != only_this:
            self.violations.append("the plugin adjusts more of containers than is simulated")
        twice = sorted(set(unified) & set(cgroup))
        if twice:
            raise PluginError(Code.UNKNOWN, f"plugins both tried to set CgroupsUnified {', '.join(twice)}")
        cgroup.update(unified)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        registered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def register(peer: Peer, message: pb.RegisterPluginRequest) -> Response | None:
            problem = _registration_problem(message)
            if problem:
                self.refused.append(problem)
            if not registered.done():
                registered.set_result(not problem)
            if problem:
                return Response(b"", Code.UNKNOWN, problem)
            return None if self._settings.eager else Response()

        peer = Peer(reader, writer, register)
        self._peers.add(peer)
        task = asyncio.create_task(self._serve_peer(peer, registered), name="plugin")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_peer(self, peer: Peer, registered: asyncio.Future[bool]) -> None:
        try:
            # Plugins are taken in one after another: a silent one holds the next one up.
            async with self._admission:
                await self._admit(peer, registered)
            await peer.wait_closed()
        except (PluginError, PluginGone, PluginTimeout, TimeoutError) as error:
            self.refused.append(str(error) or "no RegisterPlugin in time")
        finally:
            await self._drop(peer)

    async def _admit(self, peer: Peer, registered: asyncio.Future[bool]) -> None:
        gone = asyncio.create_task(peer.wait_closed())
        either: set[asyncio.Future[Any]] = {gone, registered}
        try:
            async with asyncio.timeout(self._settings.registration_timeout):
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not registered.done():
            raise PluginGone("the plugin left before it registered")
        if not registered.result():
            # A refused plugin's connection stays open and idle.
            return
        async with self._events:
            await self._configure(peer)
            await self._synchronize(peer)
            if self._settings.eager:
                peer.answer_registration()
            self.plugins.append(peer)
            self.plugins.sort(key=lambda plugin: plugin.index)
        async with self._changed:
            self._changed.notify_all()

    async def _configure(self, peer: Peer) -> None:
        settings = self._settings
        name, version = settings.name
        request = pb.ConfigureRequest(
            runtime_name=name,
            runtime_version=version,
            registration_timeout=round(settings.registration_timeout * 1000),
            request_timeout=round(settings.request_timeout * 1000),
        )
        if settings.mode is RuntimeMode.POD_RPC:
            request.NRI_version = "v0.12.0"
        answer = await peer.call("Configure", request.SerializeToString(), settings.request_timeout)
        events = pb.ConfigureResponse.FromString(answer).events
        if events & ~settings.valid_events:
            raise PluginGone(f"invalid event mask {events:#x}")
        peer.events = events or settings.valid_events

    async def _synchronize(self, peer: Peer) -> None:
        pods, containers = self._inventory()
        chunk = self._settings.sync_chunk
        count = max(len(pods), len(containers), 1)
        # One budget for the whole sequence.
        ends = time.monotonic() + self._settings.request_timeout
        for start in range(0, count, chunk):
            more = start + chunk < count
            part = slice(start, start + chunk)
            request = pb.SynchronizeRequest(pods=pods[part], containers=containers[part], more=more)
            payload = request.SerializeToString()
            answer = await peer.call("Synchronize", payload, ends - time.monotonic())
            response = pb.SynchronizeResponse.FromString(answer)
            if more and (not response.more or response.update):
                raise PluginGone("plugin does not handle split sync requests")

    async def _drop(self, peer: Peer) -> None:
        if peer in self.plugins:
            self.plugins.remove(peer)
        if peer in self._peers:
            self._peers.remove(peer)
            await peer.close()
            self.violations += peer.violations
        async with self._changed:
            self._changed.notify_all()


def _name(event: int) -> str:
    if event == pb.CREATE_CONTAINER:
        return "CreateContainer"
    return POD_EVENTS[event][0] if event in POD_EVENTS else f"event {event}"


def _registration_problem(message: pb.RegisterPluginRequest) -> str:
    index, name = message.plugin_idx, message.plugin_name
    if not re.fullmatch(r"[0-9]{2}", index):
        return f'invalid plugin index: invalid plugin index "{index}", must be 2 digits'
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name):
        return f'invalid plugin name "{name}"'
    return ""
