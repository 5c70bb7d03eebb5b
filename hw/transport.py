"""One request at a time over a netlink socket of our own.

Invariant: never hangs and never takes another's answer for its own. Each call has a deadline for the
kernel's answer, only datagrams from the kernel (port 0) with the request's sequence number count, and
a dump that the kernel interrupted is asked for again. Knows framing, not families: rtnetlink and other
netlink protocols share it.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from hw.errors import BadNetns, Busy, Refused, refusal
from hw.netns import NetnsHandle, socket_cookie, socket_in
from hw.wire import NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, Message, error_of, messages

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
DEFAULT_TIMEOUT = 5.0
"""Seconds for the kernel's answer. What it does before answering (a move waits for readers) is not
bounded by anything a process can do."""

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12
_BUFFER_BYTES = 256 * 1024
"""The kernel makes dump messages of at most 32 KiB, or one link if that is larger."""
_SOCKET_BUFFER_BYTES = 1024 * 1024
_DUMP_TRIES = 8

Encode = Callable[[int, int], bytes]
"""(flags, sequence) to a whole message with its header."""


def open_netlink(
    netns: NetnsHandle | None, protocol: int = socket.NETLINK_ROUTE, groups: int = 0
) -> socket.socket:
    """A bound netlink socket of the namespace (None: of this process).

    groups is a mask of multicast groups to join. BadNetns if the socket does not turn out to be there:
    the check is on the socket itself, by cookie.
    """
    if netns is None:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    else:
        kept = netns.take_spare() if protocol == socket.NETLINK_ROUTE else None
        sock = kept or socket_in(netns, socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    try:
        if netns is not None and socket_cookie(sock) != netns.cookie:
            raise BadNetns(f"the socket made for {netns.path} belongs to another network namespace")
        sock.bind((0, groups))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
        for option in (_NETLINK_EXT_ACK, _NETLINK_CAP_ACK, _NETLINK_GET_STRICT_CHK):
            # Each only adds comfort: words to errors, shorter acks, dumps filtered by the kernel.
            with contextlib.suppress(OSError):
                sock.setsockopt(_SOL_NETLINK, option, 1)
    except BaseException:
        sock.close()
        raise
    return sock


class Transport:
    """Requests over one netlink socket, safe to share between threads (they take turns)."""

    def __init__(self, sock: socket.socket, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Takes over sock."""
        self._sock = sock
        self._timeout = timeout
        sock.settimeout(timeout)
        self._sequence = int(time.monotonic()) & 0xFFFF
        self._lock = threading.Lock()
        self._buffer = bytearray(_BUFFER_BYTES)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def change(self, what: str, encode: Encode, flags: int = 0) -> None:
        """Send a request that only acks. what begins the error's text.

        NotFound, Unsupported, Busy or Refused as the kernel says; Refused with ETIMEDOUT or Busy with
        ENOBUFS where its answer was lost: then whether it was done has to be looked at.
        """
        self.get(what, encode, flags)

    def get(self, what: str, encode: Encode, flags: int = 0) -> list[bytes]:
        """Payloads of the answer to a request for one object. Errors as change()."""
        with self._lock:
            answer, _ = self._exchange(what, encode, NLM_F_REQUEST | NLM_F_ACK | flags)
        return [message.payload for message in answer]

    def get_each(self, what: str, encodes: Sequence[Encode]) -> list[bytes | None]:
        """Of each request for one object the payload of its answer, all asked at once: None where the kernel
        refused, or where its answer did not come in time or was lost. HwError where none could be asked."""
        with self._lock:
            first = self._sequence + 1
            self._sequence += len(encodes)
            found: list[bytes | None] = [None] * len(encodes)
            requests = (encode(NLM_F_REQUEST, first + at) for at, encode in enumerate(encodes))
            try:
                self._sock.sendto(b"".join(map(_padded, requests)), (0, 0))
                self._take_each(what, first, found)
            except OSError as error:
                if error.errno not in (errno.ENOBUFS, None):
                    raise refusal(what, error.errno) from error
            return found

    def _take_each(self, what: str, first: int, found: list[bytes | None]) -> None:
        """OSError with what was found so far in place."""
        deadline = time.monotonic() + self._timeout
        missing = set(range(len(found)))
        while missing:
            for message in messages(self._receive(what, deadline)):
                at = message.sequence - first
                if at in missing:
                    missing.discard(at)
                    found[at] = message.payload if message.type != NLMSG_ERROR else None

    def dump(self, what: str, encode: Encode, kind: int) -> list[bytes]:
        """Payloads of all messages of one type, from a dump that was not interrupted. Errors as change()."""
        with self._lock:
            for _ in range(_DUMP_TRIES):
                try:
                    answer, interrupted = self._exchange(what, encode, NLM_F_REQUEST | NLM_F_DUMP)
                except Busy as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    continue
                if not interrupted:
                    return [message.payload for message in answer if message.type == kind]
        raise Busy(f"{what}: it changed while being read, {_DUMP_TRIES} times", errno.EAGAIN)

    def _exchange(self, what: str, encode: Encode, flags: int) -> tuple[list[Message], bool]:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        sequence = self._sequence
        deadline = time.monotonic() + self._timeout
        answer: list[Message] = []
        interrupted = False
        try:
            self._sock.sendto(encode(flags, sequence), (0, 0))
            while True:
                for message in messages(self._receive(what, deadline)):
                    if message.sequence != sequence:
                        continue
                    interrupted = interrupted or bool(message.flags & NLM_F_DUMP_INTR)
                    if message.type in (NLMSG_ERROR, NLMSG_DONE):
                        code, words = error_of(message)
                        if code:
                            raise refusal(what, code, words)
                        return answer, interrupted
                    answer.append(message)
        except OSError as error:
            code = error.errno or errno.EIO
            if isinstance(error, TimeoutError):
                code = errno.ETIMEDOUT
            raise refusal(what, code) from error

    def _receive(self, what: str, deadline: float) -> bytes:
        """The next datagram from the kernel; others' are dropped.

        TimeoutError once the deadline has passed, at most one time-out of the socket later: that is set
        once, since setting it costs as much as a request.
        """
        while True:
            if time.monotonic() > deadline:
                raise TimeoutError
            size, _, flags, sender = self._sock.recvmsg_into([self._buffer])
            if sender[0] != 0:
                continue
            if flags & socket.MSG_TRUNC:
                raise Refused(f"{what}: the kernel's answer is over {_BUFFER_BYTES} bytes", errno.EMSGSIZE)
            return bytes(memoryview(self._buffer)[:size])


def _padded(message: bytes) -> bytes:
    """To where the next one begins."""
    return message + bytes(-len(message) % 4)


def header(kind: int, flags: int, sequence: int, payload: bytes) -> bytes:
    """A whole message from a payload that was packed by hand."""
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload
