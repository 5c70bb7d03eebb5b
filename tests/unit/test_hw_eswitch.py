"""Which netdev is a function's own, and which its end in the switch: as devlink says, or else by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hw import eswitch
from hw.devlink_codec import DevlinkHandle, DevlinkPort, PortFlavour
from hw.errors import HwError, Refused, Unsupported
from hw.eswitch import NO_ESWITCHES, Eswitches, is_representor, read_eswitches, representors
from hw.model import (
    DeviceKind,
    EswitchMode,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    NetdevsimIdentity,
    NsimName,
    PciAddress,
)
from hw.ports import sriov_ports
from hw.scan import Uplinks, scan
from hw.sysfs import Sysfs
from kndsim.sysfs_tree import write_tree

PF = DevlinkHandle("pci", "0000:5e:00.0")
VF = DevlinkHandle("pci", "0000:5e:00.2")
SIM = DevlinkHandle("netdevsim", "netdevsim10")
TREE = """
bus/pci/devices/0000:5e:00.0/sriov_totalvfs = 8
bus/pci/devices/0000:5e:00.2/vendor = 0x15b3
bus/netdevsim/devices/netdevsim10/sriov_numvfs = 2
"""


def link(index: int, name: str, parent: str = PF.device, **fields: Any) -> LinkInfo:
    given: dict[str, Any] = {
        "ifindex": IfIndex(index),
        "name": IfName(name),
        "flags": LinkFlags(0),
        "link_type": 1,
        "mtu": 1500,
        "parent_bus": "pci",
        "parent_device": parent,
        "phys_switch_id": "e8ebd3",
    }
    return LinkInfo(**(given | fields))


def port(index: int, flavour: PortFlavour | None, handle: DevlinkHandle = PF, **fields: Any) -> DevlinkPort:
    return DevlinkPort(handle=handle, index=index, flavour=flavour, ifindex=IfIndex(index), **fields)


def told(*ports: DevlinkPort) -> Eswitches:
    by_index = {each.ifindex: each for each in ports if each.ifindex is not None}
    return Eswitches({PF: EswitchMode.SWITCHDEV}, by_index)


def test_what_devlink_says_of_a_port_goes_before_its_name() -> None:
    renamed = link(5, "rep0", phys_port_name="odd0")
    uplink = link(6, "ens1", phys_port_name="pf0vf7")
    eswitches = told(port(5, PortFlavour.PCI_VF, pf=0, vf=3), port(6, PortFlavour.PHYSICAL))
    assert is_representor(renamed, eswitches)
    assert not is_representor(uplink, eswitches)
    assert (is_representor(renamed), is_representor(uplink)) == (False, True)


def test_a_port_of_unknown_flavour_is_told_by_its_name() -> None:
    assert is_representor(link(5, "rep0", phys_port_name="pf0vf0"), told(port(5, None)))


def test_a_vfs_representor_is_found_by_pf_and_index_and_never_that_of_another_host() -> None:
    links = [
        link(5, "rep0", phys_port_name="odd0"),
        link(6, "rep1", phys_port_name="c1pf0vf1"),
        link(7, "rep2", phys_port_name="pf0vf2"),
        link(8, "sf", phys_port_name="pf0sf3"),
        link(9, "up", phys_port_name="p0"),
    ]
    by_name = {key: each.name for key, each in representors(links, NO_ESWITCHES).items()}
    assert by_name == {(PF.device, 2): "rep2"}
    eswitches = told(
        port(5, PortFlavour.PCI_VF, pf=0, vf=0),
        port(6, PortFlavour.PCI_VF, pf=0, vf=1, external=True, controller=1),
        port(8, PortFlavour.PCI_SF, pf=0, sf=3),
    )
    by_devlink = {key: each.name for key, each in representors(links, eswitches).items()}
    assert by_devlink == {(PF.device, 0): "rep0", (PF.device, 2): "rep2"}


def test_netdevsim_ports_are_told_apart_by_flavour(tmp_path: Path) -> None:
    links = [
        link(5, "a", "netdevsim10", parent_bus="netdevsim", phys_port_name=None),
        link(6, "b", "netdevsim10", parent_bus="netdevsim", phys_port_name=None),
    ]
    ports = (port(5, PortFlavour.PHYSICAL, SIM, number=1), port(6, PortFlavour.PCI_VF, SIM, pf=0, vf=1))
    eswitches = Eswitches({SIM: EswitchMode.SWITCHDEV}, {p.ifindex: p for p in ports if p.ifindex})
    found = scan(Sysfs(tmp_path), links, Uplinks(), eswitches)
    assert [(each.identity, each.kind, bool(each.withheld)) for each in found] == [
        (NetdevsimIdentity(10, 1), DeviceKind.PF, True),
        (NetdevsimIdentity(10, 0, 1), DeviceKind.VF, False),
    ]
    assert {each.pf_eswitch for each in found} == {EswitchMode.SWITCHDEV}


def test_a_simulated_port_whose_vfs_have_no_netdevs_is_not_given_away_either(tmp_path: Path) -> None:
    write_tree(tmp_path, TREE)
    links = [link(5, "a", "netdevsim10", parent_bus="netdevsim", phys_port_name="p1")]
    (found,) = scan(Sysfs(tmp_path), links, Uplinks(), Eswitches({SIM: EswitchMode.LEGACY}))
    assert "it has VFs" in found.withheld
    assert found.pf_eswitch is EswitchMode.LEGACY


class Kernel:
    """Answers as devlink does, or as error says."""

    def __init__(self, mode: EswitchMode, error: HwError | None = None) -> None:
        self._mode, self._error = mode, error
        self.asked: list[str] = []

    def __call__(self) -> Kernel:
        if self._error is not None:
            raise self._error
        return self

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def devices(self) -> tuple[DevlinkHandle, ...]:
        return (PF, VF, SIM, DevlinkHandle("auxiliary", "mlx5_core.sf.2"))

    def eswitch_mode(self, handle: DevlinkHandle) -> EswitchMode:
        self.asked.append(str(handle))
        return self._mode

    def ports(self) -> tuple[DevlinkPort, ...]:
        self.asked.append("ports")
        return (port(5, PortFlavour.PHYSICAL), DevlinkPort(handle=PF, index=2))


def asked(root: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> Eswitches:
    write_tree(root, TREE)
    monkeypatch.setattr(eswitch, "Devlink", kernel)
    return read_eswitches(Sysfs(root))


def test_only_devices_that_can_have_vfs_are_asked_and_ports_only_in_switchdev(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(EswitchMode.LEGACY)
    found = asked(tmp_path / "legacy", monkeypatch, kernel)
    assert kernel.asked == [str(PF), str(SIM)]
    assert found.mode_of("pci", PciAddress(PF.device)) is EswitchMode.LEGACY
    assert found.mode_of("pci", VF.device) is None
    kernel = Kernel(EswitchMode.SWITCHDEV)
    found = asked(tmp_path / "switchdev", monkeypatch, kernel)
    assert kernel.asked[-1] == "ports"
    assert found.ports.keys() == {5}


@pytest.mark.parametrize("error", [Unsupported("look", 95), Refused("look", 1), HwError("nonsense")])
def test_a_kernel_that_does_not_tell_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: HwError
) -> None:
    kernel = Kernel(EswitchMode.LEGACY, error)
    assert asked(tmp_path, monkeypatch, kernel) == NO_ESWITCHES


def test_a_simulated_card_is_a_port_that_can_have_vfs_where_its_netdevs_are(tmp_path: Path) -> None:
    write_tree(tmp_path, TREE)
    own = [
        link(7, "p2", "netdevsim10", parent_bus="netdevsim", phys_port_name="p2"),
        link(5, "p1", "netdevsim10", parent_bus="netdevsim", phys_port_name="p1"),
        link(8, "v0", "netdevsim10", parent_bus="netdevsim", phys_port_name="pf0vf0"),
    ]
    name = NsimName("netdevsim10")
    found = sriov_ports(Sysfs(tmp_path), own, Uplinks(), Eswitches({SIM: EswitchMode.SWITCHDEV}))
    port = found.by_address[name]
    assert (port.num_vfs, port.total_vfs, port.eswitch, port.driver) == (
        2,
        4,
        EswitchMode.SWITCHDEV,
        "netdevsim",
    )
    assert [each.name for each in port.links] == ["p1", "p2"]
    assert "another network namespace" in port.vfs_in_use
    used = sriov_ports(Sysfs(tmp_path), own, Uplinks(addressed=frozenset({IfIndex(8)})))
    assert "has an address" in used.by_address[name].vfs_in_use
    assert name not in sriov_ports(Sysfs(tmp_path), (), Uplinks()).by_address


def test_a_simulated_card_that_tells_no_number_of_vfs_costs_itself_alone(tmp_path: Path) -> None:
    write_tree(tmp_path, "bus/netdevsim/devices/netdevsim10/sriov_numvfs = many")
    own = [link(5, "p1", "netdevsim10", parent_bus="netdevsim", phys_port_name="p1")]
    found = sriov_ports(Sysfs(tmp_path), own, Uplinks())
    assert not found.by_address
    assert "netdevsim10 cannot be read" in found.problems[0]
    assert scan(Sysfs(tmp_path), own, Uplinks())[0].withheld == ""
