"""libibverbs is read in the words of sysfs; without it sysfs is enough, and what is missing is said."""

from __future__ import annotations

import ipaddress
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from driver.lifecycle.devices import Devices
from driver.policy import NodePolicy
from hw.model import RdmaName
from hw.rdma import verbs
from hw.rdma.details import DeviceDetails, Source, by_sysfs, every_device
from hw.rdma.nldev import PhysState, PortState
from hw.sysfs import Sysfs
from kndsim.sysfs_tree import write_tree

TREES = Path(__file__).parent / "sysfs_trees"
RAW = int.from_bytes(bytes.fromhex("a088c20300180100"), sys.byteorder)
"""The GUID a088:c203:0018:0100 as pyverbs has it."""


class PyverbsError(Exception):
    pass


class Context:
    """mlx5_0 of the tree ai_node, as pyverbs has it."""

    open = 0

    def __init__(self, name: str) -> None:
        if name == "broken":
            raise PyverbsError("no such device")
        Context.open += 1

    def query_device(self) -> Any:
        return SimpleNamespace(phys_port_cnt=1, fw_version="28.39.3004", node_guid=RAW, sys_image_guid=RAW)

    def query_port(self, number: int) -> Any:
        values = {"state": 4, "phys_state": 5, "link_layer": 2, "lid": 0, "sm_lid": 0, "gid_tbl_len": 8}
        return SimpleNamespace(active_speed=128, active_width=2, **values)

    def query_gid_table(self, limit: int) -> list[Any]:
        assert limit == 8
        addresses = ("fe80::a288:c2ff:fe18:100", "::ffff:10.24.0.1")
        return [
            SimpleNamespace(
                port_num=1,
                gid_index=index,
                gid_type=1 + index % 2,
                ndev_ifindex=7,
                gid_str=lambda index=index: ipaddress.IPv6Address(addresses[index // 2]).exploded,
            )
            for index in range(4)
        ]

    def close(self) -> None:
        Context.open -= 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    package, module = ModuleType("pyverbs"), ModuleType("pyverbs.device")
    package.__spec__ = SimpleNamespace(name="pyverbs")  # type: ignore[assignment]
    module.__dict__.update(
        PyverbsError=PyverbsError,
        Context=Context,
        get_device_list=lambda: [SimpleNamespace(name=b"mlx5_0"), SimpleNamespace(name=b"broken")],
    )
    monkeypatch.setitem(sys.modules, "pyverbs", package)
    monkeypatch.setitem(sys.modules, "pyverbs.device", module)
    monkeypatch.setattr("socket.if_indextoname", lambda index: "enp24s0np0")
    return module


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(write_tree(tmp_path / "sys", (TREES / "ai_node.tree").read_text()))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.usefixtures("fake")
def test_verbs_and_sysfs_say_the_same_in_the_same_words(sysfs: Sysfs) -> None:
    told = verbs.devices()
    assert Context.open == 0
    assert list(told) == ["mlx5_0"]
    device = told[RdmaName("mlx5_0")]
    assert replace(device, source=Source.SYSFS) == by_sysfs(sysfs, RdmaName("mlx5_0"))
    (port,) = device.ports
    assert (port.state, port.phys_state, port.rate_mbps) == (PortState.ACTIVE, PhysState.LINK_UP, 400_000)
    assert [(gid.index, gid.type) for gid in port.gids] == [
        (0, "IB/RoCE v1"),
        (1, "RoCE v2"),
        (2, "IB/RoCE v1"),
        (3, "RoCE v2"),
    ]
    assert {gid.netdev for gid in port.gids} == {"enp24s0np0"}


@pytest.mark.parametrize("version", ["", "0.0.0"])
def test_firmware_of_none_is_none(fake: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    values = {"phys_port_cnt": 1, "fw_version": version, "node_guid": 0, "sys_image_guid": RAW}
    monkeypatch.setattr(Context, "query_device", lambda self: SimpleNamespace(**values))
    (device,) = verbs.devices().values()
    assert (device.firmware, device.node_guid) == (None, None)


@pytest.mark.usefixtures("fake")
def test_verbs_come_first_and_sysfs_fills_in(sysfs: Sysfs) -> None:
    found, problems = every_device(sysfs, verbs.devices)
    assert problems == ()
    assert [device.name for device in found[:3]] == ["mlx5_0", "mlx5_1", "mlx5_2"]
    assert [device.source for device in found if device.source is Source.VERBS] == [Source.VERBS]
    assert len(found) == 26


def test_infiniband_by_sysfs(tmp_path: Path) -> None:
    sysfs = Sysfs(write_tree(tmp_path, (TREES / "infiniband_vfs.tree").read_text()))
    waiting = by_sysfs(sysfs, RdmaName("mlx5_3"))
    (port,) = waiting.ports
    assert (port.link_layer, port.state, port.lid, port.rate_mbps) == (
        "InfiniBand",
        PortState.INIT,
        0,
        400_000,
    )
    assert by_sysfs(sysfs, RdmaName("mlx5_2")).ports[0].lid == 0x20
    without_guid = by_sysfs(sysfs, RdmaName("mlx5_4"))
    assert (without_guid.node_guid, without_guid.ports[0].gids) == (None, ())


def test_what_one_device_says_wrong_costs_that_one(sysfs: Sysfs) -> None:
    base = sysfs.root / "class/infiniband"
    (base / "mlx5_0/ports/1/gids/0").write_text("no gid")
    (base / "mlx5_3/ports/1/lid").write_text("far")
    (base / "mlx5_4/ports/1/state").write_text("excellent")
    (base / "mlx5_4/ports/1/rate").write_text("9" * 400 + " furlongs")
    found, problems = every_device(sysfs, dict)
    assert len(found) == 24
    assert [("mlx5_0" in one, "mlx5_3" in one) for one in problems] == [(True, False), (False, True)]
    odd = next(device for device in found if device.name == "mlx5_4")
    assert (odd.ports[0].state, odd.ports[0].rate_mbps) == (PortState.UNKNOWN, None)


def test_a_machine_without_rdma_asks_nobody(tmp_path: Path) -> None:
    def ask() -> dict[RdmaName, DeviceDetails]:
        raise AssertionError

    assert every_device(Sysfs(tmp_path), ask) == ((), ())


def test_a_kernel_without_rdma_has_no_devices(fake: ModuleType) -> None:
    def refuse() -> None:
        raise PyverbsError("Failed to get devices list")

    fake.__dict__["get_device_list"] = refuse
    assert verbs.devices() == {}


@pytest.mark.usefixtures("without")
def test_without_pyverbs_sysfs_is_enough(sysfs: Sysfs) -> None:
    assert verbs.devices() == {}
    assert "python3-pyverbs" in verbs.why_not()
    found, problems = every_device(sysfs, verbs.devices)
    assert (len(found), problems) == (26, ())


@pytest.mark.usefixtures("fake")
def test_with_pyverbs_nothing_is_missing() -> None:
    assert verbs.why_not() == ""


@pytest.mark.usefixtures("without")
def test_the_agent_says_once_what_is_missing(sysfs: Sysfs, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    devices = Devices(sysfs, NodePolicy)
    devices.rescan()
    devices.rescan()
    assert caplog.text.count("pyverbs is not installed") == 1


@pytest.mark.usefixtures("without")
def test_a_node_without_rdma_misses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Devices(Sysfs(tmp_path), NodePolicy).rescan()
    assert "pyverbs" not in caplog.text
