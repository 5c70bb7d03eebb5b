"""`knd devices` on RDMA: a row for each port, and one for each address that it is reached by."""

from __future__ import annotations

from pathlib import Path

from driver.cli import rdma_ports
from hw.rdma.details import every_device
from hw.sysfs import Sysfs
from kndsim.sysfs_tree import write_tree

TREES = Path(__file__).parent / "sysfs_trees"


def test_a_roce_port_and_its_gids(tmp_path: Path) -> None:
    sysfs = Sysfs(write_tree(tmp_path, (TREES / "ai_node.tree").read_text()))
    devices, problems = every_device(sysfs, dict)
    row = next(row for row in rdma_ports.port_rows(devices, sysfs) if row["rdma"] == "mlx5_0")
    assert problems == ()
    assert [row[column] for column in rdma_ports.COLUMNS] == [
        *("mlx5_0", 1, "Ethernet", "active", "link_up", 400_000, "a088:c203:0018:0100", 4)
    ]
    assert (row["told_by"], row["partitions"], row["lid"]) == ("sysfs", None, None)
    gids = [row for row in rdma_ports.gid_rows(devices) if row["rdma"] == "mlx5_0"]
    assert [row["gid"] for row in gids] == ["fe80::a288:c2ff:fe18:100"] * 2 + ["::ffff:10.24.0.1"] * 2
    assert (gids[3]["index"], gids[3]["type"], gids[3]["interface"]) == (3, "RoCE v2", "enp24s0np0")


def test_an_infiniband_ports_partitions_and_garbage_among_them(tmp_path: Path) -> None:
    sysfs = Sysfs(write_tree(tmp_path, (TREES / "infiniband_vfs.tree").read_text()))
    (sysfs.root / "class/infiniband/mlx5_2/ports/1/pkeys/0").write_text("0x99999")
    devices, _ = every_device(sysfs, dict)
    rows = {row["rdma"]: row for row in rdma_ports.port_rows(devices, sysfs)}
    assert (rows["mlx5_0"]["partitions"], rows["mlx5_0"]["lid"]) == ("0xffff 0x8001", 0x11)
    assert "no partition key" in str(rows["mlx5_2"]["partitions"])
    assert rows["mlx5_4"]["node_guid"] is None
