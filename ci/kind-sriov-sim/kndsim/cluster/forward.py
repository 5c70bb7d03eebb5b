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


@contextlib.contextmanager
def forwarded(connect: Connect) -> Iterator[int]:
    """The port; each connection to it is joined with one that connect() makes."""
    connections: set[socket.socket] = set()
    guard = threading.Lock()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    near, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=join, args=(near,), name="forward", daemon=True).start()

        def join(near: socket.socket) -> None:
            with near:
                try:
                    far = connect()
                except OSError:
                    return
                with far:
                    with guard:
                        connections.update((near, far))
                    _both_ways(near, far)
                    with guard:
                        connections.difference_update((near, far))

        listener = threading.Thread(target=serve, name="forward", daemon=True)
        listener.start()
        try:
            yield server.getsockname()[1]
        finally:
            # close() alone does not wake a thread that waits in accept().
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            listener.join()
            with guard:
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)


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
