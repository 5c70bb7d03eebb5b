"""Promise 1 with the agent away: a container that names a claim waits for its NIC."""

from __future__ import annotations

from kndsim.cluster import Cluster
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_node import kill_sandbox, pause_of
from tests.e2e.e2e_objects import nic
from tests.e2e.e2e_space import Space

QUIET = 3.0


def test_a_pod_that_comes_while_the_agent_is_away_waits_and_then_runs_with_its_nic(
    space: Space, agents: Agents
) -> None:
    with agents.away():
        pod = space.nic_pod("p", nic("net1", "198.18.1.1/24"))
        pod.until_event("FailedPrepareDynamicResources")
        pod.never_started(QUIET)
    pod.nudge()
    pod.running()
    assert pod.restarts() == 0
    assert pod.first_links()["net1"].up


def test_a_sandbox_made_anew_while_the_agent_is_away_starts_nothing_until_it_is_back(
    space: Space, agents: Agents, cluster: Cluster
) -> None:
    pod = space.nic_pod("p", nic("net1", "198.18.1.1/24")).running()
    place = cluster.nodes[pod.node].place
    with agents.away():
        old = kill_sandbox(place, pod)
        space.until(lambda: pause_of(place, pod) != old, 30, pod.describe)
        space.until(lambda: "waiting" in pod.status_of().get("state", {}), 30, pod.describe)
        space.holds(lambda: "running" not in pod.status_of().get("state", {}), QUIET, lambda: pod.describe())
    pod.nudge()
    pod.running(90)
    assert pod.first_links()["net1"].up
    assert pod.addresses("net1") == ["198.18.1.1/24"]


def test_a_running_pod_does_not_notice_that_the_agent_is_away(space: Space, agents: Agents) -> None:
    pod = space.nic_pod("p", nic("net1", "198.18.1.1/24")).running()
    with agents.away():
        assert pod.addresses("net1") == ["198.18.1.1/24"]
        pod.delete(wait=False)
    space.until(lambda: pod.find() is None, 30, pod.describe)
    for node in agents.cluster.nodes:
        assert agents.prepared(node, space.name) == []
