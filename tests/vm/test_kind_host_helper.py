"""The keeper of a kind cluster's devices on a kernel that has some: netdevsim, a VF of igb, soft RoCE.

Invariant: nodes and pods are network namespaces of the guest, as those of kind's containers are of its host;
the devices, and where the kernel puts them when a pod ends, are real.
"""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import pytest

from kndsim.guest import Guest, guest
from kndsim.kind.model import DeviceId, Home
from kndsim.kind.plan import Lent, Plan
from kndsim.waiting import wait_until

pytestmark = pytest.mark.timeout(600)

FOLDER = PurePosixPath("/run/kind")
NODES = ("one", "other")
PATIENCE = 180.0


@dataclass(frozen=True, slots=True)
class World:
    vm: Guest
    vf: DeviceId
    vf_name: str

    def sh(self, script: str, *, check: bool = True) -> str:
        return self.vm.run(["sh", "-euc", script], check=check, timeout=PATIENCE).out

    def links(self, node: str = "") -> dict[str, dict[str, Any]]:
        """Name to what ip(8) says of it. "" is the first namespace."""
        where = f"-n {node}" if node else ""
        found = json.loads(self.sh(f"ip {where} -d -j link show") or "[]")
        return {str(link["ifname"]): link for link in found}

    def wait_for(self, name: str, node: str) -> None:
        wait_until(
            lambda: name in self.links(node),
            PATIENCE,
            f"{name} in {node or 'the first namespace'}:\n{self.log}",
        )

    @property
    def log(self) -> str:
        return self.vm.log("keeper")

    def end_of_pod(self, node: str, device: str, name: str) -> None:
        """A pod has a device of a node under a name of its own, and ends with nobody moving it out."""
        self.sh(f"ip netns add pod; ip -n {node} link set {device} netns pod name {name}; ip netns del pod")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with guest(name="kind-host") as vm:
        vm.run(["sh", "-euc", f"modprobe -a netdevsim rdma_rxe; mkdir {FOLDER}"])
        for node in NODES:
            vm.run(["ip", "netns", "add", node])
        pf = "/sys/bus/pci/devices/0000:21:00.0"
        vm.run(["sh", "-euc", f"ip link set $(ls {pf}/net) up; echo 1 >{pf}/sriov_numvfs"])
        said = "basename $(readlink -f {0}/virtfn0); ls {0}/virtfn0/net"
        wait_until(lambda: vm.run(["sh", "-c", f"ls {pf}/virtfn0/net"], check=False).out, PATIENCE, "a VF")
        vm.run(["udevadm", "settle"])
        address, name = vm.run(["sh", "-euc", said.format(pf)]).out.split()
        vf = DeviceId("pci", address)
        plan = Plan(
            nodes={node: f"/run/netns/{node}" for node in NODES},
            ports=2,
            vfs=2,
            veths=1,
            lent=(Lent(vf, Home("one", "lent0")),),
            rdma=True,
        )
        vm.write(FOLDER / "plan.json", json.dumps(asdict(plan)).encode())
        vm.start("keeper", ["python", "-m", "kndsim.kind", "keep", str(FOLDER)])
        made = World(vm, vf, name)
        ground = f"test -e {FOLDER}/ground.json"

        def stands() -> bool:
            assert vm.alive("keeper"), vm.log("keeper")
            return vm.run(["sh", "-c", ground], check=False).code == 0

        wait_until(stands, PATIENCE * 2, "the ground stands")
        yield made


def test_every_node_has_its_devices_and_the_first_namespace_has_none_of_them(world: World) -> None:
    given = {"sim0", "sim1", "simpf", "simv0", "simv1", "net-0", "mac-0"}
    assert given | {"lent0"} <= world.links("one").keys()
    assert given <= world.links("other").keys()
    here = world.links()
    assert not [name for name, link in here.items() if link.get("parentbus") == "netdevsim"]
    assert world.vf_name not in here


