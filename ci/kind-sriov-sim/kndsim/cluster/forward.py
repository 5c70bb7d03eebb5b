"""A TCP port of this machine's loopback that leads to an address in another network namespace.

Invariant: it listens on 127.0.0.1 alone; bytes pass unchanged and in order, half-closed connections stay
half-closed; everything ends with the context.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

Connect = Callable[[], socket.socket]
_CHUNK = 1 << 16


class _Pairs:
    """Connections that are joined now, and whether new ones still may be."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._guard = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def start(self, near: socket.socket) -> None:
        thread = threading.Thread(target=self._join, args=(near,), name="forward", daemon=True)
        with self._guard:
            self._threads.add(thread)
        thread.start()

    def _join(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError), self._connect() as far:
            with self._guard:
                if self._closed:
                    return
                self._open |= {near, far}
            try:
                _both_ways(near, far)
            finally:
                with self._guard:
                    self._open -= {near, far}
        with self._guard:
            self._threads.discard(threading.current_thread())

    def close(self) -> None:
        with self._guard:
            self._closed = True
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def forwarded(connect: Connect) -> Iterator[int]:
    """The port; each connection to it is joined with one that connect() makes."""
    pairs = _Pairs(connect)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    near, _ = server.accept()
                except OSError:
                    return
                pairs.start(near)

        listener = threading.Thread(target=serve, name="forward", daemon=True)
        listener.start()
        try:
            yield server.getsockname()[1]
        finally:
            # close() alone does not wake a thread that waits in accept().
            server.shutdown(socket.SHUT_RDWR)
            listener.join()
            pairs.close()


def _both_ways(near: socket.socket, far: socket.socket) -> None:
    back = threading.Thread(target=_copy, args=(far, near), name="forward", daemon=True)
    back.start()
    _copy(near, far)
    back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
