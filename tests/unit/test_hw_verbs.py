"""What libibverbs says is read where it is there; its absence is None and never an error."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hw.rdma import verbs


class PyverbsError(Exception):
    pass


class Context:
    open = 0

    def __init__(self, name: str) -> None:
        if name == "broken":
            raise PyverbsError("no such device")
        Context.open += 1

    def query_device(self) -> Any:
        return SimpleNamespace(phys_port_cnt=2, fw_version="28.39")

    def query_port(self, number: int) -> Any:
        if number > 2:
            raise PyverbsError("no such port")
        return SimpleNamespace(state=4 if number == 1 else 1, link_layer=3 - number, gid_tbl_len=8)

    def query_gid_table(self, limit: int) -> list[Any]:
        assert limit == 16
        values = [(1, 0, 1, 7), (1, 3, 2, 7), (2, 0, 0, 0)]
        return [
            SimpleNamespace(
                port_num=port, gid_index=index, gid_type=kind, ndev_ifindex=ifindex, gid_str=lambda: "fe80::1"
            )
            for port, index, kind, ifindex in values
        ]

    def close(self) -> None:
        Context.open -= 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    package, module = ModuleType("pyverbs"), ModuleType("pyverbs.device")
    module.__dict__.update(
        PyverbsError=PyverbsError,
        Context=Context,
        get_device_list=lambda: [SimpleNamespace(name=b"mlx5_0"), SimpleNamespace(name=b"broken")],
    )
    monkeypatch.setitem(sys.modules, "pyverbs", package)
    monkeypatch.setitem(sys.modules, "pyverbs.device", module)
    return module


def test_devices_ports_and_gids_are_read_and_contexts_closed(fake: ModuleType) -> None:
    (device,) = verbs.devices() or ()
    assert (device.name, device.firmware) == ("mlx5_0", "28.39")
    assert [(port.number, port.active, port.link_layer) for port in device.ports] == [
        (1, True, "Ethernet"),
        (2, False, "InfiniBand"),
    ]
    assert [(gid.index, gid.type, gid.ifindex) for gid in device.ports[0].gids] == [
        (0, "RoCE v1", 7),
        (3, "RoCE v2", 7),
    ]
    assert device.ports[1].gids[0].ifindex is None
    assert Context.open == 0


def test_a_kernel_without_rdma_is_none(fake: ModuleType) -> None:
    def refuse() -> None:
        raise PyverbsError("Failed to get devices list")

    fake.__dict__["get_device_list"] = refuse
    assert verbs.devices() is None


def test_no_pyverbs_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    assert verbs.devices() is None
