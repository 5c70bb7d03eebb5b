"""What the product is for: a pod is given its NIC, its traffic is counted, the NIC comes home."""

from __future__ import annotations

import pytest

from kndsim.cluster import Cluster
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_ground import Ground, needs
from tests.e2e.e2e_node import links_of
from tests.e2e.e2e_objects import DRIVER, Config, DeviceClass, Json, nic
from tests.e2e.e2e_space import LivePod, Space
from tests.e2e.e2e_traffic import accounts_are, counts_are, send, two_stations


def ready_status(pod: LivePod) -> Json:
    """The one entry of status.devices, once it is there."""

    def entries() -> list[Json]:
        return [each for each in pod.claim_of()["status"].get("devices", []) if each["driver"] == DRIVER]

    (entry,) = pod.space.until(entries, 15, lambda: f"status.devices: {pod.claim_of()}")
    return entry


def test_a_pod_has_its_nic_renamed_and_addressed_before_its_first_act(space: Space, agents: Agents) -> None:
    pod = space.nic_pod("p", nic("net1", "198.18.1.2/24", "2001:db8:1::2/64", mtu=1400)).running()
    seen = pod.first_links()["net1"]
    assert (seen.mtu, seen.up) == (1400, True)
    assert sorted(pod.addresses("net1")) == ["198.18.1.2/24", "2001:db8:1::2/64"]

    (device,) = pod.devices()
    (row,) = agents.prepared(pod.node, space.name)
    assert row["pod"] == "p"
    assert (row["device"], row["interface"], row["state"]) == (device, "net1", "attached")
    assert row["quarantine"] is None

    status = ready_status(pod)
    assert (status["pool"], status["device"]) == (pod.node, device)
    assert status["networkData"]["interfaceName"] == "net1"
    assert sorted(status["networkData"]["ips"]) == ["198.18.1.2/24", "2001:db8:1::2/64"]
    assert status["networkData"]["hardwareAddress"] == pod.links()["net1"].mac
    assert {each["type"]: each["status"] for each in status["conditions"]} == {
        "Ready": "True",
        "Healthy": "True",
    }


@pytest.mark.parametrize(
    "apart",
    [
        pytest.param(False, marks=needs(devices=2, wired=True)),
        pytest.param(True, marks=needs(nodes=2, wired=True)),
    ],
)
def test_two_pods_talk_over_their_nics_and_every_frame_is_counted(
    apart: bool, space: Space, agents: Agents, cluster: Cluster
) -> None:
    one, two = two_stations(space, cluster, apart=apart)
    sent = [send(one, two, frames=500, size=400), send(two, one, frames=300, size=1000)]
    counts_are(agents, space, sent)


@needs(devices=2, wired=True)
def test_a_nic_comes_home_as_it_was_and_its_account_stays(
    space: Space, agents: Agents, cluster: Cluster, ground: Ground
) -> None:
    nodes = list(cluster.nodes)
    home = {node: links_of(cluster.nodes[node].place) for node in nodes}
    offered = {node: agents.slice_devices(node) for node in nodes}
    name = f"e2e-{space.name}"[:60]
    mac = Config(interface={"hardwareAddress": "02:00:5e:10:00:0a"})
    space.cluster_wide(DeviceClass(name=name, selectors=(ground.selector,), config=mac).object())
    one, two = two_stations(space, cluster, apart=False, mtu=1300, first_class=name)
    assert one.pod.links()["net1"].mac == "02:00:5e:10:00:0a"
    assert {node: agents.slice_devices(node) for node in nodes} == offered, "an attach writes no slice"
    node = one.pod.node
    sent = [send(one, two, frames=100, size=200)]
    counts_are(agents, space, sent)

    for station in (one, two):
        station.pod.delete()
    agents.until(
        lambda: {node: links_of(cluster.nodes[node].place) for node in nodes} == home,
        10,
        lambda: f"links as before: {home} now {[links_of(cluster.nodes[node].place) for node in nodes]}",
    )
    assert agents.counted(node, space.name) == [], "series of pods that are gone"
    accounts_are(agents, space, sent)
    assert {node: agents.slice_devices(node) for node in nodes} == offered
    assert agents.prepared(node, space.name) == []
