"""The text of a scrape, made once at a time.

Invariant: a series is written at most once per scrape and only while its device is attached; what
cannot be read costs its own series and no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from driver.errors import DriverError
from driver.model import PodSample

_SHARED_WAIT_SECONDS = 10.0


class ScrapeFailed(DriverError):
    """A scrape that was waited for did not come to its end."""


_Family = GaugeMetricFamily | CounterMetricFamily


class Watched:
    """Families that are asked for at each scrape, each on its own: one that fails spoils no other."""

    def __init__(self, failed: Callable[[str, Exception], None]) -> None:
        self._failed = failed
        self._watches: dict[
            str, tuple[Callable[[], _Family], Callable[[], Mapping[tuple[str, ...], float]]]
        ] = {}

    def add(self, family: Callable[[], _Family], read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        """A second watch of one name replaces the first."""
        self._watches[family().name] = (family, read)

    def describe(self) -> Iterable[Metric]:
        return [make() for make, _ in self._watches.values()]

    def collect(self) -> Iterable[Metric]:
        for name, (make, read) in list(self._watches.items()):
            family = make()
            try:
                for labels, number in sorted(read().items()):
                    family.add_metric(labels, number)
            except Exception as error:  # noqa: BLE001 - the watched callables come from all over the agent
                self._failed(name, error)
            else:
                yield family


class PodExposition:
    """Writes the pods' series itself: prometheus_client builds and sorts a dict of nine labels for each
    of them, which takes longer than a whole scrape may. The label text of a series is made once and
    kept while the series lives."""

    def __init__(self) -> None:
        self._labels: dict[tuple[str, ...], str] = {}

    def render(self, samples: Sequence[PodSample]) -> bytes:
        known = self._labels
        living: dict[tuple[str, ...], str] = {}
        totals: dict[str, PodSample] = {}
        for sample in samples:
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
    return labels(zip(_LABELS, sample[:9], strict=True))


def labels(pairs: Iterable[tuple[str, object]]) -> str:
    """As they stand behind a series' name."""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs) + "}"


def _escaped(value: object) -> str:
    """As the exposition format wants it. Bytes that are no text are shown, not passed on."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class _Flight:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: bytes | None = None


class SingleFlight:
    """Runs work once at a time; who comes while it runs gets its result."""

    def __init__(self, work: Callable[[], bytes], patience: float = _SHARED_WAIT_SECONDS) -> None:
        """patience: how many seconds to wait for the work that another has begun."""
        self._work = work
        self._patience = patience
        self._lock = threading.Lock()
        self._current: _Flight | None = None
        self.waiting = 0
        """How many wait for the work that is under way."""

    def get(self) -> bytes:
        """What work gives. Who leads gets its error, who shares gets ScrapeFailed."""
        with self._lock:
            flight = self._current
            if flight is None:
                own = self._current = _Flight()
            else:
                self.waiting += 1
        if flight is None:
            return self._lead(own)
        try:
            if not flight.done.wait(self._patience):
                raise ScrapeFailed("the scrape that is under way does not end")
        finally:
            with self._lock:
                self.waiting -= 1
        if flight.result is None:
            raise ScrapeFailed("the scrape that was shared has failed")
        return flight.result

    def _lead(self, flight: _Flight) -> bytes:
        try:
            flight.result = self._work()
            return flight.result
        finally:
            with self._lock:
                self._current = None
            flight.done.set()
