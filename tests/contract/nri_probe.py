"""An NRI plugin that writes down what a runtime sends it, and answers as it is told.

Invariant: every call is answered in the order and the way the case wants, or left without an answer on
purpose; nothing of the product but its codecs is used.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from driver.nri import mux, ttrpc
from driver.nri.ttrpc import Code, Request, Response
from driver.pb.nri.v1 import api_pb2 as pb

POD_CALLS: dict[str, tuple[str, Any]] = {
    "RunPodSandbox": ("run", pb.RunPodSandboxRequest),
    "StopPodSandbox": ("stop", pb.StopPodSandboxRequest),
    "RemovePodSandbox": ("remove", pb.RemovePodSandboxRequest),
}
POD_EVENTS = {
    int(pb.RUN_POD_SANDBOX): "run",
    int(pb.STOP_POD_SANDBOX): "stop",
    int(pb.REMOVE_POD_SANDBOX): "remove",
}
ALL = 0xF
"""The product's events: pods' three, and CreateContainer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """kind: run, stop, remove, create. via: the method. there: whether the netns was there then."""

    kind: str
    via: str
    pod: pb.PodSandbox
    container: str = ""
    env: tuple[str, ...] = ()
    there: bool = False

    @property
    def netns(self) -> str:
        return next((each.path for each in self.pod.linux.namespaces if each.type == "network"), "")


@dataclass
class Probe:
    """refuse: text by kind; silent: kinds that get no answer; without: methods it does not have."""

    events: int = ALL
    refuse: dict[str, str] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    without: set[str] = field(default_factory=set)
    look: Callable[[str], bool] = lambda path: False
    told: list[Told] = field(default_factory=list)
    configured: list[pb.ConfigureRequest] = field(default_factory=list)
    inventories: list[tuple[list[pb.PodSandbox], list[pb.Container]]] = field(default_factory=list)
    registered: asyncio.Future[Response] | None = None
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    _netns: dict[str, str] = field(default_factory=dict)
    _pods: list[pb.PodSandbox] = field(default_factory=list)
    _containers: list[pb.Container] = field(default_factory=list)

    def of(self, sandbox: str) -> list[str]:
        """The kinds of what was told of a sandbox, in order."""
        return [each.kind for each in self.told if each.pod.id == sandbox]

    @contextlib.asynccontextmanager
    async def connected(
        self, socket: Path, *, name: str = "probe", index: str = "10", register: bool = True
    ) -> AsyncIterator[Probe]:
        reader, writer = await asyncio.open_unix_connection(socket)
        self.registered = asyncio.get_running_loop().create_future()
        self.closed.clear()
        task = asyncio.create_task(self._read(reader, writer))
        if register:
            payload = pb.RegisterPluginRequest(plugin_name=name, plugin_idx=index).SerializeToString()
            call = Request(service="nri.pkg.api.v1alpha1.Runtime", method="RegisterPlugin", payload=payload)
            writer.write(b"".join(mux.encode(mux.Connection.RUNTIME, ttrpc.encode_request(1, call))))
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        demux = mux.Demux()
        decoders = {int(each): ttrpc.FrameDecoder() for each in mux.Connection}
        try:
            while data := await reader.read(1 << 16):
                for chunk in demux.feed(data):
                    for frame in decoders[chunk.connection].feed(chunk.data):
                        if chunk.connection == mux.Connection.RUNTIME:
                            self._registration(ttrpc.decode_response(frame.body))
                            continue
                        answer = self._answer(ttrpc.decode_request(frame.body))
                        if answer is not None:
                            message = ttrpc.encode_response(frame.stream, answer)
                            writer.write(b"".join(mux.encode(mux.Connection.PLUGIN, message)))
        except ConnectionError:
            return
        finally:
            self.closed.set()

    def _registration(self, response: Response) -> None:
        if self.registered is not None and not self.registered.done():
            self.registered.set_result(response)

    def _answer(self, request: Request) -> Response | None:
        method, payload = request.method, request.payload
        if method in self.without:
            return Response(b"", Code.UNIMPLEMENTED, f"method {method}")
        if method == "Configure":
            self.configured.append(pb.ConfigureRequest.FromString(payload))
            return Response(pb.ConfigureResponse(events=self.events).SerializeToString())
        if method == "Synchronize":
            return self._synchronize(pb.SynchronizeRequest.FromString(payload))
        if method == "StateChange":
            change = pb.StateChangeEvent.FromString(payload)
            kind = POD_EVENTS.get(int(change.event), f"event {change.event}")
            return self._event(kind, method, change.pod)
        if method == "CreateContainer":
            create = pb.CreateContainerRequest.FromString(payload)
            return self._event("create", method, create.pod, create.container)
        if method in POD_CALLS:
            kind, message = POD_CALLS[method]
            return self._event(kind, method, message.FromString(payload).pod)
        return Response()

    def _synchronize(self, request: pb.SynchronizeRequest) -> Response:
        self._pods += request.pods
        self._containers += request.containers
        if request.more:
            return Response(pb.SynchronizeResponse(more=True).SerializeToString())
        self.inventories.append((self._pods, self._containers))
        self._pods, self._containers = [], []
        return Response()

    def _event(
        self, kind: str, via: str, pod: pb.PodSandbox, container: pb.Container | None = None
    ) -> Response | None:
        told = Told(kind=kind, via=via, pod=pod)
        if container is not None:
            told = replace(told, container=container.name, env=tuple(container.env))
        netns = self._netns.setdefault(pod.id, told.netns) or told.netns
        there = bool(netns) and self.look(netns)
        self.told.append(replace(told, there=there))
        if kind in self.silent:
            return None
        if kind in self.refuse:
            return Response(b"", Code.UNKNOWN, self.refuse[kind])
        return Response()
