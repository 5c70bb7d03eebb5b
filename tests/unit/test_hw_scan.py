"""What a node has is found whole, told apart, and withheld where it must not be given away."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hw.model import (
    DeviceKind,
    EswitchMode,
    HwDevice,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    MacAddress,
    NetdevsimIdentity,
    PciAddress,
    PciIdentity,
    SoftwareIdentity,
)
from hw.scan import Uplinks, reserved, scan, uplinks_of
from hw.sysfs import Sysfs
from kndsim.sysfs_tree import vf_farm, write_tree

TREES = Path(__file__).parent / "sysfs_trees"
NOTHING = Uplinks()


def link(index: int, name: str, pci: str | None = None, **more: Any) -> LinkInfo:
    """A link of a PCI function, or of none."""
    values: dict[str, Any] = {
        "ifindex": IfIndex(index),
        "name": IfName(name),
        "flags": LinkFlags(0),
        "link_type": 1,
        "mtu": 1500,
        "mac": MacAddress(f"02:00:00:00:00:{index:02x}"),
        **more,
    }
    if pci is not None:
        values |= {"parent_bus": "pci", "parent_device": pci}
    return LinkInfo(**values)


def look(tmp_path: Path, tree: str, links: Sequence[LinkInfo], uplinks: Uplinks = NOTHING) -> list[HwDevice]:
    root = write_tree(tmp_path / "sys", (TREES / f"{tree}.tree").read_text())
    return list(scan(Sysfs(root), links, uplinks))


def at(devices: Sequence[HwDevice], address: str) -> HwDevice:
    found = [
        device
        for device in devices
        if isinstance(device.identity, PciIdentity) and device.identity.address == address
    ]
    assert len(found) == 1, devices
    return found[0]


MLX5_LINKS = (
    link(2, "ens1f0np0", "0000:3d:00.0", permanent_mac="b8:3f:d2:00:00:01", phys_port_name="p0"),
    link(3, "ens1f0v0", "0000:3d:00.2"),
    link(4, "ens1f0v1", "0000:3d:00.3"),
)


def test_vfs_are_offered_with_all_that_selects_them(tmp_path: Path) -> None:
    device = at(look(tmp_path, "mlx5", MLX5_LINKS), "0000:3d:00.3")
    assert device.kind is DeviceKind.VF
    assert device.identity == PciIdentity(PciAddress("0000:3d:00.3"), PciAddress("0000:3d:00.0"), 1)
    assert device.link == MLX5_LINKS[2]
    assert device.withheld == ""
    assert device.pf_name == "ens1f0np0"
    assert device.pf_eswitch is EswitchMode.LEGACY
    assert device.speed_mbps == 100_000
    assert device.pci is not None
    assert (device.pci.vendor, device.pci.product, device.pci.driver) == ("15b3", "101c", "mlx5_core")
    assert (device.pci.numa_node, device.pci.iommu_group) == (1, 42)
    assert (device.pci.pcie_root, device.pci.pcie_switch) == ("pci0000:3a", "0000:3b:00.0")


def test_rdma_goes_with_its_function_and_a_guid_of_zeroes_is_none(tmp_path: Path) -> None:
    devices = look(tmp_path, "mlx5", MLX5_LINKS)
    first, second = at(devices, "0000:3d:00.2").rdma, at(devices, "0000:3d:00.3").rdma
    assert first is not None
    assert (first.name, first.link_layer, first.firmware) == ("mlx5_2", "Ethernet", "28.39.1002")
    assert first.node_guid == "b83f:d203:00a1:0002"
    assert second is not None
    assert second.node_guid is None
    assert len(devices) == 3


def test_a_pf_may_be_given_away_with_vfs_and_without(tmp_path: Path) -> None:
    links = [link(2, "ens1f0", "0000:21:00.0"), link(3, "ens1f1", "0000:21:00.1")]
    devices = look(tmp_path, "igb", links)
    assert at(devices, "0000:21:00.0").withheld == ""
    other = at(devices, "0000:21:00.1")
    assert (other.kind, other.withheld, other.total_vfs) == (DeviceKind.PF, "", 7)
    assert other.speed_mbps is None


def test_a_vfs_index_is_that_of_its_link_not_of_its_place(tmp_path: Path) -> None:
    devices = look(tmp_path, "igb", [])
    for index, address in enumerate(("0000:21:10.0", "0000:21:10.2", "0000:21:10.4", "0000:21:10.6")):
        device = at(devices, address)
        assert (device.kind, device.identity) == (
            DeviceKind.VF,
            PciIdentity(PciAddress(address), PciAddress("0000:21:00.0"), index),
        )
        assert device.pf_name is None


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("0000:21:10.0", "no driver"),
        ("0000:21:10.2", "bound to vfio-pci"),
        ("0000:21:10.4", "another network namespace"),
        ("0000:21:10.6", "made no netdev|another network namespace"),
    ],
)
def test_a_vf_without_a_netdev_here_is_withheld_with_the_reason(
    tmp_path: Path, address: str, why: str
) -> None:
    device = at(look(tmp_path, "igb", []), address)
    assert device.link is None
    assert re.search(why, device.withheld)


def test_no_numa_node_is_none(tmp_path: Path) -> None:
    pci = at(look(tmp_path, "igb", []), "0000:21:10.0").pci
    assert pci is not None
    assert (pci.numa_node, pci.driver, pci.pcie_switch) == (None, None, None)


SWITCH = {"phys_switch_id": "e8ebd30003a1b2c4"}
SWITCHDEV_LINKS = (
    # The representors come first: neither order nor index may decide.
    link(5, "enp94s0f0npf0vf0", "0000:5e:00.0", phys_port_name="pf0vf0", **SWITCH),
    link(6, "enp94s0f0npf0vf1", "0000:5e:00.0", phys_port_name="pf0vf1", **SWITCH),
    link(7, "enp94s0f0npf0sf88", "0000:5e:00.0", phys_port_name="c1pf0sf88", **SWITCH),
    link(8, "pf0hpf", "0000:5e:00.0", phys_port_name="pf0hpf", **SWITCH),
    link(9, "enp94s0f0np0", "0000:5e:00.0", phys_port_name="p0", **SWITCH),
    link(10, "enp94s0f0v0", "0000:5e:00.2"),
    link(11, "enp94s0f0v1", "0000:5e:00.3"),
)


def test_representors_are_never_taken_for_a_functions_netdev(tmp_path: Path) -> None:
    devices = look(tmp_path, "switchdev", SWITCHDEV_LINKS)
    assert len(devices) == 3
    pf, vf = at(devices, "0000:5e:00.0"), at(devices, "0000:5e:00.2")
    assert pf.link == SWITCHDEV_LINKS[4]
    assert vf.link == SWITCHDEV_LINKS[5]
    assert vf.pf_name == "enp94s0f0np0"
    assert vf.pf_eswitch is EswitchMode.SWITCHDEV
    assert (vf.representor, pf.representor) == ("enp94s0f0npf0vf0", None)
    assert vf.speed_mbps == 200_000
    assert isinstance(pf.identity, PciIdentity)
    assert pf.identity.port is None


def test_each_port_of_a_function_is_a_device_of_its_own(tmp_path: Path) -> None:
    macs = [MacAddress("00:02:c9:00:00:01"), MacAddress("00:02:c9:00:00:02")]
    links = [
        link(4, "ens4", "0000:81:00.0", permanent_mac=macs[0]),
        link(5, "ens4d1", "0000:81:00.0", permanent_mac=macs[1]),
    ]
    devices = look(tmp_path, "dual_port", links)
    address = PciAddress("0000:81:00.0")
    assert [device.identity for device in devices] == [
        PciIdentity(address, port=None, permanent_mac=macs[0]),
        PciIdentity(address, port=1, permanent_mac=macs[1]),
    ]
    assert [device.withheld for device in devices] == ["", ""]
    for device, other in zip(devices, reversed(devices), strict=True):
        assert device.link is not None
        assert device.identity.matches(device.link)
        assert not other.identity.matches(device.link)


@pytest.mark.parametrize("away", [0, 1])
def test_a_ports_identity_stays_when_its_neighbour_is_away(tmp_path: Path, away: int) -> None:
    links = [
        link(4, "ens4", "0000:81:00.0", permanent_mac="00:02:c9:00:00:01"),
        link(5, "ens4d1", "0000:81:00.0", permanent_mac="00:02:c9:00:00:02"),
    ]
    both = look(tmp_path / "a", "dual_port", links)
    alone = look(tmp_path / "b", "dual_port", [links[1 - away]])
    assert [device.identity for device in alone] == [both[1 - away].identity]


def test_ports_that_cannot_be_told_apart_are_withheld(tmp_path: Path) -> None:
    links = [link(4, "ens4", "0000:81:00.0"), link(5, "ens4d1", "0000:81:00.0")]
    assert all("permanent MAC" in device.withheld for device in look(tmp_path, "dual_port", links))


def test_rdma_without_a_netdev_is_a_device(tmp_path: Path) -> None:
    links = [
        link(2, "ib0", "0000:92:00.0", link_type=32, kind="ipoib"),
        link(3, "ib0.8001", "0000:92:00.0", link_type=32, kind="ipoib", peer=IfIndex(2)),
        link(8, "vh0", kind="veth", peer=IfIndex(9), peer_nsid=0),
    ]
    devices = look(tmp_path, "infiniband", links)
    kinds = {device.rdma.name: device.kind for device in devices if device.rdma}
    assert kinds == {
        "mlx5_0": DeviceKind.RDMA,
        "mlx5_1": DeviceKind.PF,
        "erdma_0": DeviceKind.RDMA,
        "rxe0": DeviceKind.NETDEV,
    }
    assert at(devices, "0000:91:00.0").withheld == ""
    assert at(devices, "0000:93:00.0").withheld == ""
    # A partition's interface is on top of the port's, and not the port's own.
    assert at(devices, "0000:92:00.0").link == links[0]
    assert "ib0.8001" in at(devices, "0000:92:00.0").withheld


def test_in_a_guest_every_look_at_a_pf_finds_none(tmp_path: Path) -> None:
    links = [
        link(2, "eth0", parent_bus="virtio", parent_device="virtio2"),
        link(3, "eth1", "0000:00:05.0"),
    ]
    devices = look(tmp_path, "guest", links)
    assert len(devices) == 2
    nic = at(devices, "0000:00:05.0")
    assert (nic.kind, nic.withheld, nic.pf_name, nic.pf_eswitch) == (DeviceKind.PF, "", None, None)
    assert nic.speed_mbps == 25_000
    assert "virtio" in at(devices, "0000:00:03.0").withheld


def nsim(index: int, name: str, device: int, port: str | None) -> LinkInfo:
    return link(
        index, name, parent_bus="netdevsim", parent_device=f"netdevsim{device}", phys_port_name=port,
        phys_switch_id="1bd2515022c9", kind="netdevsim",
    )  # fmt: skip


def test_netdevsim_ports_and_vf_ports_are_devices(tmp_path: Path) -> None:
    links = [
        nsim(2, "eni10np1", 10, "p1"),
        nsim(3, "eni10npf0vf0", 10, "pf0vf0"),
        nsim(4, "eni10npf0vf1", 10, "pf0vf1"),
        nsim(5, "eni11np1", 11, "p1"),
        nsim(6, "odd", 11, None),
        link(7, "odder", parent_bus="netdevsim", parent_device="other"),
    ]
    devices = scan(Sysfs(tmp_path), links, NOTHING)
    assert {device.identity: (device.kind, bool(device.withheld)) for device in devices} == {
        NetdevsimIdentity(10, 1): (DeviceKind.PF, True),
        NetdevsimIdentity(10, 0, 0): (DeviceKind.VF, False),
        NetdevsimIdentity(10, 0, 1): (DeviceKind.VF, False),
        NetdevsimIdentity(11, 1): (DeviceKind.PF, False),
    }
    assert all(device.link and device.identity.matches(device.link) for device in devices)
    assert devices[1].pf_name == "eni10np1"


def test_software_links_are_devices_by_kind_and_index(tmp_path: Path) -> None:
    links = [
        link(57, "v0", kind="veth", peer=IfIndex(2), peer_nsid=3),
        link(2, "eth0"),
        link(1, "lo", link_type=772),
    ]
    (device,) = scan(Sysfs(tmp_path), links, NOTHING)
    assert device.identity == SoftwareIdentity("veth", IfIndex(57), IfIndex(2), 3)
    assert device.kind is DeviceKind.NETDEV
    assert device.withheld == ""


# --- what the host and others need -------------------------------------------------------------------


def test_the_hosts_uplinks_and_all_below_and_above_are_withheld_but_their_vfs_are_not(tmp_path: Path) -> None:
    links = [
        replace(MLX5_LINKS[0], master=IfIndex(20)),
        *MLX5_LINKS[1:],
        link(20, "bond0", kind="bond"),
        link(21, "bond0.7", kind="vlan", peer=IfIndex(20)),
        link(22, "br0", kind="bridge"),
        replace(link(23, "veth7", kind="veth", peer=IfIndex(2), peer_nsid=0), master=IfIndex(22)),
        link(24, "idle", kind="veth", peer=IfIndex(2), peer_nsid=0),
    ]
    uplinks = Uplinks(routes=frozenset({IfIndex(21)}), addressed=frozenset({IfIndex(22)}))
    devices = look(tmp_path, "mlx5", links, uplinks)
    withheld = {device.link.name: device.withheld for device in devices if device.link}
    assert withheld["ens1f0v0"] == withheld["ens1f0v1"] == withheld["idle"] == ""
    assert "default route" in withheld["bond0.7"]
    assert "bond0.7" in withheld["bond0"]
    assert "bond0" in withheld["ens1f0np0"]
    assert "address" in withheld["br0"]
    assert "br0" in withheld["veth7"]


def test_a_pf_under_an_uplink_is_withheld(tmp_path: Path) -> None:
    links = [link(3, "ens1f1", "0000:21:00.1", master=IfIndex(20)), link(20, "bond0", kind="bond")]
    devices = look(tmp_path, "igb", links, Uplinks(addressed=frozenset({IfIndex(20)})))
    assert "bond0" in at(devices, "0000:21:00.1").withheld


@pytest.mark.parametrize("how", ["master", "address", "macvlan"])
def test_a_vf_that_others_use_is_withheld(tmp_path: Path, how: str) -> None:
    vf, extra, uplinks = MLX5_LINKS[1], [], NOTHING
    if how == "master":
        vf, extra = replace(vf, master=IfIndex(30)), [link(30, "ovs", kind="openvswitch")]
    elif how == "address":
        uplinks = Uplinks(addressed=frozenset({vf.ifindex}))
    else:
        extra = [link(31, "mv0", kind="macvlan", peer=vf.ifindex)]
    devices = look(tmp_path, "mlx5", [MLX5_LINKS[0], vf, MLX5_LINKS[2], *extra], uplinks)
    assert "in use by" in at(devices, "0000:3d:00.2").withheld
    assert at(devices, "0000:3d:00.3").withheld == ""


def test_a_veth_whose_peer_is_an_uplink_of_this_namespace_is_withheld() -> None:
    links = [
        link(4, "a", kind="veth", peer=IfIndex(5)),
        link(5, "b", kind="veth", peer=IfIndex(4)),
        link(6, "c", kind="veth", peer=IfIndex(5), peer_nsid=0),
    ]
    assert set(reserved(links, Uplinks(addressed=frozenset({IfIndex(5)})))) == {4, 5}
    assert reserved(links, NOTHING) == {}


def test_what_hangs_on_an_uplinks_lower_device_is_withheld_too() -> None:
    links = [
        link(2, "eth0"),
        link(3, "mv1", kind="macvlan", peer=IfIndex(2)),
        link(4, "mv2", kind="macvlan", peer=IfIndex(2)),
        link(5, "eth1"),
    ]
    found = reserved(links, Uplinks(routes=frozenset({IfIndex(3)})))
    assert set(found) == {2, 3, 4}
    assert "eth0" in found[IfIndex(4)]


def test_loopback_does_not_spread_and_odd_references_do_no_harm() -> None:
    links = [
        link(1, "lo", link_type=772),
        link(2, "a", master=IfIndex(99)),
        link(3, "b", kind="macvlan", peer=IfIndex(98)),
        link(4, "c", kind="vlan", peer=IfIndex(4), master=IfIndex(4)),
    ]
    found = reserved(links, Uplinks(addressed=frozenset({IfIndex(1), IfIndex(97)})))
    assert set(found) >= {1, 2}
    assert 3 not in found


def test_only_addresses_that_are_global_make_an_uplink() -> None:
    class Fixed:
        def all_addresses(self) -> object:
            texts = (
                "127.0.0.1/8",
                "169.254.9.9/16",
                "fe80::1/64",
                "10.0.0.1/8",
                "2001:db8::1/64",
                "fd00::1/8",
            )
            return tuple((index, ipaddress.ip_interface(text)) for index, text in enumerate(texts, 1))

        def default_route_links(self) -> frozenset[int]:
            return frozenset({9})

    assert uplinks_of(Fixed()) == Uplinks(routes=frozenset({9}), addressed=frozenset({4, 5, 6}))  # type: ignore[arg-type]


# --- malformed ---------------------------------------------------------------------------------------

VF = "devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:00.0/0000:3d:00.2"
PF = "devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:00.0/0000:3d:00.0"


@pytest.mark.parametrize(
    ("path", "contents"),
    [
        ("vendor", b"mellanox"),
        ("vendor", b"0x115b3"),
        ("vendor", b""),
        ("device", b"\xff\xfe\x00"),
        ("numa_node", b"1.5"),
        ("net/ens1f0v0/dev_port", b"-"),
    ],
)
def test_what_one_function_says_wrong_costs_that_one(tmp_path: Path, path: str, contents: bytes) -> None:
    root = write_tree(tmp_path / "sys", (TREES / "mlx5.tree").read_text())
    (root / VF / path).write_bytes(contents)
    devices = list(scan(Sysfs(root), MLX5_LINKS, NOTHING))
    bad = at(devices, "0000:3d:00.2")
    assert path.rpartition("/")[2] in bad.withheld
    assert str(root) in bad.withheld
    assert at(devices, "0000:3d:00.3").withheld == ""


def test_a_class_that_makes_no_sense_costs_that_function(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "sys", (TREES / "igb.tree").read_text())
    (root / "bus/pci/devices/0000:21:10.6/class").write_text("network")
    devices = list(scan(Sysfs(root), [], NOTHING))
    assert "class" in at(devices, "0000:21:10.6").withheld
    assert at(devices, "0000:21:10.4").kind is DeviceKind.VF


@pytest.mark.parametrize("contents", [b"", b"fast", b"-1", b"4294967295", b"0", b"\xff"])
def test_a_speed_that_is_none_is_not_taken(tmp_path: Path, contents: bytes) -> None:
    root = write_tree(tmp_path / "sys", (TREES / "mlx5.tree").read_text())
    (root / PF / "net/ens1f0np0/speed").write_bytes(contents)
    devices = list(scan(Sysfs(root), MLX5_LINKS, NOTHING))
    assert [device.speed_mbps for device in devices] == [None] * 3
    assert at(devices, "0000:3d:00.2").withheld == ""


@pytest.mark.parametrize("layer", [b"", b"Token Ring", b"\xff"])
def test_an_rdma_device_that_makes_no_sense_costs_its_functions_rdma(tmp_path: Path, layer: bytes) -> None:
    root = write_tree(tmp_path / "sys", (TREES / "mlx5.tree").read_text())
    (root / VF / "infiniband/mlx5_2/ports/1/link_layer").write_bytes(layer)
    devices = list(scan(Sysfs(root), MLX5_LINKS, NOTHING))
    assert at(devices, "0000:3d:00.2").rdma is None
    assert at(devices, "0000:3d:00.2").withheld == ""
    assert at(devices, "0000:3d:00.3").rdma is not None


def test_links_that_lead_nowhere_are_left_alone(tmp_path: Path) -> None:
    text = (
        (TREES / "mlx5.tree").read_text()
        + """
        bus/pci/devices/0000:99:00.0 -> ../../../devices/pci0000:99/0000:99:00.0
        bus/pci/devices/not-an-address -> ../../../devices
        devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:00.0/0000:3d:00.0/virtfn7 -> ../0000:3d:01.1
        devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/0000:3c:00.0/0000:3d:00.0/virtfnX -> ../0000:3d:00.3
        class/infiniband/mlx5_9 -> ../../devices/gone
    """
    )
    devices = list(scan(Sysfs(write_tree(tmp_path / "sys", text)), MLX5_LINKS, NOTHING))
    assert len(devices) == 3


def test_a_machine_without_pci_has_no_devices(tmp_path: Path) -> None:
    assert scan(Sysfs(tmp_path / "absent"), [], NOTHING) == ()


def test_a_large_node_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of a function is read at most once, and a VF's speed not at all."""
    root = write_tree(tmp_path / "sys", vf_farm(2, 64))
    links = [link(1 + pf * 100, f"pf{pf}", f"0000:{0x20 + pf:02x}:02.0") for pf in range(2)]
    links += [
        link(2 + pf * 100 + vf, f"pf{pf}v{vf}", f"0001:{0x20 + pf:02x}:{vf // 8:02x}.{vf % 8}", mac=None)
        for pf in range(2)
        for vf in range(64)
    ]
    reads: list[str] = []
    sysfs = Sysfs(root)
    for name in ("text", "target", "names"):
        original = getattr(Sysfs, name)

        def counted(self: Sysfs, path: str, *, name: str = name, original: Any = original) -> Any:
            reads.append(f"{name} {path}")
            return original(self, path)

        monkeypatch.setattr(Sysfs, name, counted)
    started = time.perf_counter()
    devices = scan(sysfs, links, NOTHING)
    print(f"{len(devices)} devices in {(time.perf_counter() - started) * 1e3:.0f} ms, {len(reads)} reads")
    vfs = [device for device in devices if device.kind is DeviceKind.VF]
    assert len(vfs) == 128
    assert all(device.withheld == "" and device.speed_mbps == 100_000 and device.rdma for device in vfs)
    assert len({device.identity for device in devices}) == 130
    assert len(reads) == len(set(reads))
    assert sum("/speed" in path for path in reads) == 2
