"""What a scrape shows is true, well formed, gone when its device is gone, and made once at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from driver.metrics import Metrics, PodSample, ScrapeFailed
from driver.metrics.exposition import PodExposition, SingleFlight

WaitUntil = Callable[..., object]


def sample(pod: str = "train-0", total: int = 10, **other: str) -> PodSample:
    fields = {
        "namespace": "ml",
        "claim": "nic",
        "device": "pci-0000-3b-00-2",
        "interface": "net0",
        "direction": "egress",
        "traffic_class": "bulk",
        "kind": "roce",
        "source": "tcx",
    }
    return PodSample(**{**fields, **other}, pod=pod, bytes=total * 100, packets=total)


def parsed(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Series with sorted labels to value; fails on a series that comes twice."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for line in family.samples:
            key = (line.name, tuple(sorted(line.labels.items())))
            assert key not in found
            found[key] = line.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return parsed(metrics.scrape()).get((name, tuple(sorted(labels.items()))))


LABELS = {
    "namespace": "ml",
    "pod": "train-0",
    "claim": "nic",
    "device": "pci-0000-3b-00-2",
    "interface": "net0",
    "direction": "egress",
    "class": "bulk",
    "kind": "roce",
    "source": "tcx",
}


# --- the pods' series ---------------------------------------------------------------------------------


def test_a_pods_counters_carry_all_their_labels() -> None:
    metrics = Metrics()
    metrics.watch_pods(lambda: [sample()])
    assert value(metrics, "knd_pod_network_bytes_total", **LABELS) == 1000
    assert value(metrics, "knd_pod_network_packets_total", **LABELS) == 10


def test_series_follow_their_totals_and_go_with_their_pod() -> None:
    now = [sample("a", 1), sample("b", 2)]
    metrics = Metrics()
    metrics.watch_pods(lambda: now)
    assert b'pod="a"' in metrics.scrape()
    now = [sample("b", 3)]
    text = metrics.scrape()
    assert b'pod="a"' not in text
    assert parsed(text)["knd_pod_network_packets_total", tuple(sorted({**LABELS, "pod": "b"}.items()))] == 3
    now = []
    assert b"knd_pod_network" not in metrics.scrape()


def test_nothing_is_kept_of_pods_that_are_gone() -> None:
    exposition = PodExposition()
    for number in range(50):
        exposition.render([sample(f"pod-{number}"), sample("stays")])
    assert len(exposition._labels) == 2


def test_a_series_that_comes_twice_is_written_once_with_the_later_total() -> None:
    metrics = Metrics()
    metrics.watch_pods(lambda: [sample(total=1), sample(total=7)])
    assert value(metrics, "knd_pod_network_packets_total", **LABELS) == 7


def test_large_totals_are_written_exactly() -> None:
    metrics = Metrics()
    metrics.watch_pods(lambda: [sample(total=2**62 + 1)])
    assert str(2**62 + 1).encode() in metrics.scrape()


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"])), min_size=9, max_size=9))
def test_whatever_names_hold_the_text_is_what_prometheus_client_would_write(names: list[str]) -> None:
    made = PodSample(*names, bytes=1, packets=2)
    metrics = Metrics()
    metrics.watch_pods(lambda: [made])
    ours = [line for line in metrics.scrape().decode().split("\n") if "network_bytes_total{" in line]

    class Reference:
        def collect(self) -> list[CounterMetricFamily]:
            family = CounterMetricFamily("knd_pod_network_bytes", "x", labels=list(LABELS))
            family.add_metric(names, 1)
            return [family]

    registry = CollectorRegistry()
    registry.register(Reference())
    theirs = [line for line in generate_latest(registry).decode().split("\n") if "bytes_total{" in line]

    def fields(line: str) -> dict[tuple[str, str], float]:
        (family,) = [f for f in text_string_to_metric_families(line + "\n") if f.samples]
        return {(s.name, str(sorted(s.labels.items()))): s.value for s in family.samples}

    assert len(ours) == len(theirs) == 1
    assert fields(ours[0]) == fields(theirs[0])


def test_bytes_that_are_no_text_do_not_spoil_the_scrape() -> None:
    metrics = Metrics()
    metrics.watch_pods(lambda: [sample(interface="net\udc80"), sample("b")])
    text = metrics.scrape()
    assert b'interface="net\\\\udc80"' in text
    assert len(parsed(text)) > 4


def test_counters_that_cannot_be_read_cost_only_their_series(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()

    def broken() -> list[PodSample]:
        raise RuntimeError("map gone")

    metrics.watch_pods(broken)
    metrics.refused("DeviceHeld")
    text = metrics.scrape()
    assert b"knd_pod_network" not in text.replace(b'what="knd_pod_network"', b"")
    assert b'knd_refusals_total{reason="DeviceHeld"} 1.0' in text
    assert parsed(text)["knd_scrape_failures_total", (("what", "knd_pod_network"),)] == 1
    assert "map gone" in caplog.text


# --- the others ---------------------------------------------------------------------------------------


def test_it_observes_hooks_calls_and_steps() -> None:
    metrics = Metrics()
    metrics.hook_done("RunPodSandbox", 0.03, "ok")
    metrics.call_done("NodePrepareResources", 0.2, "failed")
    metrics.step_done("move-in", 0.021, "ok")
    for name, label, told, outcome, seconds in (
        ("knd_hook", "event", "RunPodSandbox", "ok", 0.03),
        ("knd_kubelet_call", "method", "NodePrepareResources", "failed", 0.2),
        ("knd_step", "step", "move-in", "ok", 0.021),
    ):
        labels = {label: told, "outcome": outcome}
        assert value(metrics, f"{name}_duration_seconds_count", **labels) == 1
        assert value(metrics, f"{name}_duration_seconds_sum", **labels) == pytest.approx(seconds)


def test_the_runtimes_two_seconds_are_a_bucket_of_the_hooks() -> None:
    metrics = Metrics()
    metrics.hook_done("RunPodSandbox", 1.9, "late")
    metrics.hook_done("RunPodSandbox", 2.1, "late")
    labels = {"event": "RunPodSandbox", "outcome": "late"}
    assert value(metrics, "knd_hook_duration_seconds_bucket", le="2.0", **labels) == 1


def test_what_is_counted_and_watched_is_shown() -> None:
    metrics = Metrics()
    recovery = "the journal was lost"
    metrics.event("DeviceQuarantined")
    metrics.ran_bare(3)
    metrics.watch_devices(lambda: {"offered": 4, "in_use": 2})
    metrics.watch_recovery(lambda: recovery)
    metrics.watch_published(lambda: True)
    metrics.watch_unready(lambda: ("NRI: not connected",))
    metrics.watch_api_requests(lambda: {"get resourceclaims": 7})
    metrics.watch_events_dropped(lambda: 2)
    assert value(metrics, "knd_events_dropped_total") == 2
    assert value(metrics, "knd_events_total", reason="DeviceQuarantined") == 1
    assert value(metrics, "knd_bare_containers_total") == 3
    assert value(metrics, "knd_devices", state="offered") == 4
    assert value(metrics, "knd_journal_recovery") == 1
    assert value(metrics, "knd_slices_published") == 1
    assert value(metrics, "knd_ready") == 0
    assert value(metrics, "knd_api_requests_total", request="get resourceclaims") == 7
    recovery = ""
    assert value(metrics, "knd_journal_recovery") == 0


def test_a_watch_that_fails_costs_only_its_own_series() -> None:
    metrics = Metrics()

    def broken() -> bool:
        raise OSError("no API server")

    metrics.watch_published(broken)
    metrics.watch_recovery(lambda: "")
    text = metrics.scrape()
    assert b"knd_slices_published" not in text.replace(b'what="knd_slices_published"', b"")
    assert parsed(text)["knd_journal_recovery", ()] == 0


def test_counters_have_no_second_series_for_their_birth() -> None:
    metrics = Metrics()
    metrics.event("x")
    metrics.hook_done("x", 1.0, "ok")
    assert b"_created" not in metrics.scrape()


def test_it_keeps_out_of_the_global_registry() -> None:
    Metrics()
    Metrics()
    assert b"knd_" not in generate_latest()


# --- single flight ------------------------------------------------------------------------------------


def test_scrapes_that_come_together_share_one(wait_until: WaitUntil) -> None:
    begun, go_on = threading.Event(), threading.Event()
    made: list[int] = []

    def read() -> list[PodSample]:
        made.append(1)
        begun.set()
        assert go_on.wait(10)
        return [sample()]

    metrics = Metrics()
    metrics.watch_pods(read)
    texts: list[bytes] = []
    threads = [threading.Thread(target=lambda: texts.append(metrics.scrape())) for _ in range(6)]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    flight = metrics._flight
    wait_until(lambda: flight.waiting == 5, what="five scrapes wait for the first")
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(texts) == 6
    assert len(set(texts)) == 1
    metrics.scrape()
    assert len(made) == 2


def test_a_scrape_that_fails_fails_all_that_share_it_and_not_the_next(wait_until: WaitUntil) -> None:
    begun, go_on = threading.Event(), threading.Event()
    broken = True

    def work() -> bytes:
        begun.set()
        assert go_on.wait(10)
        if broken:
            raise OSError("no memory")
        return b"fine"

    flight = SingleFlight(work)
    caught: list[Exception] = []

    def get() -> None:
        try:
            flight.get()
        except (OSError, ScrapeFailed) as error:
            caught.append(error)

    threads = [threading.Thread(target=get) for _ in range(2)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    wait_until(lambda: flight.waiting == 1)
    go_on.set()
    for thread in threads:
        thread.join()
    assert {type(error) for error in caught} == {OSError, ScrapeFailed}
    broken = False
    assert flight.get() == b"fine"


def test_a_scrape_that_does_not_end_is_not_waited_for_for_ever() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> bytes:
        begun.set()
        assert go_on.wait(10)
        return b""

    flight = SingleFlight(work, patience=0.05)
    leader = threading.Thread(target=flight.get)
    leader.start()
    assert begun.wait(10)
    with pytest.raises(ScrapeFailed, match="does not end"):
        flight.get()
    go_on.set()
    leader.join()
