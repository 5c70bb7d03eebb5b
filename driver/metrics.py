"""What monitoring sees of this node, and the small HTTP server that shows it.

Invariant: a scrape runs in its own thread, one at a time, and never on the asyncio loop; label values
are a closed set or name things that exist now, so series go when their device does. The server listens
on loopback only.
"""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import logging
import socket
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Final, NamedTuple, Self

import prometheus_client
from prometheus_client.core import CounterMetricFamily, Metric

from driver.errors import DriverError
from driver.model import PodSample

__all__ = [
    "CONTENT_TYPE",
    "Metrics",
    "MetricsServer",
    "MetricsUnavailable",
    "PodSample",
    "PodSamples",
    "ScrapeFailed",
]

_log = logging.getLogger(__name__)

_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 45.0)
"""From a netlink message to kubelet's deadline; 2 s is the runtime's for a hook."""

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class MetricsUnavailable(DriverError):
    """The metrics server cannot listen where it was told to."""


PodSamples = Callable[[], Sequence[PodSample]]


class ScrapeFailed(DriverError):
    """A scrape that was waited for did not come to its end."""


# --- the metrics --------------------------------------------------------------------------------------


class Metrics:
    """All of this process's metrics, in a registry of its own. Every method may be called by any thread
    and does not block. It is an observer of hooks, kubelet calls and steps."""

    def __init__(
        self,
        *,
        pods: PodSamples = tuple,
        api_requests: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """pods and api_requests are asked at each scrape, in the scraping thread; they may block shortly.

        api_requests maps `verb resource` to how many requests there were.
        """
        # Otherwise each counter gets a second series with its time of birth.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = prometheus_client.CollectorRegistry()
        self._registry = registry
        self._exposition = _PodExposition(pods)
        self._flight = _SingleFlight(self._render)
        self._hooks = _histogram(registry, "knd_hook", "Runtime hooks, request to answer.", "event")
        self._calls = _histogram(registry, "knd_kubelet_call", "Calls of kubelet.", "method")
        self._steps = _histogram(registry, "knd_step", "Steps of plans.", "step")
        gauge = prometheus_client.Gauge
        self._devices = gauge("knd_devices", "Devices of this node by state.", ["state"], registry=registry)
        self._device_states: set[str] = set()
        self._recovery = gauge(
            "knd_journal_recovery", "1 while the journal cannot be trusted.", registry=registry
        )
        self._published = gauge(
            "knd_slices_published", "1 while the cluster has this node's last offer.", registry=registry
        )
        self._ready = gauge("knd_ready", "1 while new claims can be prepared.", registry=registry)
        counter = prometheus_client.Counter
        self._events = counter("knd_events", "Kubernetes events by reason.", ["reason"], registry=registry)
        self._bare = counter(
            "knd_bare_containers",
            "Containers found running without a device their pod was given.",
            registry=registry,
        )
        self._failures = counter(
            "knd_scrape_failures", "Scrapes whose pod counters could not be read.", registry=registry
        )
        registry.register(_RequestCollector(api_requests))
        prometheus_client.ProcessCollector(registry=registry)

    def hook_done(self, event: str, seconds: float, outcome: str) -> None:
        self._hooks.labels(event, outcome).observe(seconds)

    def call_done(self, method: str, seconds: float, outcome: str) -> None:
        self._calls.labels(method, outcome).observe(seconds)

    def step_done(self, step: str, seconds: float, outcome: str) -> None:
        self._steps.labels(step, outcome).observe(seconds)

    def event(self, reason: str) -> None:
        self._events.labels(reason).inc()

    def bare_container(self) -> None:
        self._bare.inc()

    def set_devices(self, by_state: Mapping[str, int]) -> None:
        """Replaces what was said before: a state not named has no device any more."""
        for state in self._device_states - by_state.keys():
            self._devices.labels(state).set(0)
        for state, number in by_state.items():
            self._devices.labels(state).set(number)
        self._device_states |= by_state.keys()

    def set_journal_recovery(self, active: bool) -> None:
        self._recovery.set(active)

    def set_published(self, published: bool) -> None:
        self._published.set(published)

    def set_ready(self, ready: bool) -> None:
        self._ready.set(ready)

    def scrape(self) -> bytes:
        """The text exposition of now. Callers at the same time share one. ScrapeFailed."""
        return self._flight.get()

    def _render(self) -> bytes:
        try:
            pods = self._exposition.render()
        except Exception:  # noqa: BLE001 - whatever the reader of counters meets, the rest is shown
            _log.exception("the pods' counters could not be read for a scrape")
            self._failures.inc()
            pods = b""
        return prometheus_client.generate_latest(self._registry) + pods


def _histogram(
    registry: prometheus_client.CollectorRegistry, name: str, text: str, label: str
) -> prometheus_client.Histogram:
    return prometheus_client.Histogram(
        f"{name}_duration_seconds", text, [label, "outcome"], registry=registry, buckets=_SECONDS_BUCKETS
    )


class _RequestCollector:
    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        family = self._family()
        for request, number in sorted(self._read().items()):
            family.add_metric([request], number)
        return [family]

    @staticmethod
    def _family() -> CounterMetricFamily:
        return CounterMetricFamily("knd_api_requests", "Requests to the API server.", labels=["request"])


class _PodExposition:
    """Writes the pods' series itself: prometheus_client builds and sorts a dict of nine labels for each
    of them, which takes longer than a whole scrape may. The label text of a series is made once and
    kept while the series lives."""

    def __init__(self, read: PodSamples) -> None:
        self._read = read
        self._labels: dict[tuple[str, ...], str] = {}

    def render(self) -> bytes:
        known = self._labels
        living: dict[tuple[str, ...], str] = {}
        totals: dict[str, PodSample] = {}
        for sample in self._read():
            key = sample[:9]
            labels = known.get(key) or _label_text(sample)
            living[key] = labels
            # A name that comes twice is a pod made anew; two lines of one series would spoil the scrape.
            totals[labels] = sample
        self._labels = living
        if not totals:
            return b""
        lines = [
            "# HELP knd_pod_network_bytes_total Bytes of attached devices, by who has them.",
            "# TYPE knd_pod_network_bytes_total counter",
            *[f"knd_pod_network_bytes_total{labels} {sample[9]}" for labels, sample in totals.items()],
            "# HELP knd_pod_network_packets_total Packets of attached devices, by who has them.",
            "# TYPE knd_pod_network_packets_total counter",
            *[f"knd_pod_network_packets_total{labels} {sample[10]}" for labels, sample in totals.items()],
            "",
        ]
        return "\n".join(lines).encode()


_LABELS = ("namespace", "pod", "claim", "device", "interface", "direction", "class", "kind", "source")


def _label_text(sample: PodSample) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(_LABELS, sample[:9], strict=True))
    return "{" + ",".join(pairs) + "}"


def _escaped(value: object) -> str:
    """As the exposition format wants it. Bytes that are no text are shown, not passed on."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class _Flight:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: bytes | None = None


class _SingleFlight:
    """Runs work once at a time; who comes while it runs gets its result."""

    def __init__(self, work: Callable[[], bytes]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._current: _Flight | None = None

    def get(self) -> bytes:
        with self._lock:
            flight = self._current
            leads = flight is None
            if flight is None:
                flight = self._current = _Flight()
        if leads:
            try:
                flight.result = self._work()
            finally:
                with self._lock:
                    self._current = None
                flight.done.set()
        elif not flight.done.wait(_SHARED_WAIT_SECONDS):
            raise ScrapeFailed("the scrape that is under way does not end")
        if flight.result is None:
            raise ScrapeFailed("the scrape that was shared has failed")
        return flight.result


# --- the server ---------------------------------------------------------------------------------------

_SHARED_WAIT_SECONDS = 10.0
_CLIENT_SECONDS = 5.0
"""How long a client may take to send its request or to read the answer."""
_CLIENTS_MAX = 8


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
        self._thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
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
        self._server.shutdown()
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
        super().__init__(address, _Handler)

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
