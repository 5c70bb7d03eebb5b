"""Devices that the scheduler is told to keep away from: by the driver, and by an admin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kndsim.cluster import Cluster
from kndsim.place import Place
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_ground import DeviceKind, Feature, needs
from tests.e2e.e2e_node import links_of, pause_of
from tests.e2e.e2e_objects import DRIVER, Json, Pod, nic, taint_rule
from tests.e2e.e2e_space import LivePod, Space

HIDING = "e2e-hiding"
"""A network namespace of the node's, as a pod with the right to make one could keep."""


def taints(agents: Agents, node: str, device: str) -> list[Json]:
    found: list[Json] = agents.slice_devices(node)[device].get("taints", [])
    return [{key: value for key, value in taint.items() if key != "timeAdded"} for taint in found]


def is_unschedulable(pod: LivePod) -> bool:
    conditions = pod.raw()["status"].get("conditions", [])
    return any(each.get("reason") == "Unschedulable" for each in conditions)


def is_placed(pod: LivePod) -> bool:
    return any(
        each["type"] == "PodScheduled" and each["status"] == "True"
        for each in pod.raw()["status"].get("conditions", [])
    )


def is_withheld(pod: LivePod) -> bool:
    return any("is withheld until it is clean" in each["message"] for each in pod.events())


@contextlib.contextmanager
def hiding_place(place: Place) -> Iterator[None]:
    place.run(["ip", "netns", "add", HIDING])
    try:
        yield
    finally:
        place.run(["ip", "netns", "del", HIDING], check=False)


@needs(kind=DeviceKind.VETH)
def test_a_nic_that_its_pod_has_hidden_is_tainted_and_given_away_again_only_once_it_is_home(
    space: Space, agents: Agents, cluster: Cluster
) -> None:
    pod = space.nic_pod("p", nic("net1", mtu=1400)).running()
    node, (device,) = pod.node, pod.devices()
    place = cluster.nodes[node].place
    ifname = agents.slice_devices(node)[device]["attributes"]["ifName"]["string"]
    selector = f'device.attributes["knd.internal"].ifName == "{ifname}"'
    space.add(space.claim(nic("net1"), selectors=(selector,)).template("same"))
    with hiding_place(place):
        inside = ["nsenter", f"--net=/proc/{pause_of(place, pod)}/ns/net"]
        place.run([*inside, "ip", "link", "set", "net1", "netns", f"/run/netns/{HIDING}"])
        pod.delete()
        space.until(
            lambda: taints(agents, node, device),
            20,
            lambda: f"{device}: {agents.slice_devices(node)[device]}",
        )
        assert taints(agents, node, device) == [
            {"key": f"{DRIVER}/quarantined", "value": "true", "effect": "NoSchedule"}
        ]
        late = space.pod(Pod(name="late", templates={"net": "same"}, node=node))
        # The scheduler may still see the slice as it was: then the driver refuses.
        space.until(lambda: is_unschedulable(late) or is_withheld(late), 20, late.describe)
        assert not late.started()
        place.run(["ip", "-n", HIDING, "link", "set", "net1", "netns", "1"])
        space.until(lambda: not taints(agents, node, device), 20, f"{device} is home and clean")
    late.nudge()
    assert "net1" in late.running().first_links()
    assert late.devices() == [device]
    late.delete()
    space.until(lambda: ifname in links_of(place), 10, lambda: f"links of {node}: {links_of(place)}")


def rule_api(space: Space) -> str:
    """The newest version that serves DeviceTaintRules."""
    for version in ("v1", "v1beta2", "v1alpha3"):
        if space.api.serves(f"resource.k8s.io/{version}", "DeviceTaintRule"):
            return f"resource.k8s.io/{version}"
    pytest.fail("this cluster serves no DeviceTaintRule, and its description says that it does")


def first_unschedulable(space: Space, node: str) -> LivePod:
    """A pod that no device of template net is left for. The scheduler reads rules in its own time: a pod that
    it places before it has read the newest one ends, and the next is tried."""
    for attempt in range(5):
        pod = space.pod(Pod(name=f"p{attempt}", templates={"net": "net"}, node=node))
        space.until(lambda pod=pod: is_unschedulable(pod) or is_placed(pod), 15, pod.describe)
        if is_unschedulable(pod):
            return pod
        pod.delete(grace=1)
    pytest.fail("the scheduler places pods on the device after five of them")


@needs(feature=Feature.DEVICE_TAINT_RULES)
def test_a_device_under_maintenance_is_given_to_nobody_until_its_rule_is_gone(
    space: Space, agents: Agents, cluster: Cluster
) -> None:
    node = next(iter(cluster.nodes))
    device = min(agents.slice_devices(node))
    ifname = agents.slice_devices(node)[device]["attributes"]["ifName"]["string"]
    selector = f'device.attributes["knd.internal"].ifName == "{ifname}"'
    space.add(space.claim(nic("net1"), selectors=(selector,)).template("net"))
    api = rule_api(space)
    rule = f"e2e-{space.name}"[:60]
    space.cluster_wide(taint_rule(rule, api, pool=node, device=device, effect="NoSchedule"))
    pod = first_unschedulable(space, node)
    space.api.delete("DeviceTaintRule", rule, api_version=api)
    assert "net1" in pod.running().first_links()


@needs(feature=Feature.DEVICE_TAINT_RULES)
def test_a_pod_that_a_rule_evicts_gives_its_nic_back(space: Space, agents: Agents, cluster: Cluster) -> None:
    pod = space.nic_pod("p", nic("net1")).running()
    node, (device,) = pod.node, pod.devices()
    before = agents.slice_devices(node)
    rule = f"e2e-{space.name}"[:60]
    space.cluster_wide(taint_rule(rule, rule_api(space), pool=node, device=device, effect="NoExecute"))
    space.until(lambda: pod.find() is None, 30, pod.describe)
    space.until(lambda: not agents.prepared(node, space.name), 15, "the claim is taken back")
    ifname = before[device]["attributes"]["ifName"]["string"]
    assert ifname in links_of(cluster.nodes[node].place)
    assert agents.slice_devices(node) == before
