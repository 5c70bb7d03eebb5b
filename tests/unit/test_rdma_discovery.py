"""Which RDMA device goes with which netdev: on whole nodes as they are built, and where it is not plain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from driver import inventory
from driver.policy import NodePolicy
from hw.errors import HwError, NotFound
from hw.model import (
    DeviceKind,
    HwDevice,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    PciAddress,
    PciIdentity,
    RdmaIndex,
    RdmaName,
)
from hw.rdma.nldev import NldevDevice, NldevPort, PhysState, PortState
from hw.scan import Uplinks, scan
from hw.sysfs import Sysfs
from kndsim.sysfs_tree import write_tree

TREES = Path(__file__).parent / "sysfs_trees"


def link(index: int, name: str, pci: str | None = None, **more: Any) -> LinkInfo:
    place = {"parent_bus": "pci", "parent_device": pci} if pci else {}
    values = {"flags": LinkFlags(0), "link_type": 1, "mtu": 1500, **place, **more}
    return LinkInfo(ifindex=IfIndex(index), name=IfName(name), **values)


def links_of(root: Path) -> list[LinkInfo]:
    """One for each netdev of a tree's functions, as rtnetlink would have them."""
    found = sorted(root.glob("bus/pci/devices/*/net/*"))
    return [
        link(
            number + 2,
            path.name,
            path.parts[-3],
            link_type=32 if path.name.startswith("ib") else 1,
            permanent_mac=None if "v" in path.name else f"a0:88:c2:00:00:{number:02x}",
        )
        for number, path in enumerate(found)
    ]


class Told:
    """NETLINK_RDMA of a namespace, in memory: devices in the order of their indexes, and their ports."""

    def __init__(
        self, *devices: tuple[str, Sequence[int | None]], parents: dict[str, str] | None = None
    ) -> None:
        self._devices = devices
        self._parents = parents or {}
        self.asked: list[RdmaIndex] = []

    def devices(self) -> tuple[NldevDevice, ...]:
        return tuple(
            NldevDevice(
                index=RdmaIndex(index),
                name=RdmaName(name),
                ports=len(ports),
                protocol="roce",
                parent=RdmaName(self._parents[name]) if name in self._parents else None,
            )
            for index, (name, ports) in enumerate(self._devices)
        )

    def ports(self, index: RdmaIndex) -> tuple[NldevPort, ...]:
        self.asked.append(index)
        return tuple(
            NldevPort(
                number=number,
                state=PortState.ACTIVE,
                phys_state=PhysState.LINK_UP,
                netdev_index=IfIndex(netdev) if netdev is not None else None,
            )
            for number, netdev in enumerate(self._devices[index][1], 1)
        )


def by_link(devices: Sequence[HwDevice]) -> dict[str, HwDevice]:
    return {str(device.link.name): device for device in devices if device.link}


def test_a_server_with_eight_nics_is_modelled_whole(tmp_path: Path) -> None:
    root = write_tree(tmp_path, (TREES / "ai_node.tree").read_text())
    links = links_of(root)
    host = next(one.ifindex for one in links if one.name == "ens6f0np0")
    devices = scan(Sysfs(root), links, Uplinks(routes=frozenset({host})))
    found = by_link(devices)
    vfs = [device for device in devices if device.kind is DeviceKind.VF]
    assert (len(devices), len(vfs)) == (26, 16)
    assert all(vf.rdma and vf.rdma_capable and not vf.withheld and not vf.more_rdma for vf in vfs)
    assert len({vf.rdma.name for vf in vfs if vf.rdma}) == 16
    # Each pair of VFs is below one switch of its own, with one GPU, on its socket.
    switches = [vf.pci.pcie_switch for vf in vfs if vf.pci]
    assert [switches.count(switch) for switch in sorted(set(filter(None, switches)))] == [2] * 8
    assert [vf.pci.numa_node for vf in vfs if vf.pci].count(1) == 8
    vf = found["enp206s0v1"]
    assert isinstance(vf.identity, PciIdentity)
    assert (vf.identity.address, vf.identity.pf, vf.identity.vf_index) == ("0000:ce:00.2", "0000:ce:00.0", 1)
    assert (vf.pf_name, vf.speed_mbps) == ("enp206s0np0", 400_000)
    assert vf.rdma
    assert (vf.rdma.name, vf.rdma.node_guid, vf.rdma.firmware) == (
        "mlx5_25",
        "0088:c2ff:fece:0102",
        "28.39.3004",
    )
    pf, own = found["enp206s0np0"], found["ens6f0np0"]
    assert pf.rdma
    assert pf.rdma.name == "mlx5_10"
    assert not pf.withheld, "it is given whole where the server counts what it shares with its VFs"
    assert "default route" in own.withheld
    assert own.rdma
    assert (own.rdma.name, own.rdma_capable) == ("mlx5_1", True)


