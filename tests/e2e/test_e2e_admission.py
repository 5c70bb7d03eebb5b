"""An agent acts for its own node alone: what a node that was broken into cannot do to the others."""

from __future__ import annotations

import copy
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from kndsim.cluster import Cluster
from tests.e2e.e2e_agents import NAMESPACE, Agents
from tests.e2e.e2e_api import Api
from tests.e2e.e2e_ground import needs
from tests.e2e.e2e_objects import Json
from tests.e2e.e2e_space import LivePod, Space

ACCOUNT = "knd-agent"
SLICES = "/apis/resource.k8s.io/v1/resourceslices"
TYPE = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice"}


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever has this token. Every request is a dry run."""

    server: str
    token: str = field(repr=False)

    def ask(self, method: str, path: str, body: Json | None = None, kind: str = "application/json") -> str:
        """ "" if the API server would do it, else why not."""
        request = urllib.request.Request(
            f"{self.server}{path}?dryRun=All",
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": kind},
        )
        # Over loopback to a cluster that this run has started.
        context = ssl._create_unverified_context()
        try:
            with urllib.request.urlopen(request, timeout=30, context=context):
                return ""
        except urllib.error.HTTPError as error:
            return str(json.load(error)["message"])


def caller(cluster: Cluster, pod: str | None) -> Caller:
    """With a token as the agent in that pod has it, or one that belongs to no pod."""
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}") if pod else ()
    token = cluster.kubectl("--namespace", NAMESPACE, "create", "token", ACCOUNT, *bound).out.strip()
    view = cluster.kubectl("config", "view", "-o", "jsonpath={.clusters[0].cluster.server}")
    return Caller(view.out.strip(), token)


def slice_of(api: Api, node: str) -> Json:
    return next(each for each in api.list("ResourceSlice") if each["spec"].get("nodeName") == node)


@needs(nodes=2)
def test_an_agent_writes_slices_of_its_own_node_and_driver_only(
    cluster: Cluster, agents: Agents, api: Api
) -> None:
    mine, other = list(cluster.nodes)[:2]
    agent = caller(cluster, agents.pod_on(mine))
    own, foreign = slice_of(api, mine), slice_of(api, other)
    assert agent.ask("DELETE", f"{SLICES}/{own['metadata']['name']}") == ""
    for method, body in (("DELETE", None), ("PUT", {**TYPE, **foreign})):
        said = agent.ask(method, f"{SLICES}/{foreign['metadata']['name']}", body)
        assert f"an agent on {mine} writes slices of that node only" in said
    made = {**TYPE, "metadata": {"name": "made-up"}}
    spec = copy.deepcopy(own["spec"])
    assert agent.ask("POST", SLICES, {**made, "spec": spec}) == ""
    spec["driver"] = "gpu.example.com"
    assert "of the driver knd.internal only" in agent.ask("POST", SLICES, {**made, "spec": spec})


def test_a_token_of_no_pod_writes_no_slice(cluster: Cluster, agents: Agents, api: Api) -> None:
    own = slice_of(api, next(iter(cluster.nodes)))["metadata"]["name"]
    assert "names no node" in caller(cluster, None).ask("DELETE", f"{SLICES}/{own}")


def _reported(claim: Json) -> Json:
    (entry,) = claim["status"]["devices"]
    return {"devices": [{**entry, "data": {"made": "up"}}]}


def _given_away(claim: Json) -> Json:
    thief = {"resource": "pods", "name": "thief", "uid": "none"}
    return {"reservedFor": [*claim["status"]["reservedFor"], thief]}


@needs(nodes=2)
@pytest.mark.parametrize("change", [_reported, _given_away])
def test_an_agent_reports_on_claims_of_its_own_node_and_gives_none_away(
    change: Callable[[Json], Json], space: Space, cluster: Cluster, agents: Agents
) -> None:
    pod = space.nic_pod("p").running()
    status = space.until(lambda: _with_devices(pod), 15, lambda: f"status.devices: {pod.claim_of()}")
    where = (
        f"/apis/resource.k8s.io/v1/namespaces/{space.name}/resourceclaims/{status['metadata']['name']}/status"
    )

    def patch(node: str) -> str:
        body = {"status": change(status)}
        agent = caller(cluster, agents.pod_on(node))
        return agent.ask("PATCH", where, body, "application/merge-patch+json")

    (other,) = set(cluster.nodes) - {pod.node}
    # From Kubernetes 1.36 the server itself refuses first, in words of its own.
    assert patch(other) != ""
    assert (patch(pod.node) == "") == (change is _reported)


def _with_devices(pod: LivePod) -> Any:
    claim = pod.claim_of()
    return claim if claim["status"].get("devices") else None
