"""deploy/examples as a user applies them; the device kind and the image are this ground's, nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from kndsim.cluster import Cluster
from kndsim.deployed import REPOSITORY
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_ground import Ground, needs
from tests.e2e.e2e_objects import Json
from tests.e2e.e2e_space import LivePod, Space

EXAMPLES = REPOSITORY / "deploy/examples/claims"
TOOL = "localhost/knd-tool:1"
ON_ANY_MACHINE = ("one-vf", "two-pods", "shared-claim", "all-containers", "class-decides", "limits")
"""The others want NUMA nodes, rails, vfio or a feature gate."""


def adapted(file: Path, ground: Ground) -> str:
    text = file.read_text().replace("busybox:stable", TOOL)
    wanted = 'device.driver == "knd.internal" && device.attributes["knd.internal"].kind == "vf"'
    return text.replace(wanted, ground.selector)


@contextlib.contextmanager
def applied(cluster: Cluster, space: Space, text: str) -> Iterator[Sequence[LivePod]]:
    """Its pods; all of it is gone afterwards, also what is in no namespace."""
    asked = ("--namespace", space.name)
    cluster.kubectl(*asked, "apply", "-f", "-", stdin=text)
    objects: list[Json] = list(yaml.safe_load_all(text))
    try:
        yield [LivePod(space, each["metadata"]["name"]) for each in objects if each["kind"] == "Pod"]
    finally:
        cluster.kubectl(*asked, "delete", "--ignore-not-found", "-f", "-", stdin=text, timeout=120)


def done_or_running(pod: LivePod) -> bool:
    return pod.phase == "Succeeded" or pod.is_running()


@needs(devices=2, wired=True)
@pytest.mark.parametrize("name", ON_ANY_MACHINE)
def test_an_example_runs_as_it_is_written(
    name: str, cluster: Cluster, agents: Agents, space: Space, ground: Ground
) -> None:
    with applied(cluster, space, adapted(EXAMPLES / f"{name}.yaml", ground)) as pods:
        for pod in pods:
            space.until(lambda pod=pod: done_or_running(pod), 60, pod.describe)  # type: ignore[misc]
        if name == "two-pods":
            client = pods[-1]
            space.until(lambda: client.phase == "Succeeded", 60, client.describe)
            assert "0% packet loss" in client.log()
