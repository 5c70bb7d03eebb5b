"""An RDMA device goes into the pod and comes home as it was, whatever a tenant or a crash did; what was made
in software is gone afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bpf.layout import Hook
from driver import plan
from driver.errors import NotNow, Refusal
from driver.execute import rdma
from driver.execute.target import NotClean, Vanished
from driver.model import DeviceKind
from driver.plan import Act
from driver.rdma import RdmaMode, SoftRdma
from hw.model import IfName, RdmaIndex, RdmaName
from kndsim.sysfs_tree import write_tree
from tests.unit.rdma_world import GUID, HCA, HOME, POD, Kernel, Stage, bound

IFNAME = IfName("net0")
VF = "0000:3b:00.2"
TREE = f"pci pci0000:3a/0000:3a:00.0/{VF} = 0x020000 0x15b3 0x101e driver=mlx5_core\n"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(rdma, "run_in", made.run_in)
    monkeypatch.setattr(rdma, "HOME_SECONDS", 0.0)
    return made


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "sys", TREE)


def do(act: Act, stage: Stage) -> None:
    """One act as a kernel does it; those of the netdev, as far as RDMA sees them."""
    target, host = stage.target, stage.host
    match act:
        case Act.RDMA_IN:
            rdma.move_in(target, host)
        case Act.RDMA_HOME:
            rdma.move_home(target, host)
        case Act.RDMA_ADD:
            rdma.add(target, host)
        case Act.RDMA_REMOVE:
            rdma.remove(target, host)
        case Act.RDMA_RESTORE:
            rdma.restore_name(target, host)
        case Act.RDMA_VERIFY:
            rdma.verify(target, host)
        case Act.MOVE_IN:
            stage.kernel.netdev_leaves(IFNAME, POD)
        case Act.MOVE_HOME:
            if stage.kernel.netdevs.get(IFNAME) == POD:
                stage.kernel.netdev_leaves(IFNAME, HOME)


def attach_plan(stage: Stage) -> plan.Plan:
    return plan.attach(stage.attachment, stage.target.preparation, Hook.TCX)


def detach(stage: Stage) -> None:
    for step in plan.detach(stage.attachment, stage.target.preparation).steps:
        do(step.act, stage)


# --- hardware ---------------------------------------------------------------------------------------


def test_hardware_goes_in_before_its_netdev_and_comes_home_after_it(kernel: Kernel, sysfs: Path) -> None:
    stage = Stage(kernel, bound(kernel), sysfs)
    acts = [step.act for step in attach_plan(stage).steps]
    assert acts.index(Act.RDMA_IN) < acts.index(Act.MOVE_IN) < acts.index(Act.RDMA_FILES)
    homeward = [step.act for step in plan.detach(stage.attachment, stage.target.preparation).steps]
    assert homeward.index(Act.MOVE_HOME) < homeward.index(Act.RDMA_HOME) < homeward.index(Act.VERIFY)
    for step in attach_plan(stage).steps:
        do(step.act, stage)
    assert kernel.named(HCA).netns == POD
    detach(stage)
    assert kernel.named(HCA).netns == HOME


@pytest.mark.parametrize("software", [None, SoftRdma.RXE])
def test_after_a_crash_at_any_step_the_whole_undo_leaves_all_as_before(
    kernel: Kernel, sysfs: Path, software: SoftRdma | None
) -> None:
    stage = Stage(kernel, bound(kernel, software=software), sysfs)
    steps = attach_plan(stage).steps
    for reached in range(len(steps) + 1):
        kernel.netdevs[IFNAME] = HOME
        for step in steps[:reached]:
            do(step.act, stage)
        for step in reversed(steps):
            for act in step.undo:
                do(act, stage)
        do(Act.RDMA_VERIFY, stage)
        assert [each.netns for each in kernel.known.values()] == ([HOME] if software is None else []), reached


def test_a_name_and_an_index_that_changed_do_not_hide_the_device(kernel: Kernel, sysfs: Path) -> None:
    stage = Stage(kernel, bound(kernel), sysfs)
    do(Act.RDMA_IN, stage)
    moved = kernel.known.pop(RdmaIndex(0))
    moved.name = RdmaName("mine")
    kernel.known[RdmaIndex(9)] = moved
    detach(stage)
    assert (kernel.known[RdmaIndex(9)].netns, kernel.known[RdmaIndex(9)].name) == (HOME, HCA)


def test_without_a_guid_the_pci_function_tells_which_device_came_home(kernel: Kernel, tmp_path: Path) -> None:
    prepared = bound(kernel)
    assert prepared.rdma is not None
    binding = replace(prepared.rdma, index=RdmaIndex(55), node_guid="")
    kernel.known[RdmaIndex(0)].guid = ""
    sysfs = write_tree(tmp_path / "sys", TREE + f"folder bus/pci/devices/{VF}/infiniband/{HCA}\n")
    do(Act.RDMA_VERIFY, Stage(kernel, replace(prepared, rdma=binding), sysfs))


def test_a_driver_that_never_moves_its_devices_is_a_lasting_refusal(kernel: Kernel, sysfs: Path) -> None:
    kernel.moves = False
    with pytest.raises(Refusal, match="no disassociate support") as caught:
        do(Act.RDMA_IN, Stage(kernel, bound(kernel), sysfs))
    assert "rdma.mode shared" in str(caught.value)


def test_a_device_that_is_nowhere_is_not_now_on_the_way_in_and_not_clean_at_home(
    kernel: Kernel, sysfs: Path
) -> None:
    stage = Stage(kernel, bound(kernel), sysfs)
    kernel.known.clear()
    with pytest.raises(NotNow, match="not at home"):
        do(Act.RDMA_IN, stage)
    with pytest.raises(NotClean, match="did not come home"):
        do(Act.RDMA_VERIFY, stage)


def test_a_device_whose_function_was_pulled_is_gone(kernel: Kernel, tmp_path: Path) -> None:
    stage = Stage(kernel, bound(kernel), tmp_path)
    kernel.known.clear()
    with pytest.raises(Vanished, match=VF):
        do(Act.RDMA_VERIFY, stage)


def test_one_that_is_still_in_the_pod_is_brought_home_another_time(kernel: Kernel, sysfs: Path) -> None:
    stage = Stage(kernel, bound(kernel), sysfs)
    do(Act.RDMA_IN, stage)
    with pytest.raises(NotNow, match="still in the pod"):
        do(Act.RDMA_VERIFY, stage)


def test_another_guid_under_the_same_name_is_not_the_device(kernel: Kernel, sysfs: Path) -> None:
    stage = Stage(kernel, bound(kernel), sysfs)
    kernel.known[RdmaIndex(0)].guid = "dead:beef:dead:beef"
    with pytest.raises(NotClean, match=GUID):
        do(Act.RDMA_VERIFY, stage)


def test_with_shared_devices_nothing_moves(kernel: Kernel, sysfs: Path) -> None:
    kernel.exclusive = False
    stage = Stage(kernel, bound(kernel, mode=RdmaMode.SHARED), sysfs)
    assert Act.RDMA_IN not in [step.act for step in attach_plan(stage).steps]
    detach(stage)
    assert not kernel.changes


def test_what_is_an_rdma_device_and_nothing_else_has_a_life_without_a_netdev(
    kernel: Kernel, sysfs: Path
) -> None:
    stage = Stage(kernel, bound(kernel, kind=DeviceKind.RDMA), sysfs)
    prepared = stage.target.preparation
    plans = [
        plan.prepare(prepared, Hook.TCX),
        attach_plan(stage),
        plan.detach(stage.attachment, prepared),
        plan.tidy(prepared),
        plan.unprepare(prepared, reset=True),
    ]
    assert {step.act for each in plans for step in each.steps} == {
        *(Act.ZERO_SLOT, Act.FOLD, Act.RDMA_IN, Act.RDMA_HOME),
        *(Act.RDMA_FILES, Act.METER, Act.RDMA_RESTORE, Act.RDMA_VERIFY),
    }
    do(Act.RDMA_IN, stage)
    detach(stage)
    assert kernel.named(HCA).netns == HOME


# --- software ---------------------------------------------------------------------------------------


def test_a_software_device_is_made_on_the_netdev_in_the_pod_and_then_moved_there(
    kernel: Kernel, sysfs: Path
) -> None:
    stage = Stage(kernel, bound(kernel, software=SoftRdma.RXE), sysfs)
    for step in attach_plan(stage).steps:
        do(step.act, stage)
    assert kernel.changes == ["make rxe rxe_dev_0", "move rxe_dev_0"]
    assert kernel.named("rxe_dev_0").netns == POD
    do(Act.RDMA_ADD, stage)
    assert len(kernel.known) == 1
    detach(stage)
    assert kernel.changes[2:] == ["remove rxe_dev_0"]
    assert not kernel.known


def test_one_that_is_left_at_home_is_removed_when_the_pods_namespace_is_gone(
    kernel: Kernel, sysfs: Path
) -> None:
    stage = Stage(kernel, bound(kernel, software=SoftRdma.RXE), sysfs, pod=False)
    kernel.register("rxe_dev_0", "284c:2cff:feef:0f08", on=IFNAME)
    do(Act.RDMA_REMOVE, stage)
    assert not kernel.known


def test_one_that_a_tenant_made_on_the_netdev_is_waited_for_and_told(
    kernel: Kernel, sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(kernel, bound(kernel, software=SoftRdma.RXE), sysfs)
    kernel.netdevs[IFNAME] = HOME
    kernel.register("theirs", "284c:2cff:feef:0f08", on=IFNAME)
    with pytest.raises(NotClean, match="'theirs' is still on it"):
        do(Act.RDMA_VERIFY, stage)
    monkeypatch.setattr(rdma, "HOME_SECONDS", 20.0)
    kernel.lingering = 3
    do(Act.RDMA_VERIFY, stage)


def test_another_device_of_the_same_kind_is_never_taken_for_it(kernel: Kernel, sysfs: Path) -> None:
    other = kernel.register("mlx5_7", "0c42:a103:0065:9999")
    stage = Stage(kernel, bound(kernel), sysfs)
    do(Act.RDMA_IN, stage)
    assert (kernel.known[other].netns, kernel.named(HCA).netns) == (HOME, POD)
