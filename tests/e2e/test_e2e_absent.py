"""Promise 1 with the agent away: a container that names a claim waits for its NIC."""

from __future__ import annotations

from kndsim.cluster import Cluster
from kndsim.place import Place
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_ground import DeviceKind, needs
from tests.e2e.e2e_node import SPARE, kill_sandbox, pauses_of, spare_nic
from tests.e2e.e2e_objects import Pod, nic
from tests.e2e.e2e_space import LivePod, Space

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


def spare_pod(space: Space, agents: Agents, node: str, selector: str) -> LivePod:
    """Runs with the spare device."""
    space.until(
        lambda: any(
            each["attributes"]["ifName"].get("string") == SPARE
            for each in agents.slice_devices(node).values()
        ),
        15,
        f"{SPARE} of {node} is offered",
    )
    space.add(space.claim(nic("net1", "198.18.1.1/24"), selectors=(selector,)).template("spare"))
    return space.pod(Pod(name="p", templates={"net": "spare"}, node=node)).running()


@needs(kind=DeviceKind.VETH)
def test_a_sandbox_that_dies_while_the_agent_is_away_leaves_a_pod_that_never_runs_bare(
    space: Space, agents: Agents, cluster: Cluster
) -> None:
    """Its virtual device died with the network namespace: nothing is left to give it later."""
    node = next(iter(cluster.nodes))
    place = cluster.nodes[node].place
    with spare_nic(place) as selector:
        pod = spare_pod(space, agents, node, selector)
        with agents.away():
            _kill_and_watch(pod, place)
        pod.nudge()
        pod.until_event("FailedPrepareDynamicResources", within=30)
        space.holds(lambda: not pod.is_running(), QUIET, pod.describe)
        pod.delete(within=60)
        space.until(lambda: not agents.prepared(node, space.name), 20, "the claim is taken back")


@needs(kind=DeviceKind.VF)
def test_a_sandbox_made_anew_while_the_agent_is_away_starts_nothing_until_it_is_back(
    space: Space, agents: Agents, cluster: Cluster
) -> None:
    pod = space.nic_pod("p", nic("net1", "198.18.1.1/24")).running()
    with agents.away():
        _kill_and_watch(pod, cluster.nodes[pod.node].place)
    pod.nudge()
    pod.running(90)
    assert pod.first_links()["net1"].up
    assert pod.addresses("net1") == ["198.18.1.1/24"]


def _kill_and_watch(pod: LivePod, place: Place) -> None:
    """The sandbox dies, and no container runs in whatever kubelet makes in its place."""
    space = pod.space
    old = kill_sandbox(place, pod)

    def runs() -> bool:
        return "running" in pod.status_of().get("state", {})

    space.until(lambda: not runs() and old not in pauses_of(place, pod), 30, pod.describe)
    pod.nudge()
    space.holds(lambda: not runs(), QUIET, pod.describe)


@needs(kind=DeviceKind.VETH)
def test_a_running_pod_does_not_notice_that_the_agent_is_away_and_can_be_deleted(
    space: Space, agents: Agents, cluster: Cluster
) -> None:
    node = next(iter(cluster.nodes))
    with spare_nic(cluster.nodes[node].place) as selector:
        pod = spare_pod(space, agents, node, selector)
        with agents.away():
            assert pod.addresses("net1") == ["198.18.1.1/24"]
            pod.delete(wait=False)
        space.until(lambda: pod.find() is None, 60, pod.describe)
        space.until(lambda: not agents.prepared(node, space.name), 20, "the claim is taken back")
