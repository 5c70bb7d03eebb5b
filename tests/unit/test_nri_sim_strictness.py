"""The simulated runtime is as strict and as lenient as a real one, so that passing against it means much.

Invariant: each test is a plugin that does one thing, by hand, and the table's answer to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from driver.nri import mux, ttrpc
from driver.nri.ttrpc import Code, Frame, MessageType, Request, Response
from driver.pb.nri.v1 import api_pb2 as pb
from kndsim.runtime import HookOutcome, PodSpec, Runtime, RuntimeMode, SimSandbox
from tests.unit.nri_support import run, until

RUNTIME = "nri.pkg.api.v1alpha1.Runtime"
BOX = SimSandbox(id="sb1", pod=PodSpec(namespace="ns", name="p", uid="u"), netns_path=None, pid=1)


class HandPlugin:
    """A plugin that sends what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.requests: list[Request] = []
        self._demux = mux.Demux()
        self._frames = {1: ttrpc.FrameDecoder(), 2: ttrpc.FrameDecoder()}
        self._queue: list[tuple[int, Frame]] = []

    def send(self, connection: int, message: bytes, sizes: tuple[int, ...] = ()) -> None:
        """One message, in mux frames of the given sizes and the rest."""
        for size in sizes:
            self.writer.write(struct.pack(">II", connection, size) + message[:size])
            message = message[size:]
        if message:
            self.writer.write(struct.pack(">II", connection, len(message)) + message)

    def register(self, name: str = "p", index: str = "10", stream: int = 1) -> None:
        payload = pb.RegisterPluginRequest(plugin_name=name, plugin_idx=index).SerializeToString()
        request = Request(service=RUNTIME, method="RegisterPlugin", payload=payload)
        self.send(2, ttrpc.encode_request(stream, request))

    async def next(self) -> tuple[int, Frame]:
        while not self._queue:
            async with asyncio.timeout(5):
                data = await self.reader.read(1 << 16)
            if not data:
                raise EOFError
            for chunk in self._demux.feed(data):
                decoded = self._frames[chunk.connection].feed(chunk.data)
                self._queue += [(chunk.connection, frame) for frame in decoded]
        return self._queue.pop(0)

    async def request(self, method: str) -> int:
        """Wait for this call; return its stream id."""
        while True:
            connection, frame = await self.next()
            if connection == 1:
                request = ttrpc.decode_request(frame.body)
                self.requests.append(request)
                assert request.method == method
                return frame.stream

    def reply(self, stream: int, response: Response = Response()) -> None:  # noqa: B008 - frozen
        self.send(1, ttrpc.encode_response(stream, response))

    async def shake_hands(self, events: int = 0xF) -> None:
        self.register()
        payload = pb.ConfigureResponse(events=events).SerializeToString()
        self.reply(await self.request("Configure"), Response(payload))
        self.reply(await self.request("Synchronize"))