def test_what_is_published_of_such_a_server_selects_nic_and_gpu_together(tmp_path: Path) -> None:
    root = write_tree(tmp_path, (TREES / "ai_node.tree").read_text())
    built = inventory.build(scan(Sysfs(root), links_of(root), Uplinks()), NodePolicy())
    assert built.problems == ()
    attributes = built.by_name[inventory.name_of(PciIdentity(PciAddress("0000:9a:00.1")))].attributes
    assert attributes["rdma"] is True
    assert (attributes["rdmaDevice"], attributes["rdmaLinkLayer"]) == ("mlx5_20", "Ethernet")
    assert attributes["pcieSwitch"] == "0000:98:00.0"
    assert attributes["resource.kubernetes.io/pcieRoot"] == "pci0000:96"
    assert attributes["resource.kubernetes.io/numaNode"] == 1
    assert attributes["nodeGuid"] == "0088:c2ff:fe9a:0101"


def test_infiniband_vfs_with_and_without_guids_and_one_in_a_pod(tmp_path: Path) -> None:
    root = write_tree(tmp_path, (TREES / "infiniband_vfs.tree").read_text())
    devices = scan(Sysfs(root), links_of(root), Uplinks())
    found = by_link(devices)
    assert len(devices) == 10
    active, without = found["ibp24s0v0"], found["ibp24s0v2"]
    assert (active.kind, active.withheld, active.pf_name) == (DeviceKind.VF, "", "ibp24s0")
    assert active.rdma
    assert without.rdma
    assert (active.rdma.link_layer, active.rdma.node_guid) == ("InfiniBand", "0211:22ff:fe18:0000")
    assert without.rdma.node_guid is None
    away = [device for device in devices if device.link is None]
    assert [device.kind for device in away] == [DeviceKind.VF] * 2
    assert all(device.rdma is None and device.rdma_capable for device in away)
    assert all("another network namespace" in device.withheld for device in away)


def test_a_device_without_netdev_stays_what_it_is_while_a_pod_has_it(tmp_path: Path) -> None:
    """Its folder stays in sysfs, as a netdev's does, whatever namespace the device is in."""
    text = (TREES / "infiniband.tree").read_text().replace("rdma mlx5_0 0000:91:00.0", "# ")
    path = "devices/pci0000:90/0000:90:01.0/0000:91:00.0/infiniband"
    root = write_tree(tmp_path, f"{text}\nfolder {path}\n")
    devices = scan(Sysfs(root), [], Uplinks())
    (away,) = [one for one in devices if one.identity == PciIdentity(PciAddress("0000:91:00.0"))]
    assert (away.kind, away.rdma, away.rdma_capable) == (DeviceKind.RDMA, None, True)
    assert away.withheld == "its RDMA device is in another network namespace"


DUAL = (
    link(4, "ens4", "0000:81:00.0", permanent_mac="a"),
    link(5, "ens4d1", "0000:81:00.0", permanent_mac="b"),
)


@pytest.mark.parametrize(
    "told", [Told(("mlx4_0", [4, 5])), Told(("mlx4_0", [5, 4]))], ids=["plain", "crossed"]
)
def test_two_netdevs_are_two_ports_of_one_rdma_device_and_share_it(tmp_path: Path, told: Told) -> None:
    root = write_tree(tmp_path, (TREES / "dual_port.tree").read_text())
    found = by_link(scan(Sysfs(root), DUAL, Uplinks(), asked=told))
    ports = [port.netdev_index for port in told.ports(RdmaIndex(0))]
    for one in DUAL:
        rdma = found[one.name].rdma
        assert rdma
        assert (rdma.name, rdma.shared, rdma.index) == ("mlx4_0", True, 0)
        assert rdma.port == ports.index(one.ifindex) + 1


def test_without_netlink_the_ports_are_told_by_their_gids(tmp_path: Path) -> None:
    gids = "\ngid mlx4_0 1 0 fe80::1 ens4d1 RoCE v2\ngid mlx4_0 2 0 fe80::2 ens4 RoCE v2\n"
    root = write_tree(tmp_path, (TREES / "dual_port.tree").read_text() + gids)
    found = by_link(scan(Sysfs(root), DUAL, Uplinks()))
    assert [rdma.port for name in ("ens4", "ens4d1") if (rdma := found[name].rdma)] == [2, 1]


TWO = """
pci pci0000:80/0000:80:01.0/0000:81:00.0 = 0x020000 0x15b3 0x1003 numa_node=0 driver=bnxt_en
netdev 0000:81:00.0 ens4 dev_port=0
netdev 0000:81:00.0 ens4d1 dev_port=1
rdma rdma_10 0000:81:00.0 ports/1/link_layer=Ethernet
rdma rdma_9 0000:81:00.0 ports/1/link_layer=Ethernet
"""