def test_the_ports_of_two_nodes_reach_each_other(world: World) -> None:
    for number, node in enumerate(NODES, 1):
        world.sh(f"ip -n {node} addr add 192.0.2.{number}/24 dev sim1; ip -n {node} link set sim1 up")
    assert "3 received" in world.sh("ip netns exec one ping -c 3 -i 0.2 -W 10 192.0.2.2")


def test_a_device_whose_pod_ended_falls_here_and_only_the_keeper_brings_it_back(world: World) -> None:
    """Held still, the keeper does nothing: so it is the kernel that puts the device here, and the keeper that
    gives it back."""
    world.vm.signal("keeper", signal.SIGSTOP)
    world.end_of_pod("one", "sim0", "mine0")
    world.wait_for("mine0", "")
    assert world.links()["mine0"]["parentbus"] == "netdevsim"
    world.vm.signal("keeper", signal.SIGCONT)
    world.wait_for("sim0", "one")
    assert "mine0" not in world.links()
    assert "came here as 'mine0': back on one as sim0" in world.log


@pytest.mark.parametrize(("node", "device"), [("other", "simv1"), ("other", "sim0"), ("one", "lent0")])
def test_a_device_of_each_kind_is_back_in_its_own_node_under_its_own_name(
    world: World, node: str, device: str
) -> None:
    before = world.links(node)[device]
    # The name that a device of the other node has, and the first namespace's own link.
    world.end_of_pod(node, device, "eth0")
    world.wait_for(device, node)
    after = world.links(node)[device]
    same = ("address", "parentbus", "parentdev", "phys_port_name")
    assert [after.get(key) for key in same] == [before.get(key) for key in same]
    assert "eth0" not in world.links()


def test_the_devices_of_a_node_that_went_away_wait_for_it(world: World) -> None:
    world.sh("ip netns del other")
    wait_until(lambda: "wait" in world.log, PATIENCE, "the keeper has seen it")
    wait_until(
        lambda: len([link for link in world.links().values() if link.get("parentbus") == "netdevsim"]) == 5,
        PATIENCE,
        "all devices of the node stand here",
    )
    world.sh("ip netns add other")
    for name in ("sim0", "sim1", "simv0", "simv1", "simpf"):
        world.wait_for(name, "other")
    assert not [link for link in world.links().values() if link.get("parentbus") == "netdevsim"]


def test_a_device_that_came_back_has_its_soft_roce_device_again(world: World) -> None:
    def rdma() -> dict[str, str]:
        """Netdev to RDMA device, in the node."""
        found = json.loads(world.sh("ip netns exec one rdma -j link show") or "[]")
        return {str(link.get("netdev")): str(link["ifname"]) for link in found}

    wait_until(lambda: "sim0" in rdma(), PATIENCE, f"a soft RoCE device:\n{world.log}")
    before = rdma()["sim0"]
    world.end_of_pod("one", "sim0", "mine0")
    world.wait_for("sim0", "one")
    wait_until(lambda: rdma().get("sim0") == before, PATIENCE, f"it is there again:\n{world.log}")


def test_at_the_end_what_was_made_is_gone_and_what_was_lent_is_back(world: World) -> None:
    world.vm.signal("keeper", signal.SIGTERM)
    wait_until(lambda: not world.vm.alive("keeper"), PATIENCE, "the keeper ends")
    assert world.log.splitlines()[-1].endswith("the devices are gone"), world.log
    assert world.vf.device in [link.get("parentdev") for link in world.links().values()], world.links()
    assert world.links()[world.vf_name]["parentdev"] == world.vf.device, world.links()
    for node in NODES:
        assert world.links(node).keys() <= {"lo", *_tunnels(world)}
    assert world.sh("ls /sys/bus/netdevsim/devices") == ""
    assert world.sh(f"ls {shlex.quote(str(FOLDER))}").split() == ["keeper.pid", "netdevsim", "plan.json"]


def _tunnels(world: World) -> set[str]:
    """Links that a kernel with such modules gives to every new namespace."""
    world.sh("ip netns add empty")
    try:
        return set(world.links("empty"))
    finally:
        world.sh("ip netns del empty")
