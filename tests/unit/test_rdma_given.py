"""A pod is told of exactly its own device: files by the kernel's numbers, and the address it talks from."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.errors import NotNow, Refusal
from driver.execute import rdma_given
from driver.model import InterfaceConfig, NicConfig, Preparation
from driver.rdma import DeviceFile, RdmaConfig, RdmaFile, RdmaMode
from hw.model import IfName, RdmaName
from hw.rdma.gids import gid_table, roce_v2
from hw.rdma.nldev import CharacterDeviceKind
from hw.sysfs import Sysfs
from kndsim.sysfs_tree import write_tree
from tests.unit.rdma_world import HCA, POD, Kernel, Stage, bound

V1, V2 = "IB/RoCE v1", "RoCE v2"
V4, V6 = ipaddress.ip_interface("10.0.0.1/24"), ipaddress.ip_interface("fd00::1/64")
TABLE = (
    (0, "fe80:0000:0000:0000:0e42:a1ff:fe65:1234", V1, "net0"),
    (1, "fe80:0000:0000:0000:0e42:a1ff:fe65:1234", V2, "net0"),
    (4, "0000:0000:0000:0000:0000:ffff:0a00:0001", V1, "net0"),
    (5, "0000:0000:0000:0000:0000:ffff:0a00:0001", V2, "net0"),
    (8, "0000:0000:0000:0000:0000:ffff:0a00:0001", V2, "other"),
    (9, "fd00:0000:0000:0000:0000:0000:0000:0001", V2, "net0"),
)


def write_gids(root: Path, port: int = 1, entries: Any = TABLE) -> None:
    base = root / f"class/infiniband/{HCA}/ports/{port}"
    for folder in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for index in range(12):
        (base / f"gids/{index}").write_text("0000:0000:0000:0000:0000:0000:0000:0000\n")
    for index, address, kind, netdev in entries:
        (base / f"gids/{index}").write_text(f"{address}\n")
        (base / f"gid_attrs/types/{index}").write_text(f"{kind}\n")
        (base / f"gid_attrs/ndevs/{index}").write_text(f"{netdev}\n")


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_tree(tmp_path / "sys", "folder class\n")

    @contextlib.contextmanager
    def of_pod(netns: Any) -> Iterator[Sysfs]:
        assert netns.cookie == POD
        yield Sysfs(root)

    monkeypatch.setattr(rdma_given, "sysfs_of", of_pod)
    return root


def in_pod(kernel: Kernel, sysfs: Path, prepared: Preparation) -> Stage:
    kernel.netdevs[IfName("net0")] = POD
    for each in kernel.known.values():
        each.netns, each.on = POD, IfName("net0")
    return Stage(kernel, prepared, sysfs)


@pytest.mark.parametrize("mode", RdmaMode)
def test_the_partitions_index_is_the_one_that_the_port_has_when_the_pod_gets_it(
    kernel: Kernel, sysfs: Path, mode: RdmaMode
) -> None:
    """The subnet manager may have moved it since the claim was prepared."""
    kernel.exclusive = mode is RdmaMode.EXCLUSIVE
    config = NicConfig(rdma=RdmaConfig(partition=0x0002))
    stage = in_pod(kernel, sysfs, bound(kernel, mode=mode, config=config))
    table = sysfs / f"class/infiniband/{HCA}/ports/1/pkeys"
    table.mkdir(parents=True)
    for keys, index in ((("0xffff", "0x8002"), 1), (("0x8002", "0xffff"), 0)):
        for place, key in enumerate(keys):
            (table / str(place)).write_text(key)
        assert rdma_given.look(stage.target, stage.host, gid_seconds=0.0).pkey_index == index
    (table / "0").write_text("0x0002")
    with pytest.raises(Refusal, match="no full member"):
        rdma_given.look(stage.target, stage.host, gid_seconds=0.0)


def test_the_index_is_that_of_the_pods_address_in_version_2_whatever_else_is_there(
    kernel: Kernel, sysfs: Path
) -> None:
    write_gids(sysfs)
    stage = in_pod(kernel, sysfs, bound(kernel))
    given = rdma_given.look(stage.target, stage.host)
    assert (given.name, given.port, given.gid_index, given.gid) == (HCA, 1, 5, "::ffff:a00:1")
    assert given.files == (DeviceFile("uverbs0", 231, 192), DeviceFile("rdma_cm", 10, 260))


def test_addresses_come_in_the_claims_order_and_without_one_the_link_local_is_taken(tmp_path: Path) -> None:
    write_gids(tmp_path)
    table = gid_table(Sysfs(tmp_path), RdmaName(HCA), 1)
    net0 = IfName("net0")
    found = [roce_v2(table, net0, wanted) for wanted in ((V6, V4), (V4, V6), (), (V4,))]
    assert [entry.index for entry in found if entry is not None] == [9, 5, 1, 5]
    assert roce_v2(table, net0, [ipaddress.ip_interface("10.0.0.9/24")]) is None
    assert roce_v2(table, IfName("gone"), ()) is None


def test_a_table_that_is_late_is_waited_for_and_one_that_stays_empty_is_told_and_costs_nothing_else(
    kernel: Kernel, sysfs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_gids(sysfs, entries=())
    stage = in_pod(kernel, sysfs, bound(kernel))
    given = rdma_given.look(stage.target, stage.host, gid_seconds=0.0)
    assert (given.gid_index, given.gid) == (None, "")
    assert given.files
    assert "has not put the pod's address into the GID table of mlx5_2" in caplog.text
    wait_by(monkeypatch, lambda: write_gids(sysfs))
    assert rdma_given.look(stage.target, stage.host, gid_seconds=20.0).gid_index == 5


def wait_by(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """In that module alone: other threads sleep too."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: change())
    monkeypatch.setattr(rdma_given, "time", clock)


