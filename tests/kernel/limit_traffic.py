"""Traffic to hold a limit against: as much as goes, by TCP or UDP, and how long a question takes meanwhile.

Invariant: rates are of payload that arrived, over the time between two reads of the receiver's own count. No
payload is copied at either end, so that two processors keep more than 10 Gbit/s going.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from kndsim.links import SimNetns

TCP_PORT, UDP_PORT, ECHO_PORT = 9100, 9101, 9102
UDP_PAYLOAD = 1400
_UDP_SEGMENT, _UDP_GRO = 103, 104
"""Socket options, of linux/udp.h."""
_CHUNK = 512 << 10
_PATIENCE = 0.2
"""Seconds that a sender waits for room."""
TCP_SHARE = 1448 / 1514
"""Payload of an Ethernet frame that is full, with IPv4 and TCP's timestamps."""


@dataclass
class Counted:
    """What the receiver has read so far. started is when there can have been nothing yet."""

    bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)

    def overall(self) -> float:
        """Bits per second since the start: of a receiver that reads in fits and starts no more than came."""
        return self.bytes * 8 / (time.monotonic() - self.started)

    def rate(self, seconds: float) -> float:
        """Bits per second over that long from now."""
        started, before = time.monotonic(), self.bytes
        self.stop.wait(seconds)
        return (self.bytes - before) * 8 / (time.monotonic() - started)


def _listener(where: SimNetns, address: str, kind: socket.SocketKind, port: int) -> socket.socket:
    made = where.run(lambda: socket.socket(socket.AF_INET, kind))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    return made


def _drain(listener: socket.socket, counted: Counted, streams: bool) -> None:
    nowhere = bytearray(_CHUNK)
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as ready:
        if streams:
            listener.listen(128)
        ready.register(listener, selectors.EVENT_READ)
        while not counted.stop.is_set():
            for key, _ in ready.select(0.1):
                sock: socket.socket = key.fileobj  # type: ignore[assignment]
                if streams and sock is listener:
                    ready.register(stack.enter_context(sock.accept()[0]), selectors.EVENT_READ)
                    continue
                with contextlib.suppress(ConnectionResetError):
                    # The length alone: the payload is thrown away in the kernel.
                    size = sock.recv_into(nowhere, _CHUNK, socket.MSG_TRUNC)
                    counted.bytes += size
                    if streams and not size:
                        ready.unregister(sock)


def _pour_stream(sock: socket.socket, counted: Counted) -> None:
    source = os.memfd_create("payload")
    try:
        os.ftruncate(source, _CHUNK)
        with sock, contextlib.suppress(ConnectionError):
            while not counted.stop.is_set():
                with contextlib.suppress(BlockingIOError):
                    os.sendfile(sock.fileno(), source, 0, _CHUNK)
    finally:
        os.close(source)


def _pour_datagrams(sock: socket.socket, counted: Counted, datagrams: int) -> None:
    chunk = bytes(UDP_PAYLOAD * datagrams)
    with sock:
        while not counted.stop.is_set():
            # A queue that is full is no error to wait for: what it dropped is gone, as it is meant to be.
            with contextlib.suppress(OSError):
                sock.send(chunk)


@contextlib.contextmanager
def tcp(
    sender: SimNetns, receiver: SimNetns, address: str, flows: int, port: int = TCP_PORT
) -> Iterator[Counted]:
    """So many connections from one namespace to an address of another, each sending what it can."""

    def connect() -> socket.socket:
        made = sender.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        made.settimeout(5.0)
        made.connect((address, port))
        made.settimeout(None)
        # The kernel's own limit: a timeout of Python's would make the file non-blocking, sendfile's too.
        patience = struct.pack("@ll", 0, int(_PATIENCE * 1e6))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        return made

    yield from _traffic(receiver, address, socket.SOCK_STREAM, port, connect, flows, _pour_stream)


@contextlib.contextmanager
def udp(
    sender: SimNetns, receiver: SimNetns, address: str, port: int = UDP_PORT, datagrams: int = 1
) -> Iterator[Counted]:
    """Datagrams of UDP_PAYLOAD bytes, so many in one call: then the kernel cuts them, as late as it can."""

    def connect() -> socket.socket:
        return _datagram_socket(sender, address, port, datagrams)

    def pour(sock: socket.socket, counted: Counted) -> None:
        _pour_datagrams(sock, counted, datagrams)

    yield from _traffic(receiver, address, socket.SOCK_DGRAM, port, connect, 1, pour)


@contextlib.contextmanager
def udp_unread(
    sender: SimNetns, receiver: SimNetns, address: str, port: int = UDP_PORT, datagrams: int = 1
) -> Iterator[threading.Event]:
    """The same, and nobody reads them: for whoever counts at the interface, and needs all that the sender can
    do. Yields what ends it."""
    counted = Counted()
    with _listener(receiver, address, socket.SOCK_DGRAM, port) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sock = _datagram_socket(sender, address, port, datagrams)
        thread = threading.Thread(target=_pour_datagrams, args=(sock, counted, datagrams))
        thread.start()
        try:
            yield counted.stop
        finally:
            counted.stop.set()
            thread.join()


def _datagram_socket(sender: SimNetns, address: str, port: int, datagrams: int) -> socket.socket:
    made = sender.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    # What waits in the queue counts against it, so that it cannot run far ahead.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    made.setblocking(False)
    if datagrams > 1:
        made.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, UDP_PAYLOAD)
    made.connect((address, port))
    return made


def _traffic(receiver, address, kind, port, connect, flows, pour):  # type: ignore[no-untyped-def]
    counted = Counted()
    listener = _listener(receiver, address, kind, port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    streams = kind is socket.SOCK_STREAM
    if not streams:
        listener.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    threads = [threading.Thread(target=_drain, args=(listener, counted, streams))]
    with listener:
        threads[0].start()
        try:
            if streams:
                _wait_listening(listener)
            for _ in range(flows):
                threads.append(threading.Thread(target=pour, args=(connect(), counted)))
                threads[-1].start()
            yield counted
        finally:
            counted.stop.set()
            for thread in threads:
                thread.join()


def _wait_listening(listener: socket.socket) -> None:
    give_up = time.monotonic() + 5
    while not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        assert time.monotonic() < give_up
        threading.Event().wait(0.005)


@contextlib.contextmanager
def echo(where: SimNetns, address: str) -> Iterator[None]:
    """Answers datagrams."""
    stop = threading.Event()
    listener = _listener(where, address, socket.SOCK_DGRAM, ECHO_PORT)
    listener.settimeout(0.1)

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                data, peer = listener.recvfrom(64)
                listener.sendto(data, peer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with listener:
            yield
            stop.set()
            thread.join()
    finally:
        stop.set()


def round_trips(where: SimNetns, address: str, count: int) -> list[float]:
    """Seconds that each of count questions took, in rising order; one that was lost took a second."""
    asker = where.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    asker.settimeout(1.0)
    found = []
    with asker:
        for number in range(count):
            started = time.monotonic()
            asker.sendto(struct.pack("=I", number), (address, ECHO_PORT))
            with contextlib.suppress(TimeoutError):
                while struct.unpack("=I", asker.recv(64))[0] != number:
                    pass
            found.append(time.monotonic() - started)
            threading.Event().wait(0.01)
    return sorted(found)
