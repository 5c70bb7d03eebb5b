"""Dashboard and alert rules ask for series and labels that the agent exports, and for no others."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from driver.metrics import Metrics, MetricsServer
from driver.model import PodSample
from driver.samples import MeterSample, UnaccountedSample

FOLDER = Path(__file__).parents[2] / "deploy/dashboards"
_NAME = re.compile(r"\bknd_[a-z_]+\b")
_SELECTOR = re.compile(r"\b(knd_[a-z_]+)\s*\{([^}]*)\}")
_AGGREGATION = re.compile(r"\bby\s*\(([^)]*)\)\s*\(")
_GIVEN_BY_PROMETHEUS = {"instance", "job"}


@functools.cache
def exported() -> Mapping[str, frozenset[str]]:
    """Every series that a scrape can have, with its labels."""
    metrics = Metrics()
    metrics.watch_pods(lambda: (PodSample("n", "p", "c", "d", "net1", "egress", "bulk", "tcp", "tcx", 1, 1),))
    owner = ("n", "p", "c", "d", "net1")
    metrics.watch_meters(
        lambda: (
            MeterSample(*owner, "mlx5_2", 1, "rdma-hw", "rdma_tx_bytes", 1),
            MeterSample(*owner, "mlx5_2", 1, "rdma-hw", "sent_pkts", 1),
            MeterSample(*owner, "mlx5_2", 1, "rdma-hw", "out_of_buffer", 1),
            MeterSample(*owner, "d", 0, "interface", "tx_bytes", 1),
        ),
        lambda: (UnaccountedSample(*owner, "egress", "interface", 1, 1),),
    )
    metrics.watch_rdma_resources(lambda: {(*owner, "mlx5_2", "qp"): 1}, lambda: {("mlx5_2", "qp"): 1})
    metrics.watch_devices(lambda: {"offered": 1})
    metrics.watch_unhealthy(lambda: {"no-carrier": 1})
    metrics.watch_bandwidth(lambda: {("0000:21:00.0", "budget"): 1.0, ("0000:21:00.0", "given"): 1.0})
    metrics.watch_recovery(lambda: "")
    metrics.watch_published(lambda: True)
    metrics.watch_api_requests(lambda: {"get claims": 1})
    metrics.watch_events_dropped(lambda: 1)
    metrics.hook_done("RunPodSandbox", 0.1, "ok")
    metrics.call_done("prepare", 0.1, "ok")
    metrics.step_done("move-in", 0.1, "ok")
    metrics.event("Attached")
    metrics.refused("Withheld")
    metrics.ran_bare(1)
    metrics._failed("knd_devices", ValueError("seen"))
    with MetricsServer(metrics, port=0):
        text = metrics.scrape().decode()
    found: dict[str, frozenset[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, frozenset()) | frozenset(sample.labels)
    return found


def _texts(tree: Any, key: str) -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key and isinstance(value, str):
                yield value
            else:
                yield from _texts(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "knd-fabric.json").read_text())
    return loaded


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    asked = [*_texts(dashboard(), "expr"), *_texts(rules(), "expr")]
    asked += [query for query in _texts(dashboard()["templating"], "query") if "(" in query]
    assert len(asked) > 20
    return asked


@pytest.mark.parametrize("expression", expressions())
def test_every_series_and_label_asked_for_is_exported(expression: str) -> None:
    names = _NAME.findall(expression)
    assert names
    for name in names:
        assert name in exported(), f"{name} is not exported"
    labels = set().union(*(exported()[name] for name in names)) | _GIVEN_BY_PROMETHEUS
    for name, selector in _SELECTOR.findall(expression):
        for label in re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selector):
            assert label in exported()[name], f"{name} has no label {label}"
    for group in _AGGREGATION.findall(expression):
        for label in group.split(","):
            assert label.strip() in labels, f"nothing in {expression} has a label {label.strip()}"
    for name, label in re.findall(r"label_values\((knd_[a-z_]+).*, ([a-z]+)\)", expression):
        assert label in exported()[name]


@pytest.mark.parametrize("expression", expressions())
def test_brackets_are_closed(expression: str) -> None:
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)


def test_counts_of_different_sources_are_never_added_up() -> None:
    for expression in expressions():
        if "sum" in expression and "knd_pod_network" in expression:
            assert "source" in expression, expression


def test_every_rule_says_what_to_do_and_names_labels_it_has() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "runbook"}
        kept = _AGGREGATION.findall(rule["expr"])
        names = _NAME.findall(rule["expr"])
        has = (
            set(kept[0].replace(" ", "").split(",")) if kept else set().union(*(exported()[n] for n in names))
        )
        for label in re.findall(r"\$labels\.([a-z_]+)", rule["annotations"]["summary"]):
            assert label in has | _GIVEN_BY_PROMETHEUS, f"{rule['alert']} has no label {label}"


def test_panels_lie_beside_each_other_in_the_grid() -> None:
    places = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in places, panel["title"]
                places.add((x, y))
