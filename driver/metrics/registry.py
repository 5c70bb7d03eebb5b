"""What is measured of this process and its node, under which names.

Invariant: label values are a closed set or name things that exist now; nothing here blocks but a
scrape, and that runs in the scraping thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from driver.metrics.exposition import PodExposition, SingleFlight, Watched
from driver.metrics.meters import MeterExposition
from driver.model import PodSample
from driver.samples import MeterSample, UnaccountedSample

_log = logging.getLogger(__name__)

_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 45.0)
"""From a netlink message to kubelet's deadline; 2 s is the runtime's for a hook."""

_OWNER_LABELS = ("namespace", "pod", "claim", "device", "interface")
_POD_LABELS = (*_OWNER_LABELS, "direction")

PodSamples = Callable[[], Sequence[PodSample]]


class Metrics:
    """All of this process's metrics, in a registry of its own. Every method may be called by any thread
    and does not block. It is an observer of hooks, kubelet calls and steps."""

    def __init__(self) -> None:
        # Otherwise each counter gets a second series with its time of birth.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = prometheus_client.CollectorRegistry()
        self._registry = registry
        self._pods: PodSamples = tuple
        self._meters: Callable[[], Sequence[MeterSample]] = tuple
        self._unaccounted: Callable[[], Sequence[UnaccountedSample]] = tuple
        self._exposition = PodExposition()
        self._meter_exposition = MeterExposition()
        self._flight = SingleFlight(self._render)
        self._hooks = _histogram(registry, "knd_hook", "Runtime hooks, request to answer.", "event")
        self._calls = _histogram(registry, "knd_kubelet_call", "Calls of kubelet.", "method")
        self._steps = _histogram(registry, "knd_step", "Steps of plans.", "step")
        counter = prometheus_client.Counter
        self._events = counter("knd_events", "Kubernetes events by reason.", ["reason"], registry=registry)
        self._refusals = counter("knd_refusals", "Lasting refusals by reason.", ["reason"], registry=registry)
        self._bare = counter(
            "knd_bare_containers",
            "Containers found running without a device their pod was given.",
            registry=registry,
        )
        self._failures = counter(
            "knd_scrape_failures", "What a scrape could not read.", ["what"], registry=registry
        )
        self._watched = Watched(self._failed)
        registry.register(self._watched)
        prometheus_client.ProcessCollector(registry=registry)

    def hook_done(self, event: str, seconds: float, outcome: str) -> None:
        self._hooks.labels(event, outcome).observe(seconds)

    def call_done(self, method: str, seconds: float, outcome: str) -> None:
        self._calls.labels(method, outcome).observe(seconds)

    def step_done(self, step: str, seconds: float, outcome: str) -> None:
        self._steps.labels(step, outcome).observe(seconds)

    def event(self, reason: str) -> None:
        self._events.labels(reason).inc()

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def ran_bare(self, containers: int) -> None:
        self._bare.inc(containers)

    # What is watched is asked at each scrape, in the scraping thread; it may block shortly. When it
    # fails, its series are missing from that scrape and knd_scrape_failures_total counts it.

    def watch_pods(self, read: PodSamples) -> None:
        self._pods = read

    def watch_meters(
        self,
        meters: Callable[[], Sequence[MeterSample]],
        unaccounted: Callable[[], Sequence[UnaccountedSample]],
    ) -> None:
        """What devices count themselves, and what of that BPF did not see."""
        self._meters, self._unaccounted = meters, unaccounted

    def watch_devices(self, read: Callable[[], Mapping[str, int]]) -> None:
        """How many devices are in which state; the states are the caller's closed set."""
        self._watched.add(
            lambda: GaugeMetricFamily("knd_devices", "Devices of this node by state.", labels=["state"]),
            lambda: {(state,): number for state, number in read().items()},
        )

    def watch_unhealthy(self, read: Callable[[], Mapping[str, int]]) -> None:
        """How many devices have which trouble; the troubles are the caller's closed set."""
        self._watched.add(
            lambda: GaugeMetricFamily(
                "knd_unhealthy_devices", "Devices of this node by what is wrong with them.", labels=["reason"]
            ),
            lambda: {(reason,): number for reason, number in read().items()},
        )

    def watch_recovery(self, read: Callable[[], str]) -> None:
        """Why the journal cannot be trusted, or ""."""
        self._watch_flag("knd_journal_recovery", "1 while the journal cannot be trusted.", read)

    def watch_published(self, read: Callable[[], bool]) -> None:
        self._watch_flag("knd_slices_published", "1 while the cluster has this node's last offer.", read)

    def watch_unready(self, read: Callable[[], Sequence[str]]) -> None:
        """Why the agent is not ready. MetricsServer does this with its own."""
        self._watch_flag("knd_ready", "1 while new claims can be prepared.", lambda: not read())

    def watch_api_requests(self, read: Callable[[], Mapping[str, int]]) -> None:
        """Requests so far, by verb and resource."""
        self._watched.add(
            lambda: CounterMetricFamily(
                "knd_api_requests", "Requests to the API server.", labels=["request"]
            ),
            lambda: {(request,): number for request, number in read().items()},
        )

    def watch_events_dropped(self, read: Callable[[], int]) -> None:
        """Events so far that the cluster was not told."""
        text = "Kubernetes events left out: over the rate, or over what may wait for the API server."
        self._watched.add(
            lambda: CounterMetricFamily("knd_events_dropped", text, labels=[]), lambda: {(): read()}
        )

    def watch_limits(self, read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        """The limits in force, by _POD_LABELS and by what they are kept."""
        text = "Limit of an attached device that is in force, by what it is kept."
        labels = [*_POD_LABELS, "by"]
        self._watched.add(
            lambda: GaugeMetricFamily("knd_pod_network_limit_bits_per_second", text, labels=labels), read
        )

    def watch_bandwidth(self, read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        """By PF, or device that is given out in shares, and `budget` or `given`: what the policy gives out of
        it, and what claims have of that."""
        text = "Bandwidth of a port that the policy gives out (budget), and that claims have of it (given)."
        labels = ["port", "part"]
        self._watched.add(
            lambda: GaugeMetricFamily("knd_port_bandwidth_bits_per_second", text, labels=labels), read
        )

    def watch_rdma_resources(
        self,
        of_pods: Callable[[], Mapping[tuple[str, ...], float]],
        shared: Callable[[], Mapping[tuple[str, ...], float]],
    ) -> None:
        """What is made on RDMA devices now: by _OWNER_LABELS, RDMA device and kind, and by the last two."""
        self._watch_resources(
            "knd_pod_rdma_resources",
            "RDMA resources that a pod has made, by kind: qp, mr, cq, pd, ctx.",
            [*_OWNER_LABELS, "rdma_device", "kind"],
            of_pods,
        )
        self._watch_resources(
            "knd_shared_rdma_resources",
            "RDMA resources on devices of pods of which nobody can tell which pod made them.",
            ["rdma_device", "kind"],
            shared,
        )

    def _watch_resources(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        read: Callable[[], Mapping[tuple[str, ...], float]],
    ) -> None:
        self._watched.add(lambda: GaugeMetricFamily(name, text, labels=labels), read)

    def watch_dropped(self, read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        """Packets above a limit that the programs dropped, by _POD_LABELS."""
        text = "Packets of attached devices that were counted and then dropped as above their limit."
        self._watched.add(
            lambda: CounterMetricFamily("knd_pod_network_dropped_packets", text, labels=_POD_LABELS), read
        )

    def watch_waiting(self, read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        """Seconds in the queue of times of departure, by _POD_LABELS."""
        name, text = (
            "knd_pod_network_queue_delay_seconds",
            "How long what the pod sends now waits for its limit.",
        )
        self._watched.add(lambda: GaugeMetricFamily(name, text, labels=_POD_LABELS), read)

    def _watch_flag(self, name: str, text: str, read: Callable[[], object]) -> None:
        self._watched.add(lambda: GaugeMetricFamily(name, text, labels=()), lambda: {(): 1 if read() else 0})

    def scrape(self) -> bytes:
        """The text exposition of now. Callers at the same time share one. ScrapeFailed."""
        return self._flight.get()

    def _render(self) -> bytes:
        meters = self._meter_exposition
        # First, so that this scrape shows what of itself failed.
        parts = [
            self._part("knd_pod_network", lambda: self._exposition.render(self._pods())),
            self._part("knd_pod_meters", lambda: meters.meters(self._meters())),
            self._part("knd_pod_unaccounted", lambda: meters.unaccounted(self._unaccounted())),
        ]
        return b"".join([prometheus_client.generate_latest(self._registry), *parts])

    def _part(self, what: str, make: Callable[[], bytes]) -> bytes:
        try:
            return make()
        except Exception as error:  # noqa: BLE001 - whatever the reader of counters meets, the rest is shown
            self._failed(what, error)
            return b""

    def _failed(self, what: str, error: Exception) -> None:
        _log.warning("%s could not be read for a scrape", what, exc_info=error)
        self._failures.labels(what).inc()


def _histogram(
    registry: prometheus_client.CollectorRegistry, name: str, text: str, label: str
) -> prometheus_client.Histogram:
    return prometheus_client.Histogram(
        f"{name}_duration_seconds", text, [label, "outcome"], registry=registry, buckets=_SECONDS_BUCKETS
    )
