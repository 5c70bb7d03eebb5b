"""What devices count themselves is shown apart from what BPF counts, once, and by who has the device."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from driver.metrics import Metrics
from driver.metrics.meters import MeterExposition
from driver.samples import MeterSample, UnaccountedSample

OWNER = ("ml", "train-0", "nic", "pci-0000-3b-00-2", "net1")


def rdma(counter: str, total: int, source: str = "rdma-hw", owner: tuple[str, ...] = OWNER) -> MeterSample:
    return MeterSample(*owner, "mlx5_2", 1, source, counter, total)  # type: ignore[arg-type]


def link(counter: str, total: int, source: str = "interface") -> MeterSample:
    return MeterSample(*OWNER, "pci-0000-3b-00-2", 0, source, counter, total)


def shown(text: bytes) -> dict[tuple[str, str, str], float]:
    """By name, the label that tells it apart, and source."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            apart = sample.labels.get("direction") or sample.labels.get("counter", "")
            key = (sample.name, apart, sample.labels["source"])
            assert key not in found
            found[key] = sample.value
    return found


def test_traffic_is_by_direction_and_source_and_the_rest_by_its_name() -> None:
    samples = [
        rdma("port_xmit_data_bytes", 400, "rdma-port"),
        rdma("rdma_tx_bytes", 390),
        rdma("rcvd_pkts", 7),
        rdma("out_of_buffer", 2),
        link("rx_dropped", 3),
        link("tx_bytes", 9),
        link("tx_bytes", 8, "pf-vf"),
        link("rx_queue_dropped", 6, "limits"),
        link("rx_policed", 5, "limits"),
    ]
    assert shown(MeterExposition().meters(samples)) == {
        ("knd_pod_rdma_bytes_total", "egress", "rdma-port"): 400,
        ("knd_pod_rdma_bytes_total", "egress", "rdma-hw"): 390,
        ("knd_pod_rdma_packets_total", "ingress", "rdma-hw"): 7,
        ("knd_pod_rdma_events_total", "out_of_buffer", "rdma-hw"): 2,
        ("knd_pod_link_drops_total", "ingress", "interface"): 3,
        ("knd_pod_link_bytes_total", "egress", "interface"): 9,
        ("knd_pod_link_bytes_total", "egress", "pf-vf"): 8,
        ("knd_pod_network_queue_dropped_packets_total", "ingress", "limits"): 6,
    }


def test_a_series_names_pod_claim_device_and_port() -> None:
    (family,) = text_string_to_metric_families(MeterExposition().meters([rdma("sent_pkts", 7)]).decode())
    assert family.samples[0].labels == {
        "namespace": "ml",
        "pod": "train-0",
        "claim": "nic",
        "device": "pci-0000-3b-00-2",
        "interface": "net1",
        "rdma_device": "mlx5_2",
        "port": "1",
        "direction": "egress",
        "source": "rdma-hw",
    }


def test_what_several_pods_had_is_a_device_s_and_of_no_pod() -> None:
    samples = [rdma("sent_pkts", 7), rdma("sent_pkts", 5, owner=("", "", "", "", ""))]
    families = {
        f.name: f.samples[0]
        for f in text_string_to_metric_families(MeterExposition().meters(samples).decode())
    }
    assert families["knd_pod_rdma_packets"].value == 7
    shared = families["knd_shared_rdma_packets"]
    assert (shared.value, shared.labels) == (
        5,
        {"rdma_device": "mlx5_2", "port": "1", "direction": "egress", "source": "rdma-hw"},
    )


def test_what_passed_bpf_by_is_a_series_of_its_own() -> None:
    text = MeterExposition().unaccounted([UnaccountedSample(*OWNER, "egress", "interface", 90, 2)])
    assert shown(text) == {
        ("knd_pod_unaccounted_bytes_total", "egress", "interface"): 90,
        ("knd_pod_unaccounted_packets_total", "egress", "interface"): 2,
    }


def test_a_scrape_shows_them_while_they_are_there() -> None:
    metrics = Metrics()
    samples = [rdma("sent_pkts", 7)]
    metrics.watch_meters(lambda: samples, tuple)
    assert b"knd_pod_rdma_packets_total{" in metrics.scrape()
    samples.clear()
    assert b"knd_pod_rdma" not in metrics.scrape()


