"""The series of what devices count themselves, and of what passed BPF by.

Invariant: the sources are apart by their label and by their families' names, so that no sum over one family
adds what two of them counted; and no counter is in two families.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from driver.execute.meters import LIMITS
from driver.limits import QUEUE_DROPPED
from driver.metrics.exposition import labels
from driver.samples import MeterSample, UnaccountedSample

_EGRESS, _INGRESS = "egress", "ingress"

_TRAFFIC: Mapping[str, tuple[str, str]] = {
    # Port counters of every driver.
    "port_xmit_data_bytes": ("bytes", _EGRESS),
    "port_rcv_data_bytes": ("bytes", _INGRESS),
    "port_xmit_packets": ("packets", _EGRESS),
    "port_rcv_packets": ("packets", _INGRESS),
    # rdma_rxe; bytes from Linux 7.0 on.
    "sent_bytes": ("bytes", _EGRESS),
    "rcvd_bytes": ("bytes", _INGRESS),
    "sent_pkts": ("packets", _EGRESS),
    "rcvd_pkts": ("packets", _INGRESS),
    # mlx5's optional counters, while they are on.
    "rdma_tx_bytes": ("bytes", _EGRESS),
    "rdma_rx_bytes": ("bytes", _INGRESS),
    "rdma_tx_packets": ("packets", _EGRESS),
    "rdma_rx_packets": ("packets", _INGRESS),
}
"""Counters of RDMA that are traffic: as which family, in which direction. Others are shown by their names."""

_LINK: Mapping[str, tuple[str, str]] = {
    f"{way}_{what}": (unit, direction)
    for way, direction in (("tx", _EGRESS), ("rx", _INGRESS))
    for what, unit in (
        ("bytes", "bytes"),
        ("packets", "packets"),
        ("dropped", "drops"),
        ("errors", "errors"),
    )
}

_QUEUES = dict(zip(QUEUE_DROPPED, (_EGRESS, _INGRESS), strict=True))

_HELP = {
    "knd_pod_network_queue_dropped_packets_total": (
        "Packets of attached devices that were counted and then found the queue of their limit full."
    ),
    "knd_pod_rdma_bytes_total": "RDMA bytes that the device counted while this pod alone had it.",
    "knd_pod_rdma_packets_total": "RDMA packets that the device counted while this pod alone had it.",
    "knd_pod_rdma_events_total": "Further RDMA counters, by the driver's names.",
    "knd_shared_rdma_bytes_total": "RDMA bytes that a device counted while several pods had it.",
    "knd_shared_rdma_packets_total": "RDMA packets that a device counted while several pods had it.",
    "knd_shared_rdma_events_total": "Further RDMA counters of shared devices, by the driver's names.",
    "knd_pod_link_bytes_total": "Bytes as the interface or the VF's PF counted them.",
    "knd_pod_link_packets_total": "Packets as the interface or the VF's PF counted them.",
    "knd_pod_link_drops_total": "Packets that the interface or the VF's PF dropped.",
    "knd_pod_link_errors_total": "Packets that the interface counted as faulty.",
    "knd_pod_unaccounted_bytes_total": "Bytes that passed BPF by: at least so many were sent or came.",
    "knd_pod_unaccounted_packets_total": "Packets that passed BPF by: at least so many were sent or came.",
}

_OWNER = ("namespace", "pod", "claim", "device", "interface")
_MISSED_BY = (*_OWNER, "direction", "source")


_Kept = tuple[Sequence[MeterSample] | Sequence[UnaccountedSample], bytes]
_NOTHING: _Kept = ((), b"")


class MeterExposition:
    """What stands before a series' number is made once and kept while that lives. The whole text is kept
    for the next scrape, which mostly shows what the one before did: devices are read twice a minute."""

    def __init__(self) -> None:
        self._places: dict[tuple[object, ...], tuple[str, str] | None] = {}
        self._labels: dict[tuple[object, ...], str] = {}
        self._meters = self._unaccounted = _NOTHING

    def meters(self, samples: Sequence[MeterSample]) -> bytes:
        if _is_same(samples, self._meters):
            return self._meters[1]
        places: dict[tuple[object, ...], tuple[str, str] | None] = {}
        series: dict[str, dict[str, int]] = {}
        for sample in samples:
            key = sample[:9]
            place = self._places[key] if key in self._places else _place(sample)
            places[key] = place
            if place is not None:
                series.setdefault(place[0], {})[place[1]] = sample[9]
        self._places = places
        self._meters = (samples, _text(series))
        return self._meters[1]

    def unaccounted(self, samples: Sequence[UnaccountedSample]) -> bytes:
        if _is_same(samples, self._unaccounted):
            return self._unaccounted[1]
        known: dict[tuple[object, ...], str] = {}
        for sample in samples:
            key = sample[:7]
            known[key] = self._labels.get(key) or labels(zip(_MISSED_BY, key, strict=True))
        self._labels = known
        series = {
            "knd_pod_unaccounted_bytes_total": {known[each[:7]]: each.bytes for each in samples},
            "knd_pod_unaccounted_packets_total": {known[each[:7]]: each.packets for each in samples},
        }
        self._unaccounted = (samples, _text(series) if samples else b"")
        return self._unaccounted[1]


def _is_same(samples: Sequence[object], kept: _Kept) -> bool:
    """A list may have other samples by now."""
    return samples is kept[0] and isinstance(samples, tuple)


def _place(sample: MeterSample) -> tuple[str, str] | None:
    """The series' name and labels; None for what is shown as of now, with the limits."""
    if sample.source == LIMITS and sample.counter not in _QUEUES:
        return None
    name, pairs = _series(sample)
    return name, labels(pairs)


def _series(sample: MeterSample) -> tuple[str, Iterable[tuple[str, object]]]:
    owner = list(zip(_OWNER, sample, strict=False))
    if sample.source == LIMITS:
        pairs = [*owner, ("direction", _QUEUES[sample.counter]), ("source", sample.source)]
        return "knd_pod_network_queue_dropped_packets_total", pairs
    if sample.port == 0:
        unit, direction = _LINK[sample.counter]
        return f"knd_pod_link_{unit}_total", [*owner, ("direction", direction), ("source", sample.source)]
    whose, pairs = "pod", owner
    if not sample.pod:
        whose, pairs = "shared", []
    pairs = [*pairs, ("rdma_device", sample.subject), ("port", sample.port)]
    if sample.counter in _TRAFFIC:
        unit, direction = _TRAFFIC[sample.counter]
        pairs += [("direction", direction), ("source", sample.source)]
        return f"knd_{whose}_rdma_{unit}_total", pairs
    pairs += [("source", sample.source), ("counter", sample.counter)]
    return f"knd_{whose}_rdma_events_total", pairs


def _text(series: Mapping[str, Mapping[str, int]]) -> bytes:
    lines: list[str] = []
    for name, values in sorted(series.items()):
        lines += [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} counter"]
        lines += [f"{name}{text} {value}" for text, value in values.items()]
    return "\n".join([*lines, ""]).encode() if lines else b""
