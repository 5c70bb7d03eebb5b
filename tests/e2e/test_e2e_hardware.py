"""Real functions: a claim's VF is the one in the pod, netdevsim ports come and go, and files are given where
a pod drives the device itself."""

from __future__ import annotations

import re

from kndsim.cluster import Cluster
from kndsim.place import Place
from tests.e2e.e2e_agents import Agents
from tests.e2e.e2e_ground import DeviceKind, needs
from tests.e2e.e2e_node import links_of
from tests.e2e.e2e_objects import Config, Container, DeviceClass, Pod, nic
from tests.e2e.e2e_space import LivePod, Space

_DRIVER = 'device.driver == "knd.internal"'
_NAME = 'device.attributes["knd.internal"].ifName'


def pci_of(pod: LivePod) -> str:
    """The PCI address in the name of its one device, pci-0000-21-10-0."""
    (device,) = pod.devices()
    domain, bus, slot, function = device.removeprefix("pci-").split("-")
    return f"{domain}:{bus}:{slot}.{function}"


def pod_of(template: str, *more: Container) -> Pod:
    """One container that names the claim, and others."""
    return Pod(name=template, templates={"net": template}, containers=(Container(claims=("net",)), *more))


def driver_of(place: Place, address: str) -> str:
    link = place.run(["readlink", f"/sys/bus/pci/devices/{address}/driver"]).out
    return link.strip().rpartition("/")[2]


@needs(kind=DeviceKind.VF)
def test_the_interface_in_the_pod_is_the_vf_that_was_allocated(space: Space, cluster: Cluster) -> None:
    (node,) = cluster.nodes.values()
    before = links_of(node.place)
    pod = space.nic_pod("p", nic("net1", "198.18.1.2/24")).running()
    address = pci_of(pod)
    seen = pod.out("readlink", "-f", "/sys/class/net/net1/device").strip()
    assert seen.endswith(f"/{address}")
    assert len(links_of(node.place)) == len(before) - 1
    pod.delete()
    space.until(lambda: links_of(node.place) == before, 20, lambda: f"{before} again: {links_of(node.place)}")


@needs(kind=DeviceKind.VF)
def test_a_netdevsim_port_is_moved_named_and_home_again(space: Space, cluster: Cluster) -> None:
    """Its two ports are on one wire: two pods talk over it."""
    (node,) = cluster.nodes.values()
    before = links_of(node.place, "net-nsim-")
    assert len(before) == 2
    space.cluster_wide(
        DeviceClass(
            name="e2e-simulated", selectors=(f'{_DRIVER} && {_NAME}.startsWith("net-nsim-")',)
        ).object()
    )
    for number, name in enumerate(("one", "two"), 1):
        claim = space.claim(nic("sim0", f"198.18.2.{number}/24"), device_class="e2e-simulated")
        space.add(claim.template(name))
    one, two = (space.pod(pod_of(name)) for name in ("one", "two"))
    one.running()
    two.running()
    assert one.first_links()["sim0"].up
    space.until(
        lambda: one.exec("ping", "-c", "1", "-W", "1", "198.18.2.2").code == 0,
        15,
        lambda: f"the ports reach each other: {one.links()} {two.links()}",
    )
    one.delete()
    two.delete()
    space.until(
        lambda: links_of(node.place, "net-nsim-") == before,
        20,
        lambda: f"{before} again: {links_of(node.place, 'net-nsim-')}",
    )


@needs(kind=DeviceKind.VF)
def test_rdma_files_open_in_the_container_that_names_the_claim_and_in_no_other(
    space: Space, cluster: Cluster
) -> None:
    """By this policy each pod's interface has a soft RoCE device made on it. Devices are shared, so every
    container sees them in /sys, and files alone keep one out."""
    (node,) = cluster.nodes.values()
    interface = {"name": "roce0", "addresses": ["198.18.3.1/24"]}
    limits = {"handles": 8, "objects": 64}
    config = Config(interface=interface, more={"rdma": {"nccl": True, "limits": limits}})
    space.add(space.claim(config).template("p"))
    pod = space.pod(pod_of("p", Container(name="other"))).running()
    (device,) = pod.devices()
    told = dict(line.split("=", 1) for line in pod.out("env").splitlines() if "=" in line)
    key = re.sub("[^A-Z0-9]", "_", device.upper())
    name, index = told[f"KND_RDMA_DEVICE_{key}"], told[f"KND_RDMA_GID_INDEX_{key}"]
    assert (told["NCCL_IB_HCA"], told["NCCL_IB_GID_INDEX"]) == (f"={name}:1", index)
    port = f"/sys/class/infiniband/{name}/ports/1"
    assert pod.out("cat", f"{port}/gids/{index}").strip() == "0000:0000:0000:0000:0000:ffff:c612:0301"
    assert pod.out("cat", f"{port}/gid_attrs/types/{index}").strip() == "RoCE v2"
    (file,) = (each for each in pod.out("ls", "/dev/infiniband").split() if each.startswith("uverbs"))
    assert pod.out("cat", f"/sys/class/infiniband_verbs/{file}/ibdev").strip() == name
    pod.out("sh", "-c", f"exec 3<>/dev/infiniband/{file}")

    assert pod.exec("ls", "/dev/infiniband", container="other").code != 0
    numbers = pod.out("cat", f"/sys/class/infiniband_verbs/{file}/dev").strip().replace(":", " ")
    pod.out("mknod", "/own", "c", *numbers.split(), container="other")
    refused = pod.exec("sh", "-c", "exec 3<>/own", container="other")
    assert refused.code != 0
    assert "Operation not permitted" in refused.err

    for container, most in (
        ("main", "hca_handle=8 hca_object=64"),
        ("other", "hca_handle=max hca_object=max"),
    ):
        told_of = pod.out("cat", "/sys/fs/cgroup/rdma.max", container=container).splitlines()
        assert [name, *most.split()] in [line.split() for line in told_of]
    pod.delete()
    space.until(lambda: name not in node.place.run(["rdma", "link"]).out, 20, f"{name} is removed")


@needs(kind=DeviceKind.VF)
def test_a_virtual_machines_pod_has_the_vfio_files_and_the_address_it_is_told(
    space: Space, agents: Agents, cluster: Cluster
) -> None:
    (node,) = cluster.nodes.values()
    before = links_of(node.place)
    vfio = Config(more={"vf": {"driver": "vfio-pci"}})
    selector = f'{_DRIVER} && device.attributes["knd.internal"].kind == "vf"'
    space.cluster_wide(DeviceClass(name="e2e-vfio", selectors=(selector,), config=vfio).object())
    space.add(space.claim(device_class="e2e-vfio").template("vm"))
    pod = space.pod(pod_of("vm", Container(name="other"))).running()
    address = pci_of(pod)
    assert driver_of(node.place, address) == "vfio-pci"
    group = node.place.run(["readlink", f"/sys/bus/pci/devices/{address}/iommu_group"]).out
    files = pod.out("ls", "/dev/vfio").split()
    assert sorted(files) == sorted(["vfio", group.strip().rpartition("/")[2]])
    told = [line for line in pod.out("env").splitlines() if line.startswith("KND_PCI_ADDRESS_")]
    assert [line.partition("=")[2] for line in told] == [address]
    assert pod.exec("ls", "/dev/vfio", container="other").code != 0, "a container that names no claim"
    pod.delete()
    space.until(lambda: driver_of(node.place, address) == "igbvf", 20, "its own driver again")
    space.until(lambda: links_of(node.place) == before, 20, lambda: f"{before} again: {links_of(node.place)}")
    assert agents.prepared(node.name, space.name) == []
