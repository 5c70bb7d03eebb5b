"""Which physical port a device is behind and what that says of it; whether it is still the same function."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from hw.model import LinkFlags, LinkInfo, PortState
from hw.scan import scan
from hw.sysfs import Sysfs
from kndsim.sysfs_tree import write_tree
from tests.unit.test_hw_scan import MLX5_LINKS, NOTHING, TREES, at, look


def port_of(tmp_path: Path, *links: LinkInfo) -> PortState | None:
    return at(look(tmp_path, "mlx5", links), "0000:3d:00.3").physical_port


def test_the_port_of_a_vf_is_its_pfs_whatever_carrier_the_vf_itself_has(tmp_path: Path) -> None:
    pf = replace(MLX5_LINKS[0], flags=LinkFlags.UP, carrier=True)
    vf = replace(MLX5_LINKS[2], flags=LinkFlags(0), carrier=False)
    port = port_of(tmp_path, pf, vf)
    assert port == PortState(
        key="0000:3d:00.0", name=pf.name, up=True, carrier=True, speed_mbps=port.speed_mbps if port else None
    )


def test_a_pf_that_is_down_carries_nothing_but_an_ipoib_interface_says_nothing_of_its_port(
    tmp_path: Path,
) -> None:
    down = replace(MLX5_LINKS[0], flags=LinkFlags(0), carrier=True)
    port = port_of(tmp_path / "ethernet", down, MLX5_LINKS[2])
    assert port is not None
    assert port.carrier is False
    port = port_of(tmp_path / "infiniband", replace(down, link_type=32), MLX5_LINKS[2])
    assert port is not None
    assert port.carrier is None


def test_a_pf_that_is_free_and_down_is_not_without_carrier(tmp_path: Path) -> None:
    links = (replace(MLX5_LINKS[0], flags=LinkFlags(0)),)
    port = at(look(tmp_path, "mlx5", links), "0000:3d:00.0").physical_port
    assert port is not None
    assert port.carrier is None


def test_a_vf_whose_pf_is_not_to_be_seen_has_no_port(tmp_path: Path) -> None:
    assert port_of(tmp_path, MLX5_LINKS[2]) is None


def test_a_function_that_was_made_anew_at_the_same_place_is_another_instance(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "sys", (TREES / "mlx5.tree").read_text())
    before = at(list(scan(Sysfs(root), MLX5_LINKS, NOTHING)), "0000:3d:00.3").pci
    folder = (root / "bus/pci/devices/0000:3d:00.3").resolve()
    kept = folder.rename(folder.with_name("kept"))
    shutil.copytree(kept, folder, symlinks=True)
    after = at(list(scan(Sysfs(root), MLX5_LINKS, NOTHING)), "0000:3d:00.3").pci
    assert before is not None
    assert after is not None
    assert before.instance != after.instance
    assert replace(before, instance=after.instance) == after
