"""An RDMA port's counters have a known unit, and one that says nothing costs nothing but itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from hw.model import RdmaName
from hw.rdma.counters import (
    COUNTERS_MAX,
    hardware_counters,
    hardware_counters_from_sysfs,
    port_counters,
)
from hw.sysfs import Sysfs

MLX5 = RdmaName("mlx5_2")


@pytest.fixture
def port(tmp_path: Path) -> Path:
    path = tmp_path / "class/infiniband/mlx5_2/ports/1"
    (path / "counters").mkdir(parents=True)
    (path / "hw_counters").mkdir()
    return path


def write(folder: Path, **values: object) -> None:
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")


def test_data_is_in_bytes(tmp_path: Path, port: Path) -> None:
    write(port / "counters", port_xmit_data=25, port_rcv_data=2**40, port_xmit_packets=3, link_downed=1)
    found = port_counters(Sysfs(tmp_path), MLX5, 1)
    assert found is not None
    assert found.values == {
        "port_xmit_data_bytes": 100,
        "port_rcv_data_bytes": 2**42,
        "port_xmit_packets": 3,
        "link_downed": 1,
    }
    assert found.left_out == ()


def test_a_counter_at_its_end_is_left_out(tmp_path: Path, port: Path) -> None:
    write(
        port / "counters", port_xmit_data=2**32 - 1, symbol_error=65535, port_rcv_data=2**32, link_downed=254
    )
    found = port_counters(Sysfs(tmp_path), MLX5, 1)
    assert found is not None
    assert found.values == {"port_rcv_data_bytes": 2**34, "link_downed": 254}
    assert [text.split()[0] for text in found.left_out] == ["port_xmit_data", "symbol_error"]


@pytest.mark.parametrize("content", ["N/A (no PMA)", "", "-1", "12 13", "0x10"])
def test_garbage_in_one_file_costs_that_counter_only(tmp_path: Path, port: Path, content: str) -> None:
    write(port / "counters", port_xmit_data=content, port_xmit_packets=7)
    found = port_counters(Sysfs(tmp_path), MLX5, 1)
    assert found is not None
    assert found.values == {"port_xmit_packets": 7}
    (problem,) = found.left_out
    assert "counters/port_xmit_data" in problem


def test_a_driver_without_port_counters_and_a_device_that_is_gone_have_none(
    tmp_path: Path, port: Path
) -> None:
    (port / "counters").rmdir()
    assert port_counters(Sysfs(tmp_path), MLX5, 1) is None
    assert port_counters(Sysfs(tmp_path), RdmaName("mlx5_3"), 1) is None
    assert hardware_counters_from_sysfs(Sysfs(tmp_path), MLX5, 2) is None


def test_a_setting_among_the_counters_is_none(tmp_path: Path, port: Path) -> None:
    write(port / "hw_counters", lifespan=10, sent_pkts=4, out_of_buffer=1)
    found = hardware_counters_from_sysfs(Sysfs(tmp_path), MLX5, 1)
    assert found is not None
    assert found.values == {"sent_pkts": 4, "out_of_buffer": 1}


def test_counters_that_wrap_are_known_by_their_driver() -> None:
    mlx5 = hardware_counters({"out_of_buffer": 0, "duplicate_request": 3, "np_cnp_sent": 9})
    assert mlx5.wraps == {"out_of_buffer": 32, "duplicate_request": 32}
    assert hardware_counters({"duplicate_request": 3, "sent_pkts": 9}).wraps == {}


def test_names_become_series_so_they_are_few_and_plain() -> None:
    many = hardware_counters({f"c{number:04}": 1 for number in range(COUNTERS_MAX + 5)} | {'evil"} 1': 2})
    assert len(many.values) == COUNTERS_MAX
    assert many.left_out == ("6 counters have no usable name or are too many",)
