"""What a claim can say, and what becomes of one that cannot be served."""

from __future__ import annotations

from kndsim.cluster import Cluster
from tests.e2e.conftest import NIC_CLASS
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_ground import Feature, Ground, needs
from tests.e2e.e2e_objects import Claim, Config, Container, DeviceClass, Pod, Request, nic
from tests.e2e.e2e_space import Space

QUIET = 3.0
"""Seconds of watching that something does not happen."""


@needs(devices=3)
def test_a_pod_has_the_devices_of_all_its_claims(space: Space, agents: Agents) -> None:
    pair = Claim(
        requests=(Request(device_class=NIC_CLASS, name="a"), Request(device_class=NIC_CLASS, name="b")),
        configs=(
            Config(interface={"mtu": 1350}),
            nic("net1", "198.18.1.1/24", requests=["a"]),
            nic("net2", "198.18.2.1/24", requests=["b"], mtu=1360),
        ),
    )
    space.add(pair.template("pair"))
    space.add(space.claim(nic("net3", "198.18.3.1/24")).claim("single"))
    pod = space.pod(Pod(name="p", templates={"pair": "pair"}, claims={"single": "single"})).running()
    first = pod.first_links()
    assert (first["net1"].mtu, first["net2"].mtu) == (1350, 1360)
    assert "net3" in first
    for number in (1, 2, 3):
        assert pod.addresses(f"net{number}") == [f"198.18.{number}.1/24"]
    devices = {*pod.devices("pair"), *pod.devices("single")}
    assert len(devices) == 3
    rows = agents.prepared(pod.node, space.name)
    assert {(row["device"], row["state"]) for row in rows} == {(each, "attached") for each in devices}


def test_only_containers_that_name_the_claim_get_its_environment_and_all_see_the_nic(space: Space) -> None:
    space.add(space.claim(nic("net1", "198.18.1.1/24")).template("net"))
    pod = space.pod(
        Pod(
            name="p",
            templates={"net": "net"},
            init=(
                Container(name="init-with", then="env", claims=("net",)),
                Container(name="init-without", then="env"),
                Container(name="side-with", always=True, claims=("net",)),
                Container(name="side-without", always=True),
            ),
            containers=(Container(claims=("net",)), Container(name="other")),
        )
    ).running()
    for name in ("init-with", "init-without", "side-with", "side-without", "main", "other"):
        assert pod.first_links(name)["net1"].up, f"{name} ran without the NIC"
        assert pod.restarts(name) == 0
    assert "KND_INTERFACE_" in pod.log("init-with")
    assert "KND_INTERFACE_" not in pod.log("init-without")
    assert "=net1" in pod.out("sh", "-c", "env | grep KND_INTERFACE_")
    assert pod.exec("sh", "-c", "env | grep KND_INTERFACE_", container="other").code == 1


def test_class_and_claim_are_merged_and_the_class_has_the_last_word(space: Space) -> None:
    selectors = space.api.get("DeviceClass", NIC_CLASS)["spec"]["selectors"]
    name = f"e2e-{space.name}"[:60]
    space.cluster_wide(
        DeviceClass(
            name=name,
            selectors=tuple(each["cel"]["expression"] for each in selectors),
            config=Config(
                interface={"name": "fabric0", "mtu": 1400},
                more={
                    "fixed": ["interface.hardwareAddress"],
                    "bounds": {"mtu": {"minimum": 1300, "maximum": 1400}},
                },
            ),
        ).object()
    )

    def config(mtu: int, address: str) -> Config:
        return Config(interface={"mtu": mtu, "addresses": [address]})

    space.add(space.claim(config(1310, "198.18.1.1/24"), device_class=name).template("within"))
    space.add(space.claim(config(1290, "198.18.1.2/24"), device_class=name).template("outside"))
    good = space.pod(Pod(name="within", templates={"net": "within"}))
    bad = space.pod(Pod(name="outside", templates={"net": "outside"}))
    assert good.running().first_links()["fabric0"].mtu == 1310
    assert good.addresses("fabric0") == ["198.18.1.1/24"]
    bad.until_event("FailedPrepareDynamicResources", "interface.mtu: must be 1300 to 1400, not 1290")
    assert not bad.started()


def test_a_selector_chooses_the_device(space: Space, agents: Agents, cluster: Cluster) -> None:
    node = next(iter(cluster.nodes))
    device = max(agents.slice_devices(node).values(), key=lambda each: str(each["name"]))
    ifname = device["attributes"]["ifName"]["string"]
    expression = f'device.attributes["knd.internal"].ifName == "{ifname}"'
    space.add(space.claim(nic("net1"), selectors=(expression,)).template("net"))
    pod = space.pod(Pod(name="p", templates={"net": "net"}, node=node)).running()
    assert pod.devices() == [device["name"]]


