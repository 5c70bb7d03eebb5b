"""Devices get stable legal names, fit the API's limits, and one bad device costs only itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.inventory import ATTRIBUTE_LIMIT, OPTIONAL, Inventory, build, diff, name_of
from driver.model import AttributeValue, DeviceName
from driver.policy import NodePolicy
from hw.model import (
    DeviceKind,
    EswitchMode,
    HwDevice,
    Identity,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    MacAddress,
    NetdevsimIdentity,
    PciAddress,
    PciFacts,
    PciIdentity,
    RdmaFacts,
    RdmaName,
    SoftwareIdentity,
)

ALWAYS = ("kind", "rdma", "virtual", "ebpf")


class Policy:
    """Selects by name, and says what it is told to."""

    def __init__(
        self,
        selected: frozenset[str] = frozenset(),
        attributes: Mapping[str, AttributeValue] | None = None,
        withheld: str = "",
    ) -> None:
        self._selected, self._attributes, self._withheld = selected, attributes or {}, withheld

    def selects(self, link: LinkInfo) -> bool:
        return link.name in self._selected

    def attributes_for(self, device: HwDevice, name: str) -> Mapping[str, AttributeValue]:
        return self._attributes

    def withheld(self, device: HwDevice, name: str) -> str:
        return self._withheld

    def bandwidth_of(self, pf: HwDevice) -> None:
        return None

    def sharable(self, device: HwDevice, name: str, speed: int | None) -> None:
        return None

    def unsharable(self, device: HwDevice, name: str, speed: int | None) -> str:
        return ""


def link(index: int = 7, name: str = "ens1f0v0", **more: Any) -> LinkInfo:
    values: dict[str, Any] = {"flags": LinkFlags(0), "link_type": 1, "mtu": 9000, "mac": "02:00:00:00:00:07"}
    return LinkInfo(ifindex=IfIndex(index), name=IfName(name), **(values | more))


FULL = HwDevice(
    kind=DeviceKind.VF,
    identity=PciIdentity(PciAddress("0000:3b:00.2"), PciAddress("0000:3b:00.0"), 0),
    link=link(),
    pci=PciFacts(
        address=PciAddress("0000:3b:00.2"),
        vendor="15b3",
        product="101e",
        driver="mlx5_core",
        numa_node=1,
        pcie_root="pci0000:3a",
        pcie_switch="0000:3a:01.0",
    ),
    rdma=RdmaFacts(name=RdmaName("mlx5_2"), link_layer="Ethernet", node_guid="1:2:3:4", firmware="28.39"),
    rdma_capable=True,
    pf_name=IfName("ens1f0np0"),
    pf_eswitch=EswitchMode.LEGACY,
    speed_mbps=100_000,
)
VETH = HwDevice(
    kind=DeviceKind.NETDEV,
    identity=SoftwareIdentity("veth", IfIndex(57), IfIndex(3), 0),
    link=link(57, "vh0", kind="veth", peer=IfIndex(3), peer_nsid=0),
)
BARE_RDMA = HwDevice(
    kind=DeviceKind.RDMA,
    identity=PciIdentity(PciAddress("0000:91:00.0")),
    link=None,
    pci=PciFacts(address=PciAddress("0000:91:00.0"), vendor="15b3", product="1021"),
    rdma=RdmaFacts(name=RdmaName("mlx5_0"), link_layer="InfiniBand"),
    rdma_capable=True,
)


def only(inventory: Inventory) -> Any:
    (device,) = inventory.by_name.values()
    return device


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        (PciIdentity(PciAddress("0000:3b:00.2")), "pci-0000-3b-00-2"),
        (PciIdentity(PciAddress("0000:81:00.0"), port=1), "pci-0000-81-00-0-p1"),
        (PciIdentity(PciAddress("10000:e1:00.0")), "pci-10000-e1-00-0"),
        (NetdevsimIdentity(1, 0, 0), "nsim-1-vf-0"),
        (NetdevsimIdentity(1, 1, 3), "nsim-1-pf-1-vf-3"),
        (NetdevsimIdentity(1, 1), "nsim-1-port-1"),
        (SoftwareIdentity("veth", IfIndex(57), None, None), "veth-57"),
        (SoftwareIdentity("ip_vti", IfIndex(8), None, None), "ip-vti-8"),
    ],
)
def test_a_name_is_legal_and_says_where_the_device_is(identity: Identity, name: str) -> None:
    assert name_of(identity) == name
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name)


def test_a_full_device_keeps_to_the_limit_and_says_what_it_left_out() -> None:
    neighbour = PciIdentity(PciAddress("0000:3b:00.3"), PciAddress("0000:3b:00.0"), 1)
    inventory = build([FULL, replace(FULL, identity=neighbour)], Policy())
    device = inventory.by_name[DeviceName("pci-0000-3b-00-2")]
    assert set(device.attributes) >= set(ALWAYS)
    assert device.attributes["resource.kubernetes.io/pciBusID"] == "0000:3b:00.2"
    assert device.attributes["resource.kubernetes.io/pcieRoot"] == "pci0000:3a"
    assert device.attributes["resource.kubernetes.io/numaNode"] == 1
    assert [device.attributes[key] for key in ("kind", "rdma", "virtual", "ebpf")] == [
        "vf",
        True,
        False,
        True,
    ]
    assert device.attributes["pfName"] == "ens1f0np0"
    assert device.attributes["vfIndex"] == 0
    assert device.attributes["linkSpeed"] == 100_000
    missing = {"firmware", "representor", "subinterface", "vfSettings"}
    assert set(OPTIONAL) - set(device.attributes) == missing
    assert len(device.attributes) == 4 + 3 + 16
    assert device.capacities == {"bandwidth": "100G"}
    (problem,) = inventory.problems
    assert "2 devices" in problem
    assert "firmware" in problem


def test_policy_has_six_places_and_cannot_overrule_what_was_read() -> None:
    extra: dict[str, AttributeValue] = dict.fromkeys(
        ("kind", "vendor", "firmware", "resource.kubernetes.io/pciBusID"), "forged"
    )
    extra |= {f"site/{n}": n for n in range(7)}
    inventory = build([FULL], Policy(attributes=extra))
    device = only(inventory)
    assert [key for key in device.attributes if key.startswith("site/")] == [f"site/{n}" for n in range(6)]
    assert "forged" not in device.attributes.values()
    assert len(device.attributes) + len(device.capacities) <= ATTRIBUTE_LIMIT
    assert "site/6" in inventory.problems[0]


def test_rail_is_the_policys_to_say() -> None:
    assert only(build([FULL], Policy(attributes={"rail": 3}))).attributes["rail"] == 3


def test_an_rdma_device_without_a_netdev_has_no_programs() -> None:
    device = only(build([BARE_RDMA], Policy()))
    assert [device.attributes[key] for key in ("kind", "rdma", "virtual", "ebpf")] == [
        "rdma",
        True,
        False,
        False,
    ]
    assert (device.ifindex, device.settings) == (None, None)
    assert "ifName" not in device.attributes


def test_what_is_not_known_is_absent_and_not_empty() -> None:
    bare = replace(BARE_RDMA, kind=DeviceKind.PF, rdma=None, withheld="no driver")
    device = only(build([bare], Policy()))
    assert set(device.attributes) == {*ALWAYS, "resource.kubernetes.io/pciBusID", "vendor", "product"}
    assert device.withheld == "no driver"
    assert None not in device.attributes.values()


def test_software_links_are_there_only_where_the_policy_selects_them() -> None:
    other = replace(VETH, identity=SoftwareIdentity("veth", IfIndex(58), None, None), link=link(58, "vh1"))
    inventory = build([VETH, other], Policy(frozenset({"vh0"})))
    device = only(inventory)
    assert device.name == "veth-57"
    assert device.dies_with_netns
    assert device.attributes["virtual"] is True
    assert build([VETH], Policy()).by_name == {}
    assert not only(build([FULL], Policy())).dies_with_netns


def test_selecting_a_link_does_not_free_it_from_the_host() -> None:
    held = replace(VETH, withheld="in use by the host: it has an address")
    assert only(build([held], Policy(frozenset({"vh0"})))).withheld == held.withheld


def test_the_nodes_policy_fits() -> None:
    assert build([FULL, VETH], NodePolicy()).by_name.keys() == {"pci-0000-3b-00-2"}


def test_the_policy_withholds_what_hardware_would_offer() -> None:
    assert only(build([FULL], Policy(withheld="kept for storage"))).withheld == "kept for storage"


def test_a_bad_device_costs_only_itself() -> None:
    odd = replace(VETH, identity=SoftwareIdentity("\udcff /", IfIndex(9), None, None))
    long = replace(VETH, identity=SoftwareIdentity("k" * 80, IfIndex(9), None, None))
    twice = replace(FULL, speed_mbps=1)
    inventory = build([odd, long, FULL, twice], Policy(frozenset({"vh0"})))
    assert only(inventory).capacities == {"bandwidth": "100G"}
    assert len(inventory.problems) == 4
    assert all(problem.isprintable() for problem in inventory.problems)


@pytest.mark.parametrize("name", ["", "\udcff", "a b", "x" * 16, "naïve", "$(reboot)", "a/b", ".."])
def test_a_device_with_a_name_that_needs_escaping_is_withheld_until_renamed(name: str) -> None:
    device = only(build([replace(FULL, link=link(name=name))], Policy()))
    assert "interface name" in device.withheld
    shown = device.attributes.get("ifName", "")
    assert isinstance(shown, str)
    assert shown.isascii()
    assert len(shown.encode()) <= 64


@given(st.text(alphabet=st.characters(), max_size=300))
def test_no_string_breaks_the_limits(text: str) -> None:
    device = replace(
        FULL,
        pf_name=IfName(text),
        rdma=RdmaFacts(name=RdmaName(text), link_layer=text, node_guid=text, firmware=text),
    )
    for key, value in only(build([device], Policy())).attributes.items():
        assert re.fullmatch(r"([a-z0-9.-]{1,63}/)?[A-Za-z_][A-Za-z0-9_]{0,31}", key)
        if isinstance(value, str):
            assert len(value.encode()) <= 64
            assert value.isprintable()


@pytest.mark.parametrize(
    ("mbps", "quantity"),
    [(10, "10M"), (1_000, "1G"), (2_500, "2500M"), (25_000, "25G"), (800_000, "800G"), (1_000_000, "1T")],
)
def test_bandwidth_is_a_canonical_quantity(mbps: int, quantity: str) -> None:
    assert only(build([replace(FULL, speed_mbps=mbps)], Policy())).capacities["bandwidth"] == quantity


def test_vfs_are_a_pfs_capacity() -> None:
    pf = replace(FULL, kind=DeviceKind.PF, identity=PciIdentity(PciAddress("0000:3b:00.0")), total_vfs=16)
    assert only(build([pf], Policy())).capacities == {"bandwidth": "100G", "vfs": "16"}


def test_a_flap_of_the_port_is_no_change_of_the_device() -> None:
    up = build([FULL], Policy())
    down = build([replace(FULL, speed_mbps=None)], Policy(), up)
    assert not diff(up, down)
    slower = build([replace(FULL, speed_mbps=25_000)], Policy(), down)
    assert only(slower).capacities == {"bandwidth": "25G"}


def test_a_diff_is_what_changed_and_nothing_else() -> None:
    policy = Policy(frozenset({"vh0"}))
    old = build([FULL, VETH], policy)
    renamed = replace(FULL, link=link(name="eth7"))
    new = build([renamed, BARE_RDMA], policy)
    found = diff(old, new)
    assert [device.name for device in found.added] == ["pci-0000-91-00-0"]
    assert found.removed == ("veth-57",)
    assert [device.attributes["ifName"] for device in found.changed] == ["eth7"]
    assert found
    assert not diff(new, build([BARE_RDMA, renamed], policy))
    assert [device.name for device in diff(Inventory(), old).added] == list(old.by_name)


def test_a_device_that_is_away_has_no_settings_and_the_permanent_mac_is_its_own() -> None:
    away = only(build([replace(FULL, link=None)], Policy()))
    assert (away.ifindex, away.settings) == (None, None)
    assert away.attributes["ebpf"] is True
    own = link(permanent_mac=MacAddress("b8:3f:d2:00:00:01"))
    home = only(build([replace(FULL, kind=DeviceKind.PF, link=own)], Policy()))
    assert home.attributes["mac"] == home.settings.mac == "b8:3f:d2:00:00:01"


def test_a_vfs_mac_is_the_one_it_has() -> None:
    """What its driver calls permanent is what the PF last knew, a tenant's choice included."""
    vf = only(build([replace(FULL, link=link(permanent_mac=MacAddress("02:00:5e:00:00:01")))], Policy()))
    assert vf.attributes["mac"] == vf.settings.mac == "02:00:00:00:00:07"
