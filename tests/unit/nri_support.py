"""What the NRI tests share: a handler that writes down what it was told, clocks, a runtime's bare end.

Invariant: nothing here waits without a deadline, and whatever it starts ends with its context.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from driver.model import AS_IT_IS, Adjustment, Container, Sandbox, SandboxId
from driver.nri import mux, ttrpc
from driver.nri.plugin import Backoff, NriPlugin
from driver.nri.transport import Reply, Trunk
from driver.nri.ttrpc import Request, Response

T = TypeVar("T")

OK = Response()
FAST = Backoff(first=0.01, most=0.05)


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Return when condition() is true; fail the test after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not true within {seconds:g} s")
        await asyncio.sleep(0.001)


def run(work: Coroutine[Any, Any, T], seconds: float = 20.0) -> T:
    """Run work in a loop of its own; it must leave no task and no descriptor behind."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            result = await work
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"
        return result

    before = open_files()
    result = asyncio.run(bounded())
    after = open_files()
    assert after <= before, f"{after - before} descriptors left behind"
    return result


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


Behaviour = Callable[[Sandbox, float], Awaitable[None]]


@dataclass
class RecordingHandler:
    """Writes down every call in order; behaviours say what else a hook does, by pod name."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    deadlines: list[float] = field(default_factory=list)
    adjust: Callable[[Container], Adjustment] = lambda container: AS_IT_IS

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == kind]

    def runtime_connected(self, name: str, version: str) -> None:
        self.calls.append(("connected", name, version))

    def runtime_lost(self) -> None:
        self.calls.append(("lost",))

    async def synchronize(
        self, sandboxes: Sequence[Sandbox], containers: Mapping[SandboxId, Sequence[str]]
    ) -> None:
        self.calls.append(("synchronize", list(sandboxes), {k: list(v) for k, v in containers.items()}))

    async def run_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._hook("run", sandbox, deadline)

    async def stop_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._hook("stop", sandbox, deadline)

    async def remove_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._hook("remove", sandbox, deadline)

    async def create_container(self, sandbox: Sandbox, container: Container, deadline: float) -> Adjustment:
        await self._hook("create", sandbox, deadline, container.name)
        return self.adjust(container)

    async def _hook(self, kind: str, sandbox: Sandbox, deadline: float, *more: str) -> None:
        self.calls.append((kind, sandbox, *more))
        self.deadlines.append(deadline)
        behaviour = self.behaviours.get(sandbox.pod.name)
        if behaviour is not None:
            await behaviour(sandbox, deadline)


@dataclass
class RecordingObserver:
    done: list[tuple[str, float, str]] = field(default_factory=list)

    def hook_done(self, event: str, seconds: float, outcome: str) -> None:
        self.done.append((event, seconds, outcome))


@contextlib.asynccontextmanager
async def running(plugin: NriPlugin) -> AsyncIterator[asyncio.Task[None]]:
    """The plugin runs inside the context, and ends with it by cancellation."""
    task = asyncio.create_task(plugin.run(), name="plugin")
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@dataclass
class BareEnd:
    """The runtime's end of a connection, byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    _demux: mux.Demux = field(default_factory=mux.Demux)
    _decoders: dict[int, ttrpc.FrameDecoder] = field(default_factory=dict)
    _ready: list[tuple[int, ttrpc.Frame]] = field(default_factory=list)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def call(self, stream: int, request: Request) -> None:
        self.frame(1, ttrpc.encode_request(stream, request))

    def answer(self, stream: int, response: Response = OK) -> None:
        self.frame(2, ttrpc.encode_response(stream, response))

    def frame(self, connection: int, message: bytes) -> None:
        self.send(b"".join(mux.encode(connection, message)))

    async def next(self) -> tuple[int, ttrpc.Frame]:
        """The next frame from the plugin, with its connection. EOFError at the end."""
        while not self._ready:
            async with asyncio.timeout(5):
                data = await self.reader.read(1 << 16)
            if not data:
                raise EOFError
            for chunk in self._demux.feed(data):
                decoder = self._decoders.setdefault(chunk.connection, ttrpc.FrameDecoder())
                self._ready += [(chunk.connection, frame) for frame in decoder.feed(chunk.data)]
        return self._ready.pop(0)

    async def response(self) -> tuple[int, Response]:
        """The next answer of the plugin, with its stream id."""
        connection, frame = await self.next()
        assert (connection, frame.type) == (1, ttrpc.MessageType.RESPONSE)
        return frame.stream, ttrpc.decode_response(frame.body)

    async def request(self) -> tuple[int, Request]:
        """The next call of the plugin, with its stream id."""
        connection, frame = await self.next()
        assert (connection, frame.type) == (2, ttrpc.MessageType.REQUEST)
        return frame.stream, ttrpc.decode_request(frame.body)

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


async def reply_ok(request: Request, received: float) -> Reply:
    return Reply(Response())


@dataclass
class Pair:
    trunk: Trunk
    reading: asyncio.Task[None]
    peer: BareEnd


@contextlib.asynccontextmanager
async def connected_pair(
    serve: Callable[[Request, float], Awaitable[Reply]] = reply_ok,
) -> AsyncIterator[Pair]:
    """A trunk that is being read, and the other end of its socket."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    peer = BareEnd(*await asyncio.open_connection(sock=theirs))
    trunk = Trunk(reader, writer, serve, time.monotonic)
    reading = asyncio.create_task(trunk.read_until_closed(), name="reader")
    try:
        yield Pair(trunk, reading, peer)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await trunk.close()
        await peer.close()


@contextlib.asynccontextmanager
async def bare_runtime(path: Path) -> AsyncIterator[asyncio.Queue[BareEnd]]:
    """A listener at path; what connects comes out of the queue, to be talked to by hand."""
    queue: asyncio.Queue[BareEnd] = asyncio.Queue()
    ends: list[BareEnd] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = BareEnd(reader, writer)
        ends.append(end)
        await queue.put(end)

    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    server = await asyncio.start_unix_server(accept, path)
    try:
        yield queue
    finally:
        server.close()
        for end in ends:
            await end.close()
