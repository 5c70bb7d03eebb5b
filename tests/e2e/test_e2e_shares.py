"""A device that the node policy gives out in parts: the scheduler counts what is left of it, each pod has its
own interface with what it asked for, and the node goes on using the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from kndsim.cluster import Cluster
from kndsim.place import Place
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_ground import Feature, needs
from tests.e2e.e2e_node import FAR_ADDRESS, UPLINK, UPLINK_ADDRESS, kill_sandbox, links_of, uplink
from tests.e2e.e2e_objects import Json, Pod, nic
from tests.e2e.e2e_space import LivePod, Space
from tests.e2e.test_e2e_core import ready_status

SHARED_CLASS = "shared.knd.internal"
QUIET = 3.0


class Shares:
    """Pods with a part of the uplink of one node."""

    def __init__(self, space: Space, node: str, place: Place, selector: str) -> None:
        self._space = space
        self.node = node
        self.place = place
        self._selector = selector

    def pod(self, name: str, address: str, amounts: Mapping[str, str] | None = None) -> LivePod:
        claim = self._space.claim(
            nic("net1", f"{address}/24"),
            device_class=SHARED_CLASS,
            selectors=(self._selector,),
            amounts=amounts or {},
        )
        self._space.add(claim.template(name))
        return self._space.pod(Pod(name=name, templates={"net": name}, node=self.node))


@pytest.fixture
def shares(space: Space, agents: Agents, cluster: Cluster) -> Iterator[Shares]:
    node = next(iter(cluster.nodes))
    place = cluster.nodes[node].place
    with uplink(place) as selector:

        def is_offered() -> bool:
            devices = agents.slice_devices(node).values()
            return any(each["attributes"]["ifName"].get("string") == UPLINK for each in devices)

        space.until(is_offered, 15, f"{UPLINK} of {node} is offered")
        before = links_of(place, "share-")
        yield Shares(space, node, place, selector)
        space.empty()
        assert links_of(place, "share-") == before
        assert links_of(place, "knds") == {}


def allocation(pod: LivePod) -> Json:
    (result,) = pod.claim_of()["status"]["allocation"]["devices"]["results"]
    return result


def reaches(pod: LivePod, address: str) -> bool:
    return pod.exec("ping", "-c", "1", "-W", "2", address.partition("/")[0]).code == 0


@needs(feature=Feature.AMOUNTS)
def test_pods_have_a_share_each_of_a_device_that_the_node_uses(
    space: Space, agents: Agents, shares: Shares
) -> None:
    one = shares.pod("one", "198.18.7.11", {"bandwidth": "250M"}).running()
    two = shares.pod("two", "198.18.7.12").running()
    for pod, size in ((one, "300"), (two, "100")):
        status, result = ready_status(pod), allocation(pod)
        assert (status["device"], status["shareID"]) == (result["device"], result["shareID"])
        (ready,) = (each for each in status["conditions"] if each["type"] == "Ready")
        assert f"egress at most {size} Mb/s" in ready["message"]
        assert f"ingress at most {size} Mb/s" in ready["message"]
        assert pod.first_links()["net1"].up
        space.until(lambda pod=pod: reaches(pod, FAR_ADDRESS), 10, f"{pod.name} reaches the far end")
    assert allocation(one)["device"] == allocation(two)["device"]
    assert allocation(one)["shareID"] != allocation(two)["shareID"]
    assert one.links()["net1"].mac != two.links()["net1"].mac
    assert reaches(one, "198.18.7.12")
    assert UPLINK_ADDRESS in shares.place.run(["ip", "-o", "addr", "show", "dev", UPLINK]).out
    connect = f"exec 3<>/dev/tcp/{FAR_ADDRESS.partition('/')[0]}/9"
    told = shares.place.run(["timeout", "5", "bash", "-c", connect], check=False)
    assert "Connection refused" in told.err, "the far end answers the node itself"
    rows = agents.prepared(shares.node, space.name)
    assert {(row["pod"], row["device"], row["state"]) for row in rows} == {
        (name, allocation(one)["device"], "attached") for name in ("one", "two")
    }


@needs(feature=Feature.AMOUNTS)
def test_the_scheduler_gives_no_more_than_there_is_and_what_is_given_back(
    space: Space, shares: Shares
) -> None:
    large = shares.pod("large", "198.18.7.21", {"bandwidth": "800M"}).running()
    late = shares.pod("late", "198.18.7.22", {"bandwidth": "300M"})
    space.holds(lambda: not late.is_running(), QUIET, late.describe)
    small = shares.pod("small", "198.18.7.23", {"bandwidth": "200M"}).running()
    large.delete()
    late.running(90)
    assert reaches(late, "198.18.7.23")
    small.delete()


def test_a_pod_whose_sandbox_died_while_the_agent_was_away_has_its_share_again(
    space: Space, agents: Agents, cluster: Cluster, shares: Shares
) -> None:
    """The interface died with the sandbox, and its device did not: another one is made."""
    pod = shares.pod("one", "198.18.7.31").running()
    share = allocation(pod)["shareID"]
    with agents.away():
        kill_sandbox(shares.place, pod)
    pod.nudge()
    space.until(lambda: pod.restarts() > 0 and pod.is_running(), 120, pod.describe)
    assert allocation(pod)["shareID"] == share
    space.until(lambda: reaches(pod, FAR_ADDRESS), 10, "the far end is reached again")
