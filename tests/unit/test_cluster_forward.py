"""A port of the machine's loopback that leads to a node."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from kndsim.cluster.forward import forwarded


@contextmanager
def shouter() -> Iterator[int]:
    """A server that answers a whole request, once its end is seen, in capitals; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    said = b""
                    while data := connection.recv(1 << 16):
                        said += data
                    connection.sendall(said.upper())

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def ask(port: int, what: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(what)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
        return answer


def test_bytes_pass_whole_and_ends_of_requests_are_seen() -> None:
    with shouter() as far, forwarded(lambda: socket.create_connection(("127.0.0.1", far))) as port:
        assert ask(port, b"abc" * 100_000) == b"ABC" * 100_000
        assert ask(port, b"again") == b"AGAIN"


def test_where_nobody_listens_the_connection_just_ends() -> None:
    def refuse() -> socket.socket:
        raise ConnectionRefusedError

    with forwarded(refuse) as port, socket.create_connection(("127.0.0.1", port), 5) as connection:
        assert connection.recv(1) == b""


def test_nothing_listens_once_the_context_is_left() -> None:
    with shouter() as far, forwarded(lambda: socket.create_connection(("127.0.0.1", far))) as port:
        idle = socket.create_connection(("127.0.0.1", port), 5)
        idle.sendall(b"x")
    # Reset or ended: an open connection that nobody serves would hang here.
    with idle, suppress(ConnectionResetError):
        assert idle.recv(1) in (b"", b"X")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
