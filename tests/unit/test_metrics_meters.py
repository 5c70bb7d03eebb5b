"""What devices count themselves is shown apart from what BPF counts, once, and by who has the device."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from driver.metrics import Metrics
from driver.metrics.meters import render_meters, render_unaccounted
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
    assert shown(render_meters(samples)) == {
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
    (family,) = text_string_to_metric_families(render_meters([rdma("sent_pkts", 7)]).decode())
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
    families = {f.name: f.samples[0] for f in text_string_to_metric_families(render_meters(samples).decode())}
    assert families["knd_pod_rdma_packets"].value == 7
    shared = families["knd_shared_rdma_packets"]
    assert (shared.value, shared.labels) == (
        5,
        {"rdma_device": "mlx5_2", "port": "1", "direction": "egress", "source": "rdma-hw"},
    )


def test_what_passed_bpf_by_is_a_series_of_its_own() -> None:
    text = render_unaccounted([UnaccountedSample(*OWNER, "egress", "interface", 90, 2)])
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