def test_the_first_address_is_waited_for_though_the_second_is_there(
    kernel: Kernel, sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = NicConfig(interface=InterfaceConfig(addresses=(V4, V6)))
    stage = in_pod(kernel, sysfs, bound(kernel, config=config))
    write_gids(sysfs, entries=TABLE[-1:])
    assert rdma_given.look(stage.target, stage.host, gid_seconds=0.0).gid_index == 9
    wait_by(monkeypatch, lambda: write_gids(sysfs))
    assert rdma_given.look(stage.target, stage.host, gid_seconds=20.0).gid_index == 5


def test_garbage_in_the_table_is_a_sentence_and_no_index(
    kernel: Kernel, sysfs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gids(sysfs, entries=[(0, "no gid", V2, "net0")])
    stage = in_pod(kernel, sysfs, bound(kernel))
    assert rdma_given.look(stage.target, stage.host).gid_index is None
    assert "'no gid', which is no GID" in caplog.text


def test_of_several_ports_it_is_the_one_of_the_pods_interface(kernel: Kernel, sysfs: Path) -> None:
    kernel.ports = 2
    write_gids(sysfs, port=2)
    stage = in_pod(kernel, sysfs, bound(kernel))
    given = rdma_given.look(stage.target, stage.host)
    assert (given.port, given.gid_index) == (2, 5)


def test_files_of_management_are_given_only_where_asked_for(kernel: Kernel, sysfs: Path) -> None:
    write_gids(sysfs)
    config = NicConfig(rdma=RdmaConfig(files=(RdmaFile.UMAD, RdmaFile.ISSM)))
    stage = in_pod(kernel, sysfs, bound(kernel, config=config))
    names = [file.name for file in rdma_given.look(stage.target, stage.host, gid_seconds=0.0).files]
    assert names == ["uverbs0", "rdma_cm", "umad0", "issm0"]


def test_a_file_that_is_missing_is_a_lasting_refusal_that_names_the_module(
    kernel: Kernel, sysfs: Path
) -> None:
    kernel.missing = {CharacterDeviceKind.UVERBS}
    stage = in_pod(kernel, sysfs, bound(kernel))
    with pytest.raises(Refusal, match="module loaded"):
        rdma_given.look(stage.target, stage.host)


def test_without_the_connection_managers_module_its_file_is_left_out(kernel: Kernel, sysfs: Path) -> None:
    write_gids(sysfs)
    kernel.missing = {CharacterDeviceKind.RDMA_CM}
    prepared = bound(kernel)
    assert prepared.rdma is not None
    stage = in_pod(kernel, sysfs, replace(prepared, rdma=replace(prepared.rdma, rdma_cm=False)))
    assert [file.name for file in rdma_given.look(stage.target, stage.host).files] == ["uverbs0"]


def test_a_device_that_is_not_in_the_pod_is_not_given(kernel: Kernel, sysfs: Path) -> None:
    stage = Stage(kernel, bound(kernel), sysfs)
    with pytest.raises(NotNow, match="is not in the pod"):
        rdma_given.look(stage.target, stage.host)


def test_with_shared_devices_the_table_is_the_hosts(
    kernel: Kernel, sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.exclusive = False
    monkeypatch.delattr(rdma_given, "sysfs_of")
    write_gids(sysfs)
    stage = in_pod(kernel, sysfs, bound(kernel, mode=RdmaMode.SHARED))
    assert rdma_given.look(stage.target, stage.host).gid_index == 5
