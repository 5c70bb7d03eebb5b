"""ttrpc, the containerd RPC over one byte stream, without I/O: frames, bodies and stream ids.

Invariant: whatever bytes come in, the outcome is an event, an answer for the peer or a WireError, never a
hang and never an allocation from a claimed length. Only requests and responses are ever encoded: a data
frame crashes some runtimes.

WireError
├── ProtocolError       the peer broke framing; the connection cannot be used any more
│   └── FrameTooLong    a length above the protocol's
├── BadMessage          a body is not what it should be; the connection goes on
├── MessageTooLong      ours is too long; nothing was encoded
├── CallFailed          the peer answered with an error status
├── CallTimedOut        no answer in time
└── ConnectionClosed    the connection ended before the answer
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from driver.nri.mux import FrameTooLong, ProtocolError, WireError
from driver.pb.ttrpc.v1 import ttrpc_pb2 as pb

HEADER = struct.Struct(">IIBB")
"""Body length, stream id, type, flags; big-endian."""

BODY_MAX = 4 << 20

STATUS_TEXT_MAX = 1024
"""Bytes of an error text we send; it ends up in pod events and logs."""


class MessageType(enum.IntEnum):
    REQUEST = 1
    RESPONSE = 2
    DATA = 3


class Code(enum.IntEnum):
    """The gRPC codes in use here. Others arrive as plain integers."""

    OK = 0
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class BadMessage(WireError):
    """A body that is not the protobuf message it should be."""


class MessageTooLong(WireError):
    """A message of ours over the protocol's limit. Nothing was written; the connection is usable."""


class CallFailed(WireError):
    """The peer answered with an error. code is a gRPC code, text the peer's words."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.text = text
        super().__init__(f"{text or 'no text'} (code {code})")


class CallTimedOut(WireError):
    """The peer did not answer in time. A late answer is dropped."""


class ConnectionClosed(WireError):
    """The connection ended, so the answer will never come."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One ttrpc frame as it is on the wire. type is not checked: peers ignore unknown ones."""

    stream: int
    type: int
    body: bytes
    flags: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A unary call. timeout_nano is relative to sending; 0: none; negative: already over."""

    service: str
    method: str
    payload: bytes
    timeout_nano: int = 0


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: payload where code is OK, else text. text is made clean when encoded."""

    payload: bytes = b""
    code: int = Code.OK
    text: str = ""


@dataclass(frozen=True, slots=True)
class IncomingCall:
    stream: int
    request: Request


@dataclass(frozen=True, slots=True)
class Rejected:
    """A frame that gets this answer without any handler being asked."""

    stream: int
    response: Response


