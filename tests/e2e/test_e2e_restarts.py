"""What ends and comes back while pods run: sandboxes, kubelet, the runtime, the agent."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from kndsim.cluster import Cluster
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_ground import needs
from tests.e2e.e2e_links import Link
from tests.e2e.e2e_node import kill_sandbox, links_of
from tests.e2e.e2e_objects import Pod, nic
from tests.e2e.e2e_space import Space
from tests.e2e.e2e_traffic import Stream, accounts_are, counts_are, send, two_stations

PREPARE = "knd_kubelet_call_duration_seconds_count"


def prepares(agents: Agents, node: str) -> float:
    """How often kubelet has asked the agent that runs now."""
    return sum(
        value
        for name, labels, value in agents.metrics(node)
        if name == PREPARE and labels.get("method") == "NodePrepareResources"
    )


def nic_at_home(
    agents: Agents, space: Space, cluster: Cluster, home: Mapping[str, Mapping[str, Link]]
) -> None:
    """Every device of every node as it was, and none on record for this namespace."""

    def now() -> Mapping[str, Mapping[str, Link]]:
        return {node: links_of(cluster.nodes[node].place) for node in cluster.nodes}

    space.until(lambda: now() == home, 20, lambda: f"links {now()}, they were {home}")
    for node in cluster.nodes:
        space.until(
            lambda node=node: not agents.prepared(node, space.name),  # type: ignore[misc]
            20,
            lambda node=node: f"records of {node}: {agents.prepared(node, space.name)}",  # type: ignore[misc]
        )


@pytest.fixture
def home(cluster: Cluster, agents: Agents) -> Mapping[str, Mapping[str, Link]]:
    agents.ready()
    return {node: links_of(cluster.nodes[node].place) for node in cluster.nodes}


def test_a_sandbox_made_anew_has_the_nic_again_without_another_prepare(
    space: Space, agents: Agents, cluster: Cluster
) -> None:
    pod = space.nic_pod("p", nic("net1", "198.18.1.1/24")).running()
    asked = prepares(agents, pod.node)
    (device,) = pod.devices()
    first = pod.first_links()["net1"]
    kill_sandbox(cluster.nodes[pod.node].place, pod)
    space.until(lambda: pod.restarts() == 1 and pod.is_running(), 40, pod.describe)
    assert pod.first_links()["net1"] == first
    assert pod.addresses("net1") == ["198.18.1.1/24"]
    assert pod.devices() == [device]
    assert prepares(agents, pod.node) == asked


Interruption = Callable[[Cluster, Agents, str], None]


def restart_kubelet(cluster: Cluster, agents: Agents, node: str) -> None:
    cluster.nodes[node].restart("kubelet")


def restart_containerd(cluster: Cluster, agents: Agents, node: str) -> None:
    cluster.nodes[node].restart("containerd")


def kill_agent(cluster: Cluster, agents: Agents, node: str) -> None:
    agents.kill(node)


def upgrade_agents(cluster: Cluster, agents: Agents, node: str) -> None:
    agents.upgrade()


@needs(devices=3, wired=True)
@pytest.mark.parametrize("interrupt", [restart_kubelet, restart_containerd, kill_agent, upgrade_agents])
def test_traffic_flows_on_and_is_counted_whole_and_later_pods_run(
    interrupt: Interruption,
    space: Space,
    agents: Agents,
    cluster: Cluster,
    home: Mapping[str, Mapping[str, Link]],
) -> None:
    one, two = two_stations(space, cluster, apart=False)
    node = one.pod.node
    with Stream(one, two).flowing() as sent:
        interrupt(cluster, agents, node)
        later = space.nic_pod("later", nic("net1", "198.18.1.3/24"), node=node).running(60)
        assert "net1" in later.first_links()
    sent.append(send(two, one, frames=50, size=100))
    assert one.pod.restarts() == two.pod.restarts() == 0
    agents.ready()
    counts_are(agents, space, sent)
    for pod in (one.pod, two.pod, later):
        pod.delete(wait=False)
    nic_at_home(agents, space, cluster, home)
    accounts_are(agents, space, sent)


def test_a_pod_that_is_deleted_by_force_gives_its_nic_back(
    space: Space, agents: Agents, cluster: Cluster, home: Mapping[str, Mapping[str, Link]]
) -> None:
    pod = space.nic_pod("p", nic("net1", "198.18.1.1/24")).running()
    node, (device,) = pod.node, pod.devices()
    pod.delete(grace=0)
    nic_at_home(agents, space, cluster, home)
    expression = f'device.attributes["knd.internal"].ifName == "{ifname_of(agents, node, device)}"'
    space.add(space.claim(nic("net1"), selectors=(expression,)).template("again"))
    again = space.pod(Pod(name="again", templates={"net": "again"}, node=node))
    assert "net1" in again.running().first_links()
    assert again.devices() == [device]


def test_a_drained_node_has_all_its_nics_at_home(
    space: Space, agents: Agents, cluster: Cluster, home: Mapping[str, Mapping[str, Link]]
) -> None:
    pods = [space.nic_pod(f"p{number}", nic("net1")) for number in range(3)]
    node = pods[0].running().node
    for pod in pods:
        pod.running()
    try:
        cluster.kubectl(
            *("drain", node, "--force", "--ignore-daemonsets", "--delete-emptydir-data"),
            *("--grace-period=1", f"--timeout={int(60 * space.pace)}s"),
        )
        on_node = [pod for pod in pods if (found := pod.find()) and found["spec"]["nodeName"] == node]
        assert on_node == []
        space.until(
            lambda: links_of(cluster.nodes[node].place) == home[node], 20, lambda: f"{node} has its links"
        )
        assert agents.prepared(node, space.name) == []
    finally:
        cluster.kubectl("uncordon", node)


def ifname_of(agents: Agents, node: str, device: str) -> str:
    return str(agents.slice_devices(node)[device]["attributes"]["ifName"]["string"])