@contextlib.asynccontextmanager
async def hand_plugin(runtime: Runtime) -> AsyncIterator[HandPlugin]:
    reader, writer = await asyncio.open_unix_connection(runtime.socket)
    try:
        yield HandPlugin(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def event_in_hand(
    root: Path, mode: RuntimeMode = RuntimeMode.POD_RPC
) -> AsyncIterator[tuple[Runtime, HandPlugin, asyncio.Task[object], int]]:
    """A registered plugin that has been sent a Run and has not answered it yet."""
    async with Runtime(root, mode, request_timeout=1.0) as runtime, hand_plugin(runtime) as plugin:
        await plugin.shake_hands()
        await runtime.wait_plugin()
        sending = asyncio.create_task(runtime.send_event(pb.RUN_POD_SANDBOX, BOX))
        method = "RunPodSandbox" if mode is RuntimeMode.POD_RPC else "StateChange"
        yield runtime, plugin, sending, await plugin.request(method)


def message_of(size: int) -> bytes:
    """An OK answer on stream 5 whose whole ttrpc message has this size."""
    payload = size - 10 - (4 if size > 142 else 2)
    message = ttrpc.encode_response(5, Response(bytes(payload)))
    # Length prefixes grow in steps; pad to the byte by one.
    while len(message) < size:
        payload += 1
        message = ttrpc.encode_response(5, Response(bytes(payload)))
    assert len(message) == size
    return message


@pytest.mark.parametrize(
    ("size", "sizes", "kept"),
    [
        (4095, (), True),
        (4096, (), True),
        (4097, (), False),
        (4097, (4096,), True),
        (5500, (), False),
        (5500, (5000,), False),
        (5500, (4096,), True),
        (16096, (4096,), True),
        (12288, (4096, 4096), True),
        (2700, tuple([1] * 2699), False),
    ],
)
def test_frames_are_read_as_go_reads_them(
    short_tmp: Path, size: int, sizes: tuple[int, ...], kept: bool
) -> None:
    async def test() -> None:
        async with event_in_hand(short_tmp) as (runtime, plugin, sending, stream):
            assert stream == 5
            plugin.send(1, message_of(size), sizes)
            record = await sending
            assert record.outcome is (HookOutcome.OK if kept else HookOutcome.ABSENT)
            assert bool(runtime.plugins) == kept
            assert bool(runtime.violations) == (not kept)

    run(test())


@pytest.mark.parametrize(
    ("frame", "outcome", "kept"),
    [
        (Frame(5, MessageType.RESPONSE, b""), HookOutcome.OK, True),
        (Frame(5, MessageType.RESPONSE, b"", 0xFF), HookOutcome.OK, True),
        (Frame(5, MessageType.RESPONSE, b"\x0a\x02\x08\x04"), HookOutcome.ERROR, True),
        (Frame(5, MessageType.RESPONSE, b"\xff\xff"), HookOutcome.ERROR, True),
        (Frame(5, MessageType.DATA, b""), HookOutcome.ABSENT, False),
        (Frame(5, 77, b""), HookOutcome.ABSENT, False),
        (Frame(99, MessageType.RESPONSE, b""), HookOutcome.TIMEOUT_OPEN, False),
    ],
)
def test_bad_replies_fail_open_or_closed_as_the_table_says(
    short_tmp: Path, frame: Frame, outcome: HookOutcome, kept: bool
) -> None:
    async def test() -> None:
        async with event_in_hand(short_tmp) as (runtime, plugin, sending, _):
            plugin.send(1, ttrpc.encode_frame(frame))
            assert (await sending).outcome is outcome
            assert bool(runtime.plugins) == kept

    run(test())


def test_a_connection_closed_in_the_middle_fails_open(short_tmp: Path) -> None:
    async def test() -> None:
        async with event_in_hand(short_tmp) as (runtime, plugin, sending, _):
            plugin.writer.close()
            assert (await sending).outcome is HookOutcome.ABSENT
            assert not runtime.plugins

    run(test())


def test_without_plugin_an_event_is_absent(short_tmp: Path) -> None:
    async def test() -> None:
        async with Runtime(short_tmp, RuntimeMode.CRIO) as runtime:
            record = await runtime.send_event(pb.STOP_POD_SANDBOX, BOX)
            assert (record.outcome, record.event) == (HookOutcome.ABSENT, "StopPodSandbox")
            assert runtime.log == (record,)

    run(test())


def test_a_data_frame_to_the_runtime_is_a_crash(short_tmp: Path) -> None:
    async def test() -> None:
        async with event_in_hand(short_tmp) as (runtime, plugin, sending, _):
            plugin.send(2, ttrpc.encode_frame(Frame(9, MessageType.DATA, b"")))
            await sending
            assert "crashes the runtime" in runtime.violations[0]

    run(test())


def test_a_plugin_without_the_new_calls_gets_state_changes_from_then_on(short_tmp: Path) -> None:
    async def test() -> None:
        async with event_in_hand(short_tmp) as (runtime, plugin, sending, stream):
            plugin.reply(stream, Response(b"", Code.UNIMPLEMENTED, "method RunPodSandbox"))
            plugin.reply(await plugin.request("StateChange"))
            assert (await sending).outcome is HookOutcome.OK
            change = pb.StateChangeEvent.FromString(plugin.requests[-1].payload)
            assert (change.event, change.pod.id) == (pb.RUN_POD_SANDBOX, "sb1")
            assert plugin.requests[-1].timeout_nano < 1_000_000_000
            stopping = asyncio.create_task(runtime.send_event(pb.STOP_POD_SANDBOX, BOX))
            plugin.reply(await plugin.request("StateChange"))
            await stopping

    run(test())


@pytest.mark.parametrize(
    ("mode", "events", "taken"),
    [
        (RuntimeMode.STATE_CHANGE, 0x7FF, True),
        (RuntimeMode.STATE_CHANGE, 0x800, False),
        (RuntimeMode.STATE_CHANGE, -1, False),
        (RuntimeMode.POD_RPC, 0x3FFF, True),
        (RuntimeMode.POD_RPC, 0x4000, False),
        (RuntimeMode.CRIO, 0, True),
    ],
)
def test_an_event_mask_with_unknown_bits_is_not_taken(
    short_tmp: Path, mode: RuntimeMode, events: int, taken: bool
) -> None:
    async def test() -> None:
        async with Runtime(short_tmp, mode) as runtime, hand_plugin(runtime) as plugin:
            if taken:
                await plugin.shake_hands(events)
                await runtime.wait_plugin()
            else:
                with pytest.raises(EOFError):
                    await plugin.shake_hands(events)
                await until(lambda: runtime.refused)
                assert "invalid event mask" in runtime.refused[0]

    run(test())


@pytest.mark.parametrize(("name", "index"), [("p", "1"), ("p", "1a"), ("", "10"), ("a/b", "10")])
def test_a_bad_name_or_index_is_refused_and_the_connection_left_idle(
    short_tmp: Path, name: str, index: str
) -> None:
    async def test() -> None:
        async with Runtime(short_tmp, RuntimeMode.POD_RPC) as runtime, hand_plugin(runtime) as plugin:
            plugin.register(name, index)
            _, frame = await plugin.next()
            assert ttrpc.decode_response(frame.body).code == Code.UNKNOWN
            assert len(runtime.refused) == 1
            # The next plugin is taken while that connection is still open.
            async with hand_plugin(runtime) as another:
                await another.shake_hands()
                await runtime.wait_plugin()

    run(test())


def test_a_silent_plugin_holds_the_next_one_up_until_its_time_is_over(short_tmp: Path) -> None:
    async def test() -> None:
        runtime = Runtime(short_tmp, RuntimeMode.POD_RPC, registration_timeout=0.1)
        async with runtime, hand_plugin(runtime) as silent:
            await until(lambda: runtime._nri._peers)
            async with hand_plugin(runtime) as plugin:
                await plugin.shake_hands()
                await runtime.wait_plugin()
                with pytest.raises(EOFError):
                    await silent.next()
            assert runtime.refused == ("no RegisterPlugin in time",)

    run(test())


@pytest.mark.parametrize("answers_more", [True, False])
def test_a_split_synchronize_needs_its_parts_acknowledged(short_tmp: Path, answers_more: bool) -> None:
    async def test() -> None:
        runtime = Runtime(short_tmp, RuntimeMode.POD_RPC, sync_chunk=2)
        runtime._nri._inventory = lambda: ([pb.PodSandbox(id=str(n)) for n in range(5)], [])
        async with runtime, hand_plugin(runtime) as plugin:
            plugin.register()
            configured = pb.ConfigureResponse(events=0xF).SerializeToString()
            plugin.reply(await plugin.request("Configure"), Response(configured))
            more = Response(pb.SynchronizeResponse(more=answers_more).SerializeToString())
            plugin.reply(await plugin.request("Synchronize"), more)
            if not answers_more:
                with pytest.raises(EOFError):
                    await plugin.request("Synchronize")
                assert runtime.refused == ("plugin does not handle split sync requests",)
                return
            plugin.reply(await plugin.request("Synchronize"), more)
            plugin.reply(await plugin.request("Synchronize"))
            await runtime.wait_plugin()
            parts = [pb.SynchronizeRequest.FromString(request.payload) for request in plugin.requests[1:]]
            assert [[pod.id for pod in part.pods] for part in parts] == [["0", "1"], ["2", "3"], ["4"]]
            assert [part.more for part in parts] == [True, True, False]

    run(test())


def test_plugins_are_called_by_index_and_the_first_error_stops_the_chain(short_tmp: Path) -> None:
    async def test() -> None:
        runtime = Runtime(short_tmp, RuntimeMode.POD_RPC)
        async with runtime, hand_plugin(runtime) as late, hand_plugin(runtime) as early:
            for plugin, index in ((late, "20"), (early, "05")):
                plugin.register(index=index)
                answer = Response(pb.ConfigureResponse(events=0xF).SerializeToString())
                plugin.reply(await plugin.request("Configure"), answer)
                plugin.reply(await plugin.request("Synchronize"))
            await until(lambda: len(runtime.plugins) == 2)
            assert [peer.index for peer in runtime.plugins] == ["05", "20"]
            sending = asyncio.create_task(runtime.send_event(pb.RUN_POD_SANDBOX, BOX))
            stream = await early.request("RunPodSandbox")
            early.reply(stream, Response(b"", Code.UNKNOWN, "no"))
            assert (await sending).outcome is HookOutcome.ERROR
            assert [request.method for request in late.requests] == ["Configure", "Synchronize"]

    run(test())
