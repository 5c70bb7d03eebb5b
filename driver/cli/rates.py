"""Rates from two readings of the agent's counters, as `knd top` shows them.

Invariant: pure. A rate is what a series gained between two readings, over the time between them; a series
that is new, or lower than before, has none until the next one. Different sources are never added up.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

HISTORY = 30
"""Readings that a sparkline is made of."""
_BARS = "▁▂▃▄▅▆▇█"

_BYTES = "knd_pod_network_bytes"
_PACKETS = "knd_pod_network_packets"


class View(enum.StrEnum):
    """What a row of the table is about."""

    POD = "pod"
    DEVICE = "device"
    CLASS = "class"


class Order(enum.StrEnum):
    """What the rows are sorted by: the names upwards, all else downwards."""

    TOTAL = "total"
    EGRESS = "egress"
    INGRESS = "ingress"
    PACKETS = "packets"
    NAME = "name"


_NAMED: Mapping[View, tuple[str, ...]] = {
    View.POD: ("namespace", "pod"),
    View.DEVICE: ("namespace", "pod", "claim", "device", "interface"),
    View.CLASS: ("class", "kind"),
}


@dataclass(frozen=True, slots=True)
class Series:
    """One counter, by its name without `_total` and its labels as sorted pairs."""

    name: str
    labels: tuple[tuple[str, str], ...]

    def label(self, name: str) -> str:
        return dict(self.labels).get(name, "")


@dataclass(frozen=True, slots=True)
class Reading:
    """All counters of one scrape. at: seconds of a monotonic clock."""

    at: float
    counters: Mapping[Series, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A row: bits and packets per second, as the pods see them. history: the last totals, oldest first."""

    names: tuple[str, ...]
    source: str
    egress: float
    ingress: float
    packets: float
    history: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.egress + self.ingress


def columns(view: View) -> tuple[str, ...]:
    return _NAMED[view]


def parse(text: str, at: float) -> Reading:
    """The pods' counters of a scrape; ValueError if it is no exposition."""
    counters: dict[Series, float] = {}
    for family in text_string_to_metric_families(text):
        if family.name in (_BYTES, _PACKETS):
            for sample in family.samples:
                counters[Series(family.name, tuple(sorted(sample.labels.items())))] = sample.value
    return Reading(at, counters)


class Rates:
    """Rates over a row of readings."""

    def __init__(self) -> None:
        self._last: Reading | None = None
        self._gains: dict[Series, float] = {}
        self._history: defaultdict[tuple[View, tuple[str, ...], str], deque[float]] = defaultdict(
            lambda: deque(maxlen=HISTORY)
        )

    def feed(self, reading: Reading) -> None:
        """The next reading; one that is not later than the one before is left out."""
        last = self._last
        if last is not None and reading.at <= last.at:
            return
        self._last = reading
        if last is None:
            return
        seconds = reading.at - last.at
        self._gains = {
            series: (value - last.counters[series]) / seconds
            for series, value in reading.counters.items()
            if series in last.counters and value >= last.counters[series]
        }
        living = set()
        for view in View:
            for rate in self._rows(view):
                key = (view, rate.names, rate.source)
                living.add(key)
                self._history[key].append(rate.total)
        for gone in self._history.keys() - living:
            del self._history[gone]

    def rows(self, view: View, order: Order) -> list[Rate]:
        """Sorted; none before the second reading."""
        rows = self._rows(view)
        if order is Order.NAME:
            return sorted(rows, key=lambda rate: (rate.names, rate.source))
        return sorted(rows, key=lambda rate: (-getattr(rate, order.value), rate.names, rate.source))

    def _rows(self, view: View) -> list[Rate]:
        sums: defaultdict[tuple[tuple[str, ...], str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for series, gain in self._gains.items():
            key = (tuple(series.label(name) for name in _NAMED[view]), series.label("source"))
            if series.name == _PACKETS:
                sums[key][2] += gain
            else:
                sums[key][0 if series.label("direction") == "egress" else 1] += 8 * gain
        return [
            Rate(
                names=names,
                source=source,
                egress=egress,
                ingress=ingress,
                packets=packets,
                history=tuple(self._history.get((view, names, source), ())),
            )
            for (names, source), (egress, ingress, packets) in sums.items()
        ]


def spark(values: Sequence[float]) -> str:
    """A bar for each value, the highest of them a full one."""
    most = max(values, default=0.0)
    if most <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in values)


def with_unit(amount: float, unit: str) -> str:
    """`1.23 Gb/s`: three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if amount < 999.5 or prefix == "T":
            break
        amount /= 1000
    digits = 0 if amount >= 99.95 or (not prefix and amount == int(amount)) else 1 if amount >= 9.995 else 2
    return f"{amount:.{digits}f} {prefix}{unit}"


def sums(rows: Iterable[Rate]) -> Mapping[str, tuple[float, float]]:
    """Egress and ingress of all rows, by source."""
    found: dict[str, tuple[float, float]] = {}
    for rate in rows:
        egress, ingress = found.get(rate.source, (0.0, 0.0))
        found[rate.source] = (egress + rate.egress, ingress + rate.ingress)
    return found


def cells(rate: Rate) -> list[str]:
    """A row's figures as people read them, the sparkline last."""
    return [
        rate.source,
        with_unit(rate.egress, "b/s"),
        with_unit(rate.ingress, "b/s"),
        with_unit(rate.packets, "pkt/s"),
        spark(rate.history),
    ]