def test_of_two_rdma_devices_of_a_function_each_netdev_has_its_own(tmp_path: Path) -> None:
    root = write_tree(tmp_path, TWO)
    told = Told(("rdma_9", [5]), ("rdma_10", [4]))
    found = by_link(scan(Sysfs(root), DUAL, Uplinks(), asked=told))
    first, second = found["ens4"], found["ens4d1"]
    assert first.rdma
    assert second.rdma
    assert (first.rdma.name, first.more_rdma, first.rdma.shared) == ("rdma_10", ("rdma_9",), False)
    assert (second.rdma.name, second.more_rdma, second.rdma.shared) == ("rdma_9", ("rdma_10",), False)


def test_a_part_of_a_device_comes_after_what_it_is_a_part_of(tmp_path: Path) -> None:
    root = write_tree(tmp_path, TWO.replace("netdev 0000:81:00.0 ens4d1 dev_port=1\n", ""))
    told = Told(("rdma_9", [None]), ("rdma_10", [None]), parents={"rdma_9": "rdma_10"})
    (device,) = by_link(scan(Sysfs(root), DUAL[:1], Uplinks(), asked=told)).values()
    assert device.rdma
    assert (device.rdma.name, device.more_rdma) == ("rdma_10", ("rdma_9",))


SOFT = """
folder devices/virtual/infiniband/soft0
class/infiniband/soft0 -> ../../devices/virtual/infiniband/soft0
devices/virtual/infiniband/soft0/ports/1/link_layer = Ethernet
"""


def test_software_is_known_by_the_netdev_it_is_made_on_whatever_its_name(tmp_path: Path) -> None:
    """siw does not say in sysfs what it is made on; rxe says a name, which may be another by now."""
    root = write_tree(tmp_path, SOFT)
    netdevs = [link(8, "renamed", kind="veth", peer=IfIndex(9), peer_nsid=0)]
    (device,) = scan(Sysfs(root), netdevs, Uplinks(), asked=Told(("soft0", [8])))
    assert device.rdma
    assert (device.rdma.name, device.rdma.software, device.rdma.index) == ("soft0", True, 0)
    (device,) = scan(Sysfs(root), netdevs, Uplinks())
    assert device.rdma is None
    (root / "devices/virtual/infiniband/soft0/parent").write_text("renamed\n")
    (device,) = scan(Sysfs(root), netdevs, Uplinks())
    assert device.rdma
    assert device.rdma.name == "soft0"


def test_software_on_a_netdev_comes_after_its_hardware(tmp_path: Path) -> None:
    """An admin may have tried something; what pods use is the card's own."""
    one = TWO.replace("netdev 0000:81:00.0 ens4d1 dev_port=1\n", "")
    one = "".join(line for line in one.splitlines(keepends=True) if "rdma_9" not in line)
    root = write_tree(tmp_path, one + SOFT)
    told = Told(("rdma_10", [None]), ("soft0", [DUAL[0].ifindex]))
    (device,) = by_link(scan(Sysfs(root), DUAL[:1], Uplinks(), asked=told)).values()
    assert device.rdma
    assert (device.rdma.name, device.rdma.software, device.more_rdma) == ("rdma_10", False, ("soft0",))


def test_hardware_is_not_asked_for_the_netdevs_of_its_one_port(tmp_path: Path) -> None:
    """Each question is a command to a card's firmware, and a node may have a thousand VFs."""
    root = write_tree(tmp_path, (TREES / "ai_node.tree").read_text())
    names = sorted((root / "class/infiniband").iterdir())
    told = Told(*((path.name, [None]) for path in names))
    devices = scan(Sysfs(root), links_of(root), Uplinks(), asked=told)
    assert told.asked == []
    assert all(one.rdma and one.rdma.index is not None and one.rdma.protocol == "roce" for one in devices)


class Silent(Told):
    def devices(self) -> tuple[NldevDevice, ...]:
        raise HwError("read the RDMA devices of the host: ENOBUFS")


class Gone(Told):
    def ports(self, index: RdmaIndex) -> tuple[NldevPort, ...]:
        raise NotFound("read the ports of RDMA device 0 of the host: the device is not there (any more)")


@pytest.mark.parametrize("told", [Silent(), Gone(("mlx4_0", [4, 5]))], ids=["silent", "gone"])
def test_where_netlink_fails_sysfs_is_enough(
    tmp_path: Path, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_tree(tmp_path, (TREES / "dual_port.tree").read_text())
    found = by_link(scan(Sysfs(root), DUAL, Uplinks(), asked=told))
    assert all(device.rdma and device.rdma.name == "mlx4_0" for device in found.values())
    assert "sysfs" in caplog.text
