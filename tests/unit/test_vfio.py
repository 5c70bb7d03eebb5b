"""A VF that a pod drives itself: taken from its driver only where that gives away nothing else, and back.

The kernel's side is played by a sysfs of files that binds and unbinds as the PCI core does; the tests in a
guest do the same with real functions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.errors import Refusal
from driver.execute import probe, vfio
from driver.execute.target import NotClean, Target, Vanished
from driver.lifecycle.devices import Devices
from driver.model import NicConfig, VfConfig, VfDriver
from driver.policy import NodePolicy
from hw.errors import Busy, NotFound, Refused
from hw.model import PciAddress, PciIdentity
from hw.sriov import binding
from hw.sysfs import Sysfs
from hw.udev import Udev
from kndsim.sysfs_tree import write_tree
from tests.unit.journal_values import preparation

VF = PciAddress("0000:21:10.0")
NEIGHBOUR = "0000:21:10.2"
TREE = f"""
pci pci0000:20/0000:20:00.0/{VF} = 0x020000 0x8086 0x10ca driver=igbvf iommu_group=15
pci pci0000:20/0000:20:00.0/{NEIGHBOUR} = 0x020000 0x8086 0x10ca driver=igbvf iommu_group=16
bus/pci/devices/{VF}/driver_override = (null)
folder bus/pci/drivers/igbvf
folder bus/pci/drivers/vfio-pci
kernel/iommu_groups/15/devices/{VF} -> ../../../../bus/pci/devices/{VF}
"""


class PciCore(Sysfs):
    """Binds as drivers/pci/pci-driver.c does with sriov_drivers_autoprobe off: by driver_override alone."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.stuck = ""
        """A driver that does not let go."""
        self.unwilling = ""
        """A driver whose probe fails."""

    def write(self, path: str, value: str, *, timeout: float = 1.0) -> None:
        driver = self.root / f"bus/pci/devices/{VF}/driver"
        if path.endswith("/unbind"):
            if path.split("/")[-2] == self.stuck:
                raise Busy(f"write {value} to {path} did not end", 110)
            driver.unlink()
        elif path == "bus/pci/drivers_probe":
            wanted = (self.text(f"bus/pci/devices/{VF}/driver_override") or "").strip()
            if not wanted or driver.is_symlink():
                raise Refused(f"write {value} to {path}", 19)
            if wanted != self.unwilling:
                driver.symlink_to(f"../../../../bus/pci/drivers/{wanted}")
        else:
            assert path.endswith("/driver_override")
            (self.root / path).write_text(value)

    @property
    def override(self) -> str:
        return self.text(f"bus/pci/devices/{VF}/driver_override") or ""


def host(core: PciCore) -> probe.Host:
    return probe.Host(core, Udev(core.root / "no-udev"))


@pytest.fixture
def core(tmp_path: Path) -> PciCore:
    return PciCore(write_tree(tmp_path / "sys", TREE))


def target(*, netdev: bool = True, no_iommu: bool = False) -> Target:
    known = replace(
        preparation(0),
        identity=PciIdentity(VF, PciAddress("0000:21:00.0"), 0),
        config=NicConfig(vf=VfConfig(driver=VfDriver.VFIO)),
        home_driver="igbvf",
        no_iommu=no_iommu,
    )
    links: Any = SimpleNamespace(
        dump=lambda: (
            [
                SimpleNamespace(
                    ifindex=7, parent_bus="pci", parent_device=VF, permanent_mac=None, is_stacked=False
                )
            ]
            if netdev
            else []
        )
    )
    return Target(preparation=known, attachment=None, home=links, home_netns=links)


def test_a_vf_goes_to_vfio_and_back_and_no_override_stays(core: PciCore) -> None:
    vfio.to_vfio(target(), core)
    assert (binding.driver_of(core, VF), core.override) == ("vfio-pci", "")
    vfio.to_vfio(target(), core)
    vfio.verify_vfio(target(), core)
    probe.to_kernel(target(), host(core))
    assert (binding.driver_of(core, VF), core.override) == ("igbvf", "")


def test_a_group_that_is_shared_is_not_given_away(core: PciCore, tmp_path: Path) -> None:
    (tmp_path / f"sys/kernel/iommu_groups/15/devices/{NEIGHBOUR}").touch()
    with pytest.raises(Refusal, match=f"group 15.*{NEIGHBOUR}"):
        vfio.to_vfio(target(), core)
    assert binding.driver_of(core, VF) == "igbvf"


def test_a_bridge_in_the_group_is_no_sharer(core: PciCore, tmp_path: Path) -> None:
    (tmp_path / "sys/kernel/iommu_groups/15/devices/0000:20:00.0").touch()
    vfio.to_vfio(target(), core)


