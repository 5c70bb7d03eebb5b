"""The trunk: one unix socket to the runtime, read by one task, written by whole messages.

Invariant: the reader never waits for a handler or for a writer, so answers and new calls get through
whatever is stuck; every call of ours ends in an answer, an error or its timeout; after close() no task,
future or descriptor of the trunk is left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from driver.nri import mux, ttrpc
from driver.nri.mux import Connection, ProtocolError, WireError
from driver.nri.ttrpc import CallFailed, CallTimedOut, Code, ConnectionClosed, Request, Response

log = logging.getLogger(__name__)

READ_SIZE = 256 * 1024
IN_FLIGHT_MAX = 1024
"""Calls of the peer being served at once. A runtime makes one; more than this gets an error each."""
WRITE_BUFFER_MAX = 16 << 20
"""Bytes a peer may leave unread before it is given up."""
CLOSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer. after_write runs once the answer is on its way and before any later call of the
    peer can be read; it must not block."""

    response: Response
    after_write: Callable[[], None] | None = None


class Serve(Protocol):
    def __call__(self, request: Request, received: float, /) -> Awaitable[Reply]:
        """Answer one call; received is the clock's time at which its bytes were read."""


class Trunk:
    """An async context manager: leaving it closes the socket and ends all its tasks.

    monotonic stamps incoming calls; it is the clock that serve's deadlines are counted in.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        serve: Serve,
        monotonic: Callable[[], float],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._serve = serve
        self._monotonic = monotonic
        self._demux = mux.Demux()
        self._frames = {id_: ttrpc.FrameDecoder() for id_ in Connection}
        self._served = ttrpc.ServerStreams()
        self._called = ttrpc.ClientStreams()
        self._answers: dict[int, asyncio.Future[Response]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: WireError | None = None

    @classmethod
    async def connect(cls, path: Path, serve: Serve, monotonic: Callable[[], float]) -> Trunk:
        """OSError if nothing listens at path."""
        reader, writer = await asyncio.open_unix_connection(path)
        return cls(reader, writer, serve, monotonic)

    async def __aenter__(self) -> Trunk:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def read_until_closed(self) -> None:
        """Return when the peer has closed between two frames.

        ProtocolError if it broke the protocol, ConnectionClosed if it went away in the middle.
        """
        try:
            while data := await self._reader.read(READ_SIZE):
                self._take(data, self._monotonic())
            if self._broken is not None:
                raise self._broken
            if self._demux.mid_frame or any(decoder.pending for decoder in self._frames.values()):
                raise ConnectionClosed("the runtime closed the connection in the middle of a message")
        except OSError as error:
            broken = ConnectionClosed(f"the connection to the runtime broke: {error}")
            self._fail(broken)
            raise broken from error
        except WireError as error:
            self._fail(error)
            raise
        self._fail(ConnectionClosed("the runtime closed the connection"))

    async def call(self, service: str, method: str, payload: bytes, timeout: float) -> bytes:
        """Call the peer; return the answer's payload. timeout in seconds.

        CallFailed, CallTimedOut, ConnectionClosed, BadMessage or MessageTooLong otherwise.
        """
        if self._broken is not None:
            raise ConnectionClosed(f"{method} was not sent: {self._broken}")
        request = Request(service=service, method=method, payload=payload, timeout_nano=int(timeout * 1e9))
        stream = self._called.open()
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._answers[stream] = answer
        try:
            # No await from open() to here: ids go out in the order in which they were taken.
            self._write(Connection.RUNTIME, ttrpc.encode_request(stream, request))
            async with asyncio.timeout(timeout):
                response = await answer
        except TimeoutError:
            raise CallTimedOut(f"{method} got no answer within {timeout:g} s") from None
        finally:
            self._called.forget(stream)
            self._answers.pop(stream, None)
            if answer.done() and not answer.cancelled():
                # Cancelled just as it failed: nobody else will look, and asyncio complains of that.
                answer.exception()
        if response.code != Code.OK:
            raise CallFailed(response.code, response.text)
        return response.payload

    async def drain(self, seconds: float) -> None:
        """Wait, at most so long, until the calls being served are answered. The peer's later calls are
        not read any more if the caller has ended read_until_closed."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def close(self) -> None:
        """End the serving tasks, fail our pending calls, close the socket. Never raises."""
        self._fail(ConnectionClosed("the connection to the runtime was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.close()
        closing = asyncio.ensure_future(self._writer.wait_closed())
        await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
        if not closing.done():
            # The peer does not read what is still buffered for it.
            self._writer.transport.abort()
        await asyncio.gather(closing, return_exceptions=True)

    def _take(self, data: bytes, received: float) -> None:
        for chunk in self._demux.feed(data):
            if chunk.connection == Connection.PLUGIN:
                for frame in self._frames[Connection.PLUGIN].feed(chunk.data):
                    self._take_call(frame, received)
            elif chunk.connection == Connection.RUNTIME:
                for frame in self._frames[Connection.RUNTIME].feed(chunk.data):
                    self._take_answer(frame)

    def _take_answer(self, frame: ttrpc.Frame) -> None:
        answer = self._called.receive(frame)
        if answer is None:
            log.debug("an answer on stream %d came too late or was never asked for", frame.stream)
            return
        waiting = self._answers[answer.stream]
        if waiting.done():
            return
        if isinstance(answer.outcome, Response):
            waiting.set_result(answer.outcome)
        else:
            waiting.set_exception(answer.outcome)

    def _take_call(self, frame: ttrpc.Frame, received: float) -> None:
        event = self._served.receive(frame)
        if event is None:
            return
        if isinstance(event, ttrpc.Rejected):
            log.warning("the runtime sent a bad request: %s", event.response.text)
            self._answer(event.stream, event.response)
        elif len(self._tasks) >= IN_FLIGHT_MAX:
            text = f"{IN_FLIGHT_MAX} calls are being served; try again"
            self._answer(event.stream, Response(b"", Code.RESOURCE_EXHAUSTED, text))
        else:
            task = asyncio.create_task(self._serve_call(event, received), name=event.request.method)
            # asyncio itself keeps only weak references to tasks.
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve_call(self, call: ttrpc.IncomingCall, received: float) -> None:
        try:
            reply = await self._serve(call.request, received)
        except Exception as error:  # whatever it is, an unanswered call makes the runtime drop us
            log.exception("%s failed", call.request.method)
            reply = Reply(Response(b"", Code.UNKNOWN, f"{type(error).__name__}: {error}"))
        self._answer(call.stream, reply.response)
        try:
            if reply.after_write is not None:
                reply.after_write()
        except Exception:
            log.exception("what follows the answer to %s failed", call.request.method)
        try:
            # Counts as being served until the peer has taken it: that is the back-pressure.
            await self._writer.drain()
        except OSError as error:
            log.debug("the answer to %s was not delivered: %s", call.request.method, error)

    def _answer(self, stream: int, response: Response) -> None:
        try:
            message = ttrpc.encode_response(stream, response)
        except ttrpc.MessageTooLong as error:
            message = ttrpc.encode_response(stream, Response(b"", Code.RESOURCE_EXHAUSTED, str(error)))
        self._write(Connection.PLUGIN, message)

    def _write(self, connection: Connection, message: bytes) -> None:
        """Queue one whole message. Without an await inside, messages cannot interleave."""
        if self._broken is not None or self._writer.is_closing():
            return
        self._writer.write(b"".join(mux.encode(connection, message)))
        if self._writer.transport.get_write_buffer_size() > WRITE_BUFFER_MAX:
            error = ProtocolError(f"the runtime left {WRITE_BUFFER_MAX} bytes unread; giving it up")
            self._fail(error)
            # The reader sees the end of the stream and reports it.
            self._writer.transport.abort()

    def _fail(self, cause: WireError) -> None:
        """No more calls and no more writes; the pending calls end now."""
        if self._broken is None:
            self._broken = cause
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(ConnectionClosed(f"no answer will come: {self._broken}"))