def test_resources_of_pods_and_of_nobody_are_gauges_of_different_names() -> None:
    metrics = Metrics()
    metrics.watch_rdma_resources(
        lambda: {(*OWNER, "mlx5_2", "qp"): 12}, lambda: {("mlx5_2", "mr"): 3, ("mlx5_2", "qp"): 1}
    )
    families = {f.name: f for f in text_string_to_metric_families(metrics.scrape().decode())}
    (pods,) = families["knd_pod_rdma_resources"].samples
    owner = dict(zip(("namespace", "pod", "claim", "device", "interface"), OWNER, strict=True))
    assert (pods.value, pods.labels) == (12, {**owner, "rdma_device": "mlx5_2", "kind": "qp"})
    shared = families["knd_shared_rdma_resources"]
    assert {sample.labels["kind"]: sample.value for sample in shared.samples} == {"mr": 3, "qp": 1}
    assert shared.type == "gauge"


def test_meters_that_cannot_be_read_cost_a_scrape_only_their_own_series() -> None:
    metrics = Metrics()

    def fails() -> list[MeterSample]:
        raise OSError("no")

    metrics.watch_meters(fails, lambda: [UnaccountedSample(*OWNER, "egress", "interface", 90, 2)])
    text = metrics.scrape()
    assert b"knd_pod_unaccounted_bytes_total{" in text
    assert b'knd_scrape_failures_total{what="knd_pod_meters"} 1.0' in text


def exposed(families: Iterable[CounterMetricFamily]) -> bytes:
    """By the library."""

    class Families:
        def collect(self) -> list[CounterMetricFamily]:
            return list(families)

    registry = CollectorRegistry()
    registry.register(Families())
    return generate_latest(registry)


def series(text: bytes) -> list[tuple[str, str, str, list[tuple[str, str]], float]]:
    return sorted(
        (family.name, family.type, family.documentation, sorted(sample.labels.items()), sample.value)
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    )


NAMES = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1)


@given(st.lists(st.tuples(NAMES, NAMES, st.integers(0, 2**50)), max_size=6, unique_by=lambda each: each[:2]))
def test_whatever_names_hold_it_is_what_the_library_would_write(made: list[tuple[str, str, int]]) -> None:
    metrics, text = MeterExposition(), "Bytes as the interface or the VF's PF counted them."
    for added in (0, 7):
        family = CounterMetricFamily(
            "knd_pod_link_bytes",
            text,
            labels=["namespace", "pod", "claim", "device", "interface", "direction", "source"],
        )
        samples = []
        for pod, interface, total in made:
            family.add_metric(["ml", pod, "nic", "dev", interface, "egress", "pf-vf"], total + added)
            owner = ("ml", pod, "nic", "dev", interface)
            samples.append(MeterSample(*owner, "dev", 0, "pf-vf", "tx_bytes", total + added))
        theirs = exposed([family]) if made else b""
        assert series(metrics.meters(tuple(samples))) == series(theirs)


def test_series_follow_their_totals_and_nothing_is_kept_of_those_that_are_gone() -> None:
    metrics = MeterExposition()
    first = (link("tx_bytes", 9), link("rx_policed", 5, "limits"))
    assert metrics.meters(first) == metrics.meters(first)
    assert b" 9\n" in metrics.meters(first)
    assert b" 10\n" in metrics.meters((link("tx_bytes", 10),))
    assert len(metrics._places) == 1
    assert b" 9\n" in metrics.meters(first)
    gone = (UnaccountedSample(*OWNER, "egress", "interface", 90, 2),)
    assert b" 90\n" in metrics.unaccounted(gone)
    assert b" 91\n" in metrics.unaccounted((gone[0]._replace(bytes=91),))
    assert metrics.unaccounted(()) == b""
    assert not metrics._labels


def test_a_list_that_has_others_by_now_is_made_anew() -> None:
    metrics, samples = MeterExposition(), [link("tx_bytes", 9)]
    metrics.meters(samples)
    samples[0] = link("tx_bytes", 10)
    assert b" 10\n" in metrics.meters(samples)