def test_a_pod_waits_while_the_pool_is_empty_and_runs_once_a_device_is_free(
    space: Space, cluster: Cluster, ground: Ground
) -> None:
    node = next(iter(cluster.nodes))
    space.add(space.claim(count=ground.devices).template("all"))
    hog = space.pod(Pod(name="hog", templates={"net": "all"}, node=node)).running()
    assert len(set(hog.devices())) == ground.devices
    late = space.nic_pod("late", nic("net1"), node=node)

    def unschedulable() -> bool:
        return any(
            each["type"] == "PodScheduled" and each.get("reason") == "Unschedulable"
            for each in late.raw()["status"].get("conditions", [])
        )

    space.until(unschedulable, 15, late.describe)
    hog.delete()
    assert "net1" in late.running().first_links()


def test_a_second_pod_on_an_exclusive_claim_waits_and_is_told_why(space: Space, agents: Agents) -> None:
    space.add(space.claim(nic("net1", "198.18.1.1/24")).claim("one"))
    holder = space.pod(Pod(name="holder", claims={"net": "one"})).running()
    second = space.pod(Pod(name="second", claims={"net": "one"}))
    event = second.until_event("DeviceInUse", f"{space.name}/holder")
    assert "cannot be shared" in event["message"]
    second.never_started(QUIET)
    assert "net1" in holder.links(), "the holder is not touched"
    holder.delete()
    second.nudge()
    assert "net1" in second.running().first_links()
    assert second.addresses("net1") == ["198.18.1.1/24"]


@needs(feature=Feature.EXTENDED_RESOURCES)
def test_an_extended_resource_is_a_nic(space: Space, ground: Ground) -> None:
    name = f"e2e-{space.name}"[:60]
    resource = "e2e.knd.internal/nic"
    space.cluster_wide(
        DeviceClass(
            name=name,
            selectors=(ground.selector,),
            config=nic("net1", "198.18.1.1/24"),
            extended_resource=resource,
        ).object()
    )
    pod = space.pod(Pod(name="p", containers=(Container(limits={resource: "1"}),))).running()
    assert pod.first_links()["net1"].up
    assert pod.addresses("net1") == ["198.18.1.1/24"]


def test_a_bad_config_is_told_in_an_event_and_its_repair_runs(space: Space, agents: Agents) -> None:
    space.add(space.claim(Config(interface={"nmae": "net1"})).template("net"))
    pod = space.pod(Pod(name="p", templates={"net": "net"}))
    pod.until_event("FailedPrepareDynamicResources", "nmae")
    claim = pod.claim_of()["metadata"]["name"]
    told = space.until(
        lambda: [each for each in space.api.events(space.name, claim) if each["reason"] == "PrepareFailed"],
        10,
        f"an event about claim {claim}",
    )
    assert "nmae" in told[0]["message"]
    assert not pod.started()
    pod.delete()
    space.api.delete("ResourceClaimTemplate", "net", space.name)
    space.add(space.claim(nic("net1")).template("net"))
    assert "net1" in space.pod(Pod(name="p", templates={"net": "net"})).running().first_links()
    assert agents.prepared(pod.node, space.name)[0]["quarantine"] is None


def test_a_pod_on_the_hosts_network_is_refused_with_the_reason(
    space: Space, agents: Agents, cluster: Cluster
) -> None:
    pod = space.nic_pod("p", nic("net1"), more={"hostNetwork": True})
    event = pod.until_event("HostNetwork")
    assert "host's network" in event["message"]
    pod.never_started(QUIET)
    node = pod.node
    assert cluster.nodes[node].place.run(["ip", "link", "show", "net1"], check=False).code != 0
    pod.delete()
    space.until(lambda: not agents.prepared(node, space.name), 15, "the claim is taken back")


@needs(feature=Feature.USER_NAMESPACES)
def test_a_pod_in_a_user_namespace_has_its_nic(space: Space) -> None:
    pod = space.nic_pod("p", nic("net1", "198.18.1.1/24"), more={"hostUsers": False}).running()
    assert pod.out("cat", "/proc/self/uid_map").split()[1] != "0", "it is in a user namespace"
    assert pod.first_links()["net1"].up
    assert pod.addresses("net1") == ["198.18.1.1/24"]
