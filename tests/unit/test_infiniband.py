"""What InfiniBand has beyond RoCE is read and written as its documents say; no hardware was there to ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from hw import ipoib, wire
from hw.errors import HwError
from hw.ipoib import IpoibMode
from hw.model import IfIndex, IfName, MacAddress, RdmaName
from hw.rdma import infiniband
from hw.rdma.infiniband import COMES_UP, Partition, guid_of, parse_guid, partitions, port_guid, wait_for_port
from hw.rdma.nldev import NldevPort, PhysState, PortState
from hw.sysfs import Sysfs
from hw.transport import header
from hw.wire import RTM_NEWLINK
from kndsim.sysfs_tree import write_tree
from tests.unit.igb_world import IDENTITY, VF_LINK
from tests.unit.test_hw_wire import attr, link_payload

TREE = (Path(__file__).parent / "sysfs_trees/infiniband_vfs.tree").read_text()
FIRST_VF, WITHOUT_GUID = RdmaName("mlx5_2"), RdmaName("mlx5_4")


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(write_tree(tmp_path, TREE))


@pytest.mark.parametrize("text", ["0211:22ff:fe18:0001", " 02:11:22:FF:FE:18:00:01\n"])
def test_a_guid_has_one_form_however_it_was_written(text: str) -> None:
    assert parse_guid(text) == "0211:22ff:fe18:0001"


@pytest.mark.parametrize(
    "text", ["", "0211:22ff:fe18", "0211:22ff:fe18:000g", "0000:0000:0000:0000", "ff:ff:ff:ff:ff:ff:ff:ff"]
)
def test_what_is_no_guid_or_stands_for_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="GUID"):
        parse_guid(text)


def test_an_ipoib_address_ends_with_its_ports_guid() -> None:
    address = "80:00:00:28:fe:80:00:00:00:00:00:00:02:11:22:ff:fe:18:00:01"
    assert guid_of(MacAddress(address)) == "0211:22ff:fe18:0001"
    assert guid_of(MacAddress("02:00:00:00:00:01")) is None
    assert guid_of(MacAddress(address[:36] + "00:00:00:00:00:00:00:00")) is None


def test_a_ports_guid_is_in_its_first_gid(sysfs: Sysfs) -> None:
    assert port_guid(sysfs, FIRST_VF, 1) == "0211:22ff:fe18:0000"
    assert port_guid(sysfs, WITHOUT_GUID, 1) is None
    assert port_guid(sysfs, RdmaName("gone"), 1) is None


def test_partitions_are_read_without_empty_entries(sysfs: Sysfs) -> None:
    assert partitions(sysfs, RdmaName("mlx5_0"), 1) == (Partition(0, 0x7FFF, True), Partition(1, 1, True))
    assert [one.pkey for one in partitions(sysfs, RdmaName("mlx5_0"), 1)] == [0xFFFF, 0x8001]
    assert partitions(sysfs, WITHOUT_GUID, 1) == ()


@pytest.mark.parametrize("garbage", ["0x12345", "-1", "many"])
def test_a_partition_table_of_garbage_is_an_error(sysfs: Sysfs, garbage: str) -> None:
    (sysfs.root / "class/infiniband/mlx5_2/ports/1/pkeys/0").write_text(garbage)
    with pytest.raises(HwError, match="mlx5_2/ports/1/pkeys/0"):
        partitions(sysfs, FIRST_VF, 1)


def port(state: PortState) -> NldevPort:
    return NldevPort(number=1, state=state, phys_state=PhysState.LINK_UP)


def test_a_port_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infiniband, "_PAUSE", 0.0)
    states = iter([PortState.DOWN, PortState.DOWN, PortState.INIT, PortState.ACTIVE])
    answers = (port(state) for state in states)
    found = wait_for_port(lambda: next(answers), COMES_UP, within=60, what="port 1 of mlx5_2")
    assert found.state is PortState.INIT
    assert next(answers).state is PortState.ACTIVE


@pytest.mark.parametrize(("state", "who"), [(PortState.DOWN, "GUID"), (PortState.INIT, "subnet manager")])
def test_a_port_that_does_not_come_up_says_who_would_bring_it(state: PortState, who: str) -> None:
    with pytest.raises(HwError, match=rf"port 1 of mlx5_2 is {state.name} after 0 s.*{who}"):
        wait_for_port(lambda: port(state), {PortState.ACTIVE}, within=0, what="port 1 of mlx5_2")


def test_a_partitions_interface_is_asked_for_as_another_reader_understands() -> None:
    payload = ipoib.child_request(IfIndex(7), IfName("ib0.8001"), 0x0001)
    message = ifinfmsg(header(RTM_NEWLINK, 0, 1, payload))
    message.decode()
    assert message.get_attr("IFLA_IFNAME") == "ib0.8001"
    assert message.get_attr("IFLA_LINK") == 7
    info = message.get_attr("IFLA_LINKINFO")
    assert info.get_attr("IFLA_INFO_KIND") == "ipoib"
    assert ipoib.pkey_of(payload) == 0x8001


@pytest.mark.parametrize(("mode", "told"), [(IpoibMode.DATAGRAM, False), (IpoibMode.CONNECTED, True)])
def test_a_mode_is_told_where_it_is_not_the_kernels_first(mode: IpoibMode, told: bool) -> None:
    payload = ipoib.child_request(IfIndex(7), IfName("ib1"), 1, mode)
    info = wire.attributes(wire.attributes(payload, 16)[18])
    assert (wire.attributes(info[2]).get(2) == b"\x01\0") is told


def test_a_ports_own_interface_is_no_child_though_it_is_of_the_same_kind() -> None:
    own = attr(18, attr(1, b"ipoib\0"))
    child = attr(5, b"\x07\0\0\0") + own
    assert [ipoib.is_child(wire.link(link_payload(each))) for each in (own, child)] == [False, True]


def test_what_was_made_on_a_functions_netdev_is_not_the_function() -> None:
    link = replace(VF_LINK, kind="ipoib")
    assert IDENTITY.matches(link)
    assert not IDENTITY.matches(replace(link, ifindex=IfIndex(9), peer=link.ifindex))


@pytest.mark.parametrize("pkey", [0, 0x8000, 0x10000, -1])
def test_a_key_that_is_none_makes_no_interface(pkey: int) -> None:
    with pytest.raises(ValueError, match="not a partition key"):
        ipoib.child_request(IfIndex(7), IfName("ib0.0"), pkey)


def test_the_partition_of_an_interface_is_read_of_ipoib_alone() -> None:
    data = attr(2, attr(1, b"\x01\x80") + attr(2, b"\0\0"))
    assert ipoib.pkey_of(link_payload(attr(18, attr(1, b"ipoib\0") + data))) == 0x8001
    assert ipoib.pkey_of(link_payload(attr(18, attr(1, b"vlan\0") + data))) is None
    assert ipoib.pkey_of(link_payload(attr(18, attr(1, b"ipoib\0") + attr(2, attr(1, b"\x01"))))) is None
    assert ipoib.pkey_of(link_payload()) is None
