"""What discovery says of a real tree of PCI functions, netdevsim ports and RDMA devices, held against the
machine that was asked for and against each other.

Invariant: the answers come from the repository's code, run in the guest; what is right comes from the command
line of the machine (kndsim.guest.machine) and from the kernel's own files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kndsim.guest import Guest, Kernel
from kndsim.guest.machine import IGB_PORTS

MAKE = r"""
set -e
modprobe -a netdevsim rdma_rxe ib_uverbs
for pf in /sys/class/net/*/device/sriov_numvfs; do
    link=${pf#/sys/class/net/}
    ip link set "${link%%/*}" up
    echo 2 >"$pf"
done
echo '7 2' >/sys/bus/netdevsim/new_device
udevadm settle
port=$(ls /sys/bus/netdevsim/devices/netdevsim7/net | head -n 1)
ip link set "$port" up
rdma link add rxe0 type rxe netdev "$port"
echo "$port"
"""
REMOVE = r"""
rdma link delete rxe0
echo 7 >/sys/bus/netdevsim/del_device
for pf in /sys/class/net/*/device/sriov_numvfs; do
    echo 0 >"$pf"
    link=${pf#/sys/class/net/}
    ip link set "${link%%/*}" down
done
udevadm settle
"""
FUNCTIONS = r"""
for function in /sys/bus/pci/devices/*; do
    [ -e "$function/physfn" ] || [ -e "$function/sriov_numvfs" ] || continue
    echo "${function##*/} $(readlink -f "$function") $(cat "$function/numa_node")" \
        "$(basename "$(readlink "$function/iommu_group")") $(basename "$(readlink "$function/physfn")")"
done
"""

Device = dict[str, Any]


class Found:
    """One scan, and the guest it was made in."""

    def __init__(self, vm: Guest, rdma_port: str) -> None:
        self.vm, self.rdma_port = vm, rdma_port
        told = vm.run(["python", "tests/vm/in_guest_scan.py"], timeout=120).out
        self.told: dict[str, Any] = json.loads(told)

    def by(self, kind: str, part: str) -> list[Device]:
        """Devices of a kind whose identity has this part."""
        return [it for it in self.told["devices"] if it["kind"] == kind and part in it["identity"]]


@pytest.fixture(scope="module")
def found(vm: Guest) -> Iterator[Found]:
    port = vm.run(["bash", "-c", MAKE], timeout=120).out.strip()
    try:
        yield Found(vm, port)
    finally:
        vm.run(["bash", "-c", REMOVE], timeout=120)


on_both = pytest.mark.parametrize("vm", [Kernel.NEWEST, Kernel.DEBIAN12], indirect=True, ids=str)


@on_both
def test_every_port_and_its_functions_are_found_where_they_are(found: Found) -> None:
    pfs, vfs = found.by("pf", "address"), found.by("vf", "address")
    assert sorted(pf["link"]["mac"] for pf in pfs) == [f"52:54:00:00:00:{n}" for n in (10, 11, 12, 13)]
    assert {pf["total_vfs"] for pf in pfs} == {7}
    assert len(vfs) == 8
    lines = [line.split() for line in found.vm.run(["bash", "-c", FUNCTIONS]).out.splitlines()]
    kernel = {address: rest for address, *rest in lines}
    assert {device["identity"]["address"] for device in [*pfs, *vfs]} == kernel.keys()
    for device in [*pfs, *vfs]:
        path, numa, group, *physfn = kernel[device["identity"]["address"]]
        facts = device["pci"]
        assert facts["pcie_root"] == path.split("/")[3]
        assert facts["numa_node"] == int(numa)
        assert facts["iommu_group"] == int(group)
        assert [device["identity"]["pf"]] == (physfn if device in vfs else [None])


@on_both
def test_the_two_roots_are_on_the_nodes_they_were_put_on(found: Found) -> None:
    places = {
        pf["link"]["mac"]: (pf["pci"]["pcie_root"], pf["pci"]["numa_node"])
        for pf in found.by("pf", "address")
    }
    assert places == {
        "52:54:00:00:00:10": ("pci0000:20", 0),
        "52:54:00:00:00:11": ("pci0000:20", 0),
        "52:54:00:00:00:12": ("pci0000:40", 1),
        "52:54:00:00:00:13": ("pci0000:40", 1),
    }
    groups = [vf["pci"]["iommu_group"] for vf in found.by("vf", "address")]
    assert len(set(groups)) == len(groups), "each VF can be given to a tenant by itself"


@on_both
def test_simulated_ports_are_known_by_bus_and_port(found: Found) -> None:
    ports = found.by("pf", "bus_id")
    assert sorted((it["identity"]["bus_id"], it["identity"]["port"]) for it in ports) == [(7, 1), (7, 2)]


@on_both
def test_sysfs_and_verbs_agree_on_a_soft_roce_device_and_its_link(found: Found) -> None:
    assert {netdev: facts["name"] for netdev, facts in found.told["sysfs"].items()} == {
        found.rdma_port: "rxe0"
    }
    (device,) = found.told["verbs"]
    facts = found.told["sysfs"][found.rdma_port]
    assert device["name"] == facts["name"]
    assert {port["link_layer"] for port in device["ports"]} == {facts["link_layer"]} == {"Ethernet"}
    gids = [gid for port in device["ports"] for gid in port["gids"]]
    assert gids
    assert {gid["netdev"] for gid in gids} == {found.rdma_port}


@on_both
def test_the_command_lists_what_the_scan_found(found: Found) -> None:
    told = found.vm.run(["knd", "devices", "-o", "json"], timeout=120).out
    rows = json.loads(told)["rows"]
    kinds = [row["kind"] for row in rows]
    assert (kinds.count("vf"), kinds.count("pf")) == (8, IGB_PORTS + 2)
    listed = {row["interface"] for row in rows if row["kind"] in ("vf", "pf")}
    assert listed == {it["link"]["name"] for it in found.told["devices"] if it["kind"] in ("vf", "pf")}
