"""The HTTP server that shows metrics and readiness.

Invariant: it listens on loopback only, away from the asyncio loop; a client can make it neither wait
for ever nor start an unbounded number of threads, and a bad request is the client's error.
"""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import logging
import socket
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Final, NamedTuple, Self

from driver.errors import DriverError
from driver.metrics.registry import Metrics

_log = logging.getLogger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_CLIENT_SECONDS = 5.0
"""How long a client may take to send its request or to read the answer."""
_CLIENTS_MAX = 8
_PAUSE_SECONDS = 0.1


class MetricsUnavailable(DriverError):
    """The metrics server cannot listen where it was told to."""


class MetricsServer:
    """Serves /metrics, /readyz and /livez on a loopback address. A context manager.

    unready and unlive give the reasons, sentences, why the agent is not; none means it is. They are
    called in the server's threads and must not block for long.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        port: int,
        host: str = "127.0.0.1",
        unready: Callable[[], Sequence[str]] = tuple,
        unlive: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """port 0 picks a free one. MetricsUnavailable: not loopback, or not a port."""
        if not _is_loopback(host):
            raise MetricsUnavailable(
                f"metrics are served on loopback only, and {host} is not a loopback address: use "
                "127.0.0.1 and a proxy that authenticates"
            )
        if not 0 <= port <= 65535:
            raise MetricsUnavailable(f"{port} is not a TCP port: use 0 to 65535")
        metrics.watch_unready(unready)
        self._address = (host, port)
        self._routes: dict[str, Callable[[], _Answer]] = {
            "/metrics": lambda: _metrics_answer(metrics),
            "/readyz": lambda: _reasons_answer(unready),
            "/livez": lambda: _reasons_answer(unlive),
        }
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """Where it listens. Only inside the context."""
        assert self._server is not None
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        """MetricsUnavailable: the port is taken."""
        host, port = self._address
        try:
            server = _Server(self._address, self._routes)
        except OSError as error:
            raise MetricsUnavailable(
                f"metrics cannot be served on {host} port {port}: {error.strerror or error}; "
                "choose another port"
            ) from error
        self._server = server
        self._thread = threading.Thread(target=server.serve, name="metrics", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.stop()
        self._thread.join()
        self._server.server_close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Answer(NamedTuple):
    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


def _metrics_answer(metrics: Metrics) -> _Answer:
    return _Answer(HTTPStatus.OK, metrics.scrape(), CONTENT_TYPE)


def _reasons_answer(read: Callable[[], Sequence[str]]) -> _Answer:
    reasons = read()
    if not reasons:
        return _Answer(HTTPStatus.OK, b"ok\n")
    text = "".join(f"{reason}\n" for reason in reasons)
    return _Answer(HTTPStatus.SERVICE_UNAVAILABLE, text.encode("utf-8", "backslashreplace"))


class _Server(http.server.ThreadingHTTPServer):
    """A thread for each of a bounded number of clients; who comes over that is told to come later."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], routes: Mapping[str, Callable[[], _Answer]]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.routes = routes
        self._places = threading.BoundedSemaphore(_CLIENTS_MAX)
        self._stopping = threading.Event()
        super().__init__(address, _Handler)

    def serve(self) -> None:
        """Until stop. serve_forever would wake twice a second for nothing, and take as long to end."""
        while not self._stopping.is_set():
            try:
                request, client = self.get_request()
            except OSError:
                # Stopped, a client that has left already, or no file descriptor free: that may take a while.
                self._stopping.wait(_PAUSE_SECONDS)
                continue
            try:
                self.process_request(request, client)
            except RuntimeError:
                _log.exception("no thread can be started for a metrics client")
                self._places.release()
                self.shutdown_request(request)

    def stop(self) -> None:
        self._stopping.set()
        self.socket.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client: object) -> None:
        assert isinstance(request, socket.socket)
        if not self._places.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(0)
                request.send(b"HTTP/1.0 503 Service Unavailable\r\n\r\ntoo many clients at once\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client: object
    ) -> None:
        try:
            super().process_request_thread(request, client)
        finally:
            self._places.release()

    def handle_error(self, request: object, client: object) -> None:
        """A client that went away is nobody's concern; the rest is logged by the handler."""
        _log.debug("a metrics client went away", exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = _CLIENT_SECONDS
    server_version = "knd"
    sys_version = ""
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def _answer(self, *, send_body: bool) -> None:
        route = self.server.routes.get(self.path.partition("?")[0])
        if route is None:
            self.send_error(HTTPStatus.NOT_FOUND, "there are /metrics, /readyz and /livez")
            return
        try:
            answer = route()
        except Exception:  # noqa: BLE001 - the reasons and counters come from all over the agent
            _log.exception("%s could not be answered", self.path.partition("?")[0])
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, "see the agent's log")
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if send_body:
            self.wfile.write(answer.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What a client did wrong is a 4xx, also what the base class calls not implemented."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code, message = HTTPStatus.METHOD_NOT_ALLOWED, "use GET or HEAD"
        elif code == HTTPStatus.HTTP_VERSION_NOT_SUPPORTED:
            code = HTTPStatus.BAD_REQUEST
        super().send_error(code, message, explain)

    def log_message(self, format: str, *args: object) -> None:
        """Every scrape would be a line."""
