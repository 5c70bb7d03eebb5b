"""Datagrams one after the other, whatever becomes of them, and how many the kernel took.

Invariant: sent is what the kernel took: without a route, or a device that is up, nothing was sent.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PORT = 9
FRAME = 1042
"""Bytes of one on the wire, without preamble and checksum."""
_EVERY = 0.001
_HEADERS = 42


@dataclass(slots=True)
class Flood:
    """One way. arrived is in bytes of frames that the receiver has read, where there is one."""

    sender: socket.socket
    to: str
    sink: socket.socket | None = None
    sent: int = 0
    arrived: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def send(self) -> None:
        while not self.stop.wait(_EVERY):
            with contextlib.suppress(OSError):
                self.sender.sendto(bytes(FRAME - _HEADERS), (self.to, PORT))
                self.sent += 1

    def receive(self) -> None:
        assert self.sink is not None
        self.sink.settimeout(0.2)
        while not self.stop.is_set():
            with contextlib.suppress(OSError):
                self.arrived += len(self.sink.recv(65536)) + _HEADERS


def socket_to_send_by(dscp: int = 0) -> socket.socket:
    """In the calling thread's namespace. What waits in a queue does not hold it up."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    made.setblocking(False)
    return made


def sink() -> socket.socket:
    """In the calling thread's namespace, for all its addresses."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("0.0.0.0", PORT))
    return made


@contextlib.contextmanager
def flowing(floods: Sequence[Flood]) -> Iterator[None]:
    """All of them, each in threads of its own; their sockets are closed at the end."""
    works = [flood.send for flood in floods]
    works += [flood.receive for flood in floods if flood.sink is not None]
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for flood in floods:
            flood.stop.set()
        for thread in threads:
            thread.join()
        for flood in floods:
            flood.sender.close()
            if flood.sink is not None:
                flood.sink.close()
