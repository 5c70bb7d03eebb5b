"""Pods that kubelet starts by itself: they can have no claim, and wait for nobody."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from kndsim.cluster import Cluster
from kndsim.place import Place
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_api import Api, ApiRefused
from tests.e2e.e2e_objects import FIRST, Container, Pod, nic
from tests.e2e.e2e_space import Space

MANIFESTS = PurePosixPath("/etc/kubernetes/manifests")
SERVER = "kube-apiserver"


@contextlib.contextmanager
def api_away(cluster: Cluster, api: Api, space: Space) -> Iterator[None]:
    control_plane = next(iter(cluster.nodes.values()))
    control_plane.stop(SERVER)
    try:
        yield
    finally:
        control_plane.start(SERVER)

        def answers() -> bool:
            with contextlib.suppress(ApiRefused):
                return bool(api.list("Node"))
            return False

        space.until(answers, 60, "the API server answers again")


@contextlib.contextmanager
def static_pod(place: Place, pod: Pod, namespace: str) -> Iterator[None]:
    obj = pod.object()
    obj["metadata"]["namespace"] = namespace
    file = MANIFESTS / f"{pod.name}.json"
    place.write(file, json.dumps(obj).encode())
    try:
        yield
    finally:
        place.run(["rm", str(file)])


@pytest.mark.parametrize("beside_claims", [False, True])
def test_a_static_pod_starts_while_the_api_is_away(
    beside_claims: bool, space: Space, agents: Agents, api: Api, cluster: Cluster
) -> None:
    """Also in a namespace that has claims prepared on the node: nobody can ask what the pod names."""
    holder = space.nic_pod("holder", nic("net1")).running()
    place = cluster.nodes[holder.node].place
    namespace = space.name if beside_claims else "default"
    static = Pod(name="e2e-static", containers=(Container(),))

    def said() -> bool:
        logs = f"/var/log/pods/{namespace}_{static.name}-*/main/*.log"
        return f"{FIRST} " in place.run(["sh", "-c", f"cat {logs}"], check=False).out

    mirror = f"{static.name}-{holder.node}"
    with api_away(cluster, api, space), static_pod(place, static, namespace):
        space.until(said, 30, f"the static pod's container runs in {namespace}")
    space.until(lambda: api.find("Pod", mirror, namespace) is None, 60, f"{mirror} is gone")
    agents.ready()
