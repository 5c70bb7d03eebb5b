"""A plugin as a container runtime sees it: one accepted connection, read as strictly as Go reads it.

Invariant: what would make a real runtime drop the plugin drops it here, and is written down as a
violation, so that a test can say that there was none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from driver.nri import mux, ttrpc
from driver.nri.mux import Connection, ProtocolError, WireError
from driver.nri.ttrpc import Code, MessageType, Request, Response
from driver.pb.nri.v1 import api_pb2 as pb

PLUGIN_SERVICE = "nri.pkg.api.v1alpha1.Plugin"
RUNTIME_SERVICE = "nri.pkg.api.v1alpha1.Runtime"

GO_READ_BUFFER = 4096
GO_FRAME_QUEUE = 256


class PluginError(Exception):
    """The plugin answered with an error, or with something that is no answer. It stays connected."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.text = text
        super().__init__(f"{text} (code {code})")


class PluginTimeout(Exception):
    """No answer in time."""


class PluginGone(Exception):
    """The connection ended, or the plugin broke the protocol."""


class Peer:
    """call() calls the plugin; register answers its RegisterPlugin: a Response, or None to do it later by
    answer_registration()."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        register: Callable[[Peer, pb.RegisterPluginRequest], Response | None],
    ) -> None:
        self.name = ""
        self.index = ""
        self.events = 0
        self.state_change_only = False
        self.violations: list[str] = []
        self._reader = reader
        self._writer = writer
        self._register = register
        self._register_stream = 0
        self._served = ttrpc.ServerStreams()
        self._called = ttrpc.ClientStreams()
        self._answers: dict[int, asyncio.Future[Response]] = {}
        self._demux = mux.Demux()
        self._decoders = {id_: ttrpc.FrameDecoder() for id_ in Connection}
        self._small_frames = dict.fromkeys(Connection, 0)
        self._task = asyncio.create_task(self._read(), name="plugin reader")

    @property
    def closed(self) -> bool:
        return self._task.done()

    async def wait_closed(self) -> None:
        await asyncio.wait({self._task})

    async def call(self, method: str, payload: bytes, timeout: float, service: str = PLUGIN_SERVICE) -> bytes:
        """The answer's payload; PluginError, PluginTimeout or PluginGone. timeout in seconds."""
        if self.closed:
            raise PluginGone("the plugin is not connected any more")
        request = Request(service=service, method=method, payload=payload, timeout_nano=int(timeout * 1e9))
        stream = self._called.open()
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._answers[stream] = answer
        self.write(Connection.PLUGIN, ttrpc.encode_request(stream, request))
        try:
            async with asyncio.timeout(timeout):
                response = await answer
        except TimeoutError:
            raise PluginTimeout(f"{method}: no answer within {timeout:g} s") from None
        finally:
            self._called.forget(stream)
            self._answers.pop(stream, None)
            if answer.done() and not answer.cancelled():
                # Cancelled just as it failed: nobody else will look, and asyncio complains of that.
                answer.exception()
        if response.code != Code.OK:
            raise PluginError(response.code, response.text)
        return response.payload

    def answer_registration(self) -> None:
        """Success, where register had put it off."""
        self._reply(self._register_stream, Response())

    def write(self, connection: int, message: bytes) -> None:
        """One whole ttrpc message; nothing happens once the plugin is gone."""
        if not self._writer.is_closing():
            self._writer.write(b"".join(mux.encode(connection, message)))

    async def close(self) -> None:
        """Drop the plugin."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        # A task that is cancelled before it has begun runs no finally.
        self._writer.close()
        closing = asyncio.ensure_future(self._writer.wait_closed())
        await asyncio.wait({closing}, timeout=1.0)
        if not closing.done():
            # The plugin does not read what is left for it.
            self._writer.transport.abort()
        await asyncio.gather(closing, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(1 << 16):
                for chunk in self._demux.feed(data):
                    self._take(chunk)
        except WireError as error:
            self.violations.append(str(error))
        except OSError:
            # A reset is an end like any other.
            return
        finally:
            self._writer.close()
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(PluginGone("the connection to the plugin ended"))

    def _take(self, chunk: mux.Chunk) -> None:
        if chunk.connection not in self._decoders:
            return
        connection = Connection(chunk.connection)
        decoder = self._decoders[connection]
        if chunk.starts_frame:
            self._check_frame(connection, chunk.frame_length, decoder.missing_body)
        for frame in decoder.feed(chunk.data):
            self._small_frames[connection] = 0
            if connection is Connection.PLUGIN:
                self._take_answer(frame)
            else:
                self._take_call(frame)

    def _check_frame(self, connection: Connection, length: int, missing: int) -> None:
        """Go hands out whole frames through a small buffer, unless it is already inside a long body."""
        if length > GO_READ_BUFFER and not (missing >= GO_READ_BUFFER and missing >= length):
            raise ProtocolError(f"a frame of {length} bytes does not fit the reader: cannot allocate memory")
        self._small_frames[connection] += 1
        if self._small_frames[connection] > GO_FRAME_QUEUE:
            raise ProtocolError("failed to queue payload for reading: one message in too many frames")

    def _take_answer(self, frame: ttrpc.Frame) -> None:
        answer = self._called.receive(frame)
        if answer is None:
            return
        waiting = self._answers[answer.stream]
        if isinstance(answer.outcome, ProtocolError):
            raise answer.outcome
        if waiting.done():
            return
        if isinstance(answer.outcome, Response):
            waiting.set_result(answer.outcome)
        else:
            waiting.set_exception(PluginError(Code.UNKNOWN, str(answer.outcome)))

    def _take_call(self, frame: ttrpc.Frame) -> None:
        if frame.type == MessageType.DATA:
            raise ProtocolError(f"a data frame on stream {frame.stream} crashes the runtime")
        event = self._served.receive(frame)
        if isinstance(event, ttrpc.Rejected):
            self.violations.append(event.response.text)
            self._reply(event.stream, event.response)
        elif event is not None:
            response = self._serve(event)
            if response is not None:
                self._reply(event.stream, response)

    def _serve(self, call: ttrpc.IncomingCall) -> Response | None:
        request = call.request
        if request.service != RUNTIME_SERVICE:
            return Response(b"", Code.UNIMPLEMENTED, f"service {request.service}")
        if request.method != "RegisterPlugin":
            return Response(b"", Code.UNIMPLEMENTED, f"method {request.method}")
        message = pb.RegisterPluginRequest.FromString(request.payload)
        self.name, self.index = message.plugin_name, message.plugin_idx
        self._register_stream = call.stream
        return self._register(self, message)

    def _reply(self, stream: int, response: Response) -> None:
        self.write(Connection.RUNTIME, ttrpc.encode_response(stream, response))
