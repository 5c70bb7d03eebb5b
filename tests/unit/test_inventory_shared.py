"""What the policy gives out in shares is offered where it is, whoever uses it, and nothing is given twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from driver.inventory import Inventory, build
from driver.model import Device, DeviceName
from driver.policy import DeviceSelector, NodePolicy
from driver.policy.bandwidth import BandwidthRule, SizeClass
from driver.policy.rules import Attributes, DeviceRule
from driver.policy.selectors import NetdevSelector
from driver.policy.shared import SharedRule
from driver.traffic import Portion, VlanRange
from hw.model import (
    DeviceKind,
    HwDevice,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    PciAddress,
    PciIdentity,
    RdmaFacts,
    RdmaName,
    SoftwareIdentity,
)
from hw.subinterface import FIRST_INDEX, SubinterfaceKind
from tests.unit.bandwidth_world import PF_NAME, port, vf_name

ADDRESS = "in use by the host: it has an address"
RDMA = RdmaFacts(name=RdmaName("mlx5_0"), link_layer="Ethernet", node_guid="1:2:3:4", firmware="28.39")


def rule(kind: str = "macvlan", *, bandwidth: int | None = None, **match: Any) -> SharedRule:
    made = SubinterfaceKind(kind)
    vlans = (VlanRange(first=100, last=199),) if made is SubinterfaceKind.VLAN else ()
    selector = DeviceSelector(**(match or {"interfaces": ("ens1",)}))
    return SharedRule(match=selector, kind=made, bandwidth=bandwidth, vlans=vlans)


def pf(**fields: Any) -> HwDevice:
    return replace(port(0)[0], **fields)


def sharing(*rules: SharedRule, **more: Any) -> NodePolicy:
    return NodePolicy(shared=rules or (rule(),), **more)


def one(device: HwDevice, policy: NodePolicy, previous: Inventory | None = None) -> Device:
    (found,) = build([device], policy, previous).by_name.values()
    return found


def software(ifindex: int, name: str, kind: str = "bond", **more: Any) -> HwDevice:
    link = LinkInfo(
        ifindex=IfIndex(ifindex),
        name=IfName(name),
        flags=LinkFlags.UP,
        link_type=1,
        mtu=1500,
        kind=kind,
        peer=more.get("peer"),
        master=more.get("master"),
    )
    identity = SoftwareIdentity(kind, IfIndex(ifindex), more.get("peer"), None)
    return HwDevice(kind=DeviceKind.NETDEV, identity=identity, link=link)


def test_a_shared_port_is_offered_with_what_all_shares_have_together_and_how_many_there_are() -> None:
    found = one(pf(), sharing())
    assert (found.kind, found.name, found.withheld) == (DeviceKind.SHARED, PF_NAME, "")
    assert found.sharable is not None
    assert found.capacities == {"bandwidth": "25G", "shares": "64"}
    told = {key: found.attributes[key] for key in ("kind", "subinterface", "ifName", "linkSpeed", "virtual")}
    assert told == {
        "kind": "shared",
        "subinterface": "macvlan",
        "ifName": "ens1",
        "linkSpeed": 25_000,
        "virtual": False,
    }


def test_what_is_not_shared_says_nothing_of_shares() -> None:
    found = one(pf(), sharing(rule(interfaces=("other",))))
    assert (found.kind, found.sharable) == (DeviceKind.PF, None)
    assert "subinterface" not in found.attributes
    assert "shares" not in found.capacities


def test_rdma_is_not_what_a_share_has() -> None:
    found = one(pf(rdma=RDMA, rdma_capable=True, more_rdma=(RdmaName("mlx5_1"),), vf_can="vlan"), sharing())
    assert found.rdma is None
    assert "vfSettings" not in found.attributes
    assert found.attributes["rdma"] is False
    assert not found.attributes.keys() & {"rdmaDevice", "rdmaLinkLayer", "nodeGuid", "firmware"}


def test_what_the_host_does_with_a_link_is_nothing_against_sharing_it() -> None:
    used = pf(withheld=ADDRESS, in_use=ADDRESS, taken=True)
    assert one(used, sharing()).withheld == ""
    assert one(used, NodePolicy()).withheld == ADDRESS


def test_whatever_else_is_against_a_device_is_against_sharing_it() -> None:
    for reason in ("its switch is in switchdev mode, and it is the switch's way out", "held back"):
        found = one(pf(withheld=reason, in_use=ADDRESS, taken=True), sharing())
        assert (found.withheld, found.sharable, found.kind) == (reason, None, DeviceKind.PF)


@pytest.mark.parametrize("kind", ["macvlan", "ipvlan"])
def test_nothing_goes_on_top_of_what_is_in_a_bridge_but_a_vlan(kind: str) -> None:
    link = pf().link
    assert link is not None
    used = "in use by others: it belongs to 'br0'"
    enslaved = pf(link=replace(link, master=IfIndex(9)), withheld=used, in_use=used, taken=True)
    found = one(enslaved, sharing(rule(kind)))
    assert f"no {kind} goes on top of it" in found.withheld
    assert found.sharable is None
    assert one(enslaved, sharing(rule("vlan"))).withheld == ""


@pytest.mark.parametrize(
    ("kind", "other", "goes"),
    [
        ("macvlan", "ipvlan", False),
        ("macvlan", "macvtap", True),
        ("macvlan", "vlan", True),
        ("ipvlan", "macvtap", False),
        ("ipvlan", "ipvlan", True),
        ("vlan", "macvlan", True),
    ],
)
def test_no_ipvlan_goes_beside_a_macvlan_that_the_host_has_there(kind: str, other: str, goes: bool) -> None:
    used = "in use by others: 'other' is on top of it"
    devices = [
        pf(withheld=used, in_use=used, taken=True),
        software(9, "other", other, peer=IfIndex(3)),
        software(10, "elsewhere", "ipvlan", peer=IfIndex(99)),
    ]
    found = build(devices, sharing(rule(kind))).by_name[PF_NAME]
    assert found.withheld == (
        "" if goes else f"it carries {other}, and no {kind} beside that (node policy, shared)"
    )


def test_what_is_no_ethernet_has_no_shares_and_is_not_given_whole_either() -> None:
    link = pf().link
    assert link is not None
    found = one(pf(link=replace(link, link_type=32)), sharing())
    assert "it is no Ethernet interface" in found.withheld
    bare = replace(pf(), kind=DeviceKind.RDMA, link=None, rdma=RDMA, rdma_capable=True)
    found = one(bare, sharing(rule(names=("pci-*",))))
    assert "no interface here that could be shared" in found.withheld
    assert found.sharable is None


def test_a_port_of_unknown_speed_is_withheld_unless_the_policy_says_what_it_gives_out() -> None:
    found = one(pf(speed_mbps=None), sharing())
    assert "the speed of its port is not known" in found.withheld
    assert found.sharable is None
    said = one(pf(speed_mbps=None), sharing(rule(bandwidth=10_000)))
    assert (said.withheld, said.capacities["bandwidth"]) == ("", "10G")


def test_a_port_that_lost_its_link_gives_out_what_it_did() -> None:
    before = build([pf()], sharing())
    assert one(pf(speed_mbps=None), sharing(), before) == before.by_name[PF_NAME]


def test_a_software_interface_is_shared_though_netdevs_does_not_list_it() -> None:
    policy = sharing(rule(interfaces=("bond0",), bandwidth=10_000))
    found = build([software(7, "bond0"), software(8, "bond1")], policy).by_name
    assert list(found) == ["bond-7"]
    assert found[DeviceName("bond-7")].kind is DeviceKind.SHARED


def test_interfaces_made_as_shares_are_no_devices_whatever_the_policy_selects() -> None:
    policy = sharing(
        rule(interfaces=("*",), bandwidth=10_000), netdevs=(NetdevSelector(kinds=("macvlan", "veth")),)
    )
    ours = software(FIRST_INDEX + 5, "renamed", "macvlan", peer=IfIndex(3))
    theirs = software(12, "knds1073741829", "macvlan", peer=IfIndex(3))
    assert list(build([ours, theirs], policy).by_name) == ["macvlan-12"]


def sized(*rules: SharedRule, percent: int = 100) -> NodePolicy:
    sizes = BandwidthRule(sizes=(SizeClass(rate=5_000),), percent=percent)
    return sharing(*rules, port_bandwidth=(sizes,))


def portions(devices: Sequence[HwDevice], policy: NodePolicy) -> list[Portion | None]:
    found = build(devices, policy).by_name
    return [found[name].portion for name in (PF_NAME, *(vf_name(index) for index in range(2)))]


def test_what_a_port_gives_out_in_shares_its_vfs_do_not_have() -> None:
    left = Portion(size=5_000, of=15_000)
    assert portions(port(2), sized(rule(bandwidth=10_000))) == [None, left, left]
    oversold = Portion(size=5_000, of=25_000)
    assert portions(port(2), sized(rule(), percent=200)) == [None, oversold, oversold]


def test_vfs_of_a_port_that_gives_all_out_in_shares_are_withheld() -> None:
    found = build(port(1), sized(rule())).by_name
    assert found[PF_NAME].withheld == ""
    assert "all that its PF gives out is given out in shares" in found[vf_name(0)].withheld
    found = build(port(1), sized(rule(bandwidth=21_000))).by_name
    assert "its size is 5G and its PF gives out 4G" in found[vf_name(0)].withheld


def test_a_vf_of_a_size_shares_that_and_it_is_given_to_no_other() -> None:
    found = build(port(2), sized(rule(interfaces=("ens1v0",)))).by_name
    shared, other = found[vf_name(0)], found[vf_name(1)]
    assert (shared.kind, shared.portion) == (DeviceKind.SHARED, None)
    assert shared.capacities["bandwidth"] == "5G"
    assert other.portion == Portion(size=5_000, of=20_000)


def test_a_look_after_a_look_takes_off_nothing_more() -> None:
    policy = sized(rule(bandwidth=10_000))
    first = build(port(2), policy)
    assert build(port(2), policy, first) == first
    away = [replace(each, link=None, speed_mbps=None) if each.total_vfs else each for each in port(2)]
    assert build(away, policy, first).given_out[PciAddress("0000:21:00.0")].budget == 25_000


def test_rules_about_devices_see_one_as_it_is_offered() -> None:
    def marks(kind: DeviceKind) -> DeviceRule:
        return DeviceRule(match=DeviceSelector(kinds=(kind,)), attributes=Attributes((("site", kind.value),)))

    policy = sharing(devices=(marks(DeviceKind.SHARED), marks(DeviceKind.PF)))
    assert one(pf(), policy).attributes["site"] == "shared"
    policy = sharing(devices=(DeviceRule(match=DeviceSelector(kinds=(DeviceKind.SHARED,)), offer=False),))
    assert "the node policy withholds it" in one(pf(), policy).withheld


def test_a_software_rdma_device_is_not_in_the_way_of_shares() -> None:
    assert one(pf(rdma=replace(RDMA, software=True)), sharing()).withheld == ""
    assert one(pf(identity=PciIdentity(PciAddress("0000:21:00.0"))), sharing()).name == PF_NAME
