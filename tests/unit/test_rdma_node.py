"""What of RDMA a claim is promised is decided in prepare, with a sentence where it cannot be; and a device
file is given only while its numbers are the device's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from driver.errors import NotNow, Refusal
from driver.execute.probe import Host
from driver.lifecycle.rdma import NodeRdma, soft_name
from driver.model import Device, DeviceKind, DeviceName, NicConfig, VfConfig, VfDriver
from driver.policy.rdma import ModeChoice, RdmaRules, SoftChoice
from driver.rdma import (
    DeviceFile,
    IpoibConfig,
    RdmaBinding,
    RdmaConfig,
    RdmaInPod,
    RdmaLimits,
    RdmaMode,
    SoftRdma,
)
from hw.model import IfName, RdmaFacts, RdmaIndex
from hw.sysfs import Sysfs
from hw.udev import Udev
from kndsim.sysfs_tree import write_tree
from tests.unit.claims_world import A, device
from tests.unit.journal_values import attachment
from tests.unit.rdma_world import GUID, HCA, Kernel, Stage, bound

TREE = """
folder module/ib_uverbs
folder module/rdma_ucm
folder module/rdma_rxe
folder module/siw
"""
RXE = RdmaRules(software=SoftChoice.RXE)
FACTS = RdmaFacts(name=HCA, link_layer="Ethernet")


@pytest.fixture
def kernel() -> Kernel:
    made = Kernel()
    made.register(HCA, GUID)
    return made


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "sys", TREE)


def node(kernel: Kernel, sysfs: Path) -> NodeRdma:
    return NodeRdma(Host(Sysfs(sysfs), Udev(sysfs), rdma=kernel.open))


def with_rdma(**facts: Any) -> Device:
    return device(A, 20, rdma=replace(FACTS, **facts))


# --- what goes with a device --------------------------------------------------------------------------


def test_an_hca_is_on_record_by_what_no_tenant_can_change(kernel: Kernel, sysfs: Path) -> None:
    for exclusive, mode in ((True, RdmaMode.EXCLUSIVE), (False, RdmaMode.SHARED)):
        kernel.exclusive = exclusive
        assert node(kernel, sysfs).binding(with_rdma(), NicConfig(), RdmaRules()) == RdmaBinding(
            name=HCA, mode=mode, index=RdmaIndex(0), node_guid=GUID
        )


def test_hardware_is_preferred_and_software_made_only_where_the_policy_says(
    kernel: Kernel, sysfs: Path
) -> None:
    plain = device(A, 20)
    assert node(kernel, sysfs).binding(plain, NicConfig(), RdmaRules()) is None
    made = node(kernel, sysfs).binding(plain, NicConfig(), RXE)
    assert made is not None
    assert (made.name, made.software, made.index) == ("rxe_dev_a", SoftRdma.RXE, None)
    hardware = node(kernel, sysfs).binding(with_rdma(), NicConfig(), RXE)
    assert hardware is not None
    assert hardware.software is None


def test_somebodys_software_device_is_nothing_that_could_be_given(kernel: Kernel, sysfs: Path) -> None:
    """It ends when its netdev moves."""
    theirs = with_rdma(name="rxe9", software=True)
    assert node(kernel, sysfs).binding(theirs, NicConfig(), RdmaRules()) is None
    with pytest.raises(Refusal, match="no RDMA device that could go into a pod"):
        node(kernel, sysfs).binding(theirs, NicConfig(rdma=RdmaConfig(nccl=True)), RdmaRules())


@pytest.mark.parametrize(
    ("wishes", "rules"),
    [
        (RdmaConfig(mode=RdmaMode.EXCLUSIVE), RdmaRules()),
        (RdmaConfig(), RdmaRules(mode=ModeChoice.EXCLUSIVE)),
    ],
)
def test_a_node_in_the_other_mode_is_refused_and_told_how_it_is_booted(
    kernel: Kernel, sysfs: Path, wishes: RdmaConfig, rules: RdmaRules
) -> None:
    kernel.exclusive = False
    with pytest.raises(Refusal, match=r"RDMA devices are shared here: .*ib_core.netns_mode=0"):
        node(kernel, sysfs).binding(with_rdma(), NicConfig(rdma=wishes), rules)
    kernel.exclusive = True
    assert node(kernel, sysfs).binding(with_rdma(), NicConfig(rdma=wishes), rules) is not None


def test_modules_are_not_loaded_by_the_way(kernel: Kernel, sysfs: Path) -> None:
    for module in ("rdma_rxe", "ib_uverbs"):
        (sysfs / "module" / module).rmdir()
        with pytest.raises(Refusal, match=f"modprobe {module}"):
            node(kernel, sysfs).binding(device(A, 20), NicConfig(), RXE)
    told = node(kernel, sysfs).binding(device(A, 20), NicConfig(), replace(RXE, load_modules=True))
    assert told is not None
    assert told.rdma_cm


def test_without_rdma_ucm_the_connection_managers_file_is_not_promised(kernel: Kernel, sysfs: Path) -> None:
    (sysfs / "module/rdma_ucm").rmdir()
    made = node(kernel, sysfs).binding(with_rdma(), NicConfig(), RdmaRules())
    assert made is not None
    assert not made.rdma_cm


@pytest.mark.parametrize(
    ("controllers", "found"),
    [(None, "there is no cgroup version 2"), ("cpu memory pids", "they are cpu memory pids")],
)
def test_limits_are_refused_where_containers_have_no_rdma_controller(
    kernel: Kernel, sysfs: Path, controllers: str | None, found: str
) -> None:
    """The runtime would fail each container instead."""
    told = sysfs / "fs/cgroup/cgroup.controllers"
    told.parent.mkdir(parents=True)
    if controllers is not None:
        told.write_text(f"{controllers}\n")
    limited = NicConfig(rdma=RdmaConfig(limits=RdmaLimits(objects=64)))
    with pytest.raises(Refusal, match=rf"rdma.limits, .* controller rdma on this node: {found};"):
        node(kernel, sysfs).binding(with_rdma(), limited, RdmaRules())
    assert node(kernel, sysfs).binding(with_rdma(), NicConfig(), RdmaRules()) is not None
    told.write_text("cpu rdma misc\n")
    assert node(kernel, sysfs).binding(with_rdma(), limited, RdmaRules()) is not None


def test_a_partition_is_refused_of_what_is_not_on_infiniband(kernel: Kernel, sysfs: Path) -> None:
    config = NicConfig(rdma=RdmaConfig(partition=1))
    on_infiniband = with_rdma(link_layer="InfiniBand")
    assert node(kernel, sysfs).binding(on_infiniband, config, RdmaRules()) is not None
    for other in (with_rdma(), device(A, 20)):
        with pytest.raises(Refusal, match="is not on InfiniBand and has no partitions"):
            node(kernel, sysfs).binding(other, config, RXE)


def test_an_ipoib_interface_is_refused_where_the_rdma_device_moves(kernel: Kernel, sysfs: Path) -> None:
    config = NicConfig(rdma=RdmaConfig(partition=1, ipoib=IpoibConfig(name=IfName("ib1"))))
    on_infiniband = with_rdma(link_layer="InfiniBand")
    with pytest.raises(Refusal, match=r"rdma.ipoib needs RDMA devices to be shared, and they are exclusive"):
        node(kernel, sysfs).binding(on_infiniband, config, RdmaRules())
    kernel.exclusive = False
    assert node(kernel, sysfs).binding(on_infiniband, config, RdmaRules()) is not None


def test_siw_is_refused_where_it_would_have_to_move(kernel: Kernel, sysfs: Path) -> None:
    rules = RdmaRules(software=SoftChoice.SIW)
    with pytest.raises(Refusal, match="siw stays where it is"):
        node(kernel, sysfs).binding(device(A, 20), NicConfig(), rules)
    kernel.exclusive = False
    assert node(kernel, sysfs).binding(device(A, 20), NicConfig(), rules) is not None


def test_a_kernel_without_rdma_gives_netdevs_all_the_same(kernel: Kernel, sysfs: Path) -> None:
    kernel.has_rdma = False
    assert node(kernel, sysfs).binding(device(A, 20), NicConfig(), RdmaRules()) is None
    with pytest.raises(Refusal, match="modprobe it"):
        node(kernel, sysfs).binding(device(A, 20), NicConfig(), RXE)


def test_a_device_given_through_vfio_has_no_rdma_and_a_wish_for_it_is_refused(
    kernel: Kernel, sysfs: Path
) -> None:
    config = NicConfig(vf=VfConfig(driver=VfDriver.VFIO))
    assert node(kernel, sysfs).binding(with_rdma(), config, RXE) is None
    with pytest.raises(Refusal, match="vfio's files"):
        node(kernel, sysfs).binding(with_rdma(), replace(config, rdma=RdmaConfig(ucx=True)), RXE)


def test_what_other_interfaces_use_too_is_not_moved_away_from_them(kernel: Kernel, sysfs: Path) -> None:
    with pytest.raises(Refusal, match="that of other interfaces too"):
        node(kernel, sysfs).binding(with_rdma(shared=True), NicConfig(), RdmaRules())
    kernel.exclusive = False
    assert node(kernel, sysfs).binding(with_rdma(shared=True), NicConfig(), RdmaRules()) is not None


def test_a_device_that_is_away_is_not_now(kernel: Kernel, sysfs: Path) -> None:
    kernel.known.clear()
    with pytest.raises(NotNow, match="mlx5_2 is not at home"):
        node(kernel, sysfs).binding(with_rdma(), NicConfig(), RdmaRules())


def test_one_that_was_registered_anew_while_it_was_prepared_is_on_record_as_it_is_now(
    kernel: Kernel, sysfs: Path
) -> None:
    kernel.known.clear()
    prepared = bound(kernel)
    kernel.known.clear()
    anew = kernel.register("mlx5_7", GUID)
    now = node(kernel, sysfs).binding_now(Stage(kernel, prepared, sysfs).target)
    assert prepared.rdma is not None
    assert now == replace(prepared.rdma, index=anew)
    kernel.known.clear()
    assert node(kernel, sysfs).binding_now(Stage(kernel, prepared, sysfs).target) == prepared.rdma
    software = bound(kernel, software=SoftRdma.RXE)
    assert node(kernel, sysfs).binding_now(Stage(kernel, software, sysfs).target) == software.rdma


def test_names_of_software_devices_are_the_devices_own() -> None:
    assert soft_name(SoftRdma.RXE, DeviceName("pci-0000-3b-00-2")) == "rxe_pci_0000_3b_00_2"
    assert len(soft_name(SoftRdma.SIW, DeviceName("x" * 63))) == 63


# --- the node's mode ----------------------------------------------------------------------------------


def test_the_policys_mode_is_set_or_it_is_said_how(
    kernel: Kernel, sysfs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared, exclusive = (RdmaRules(mode=mode) for mode in (ModeChoice.SHARED, ModeChoice.EXCLUSIVE))
    rdma = node(kernel, sysfs)
    for rules, found in ((RdmaRules(), True), (exclusive, True), (shared, False), (RdmaRules(), False)):
        rdma.apply(rules)
        assert kernel.exclusive is found
    kernel.other_namespaces = True
    rdma.apply(shared)
    assert not [each for each in caplog.records if each.levelname == "ERROR"]
    rdma.apply(exclusive)
    assert "ib_core.netns_mode=0" in caplog.text
    assert not kernel.exclusive
    kernel.has_rdma = False
    rdma.apply(exclusive)
    assert "no RDMA netlink" in caplog.text


# --- whose files --------------------------------------------------------------------------------------


def files_of(sysfs: Path, number: str, owner: str, ibdev: str) -> None:
    base = sysfs / "class/infiniband_verbs/uverbs0"
    base.mkdir(parents=True, exist_ok=True)
    (base / "dev").write_text(number)
    (base / "ibdev").write_text(ibdev)
    (base / "device").unlink(missing_ok=True)
    (base / "device").symlink_to(f"../../../devices/{owner}")


@pytest.mark.parametrize("software", [None, SoftRdma.RXE])
def test_a_number_that_is_anothers_by_now_is_refused(
    kernel: Kernel, sysfs: Path, software: SoftRdma | None
) -> None:
    rdma, prepared = node(kernel, sysfs), bound(kernel, software=software, kind=DeviceKind.VF)
    given = RdmaInPod(
        name=prepared.rdma.name if prepared.rdma else HCA,
        index=RdmaIndex(0),
        port=1,
        files=(DeviceFile("uverbs0", 231, 192),),
    )
    proofs = rdma.proofs(replace(attachment(0), rdma=given), prepared)
    files_of(sysfs, "231:192\n", "0000:3b:00.2", given.name)
    assert not rdma.disproved(proofs)
    files_of(sysfs, "231:192\n", "0000:3b:00.3", "mlx5_9")
    assert "delete the pod" in rdma.disproved(proofs)
    files_of(sysfs, "231:193\n", "0000:3b:00.2", given.name)
    assert "class/infiniband_verbs/uverbs0/dev in /sys is '231:193'" in rdma.disproved(proofs)
    (sysfs / "class/infiniband_verbs/uverbs0/dev").unlink()
    assert rdma.disproved(proofs)


def test_a_device_is_limited_by_the_name_it_has_when_a_container_starts(kernel: Kernel, sysfs: Path) -> None:
    """A tenant may rename its device, and the kernel takes limits for names that are there only."""
    given = RdmaInPod(name=HCA, index=RdmaIndex(0), port=1, files=(DeviceFile("uverbs0", 231, 192),))
    attached = replace(attachment(0), rdma=given)
    assert node(kernel, sysfs).names_now([attached]) == (HCA,)
    files_of(sysfs, "231:192\n", "0000:3b:00.2", "theirs\n")
    assert node(kernel, sysfs).names_now([attached]) == ("theirs",)


def test_what_has_no_rdma_device_has_nothing_to_prove(kernel: Kernel, sysfs: Path) -> None:
    assert node(kernel, sysfs).proofs(attachment(0), bound(kernel)) == ()