def test_without_an_iommu_nothing_is_given_away(core: PciCore, tmp_path: Path) -> None:
    (tmp_path / f"sys/bus/pci/devices/{VF}/iommu_group").unlink()
    with pytest.raises(Refusal, match="IOMMU"):
        vfio.to_vfio(target(), core)
    assert binding.driver_of(core, VF) == "igbvf"


UNSAFE = "module/vfio/parameters/enable_unsafe_noiommu_mode"


@pytest.mark.parametrize(
    ("told", "policy", "words"),
    [
        ("Y", False, "noIommu: true"),
        ("N", True, "write Y to"),
        (None, True, "CONFIG_VFIO_NOIOMMU"),
    ],
)
def test_without_an_iommu_policy_and_kernel_must_both_allow_it(
    core: PciCore, tmp_path: Path, told: str | None, policy: bool, words: str
) -> None:
    (tmp_path / f"sys/bus/pci/devices/{VF}/iommu_group").unlink()
    if told is not None:
        (core.root / UNSAFE).parent.mkdir(parents=True)
        (core.root / UNSAFE).write_text(f"{told}\n")
    with pytest.raises(Refusal, match=words):
        vfio.to_vfio(target(no_iommu=policy), core)
    assert binding.driver_of(core, VF) == "igbvf"


def test_without_an_iommu_it_is_given_away_where_both_allow_it_and_by_other_files(
    core: PciCore, tmp_path: Path
) -> None:
    group = tmp_path / f"sys/bus/pci/devices/{VF}/iommu_group"
    group.unlink()
    (core.root / UNSAFE).parent.mkdir(parents=True)
    (core.root / UNSAFE).write_text("Y\n")
    vfio.to_vfio(target(no_iommu=True), core)
    assert binding.driver_of(core, VF) == "vfio-pci"
    # As vfio does when it is bound.
    group.symlink_to("../../../../kernel/iommu_groups/3")
    (core.root / "kernel/iommu_groups/3").mkdir(parents=True)
    (core.root / "kernel/iommu_groups/3/name").write_text("vfio-noiommu\n")
    files = Devices(core, NodePolicy).vfio_files(VF)
    assert list(map(str, files)) == ["/dev/vfio/vfio", "/dev/vfio/noiommu-3"]
    with pytest.raises(Refusal, match="noIommu: true"):
        vfio.to_vfio(target(), core)


def test_a_node_without_vfio_says_what_to_load(core: PciCore, tmp_path: Path) -> None:
    (tmp_path / "sys/bus/pci/drivers/vfio-pci").rmdir()
    with pytest.raises(Refusal, match="modprobe"):
        vfio.to_vfio(target(), core)


def test_a_driver_that_does_not_take_it_is_an_error_and_the_way_back_works(core: PciCore) -> None:
    core.unwilling = "vfio-pci"
    with pytest.raises(Refused, match="did not take it"):
        vfio.to_vfio(target(), core)
    assert core.override == ""
    with pytest.raises(NotClean):
        vfio.verify_vfio(target(), core)
    probe.to_kernel(target(), host(core))
    assert binding.driver_of(core, VF) == "igbvf"


def test_a_vf_whose_user_does_not_let_go_is_not_called_home(core: PciCore) -> None:
    vfio.to_vfio(target(), core)
    core.stuck = "vfio-pci"
    with pytest.raises(Busy):
        probe.to_kernel(target(), host(core))
    assert core.override == ""
    core.stuck = ""
    probe.to_kernel(target(), host(core))


def test_a_vf_without_its_netdev_is_not_home(core: PciCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "NETDEV_SECONDS", 0.05)
    with pytest.raises(NotClean, match="made no netdev"):
        probe.to_kernel(target(netdev=False), host(core))


def test_a_vf_that_is_no_more_is_gone_and_not_dirty(core: PciCore, tmp_path: Path) -> None:
    (tmp_path / f"sys/bus/pci/devices/{VF}").unlink()
    with pytest.raises(Vanished):
        vfio.verify_vfio(target(), core)
    with pytest.raises(Vanished):
        probe.to_kernel(target(), host(core))


def test_a_home_driver_that_was_unloaded_is_not_taken_for_a_vf_that_is_gone(
    core: PciCore, tmp_path: Path
) -> None:
    vfio.to_vfio(target(), core)
    (tmp_path / "sys/bus/pci/drivers/igbvf").rmdir()
    with pytest.raises(NotFound, match="load its module"):
        probe.to_kernel(target(), host(core))
