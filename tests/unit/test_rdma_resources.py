"""RDMA resources are a pod's where its processes made them, or where it alone can have; else the device's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.cli import rdma_processes
from driver.execute import resources as execute_resources
from driver.execute.resources import made_on
from driver.lifecycle.resources import Resources, container_in, pod_in
from driver.model import Attachment, AttachmentState, PodRef, PodUid
from driver.rdma import RdmaInPod, RdmaMode
from hw.errors import HwError
from hw.model import RdmaIndex
from hw.netns import NetnsHandle
from hw.rdma.netlink import RdmaSocket
from hw.rdma.tracking import Resource, ResourceKind
from tests.unit.journal_values import attachment
from tests.unit.rdma_world import HCA, POD, Kernel, Stage, bound, netns

ONE, TWO = (PodUid(f"0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f{number}") for number in range(2))
CONTAINER = "c0ffee" + "0" * 58


def systemd(pod: PodUid) -> str:
    slice_ = f"kubepods-burstable-pod{pod.replace('-', '_')}.slice"
    return f"0::/kubepods.slice/kubepods-burstable.slice/{slice_}/cri-containerd-{CONTAINER}.scope\n"


def process(proc: Path, pid: int, cgroup: str, comm: str = "ib_write_bw") -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cgroup").write_text(cgroup)
    (proc / str(pid) / "comm").write_text(f"{comm}\n")


def qps(number: int, *, pid: int | None = None, by: str | None = None) -> list[Resource]:
    return [Resource(kind=ResourceKind.QP, number=n, pid=pid, kernel_name=by) for n in range(number)]


class World:
    """One RDMA device and the pods that have it."""

    def __init__(self, tmp_path: Path, pods: dict[PodUid, int], mode: RdmaMode) -> None:
        self.proc = tmp_path / "proc"
        self.kernel = Kernel(exclusive=mode is RdmaMode.EXCLUSIVE)
        self.prepared = bound(self.kernel, mode=mode)
        self.kernel.made[HCA] = []
        given = RdmaInPod(name=HCA, index=RdmaIndex(0), port=1, files=())
        self.attached = {
            f"attachment-{number}": replace(
                attachment(number),
                preparation=self.prepared.key,
                pod=PodRef("ml", f"train-{number}", uid),
                rdma=given,
            )
            for uid, number in pods.items()
        }
        self.stage = Stage(self.kernel, self.prepared, tmp_path)
        book: Any = SimpleNamespace(
            attachments=lambda: tuple(self.attached.values()),
            attachment=self.attached.get,
            preparation=lambda key: self.prepared if key == self.prepared.key else None,
        )
        self.resources = Resources(book, self.stage.host, self.proc)

    def look(self) -> tuple[dict[str, float], float]:
        """Queue pairs of each pod by its name, and of none."""

        @contextmanager
        def reach(held: Attachment) -> Iterator[Any]:
            yield replace(self.stage.target, attachment=held)

        self.resources.look(reach)
        pods = self.resources.of_pods()
        assert {(key[0], *key[2:]) for key in pods} <= {("ml", "nic-0", "dev-0", "net0", "mlx5_2", "qp")}
        return {key[1]: number for key, number in pods.items()}, self.resources.shared().get((HCA, "qp"), 0)


def test_processes_that_are_seen_tell_apart_the_pods_of_a_shared_device(tmp_path: Path) -> None:
    world = World(tmp_path, {ONE: 1, TWO: 2}, RdmaMode.SHARED)
    process(world.proc, 11, systemd(ONE))
    process(world.proc, 12, f"0::/kubepods/besteffort/pod{TWO}/{CONTAINER}\n")
    process(world.proc, 13, "0::/system.slice/storage.service\n")
    world.kernel.made[HCA] = [*qps(3, pid=11), *qps(2, pid=12), *qps(5, pid=13), *qps(7, by="ib_core")]
    assert world.look() == ({"train-1": 3, "train-2": 2}, 5)


def test_processes_that_are_not_seen_are_the_sole_holders_and_else_nobodys(tmp_path: Path) -> None:
    """An agent in a pid namespace of its own is told no process."""
    for mode in RdmaMode:
        world = World(tmp_path / mode, {ONE: 1}, mode)
        if mode is RdmaMode.EXCLUSIVE:
            world.kernel.named(HCA).netns = POD
        world.kernel.made[HCA] = [*qps(3), *qps(4, pid=0), *qps(9, by="ib_core")]
        assert world.look() == ({"train-1": 7}, 0)
    world = World(tmp_path / "two", {ONE: 1, TWO: 2}, RdmaMode.SHARED)
    world.kernel.made[HCA] = qps(3)
    assert world.look() == ({}, 3)


def test_a_pod_that_left_has_no_series_any_more(tmp_path: Path) -> None:
    world = World(tmp_path, {ONE: 1}, RdmaMode.SHARED)
    world.kernel.made[HCA] = qps(3)
    assert world.look() == ({"train-1": 3}, 0)
    world.attached.clear()
    assert world.resources.of_pods() == {}
    assert world.look() == ({}, 0)


def test_a_device_on_its_way_is_not_asked(tmp_path: Path) -> None:
    world = World(tmp_path, {ONE: 1}, RdmaMode.SHARED)
    world.kernel.made[HCA] = qps(3)
    for id, held in world.attached.items():
        world.attached[id] = replace(held, state=AttachmentState.DETACHING)
    assert world.look() == ({}, 0)


def test_very_many_are_counted_and_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute_resources, "LISTED_MAX", 4)
    world = World(tmp_path, {ONE: 1}, RdmaMode.SHARED)
    world.kernel.made[HCA] = qps(5)
    assert world.look() == ({"train-1": 5}, 0)
    assert world.kernel.listed == []


def test_what_a_kernel_counts_and_cannot_list_costs_the_others_nothing() -> None:
    kernel = Kernel(unlisted={ResourceKind.CTX})
    index = kernel.register(HCA, "")
    kernel.made[HCA] = [*qps(1, pid=5), Resource(kind=ResourceKind.CTX, number=1, pid=5)]
    assert made_on(kernel.open(None), index) == {(ResourceKind.QP, 5): 1}


@pytest.mark.parametrize(
    ("cgroup", "pod", "container"),
    [
        (systemd(ONE), ONE, CONTAINER),
        (f"0::/../../kubepods-pod{ONE.replace('-', '_')}.slice/crio-{CONTAINER}.scope", ONE, CONTAINER),
        (f"12:rdma:/\n1:name=systemd:/kubepods/pod{TWO}/{CONTAINER}\n", TWO, CONTAINER),
        ("0::/user.slice/user-1000.slice\n", None, ""),
        ("0::/kubepods.slice/kubepods-pod12.slice\n", None, ""),
        ("", None, ""),
    ],
)
def test_a_cgroups_path_tells_pod_and_container(cgroup: str, pod: PodUid | None, container: str) -> None:
    assert (pod_in(cgroup), container_in(cgroup)) == (pod, container)


# --- knd devices --rdma -------------------------------------------------------------------------------


def test_a_row_for_each_process_with_its_pod_wherever_the_device_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, {ONE: 1}, RdmaMode.EXCLUSIVE)
    world.kernel.named(HCA).netns = POD
    process(world.proc, 11, systemd(ONE))
    process(world.proc, 12, "0::/init.scope\n", comm="theirs")
    world.kernel.made[HCA] = [*qps(3, pid=11), *qps(1, pid=12), *qps(2)]
    monkeypatch.setattr(rdma_processes, "open_netns", _opened)
    rows, problems = rdma_processes.read(world.proc, world.attached.values(), world.kernel.open)
    assert problems == []
    assert [tuple(row[column] for column in rdma_processes.COLUMNS[:6]) for row in rows] == [
        ("mlx5_2", None, None, None, None, 2),
        ("mlx5_2", 11, "ib_write_bw", "ml/train-1", CONTAINER[:12], 3),
        ("mlx5_2", 12, "theirs", None, None, 1),
    ]
    json.dumps(rows)


def test_a_namespace_that_cannot_be_read_is_a_sentence_and_costs_no_other(tmp_path: Path) -> None:
    world = World(tmp_path, {ONE: 1}, RdmaMode.SHARED)
    world.kernel.made[HCA] = qps(1)

    def opener(where: NetnsHandle | None) -> RdmaSocket:
        if where is not None:
            raise HwError("no")
        return world.kernel.open(where)

    rows, problems = rdma_processes.read(world.proc, world.attached.values(), opener)
    assert [row["rdma"] for row in rows] == [HCA]
    assert len(problems) == 1
    assert "/run/netns/pod-1" in problems[0]


@contextmanager
def _opened(path: Path) -> Iterator[NetnsHandle]:
    del path
    yield netns(POD)
