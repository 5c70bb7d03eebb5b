"""Several logical connections over one unix socket: 8-byte headers, without I/O.

Invariant: a message goes out in at most two frames, the first of at most 4096 bytes, because the Go side
reads ttrpc headers through a buffer of that size and drops a plugin whose frame does not fit. On the way
in nothing is assumed of frame boundaries, and nothing is allocated from a length that a peer claims.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from driver.errors import DriverError

HEADER = struct.Struct(">II")
"""Connection id, payload length; big-endian."""

FIRST_FRAME_MAX = 4096
"""Payload bytes of a frame that carries a ttrpc header."""

PAYLOAD_MAX = (4 << 20) + 10
"""The longest ttrpc message with its header, and so the longest frame that makes sense."""


class Connection(enum.IntEnum):
    """Logical connections. Frames for any other id are read and dropped."""

    PLUGIN = 1
    """The runtime calls, the plugin serves."""
    RUNTIME = 2
    """The plugin calls, the runtime serves."""


class WireError(DriverError):
    """Base of what can go wrong between plugin and runtime."""


class ProtocolError(WireError):
    """The peer broke the protocol; this connection to it cannot be used any more."""


class FrameTooLong(ProtocolError):
    """A length above what the protocol allows."""


def encode(connection: int, message: bytes) -> list[bytes]:
    """Frames, headers included, for one whole message; each message starts a frame of its own."""
    if len(message) > PAYLOAD_MAX:
        raise ValueError(f"a message of {len(message)} bytes is over the limit of {PAYLOAD_MAX}")
    pieces = [message[:FIRST_FRAME_MAX], message[FIRST_FRAME_MAX:]]
    return [HEADER.pack(connection, len(piece)) + piece for piece in pieces if piece]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Payload bytes of one logical connection, in order; a frame may come as several chunks.

    frame_length is the whole frame's payload length, starts_frame marks the frame's first chunk.
    """

    connection: int
    data: bytes
    frame_length: int
    starts_frame: bool


class Demux:
    """Bytes from the socket in, chunks out. Holds back at most one incomplete header."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._connection = 0
        self._length = 0
        self._missing = 0

    @property
    def mid_frame(self) -> bool:
        """An end of the stream here cuts a frame off."""
        return bool(self._header) or self._missing > 0

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """Yield what data completes. FrameTooLong at a length over PAYLOAD_MAX: close, do not go on."""
        view = memoryview(data)
        while len(view):
            if self._missing == 0:
                view = self._take_header(view)
                continue
            piece = view[: self._missing]
            starts = self._missing == self._length
            self._missing -= len(piece)
            view = view[len(piece) :]
            yield Chunk(self._connection, bytes(piece), self._length, starts)

    def _take_header(self, view: memoryview) -> memoryview:
        wanted = HEADER.size - len(self._header)
        self._header += view[:wanted]
        if len(self._header) == HEADER.size:
            self._connection, self._length = HEADER.unpack(self._header)
            self._header.clear()
            if self._length > PAYLOAD_MAX:
                raise FrameTooLong(
                    f"the peer announced a frame of {self._length} bytes on connection {self._connection}; "
                    f"the limit is {PAYLOAD_MAX}"
                )
            self._missing = self._length
        return view[wanted:]
