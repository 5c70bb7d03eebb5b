"""Whatever a sysfs holds, looking at it ends with what is there: no error, no device that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driver import inventory
from driver.policy import NodePolicy
from driver.policy.sriov import PfRule
from driver.provision.plan import Known, plan
from hw.model import IfIndex, IfName, LinkFlags, LinkInfo, PciIdentity
from hw.ports import sriov_ports
from hw.scan import Uplinks, scan
from hw.sysfs import Sysfs
from tests.unit.provision_world import BOOT

ADDRESSES = ("0000:21:00.0", "0000:21:00.1", "0000:21:10.0", "0000:22:00.0", "not-a-function", "0000:zz:00.0")
FILES = (
    *("class", "vendor", "device", "numa_node", "sriov_totalvfs", "sriov_numvfs"),
    *("sriov_drivers_autoprobe", "net/eth0/dev_port", "net/eth0/speed"),
    *("infiniband/mlx5_0/node_guid", "infiniband/mlx5_0/ports/1/link_layer"),
)
LINKS = ("driver", "physfn", "iommu_group", "virtfn0", "virtfn1", "virtfn999999999999999999999", "virtfnX")
GOOD = {
    "class": b"0x020000\n",
    "vendor": b"0x8086\n",
    "device": b"0x10c9\n",
    "numa_node": b"0\n",
    "sriov_totalvfs": b"7\n",
    "sriov_numvfs": b"1\n",
}
CONTENTS = st.one_of(
    st.binary(max_size=24),
    st.sampled_from(
        [b"", b"\n", b"0", b"-1", b"7\n", b"0x", b"1_000", b"9" * 5000, b"\xff\xfe", b"x" * 200_000, b"\0\0"]
    ),
)
TARGETS = st.sampled_from(
    [
        "",
        ".",
        "..",
        "/",
        "nowhere",
        "../0000:21:00.0",
        "../0000:21:10.0",
        "../../../../../etc/passwd",
        "x" * 200,
    ]
) | st.just("loop")
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.none() | CONTENTS | st.just("good") | st.just("folder") for name in FILES},
        **{name: st.none() | TARGETS | CONTENTS for name in LINKS},
    },
)
TREES = st.dictionaries(st.sampled_from(ADDRESSES), ENTRIES, max_size=len(ADDRESSES))


def write(root: Path, tree: dict[str, dict[str, Any]]) -> None:
    (root / "bus/pci/devices").mkdir(parents=True)
    (root / "class/infiniband").mkdir(parents=True)
    for address, entries in tree.items():
        home = root / "devices/pci0000:20" / address
        home.mkdir(parents=True)
        (root / "bus/pci/devices" / address).symlink_to(f"../../../devices/pci0000:20/{address}")
        # A good function with something wrong, or the tree would end at its first file.
        for name, content in {**dict.fromkeys(GOOD, "good"), **entries}.items():
            path = home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content == "folder":
                path.mkdir()
            elif content == "good":
                path.write_bytes(GOOD.get(name, b"1\n"))
            elif isinstance(content, bytes):
                path.write_bytes(content)
            elif content == "loop":
                path.symlink_to(path)
            elif content:
                path.symlink_to(content)


def links(addresses: list[str]) -> tuple[LinkInfo, ...]:
    return tuple(
        LinkInfo(
            ifindex=IfIndex(number + 2),
            name=IfName("eth0"),
            flags=LinkFlags(0),
            link_type=1,
            mtu=1500,
            parent_bus="pci",
            parent_device=address,
        )
        for number, address in enumerate(addresses)
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES, linked=st.lists(st.sampled_from(ADDRESSES), unique=True))
def test_no_tree_makes_an_error_or_a_device_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, dict[str, Any]], linked: list[str]
) -> None:
    root = tmp_path_factory.mktemp("sys")
    write(root, tree)
    found = links(linked)
    devices = scan(Sysfs(root), found, Uplinks())
    for device in devices:
        assert isinstance(device.identity, PciIdentity)
        assert device.identity.address in tree
        assert device.identity.address in ADDRESSES[:4]
        assert device.link is None or device.link in found
    built = inventory.build(devices, NodePolicy())
    assert len(built.by_name) <= len(devices)
    ports = sriov_ports(Sysfs(root), found, Uplinks())
    assert ports.by_address.keys() <= tree.keys()
    known = Known(makings={}, boot_id=BOOT, held={})
    for each in plan(ports.by_address.values(), [PfRule(vfs=4)], known).values():
        assert not (each.changes and each.port.num_vfs)


@pytest.mark.parametrize("missing", ["", "bus", "bus/pci", "bus/pci/devices"])
def test_a_machine_without_such_folders_has_no_devices(tmp_path: Path, missing: str) -> None:
    if missing:
        (tmp_path / missing).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / missing).write_text("a file")
    assert scan(Sysfs(tmp_path), (), Uplinks()) == ()
    assert not sriov_ports(Sysfs(tmp_path), (), Uplinks()).by_address