def clean_text(text: str, limit: int = STATUS_TEXT_MAX) -> str:
    """text as valid UTF-8 of at most limit bytes: a status that is not valid does not decode in Go."""
    encoded = text.encode("utf-8", errors="replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - 3].decode(errors="ignore") + "…"


def encode_frame(frame: Frame) -> bytes:
    if len(frame.body) > BODY_MAX:
        raise MessageTooLong(f"a message of {len(frame.body)} bytes is over the limit of {BODY_MAX}")
    return HEADER.pack(len(frame.body), frame.stream, frame.type, frame.flags) + frame.body


def encode_request(stream: int, request: Request) -> bytes:
    body = pb.Request(
        service_name=request.service,
        method=request.method,
        payload=request.payload,
        timeout_nano=request.timeout_nano,
    )
    return encode_frame(Frame(stream, MessageType.REQUEST, body.SerializeToString()))


def encode_response(stream: int, response: Response) -> bytes:
    if response.code == Code.OK:
        body = pb.Response(payload=response.payload)
    else:
        # Peers decode the payload before they look at the status, so an error carries none.
        body = pb.Response(status=pb.Status(code=response.code, message=clean_text(response.text)))
    return encode_frame(Frame(stream, MessageType.RESPONSE, body.SerializeToString()))


def decode_request(body: bytes) -> Request:
    """BadMessage if body is no request. Metadata and unknown fields are skipped."""
    try:
        message = pb.Request.FromString(body)
    except DecodeError as error:
        raise BadMessage(f"unmarshal request error: {error}") from error
    return Request(
        service=message.service_name,
        method=message.method,
        payload=message.payload,
        timeout_nano=message.timeout_nano,
    )


def decode_response(body: bytes) -> Response:
    """BadMessage if body is no response. An empty body is success with an empty message."""
    try:
        message = pb.Response.FromString(body)
    except DecodeError as error:
        raise BadMessage(f"the peer's answer is not a ttrpc response: {error}") from error
    if message.status.code == Code.OK:
        return Response(message.payload)
    return Response(b"", message.status.code, message.status.message)


class FrameDecoder:
    """Payload bytes of one logical connection in, frames out. Memory is bounded by one frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame."""
        return len(self._buffer)

    @property
    def missing_body(self) -> int:
        """Bytes that the body being received still lacks; 0 between frames and inside a header."""
        if len(self._buffer) < HEADER.size:
            return 0
        length = HEADER.unpack_from(self._buffer)[0]
        return int(length) - (len(self._buffer) - HEADER.size)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield what data completes. FrameTooLong at a length over BODY_MAX: close, do not go on."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= HEADER.size:
                length, stream, kind, flags = HEADER.unpack_from(self._buffer, start)
                if length > BODY_MAX:
                    raise FrameTooLong(
                        f"the peer announced a body of {length} bytes on stream {stream}; "
                        f"the limit is {BODY_MAX}"
                    )
                end = start + HEADER.size + length
                if len(self._buffer) < end:
                    return
                body = bytes(memoryview(self._buffer)[start + HEADER.size : end])
                start = end
                yield Frame(stream, kind, body, flags)
        finally:
            # Once per read, not per frame: deleting a prefix moves what is behind it.
            del self._buffer[:start]


class ServerStreams:
    """The stream-id rules of the answering side of one connection."""

    def __init__(self) -> None:
        self._last = 0

    def receive(self, frame: Frame) -> IncomingCall | Rejected | None:
        """A call to serve, an answer to give at once, or None for what a server ignores.

        Streaming flags are not looked at: every request is served as a unary one.
        """
        if frame.type != MessageType.REQUEST:
            return None
        if frame.stream % 2 == 0:
            return self._reject(frame, "StreamID must be odd for client initiated streams")
        if frame.stream <= self._last:
            return self._reject(frame, "StreamID cannot be re-used and must increment")
        self._last = frame.stream
        try:
            return IncomingCall(frame.stream, decode_request(frame.body))
        except BadMessage as error:
            return self._reject(frame, str(error))

    @staticmethod
    def _reject(frame: Frame, text: str) -> Rejected:
        return Rejected(frame.stream, Response(b"", Code.INVALID_ARGUMENT, text))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came for a call of ours: a response, or why there is none."""

    stream: int
    outcome: Response | WireError


class ClientStreams:
    """The stream ids of the calling side of one connection: odd, increasing, never used twice."""

    def __init__(self) -> None:
        self._next = 1
        self._open: set[int] = set()

    def open(self) -> int:
        """A new id. Write its request before opening another, so that ids never go backwards."""
        stream = self._next
        self._next += 2
        self._open.add(stream)
        return stream

    def forget(self, stream: int) -> None:
        """No answer is awaited any more; one that still comes is dropped."""
        self._open.discard(stream)

    def receive(self, frame: Frame) -> Answer | None:
        """The answer to an open call, or None for a late, repeated or unknown one."""
        if frame.stream not in self._open:
            return None
        self._open.discard(frame.stream)
        if frame.type != MessageType.RESPONSE:
            return Answer(
                frame.stream, ProtocolError(f"the peer sent type {frame.type} in place of an answer")
            )
        try:
            return Answer(frame.stream, decode_response(frame.body))
        except BadMessage as error:
            return Answer(frame.stream, error)
