"""What a pod sends past the hooks is not counted by BPF, and is told as a number of its own, for which there
is an alert. It needs no more than what containers have by default."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kndsim.demo.devices import Devices
from kndsim.netns import in_netns
from kndsim.node import REPOSITORY, ClaimSpec, SimNode, SimPod, interface
from kndsim.waiting import wait_until_async
from tests.kernel.bpf_traffic import ARP_FRAME
from tests.node import seen_outside as seen
from tests.node.bypass import by_packet_socket, by_xdp_socket, with_default_capabilities
from tests.node.node_stage import play

pytestmark = pytest.mark.timeout(240)

PAST, SEEN = 300, 40
PATIENCE = 90.0
"""Seconds: interfaces are read every half minute."""
WAYS: Mapping[str, Callable[[int], None]] = {
    "packet": lambda count: by_packet_socket("net1", ARP_FRAME, count),
    "xdp": lambda count: by_xdp_socket("net1", ARP_FRAME, count),
}
"""By the pod that goes this way."""

Series = Mapping[frozenset[tuple[str, str]], float]


def scraped(sim: SimNode, name: str) -> Series:
    """All series of a name."""
    return {
        frozenset(sample.labels.items()): sample.value
        for family in text_string_to_metric_families(sim.agent.get("/metrics")[1])
        for sample in family.samples
        if sample.name == name
    }


def egress(sim: SimNode, name: str, pod: str) -> float:
    """Of all series of a name, what the pod sent."""
    wanted = {("direction", "egress"), ("pod", pod)}
    return sum(value for labels, value in scraped(sim, name).items() if wanted <= labels)


class Alert:
    """A rule of the form sum by (labels) (increase(series[time])) > number, evaluated over two scrapes as
    Prometheus does: what one of them lacks has no increase."""

    def __init__(self, name: str) -> None:
        groups = yaml.safe_load((REPOSITORY / "deploy/dashboards/alerts.yaml").read_text())["groups"]
        (rule,) = (each for group in groups for each in group["rules"] if each.get("alert") == name)
        form = r"sum by \(([^)]*)\) \(increase\((\w+)\[15m\]\)\) > (\d+)"
        found = re.fullmatch(form, " ".join(rule["expr"].split()))
        assert found is not None, rule["expr"]
        self._by = [label.strip() for label in found[1].split(",")]
        self.series, self._above = found[2], float(found[3])

    def firing(self, before: Series, after: Series) -> list[dict[str, str]]:
        sums: dict[tuple[tuple[str, str], ...], float] = {}
        for labels, value in after.items():
            if labels in before:
                group = tuple((name, dict(labels).get(name, "")) for name in self._by)
                sums[group] = sums.get(group, 0.0) + value - before[labels]
        return [dict(group) for group, total in sums.items() if total > self._above]


async def limited(sim: SimNode, name: str) -> SimPod:
    parameters = interface(name="net1") | {"qos": {"egress": {"rate": "1M"}}}
    claim = ClaimSpec(name=f"{name}-nic", parameters={"": parameters})
    return await sim.start_pod(sim.schedule(name, [claim]))


def send(pod: SimPod, work: Callable[[], None]) -> None:
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    in_netns(Path(pod.sandbox.netns_path), lambda: with_default_capabilities(work))


async def told(sim: SimNode, pod: str) -> None:
    await wait_until_async(
        lambda: egress(sim, "knd_pod_unaccounted_packets_total", pod) >= PAST,
        within=PATIENCE,
        what="a series of what passed the hooks by",
    )


def said(sim: SimNode, claim: str) -> str:
    """What the claim's status says of its device."""
    devices: list[dict[str, Any]] = sim.api.claim("default", claim)["status"].get("devices") or []
    return " ".join(each["message"] for device in devices for each in device["conditions"])


def test_what_passes_the_hooks_by_is_told_to_the_packet_with_an_alert_and_ends_with_the_pod() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        # First, so that the pods' ends have a carrier, and a queue, from the moment that they are up.
        seen.raise_peers(made.far)
        pods = {name: await limited(sim, name) for name in WAYS}
        alert = Alert("KndTrafficUnaccounted")
        before = await asyncio.to_thread(scraped, sim, alert.series)
        for name, way in WAYS.items():
            send(pods[name], lambda: by_packet_socket("net1", ARP_FRAME, SEEN, past_the_queues=False))
            counted = egress(sim, "knd_pod_network_packets_total", name)
            send(pods[name], partial(way, PAST))
            assert egress(sim, "knd_pod_network_packets_total", name) == counted >= SEEN
        for name in WAYS:
            await told(sim, name)
            assert egress(sim, "knd_pod_unaccounted_packets_total", name) == PAST
            # Eight bytes a packet could be its checksum and a tag.
            least = PAST * len(ARP_FRAME) - 8 * (PAST + SEEN)
            size = egress(sim, "knd_pod_unaccounted_bytes_total", name)
            assert least <= size <= PAST * len(ARP_FRAME)
            assert "egress at most 1 Mb/s (htb, cooperative)" in said(sim, f"{name}-nic")
        firing = alert.firing(before, await asyncio.to_thread(scraped, sim, alert.series))
        assert sorted((each["pod"], each["direction"]) for each in firing) == [
            (name, "egress") for name in sorted(WAYS)
        ]
        for name, pod in pods.items():
            await sim.delete_pod(pod)
            assert egress(sim, "knd_pod_unaccounted_packets_total", name) == 0
        rows = sim.knd("usage", "--counters", "-o", "csv").stdout.splitlines()
        sent = [row.split(",") for row in rows if ",interface,tx_packets," in row]
        assert {row[1]: int(row[8]) for row in sent} == dict.fromkeys(WAYS, PAST + SEEN)

    play(len(WAYS), story)
