"""The host's end of a guest's agent port: requests out, answers in, as many at once as there are callers.

Invariant: every call ends, with its answer, at its own deadline, or when the guest is gone.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kndsim.guest.inside.agent import LONGEST, Lines, Message, encode

_GRACE = 30.0
"""Seconds a guest has to answer on top of what a command may take: it may be busy, and is slow."""


class GuestGone(Exception):
    """The guest, or its agent, does not answer any more."""


class Refused(Exception):
    """The agent says why it could not do what was asked. number: the errno, if it was one."""

    def __init__(self, text: str, number: int | None) -> None:
        super().__init__(text)
        self.number = number


class _Call:
    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.err: list[bytes] = []
        self.ended = threading.Event()
        self.answer: Message = {}


class Answer:
    """A request's result and all its output."""

    def __init__(self, call: _Call) -> None:
        self.end = call.answer["end"]
        self.out = b"".join(call.out)
        self.err = b"".join(call.err)


class Channel:
    """One connection to an agent. A thread of its own reads; callers write in turn."""

    def __init__(self, path: Path) -> None:
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._gone = ""
        self.hello = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._reader = threading.Thread(target=self._read, name="guest-channel", daemon=True)
        self._reader.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def call(self, seconds: float, **request: object) -> Answer:
        """Refused if the agent could not; TimeoutError if it did not answer in time; GuestGone."""
        number, call = next(self._numbers), _Call()
        line = encode({"id": number, **request})
        if len(line) > LONGEST:
            raise ValueError(
                f"{len(line)} bytes are too many for one request to a guest: write it to a file first"
            )
        with self._lock:
            if self._gone:
                raise GuestGone(self._gone)
            self._calls[number] = call
        try:
            with self._writing:
                self._socket.sendall(line)
            if not call.ended.wait(seconds + _GRACE):
                raise TimeoutError(f"no answer from the guest after {seconds + _GRACE:g} s")
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise GuestGone(self._gone or str(error)) from error
        finally:
            with self._lock:
                self._calls.pop(number, None)
        if not call.answer:
            raise GuestGone(self._gone)
        if "failed" in call.answer:
            raise Refused(call.answer["failed"], call.answer.get("errno"))
        return Answer(call)

    def wait_hello(self, until: float, goes_on: Callable[[], bool]) -> bool:
        """Whether the agent came before the time (monotonic) was up; goes_on() false ends the wait."""
        while not self.hello.wait(0.05):
            if time.monotonic() > until or not goes_on() or self._gone:
                return False
        return True

    def _read(self) -> None:
        lines = Lines()
        try:
            while data := self._socket.recv(1 << 16):
                for message in lines.feed(data):
                    self._take(message)
            self._end("the guest's machine is gone")
        except OSError as error:
            self._end(f"the guest's machine is gone: {error}")

    def _take(self, message: Message) -> None:
        if "hello" in message:
            if self.hello.is_set():
                self._end("the agent in the guest ended and was started anew")
            self.hello.set()
            return
        with self._lock:
            call = self._calls.get(message.get("id", 0))
        if call is None:
            return
        for kind, pieces in (("out", call.out), ("err", call.err)):
            if kind in message:
                pieces.append(base64.b64decode(message[kind]))
        if "end" in message or "failed" in message:
            call.answer = message
            call.ended.set()

    def _end(self, why: str) -> None:
        with self._lock:
            self._gone = why
            calls = list(self._calls.values())
        for call in calls:
            call.ended.set()
