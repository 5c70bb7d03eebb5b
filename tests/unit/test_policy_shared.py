"""The policy's section about shared uplinks is strict, and what it gives out is what the API takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.errors import ConfigError
from driver.inventory import capacity_requests, quantity
from driver.kube.request_policy import request_policy
from driver.policy import DeviceSelector, NodePolicy, load_policy
from driver.policy.shared import MAX_SHARES, RequestRule, SharedRule
from driver.traffic import Amounts, Sharable, VlanRange
from hw.model import DeviceKind, HwDevice, IfIndex, IfName, LinkFlags, LinkInfo, PciAddress, PciIdentity
from hw.subinterface import MODES, Subinterface, SubinterfaceKind, SubinterfaceMode

HEADER = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"
ON_ETH0 = DeviceSelector(interfaces=("eth0",))
MACVLAN = SharedRule(match=ON_ETH0, kind=SubinterfaceKind.MACVLAN)


def link(name: str = "eth0", **more: Any) -> LinkInfo:
    values: dict[str, Any] = {"flags": LinkFlags(0), "link_type": 1, "mtu": 1500}
    return LinkInfo(ifindex=IfIndex(3), name=IfName(name), **(values | more))


PF = HwDevice(
    kind=DeviceKind.PF, identity=PciIdentity(PciAddress("0000:21:00.0")), link=link(), speed_mbps=25_000
)


def load(body: str) -> NodePolicy:
    return load_policy(HEADER + body, "policy.yaml")


def rule(entry: str) -> SharedRule:
    (found,) = load(f"shared:\n  - {entry}\n").shared
    return found


def given_out(entry: str, speed: int | None = None) -> Sharable:
    found = rule(entry).sharable(speed)
    assert found is not None
    return found


def test_a_whole_rule_is_read() -> None:
    found = given_out(
        "{match: {interfaces: [bond0]}, kind: vlan, bandwidth: 10G, shares: 20,"
        " request: {default: 500M, minimum: 100M, maximum: 4G, step: 100M}, vlans: [7, '100-199']}"
    )
    assert found == Sharable(
        kind=SubinterfaceKind.VLAN,
        mode=None,
        bandwidth=10_000,
        amounts=Amounts(default=500, least=100, most=4_000, step=100),
        shares=20,
        vlans=(VlanRange(first=7, last=7), VlanRange(first=100, last=199)),
    )
    assert load("reset: none\n").shared == ()


def test_what_a_rule_does_not_say_follows_from_the_port() -> None:
    found = given_out("{match: {interfaces: [eth0]}, kind: macvlan}", 25_000)
    assert found == Sharable(
        kind=SubinterfaceKind.MACVLAN,
        mode=SubinterfaceMode.BRIDGE,
        bandwidth=25_000,
        amounts=Amounts(default=390, least=1, most=25_000),
        shares=64,
    )
    assert given_out("{match: {interfaces: [eth0]}, kind: ipvlan}", 100).mode is SubinterfaceMode.L2
    assert given_out("{match: {interfaces: [eth0]}, kind: ipvlan, mode: l3}", 1).mode is SubinterfaceMode.L3


@pytest.mark.parametrize(
    ("more", "speed", "amounts"),
    [
        ("shares: 256", 100, Amounts(default=1, least=1, most=100)),
        ("request: {step: 100M}", 25_050, Amounts(default=300, least=100, most=25_000, step=100)),
        ("request: {minimum: 1G}", 25_000, Amounts(default=1_000, least=1_000, most=25_000)),
        ("shares: 4, request: {maximum: 2G}", 25_000, Amounts(default=2_000, least=1, most=2_000)),
        ("request: {maximum: 2G}", 1_000, Amounts(default=15, least=1, most=1_000)),
        (
            "shares: 2, request: {minimum: 150M, step: 100M}",
            1_000,
            Amounts(default=450, least=150, most=950, step=100),
        ),
    ],
)
def test_amounts_that_a_rule_leaves_out_are_those_that_fit(more: str, speed: int, amounts: Amounts) -> None:
    found = given_out(f"{{match: {{interfaces: [eth0]}}, kind: macvlan, {more}}}", speed)
    assert found.amounts == amounts


def test_there_are_no_more_shares_than_vlans() -> None:
    vlan = "{match: {interfaces: [eth0]}, kind: vlan, bandwidth: 1G, vlans: [5, '4-6', '10-12']}"
    assert given_out(vlan).shares == 6
    assert given_out(vlan.replace("10-12", "10-99")).shares == 64


MATCH = "match: {interfaces: [eth0]}"


@pytest.mark.parametrize(
    ("entry", "path", "said"),
    [
        ("{kind: macvlan}", "", "needs match"),
        ("{match: {}, kind: macvlan}", ".match", "needs a criterion"),
        ("{match: {kinds: [shared]}, kind: macvlan}", ".match.kinds", "cannot be shared"),
        (f"{{{MATCH}}}", "", "needs kind"),
        (f"{{{MATCH}, kind: bridge}}", ".kind", "must be one of macvlan, ipvlan, vlan"),
        (f"{{{MATCH}, kind: macvlan, mode: l2}}", ".mode", "must be one of bridge, private, vepa"),
        (f"{{{MATCH}, kind: ipvlan, mode: l3s}}", ".mode", "must be one of"),
        (f"{{{MATCH}, kind: vlan, vlans: [5], mode: l2}}", ".mode", "of a vlan it must not be there"),
        (f"{{{MATCH}, kind: macvlan, bandwidth: 10Gi}}", ".bandwidth", "is not a rate like 500M"),
        (f"{{{MATCH}, kind: macvlan, bandwidth: '0'}}", ".bandwidth", "must be more than 0"),
        (f"{{{MATCH}, kind: macvlan, shares: 0}}", ".shares", "must be 1 to 256"),
        (f"{{{MATCH}, kind: macvlan, shares: 257}}", ".shares", "must be 1 to 256"),
        (f"{{{MATCH}, kind: macvlan, share: 2}}", ".share", "did you mean shares?"),
        (f"{{{MATCH}, kind: macvlan, request: {{step: '0'}}}}", ".request.step", "must be more than 0"),
        (f"{{{MATCH}, kind: macvlan, request: {{default: '0'}}}}", ".request.default", "more than 0"),
        (
            f"{{{MATCH}, kind: macvlan, request: {{minimum: 2G, maximum: 1G}}}}",
            ".request.maximum",
            "is 1000M, less than the minimum, which is 2000M",
        ),
        (
            f"{{{MATCH}, kind: macvlan, bandwidth: 1G, request: {{maximum: 2G}}}}",
            ".request.maximum",
            "is 2000M, and 1000M are given out",
        ),
        (
            f"{{{MATCH}, kind: macvlan, request: {{minimum: 50M, maximum: 120M, step: 100M}}}}",
            ".request.maximum",
            "no multiple of 100M above the minimum, 50M",
        ),
        (
            f"{{{MATCH}, kind: macvlan, request: {{default: 1G, minimum: 2G}}}}",
            ".request.default",
            "less than the minimum",
        ),
        (
            f"{{{MATCH}, kind: macvlan, request: {{default: 3G, maximum: 2G}}}}",
            ".request.default",
            "one claim can have 2000M at most",
        ),
        (
            f"{{{MATCH}, kind: macvlan, bandwidth: 1G, request: {{default: 3G}}}}",
            ".request.default",
            "one claim can have 1000M at most",
        ),
        (
            f"{{{MATCH}, kind: macvlan, request: {{default: 150M, step: 100M}}}}",
            ".request.default",
            "no multiple of 100M above the minimum, 100M",
        ),
        (
            f"{{{MATCH}, kind: macvlan, bandwidth: 1G, request: {{minimum: 2G}}}}",
            ".request.minimum",
            "is 2000M, and 1000M are given out",
        ),
        (
            f"{{{MATCH}, kind: macvlan, bandwidth: 1G, request: {{step: 2G}}}}",
            ".request.step",
            "is 2000M, and 1000M are given out",
        ),
        (
            f"{{{MATCH}, kind: macvlan, bandwidth: 1G, request: {{minimum: 100M, step: 950M}}}}",
            ".request.step",
            "one step above 100M is more than the 1000M",
        ),
        (f"{{{MATCH}, kind: vlan}}", "", "needs vlans"),
        (f"{{{MATCH}, kind: vlan, vlans: []}}", ".vlans", "must have 1 to 64 entries"),
        (f"{{{MATCH}, kind: macvlan, vlans: [5]}}", ".vlans", "is there for kind vlan alone"),
        (f"{{{MATCH}, kind: vlan, vlans: [0]}}", ".vlans[0]", "must be a VLAN id like 100 or a range"),
        (f"{{{MATCH}, kind: vlan, vlans: [4095]}}", ".vlans[0]", "must be 1 to 4094, not 4095"),
        (f"{{{MATCH}, kind: vlan, vlans: [true]}}", ".vlans[0]", "not true"),
        (f"{{{MATCH}, kind: vlan, vlans: [7, '9-8']}}", ".vlans[1]", "is empty: 9 is above 8"),
        (f"{{{MATCH}, kind: vlan, vlans: ['5-']}}", ".vlans[0]", "or a range"),
        (f"{{{MATCH}, kind: vlan, vlans: [5, '5-5']}}", ".vlans[1]", "is the same as"),
        (f"{{{MATCH}, kind: vlan, shares: 3, vlans: ['5-6']}}", ".shares", "there are 2 VLANs"),
    ],
)
def test_what_is_wrong_is_told_with_line_and_field(entry: str, path: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"shared:\n  - {entry}\n")
    (problem,) = caught.value.problems
    assert problem.path == f"policy.yaml:4: shared[0]{path}"
    assert said in problem.message


def test_two_rules_with_the_same_fault_are_two_problems_each_in_its_place() -> None:
    fault = "{match: {interfaces: [eth0]}, kind: macvlan, bandwidth: '0'}"
    with pytest.raises(ConfigError) as caught:
        load(f"shared:\n  - {fault}\n  - {fault.replace('eth0', 'eth1')}\n")
    assert [problem.path for problem in caught.value.problems] == [
        "policy.yaml:4: shared[0].bandwidth",
        "policy.yaml:5: shared[1].bandwidth",
    ]


def test_the_first_rule_that_matches_is_the_one_and_others_are_not_shared() -> None:
    policy = load(
        "shared:\n"
        "  - {match: {names: [pci-*], kinds: [vf]}, kind: macvlan}\n"
        "  - {match: {names: [pci-*], kinds: [pf]}, kind: ipvlan}\n"
        "  - {match: {interfaces: [eth0]}, kind: macvlan}\n"
    )
    found = policy.sharable(PF, "pci-0000-21-00-0", 1_000)
    assert found is not None
    assert found.kind is SubinterfaceKind.IPVLAN
    other = replace(PF, link=link("eth1"))
    assert policy.sharable(other, "nsim-1-port-0", 1_000) is None
    assert policy.unsharable(other, "nsim-1-port-0", None) == ""
    assert NodePolicy().sharable(PF, "pci-0000-21-00-0", 1_000) is None


@pytest.mark.parametrize(
    ("made", "speed", "said"),
    [
        (MACVLAN, None, "the speed of its port is not known"),
        (
            replace(MACVLAN, request=RequestRule(minimum=2_000)),
            1_000,
            "request.minimum is 2000M, and 1000M are given out (node policy, shared)",
        ),
        (replace(MACVLAN, request=RequestRule(default=2_000)), 1_000, "one claim can have 1000M at most"),
        (replace(MACVLAN, request=RequestRule(minimum=1, step=10)), 10, "one step above 1M"),
    ],
)
def test_a_port_that_a_rule_does_not_fit_gives_out_nothing_and_says_why(
    made: SharedRule, speed: int | None, said: str
) -> None:
    policy = NodePolicy(shared=(made,))
    assert policy.sharable(PF, "n", speed) is None
    assert said in policy.unsharable(PF, "n", speed)
    assert policy.unsharable(PF, "n", 25_000) == ""
    assert policy.sharable(PF, "n", 25_000) is not None


@pytest.mark.parametrize(
    ("match", "selected"),
    [
        ("interfaces: ['bond*']", True),
        ("interfaces: ['bond*'], kinds: [netdev]", True),
        ("interfaces: [eth0]", False),
        ("interfaces: ['bond*'], kinds: [pf]", False),
        ("interfaces: ['bond*'], pfNames: ['*']", False),
        ("interfaces: ['bond*'], names: ['bond-*']", False),
        ("names: ['bond-*']", False),
    ],
)
def test_a_software_interface_that_is_shared_by_its_name_is_selected_and_no_other(
    match: str, selected: bool
) -> None:
    policy = load(f"shared: [{{match: {{{match}}}, kind: macvlan, bandwidth: 1G}}]")
    assert policy.selects(link("bond0", kind="bond")) is selected
    assert not policy.selects(link("bond0", kind="bond", link_type=772))


RATES = st.integers(1, 10_000_000)
OPTIONAL_RATES = st.none() | RATES


@given(
    st.builds(RequestRule, default=OPTIONAL_RATES, minimum=OPTIONAL_RATES, maximum=OPTIONAL_RATES)
    | st.builds(RequestRule, minimum=OPTIONAL_RATES, step=OPTIONAL_RATES)
    | st.builds(
        RequestRule, step=st.integers(1, 50), maximum=st.integers(1, 500), default=st.integers(1, 99)
    ),
    OPTIONAL_RATES,
    st.none() | st.integers(1, MAX_SHARES),
    RATES,
)
def test_whatever_a_rule_gives_out_is_what_the_api_takes(
    request: RequestRule, bandwidth: int | None, shares: int | None, speed: int
) -> None:
    made = replace(MACVLAN, request=request, bandwidth=bandwidth, shares=shares)
    found = made.sharable(speed)
    assert (found is None) is bool(made.unsharable(speed))
    if found is None:
        return
    asked = capacity_requests(found)
    assert request_policy(asked["bandwidth"], quantity(found.bandwidth))["validRange"]["min"]
    assert request_policy(asked["shares"], str(found.shares))["default"] == "1"
    assert found.amounts.most <= found.bandwidth


@pytest.mark.parametrize("kind", SubinterfaceKind)
def test_a_share_of_any_rule_can_be_made(kind: SubinterfaceKind) -> None:
    vlans = (VlanRange(first=5, last=5),) if kind is SubinterfaceKind.VLAN else ()
    for mode in (None, *MODES[kind]):
        found = SharedRule(match=ON_ETH0, kind=kind, mode=mode, vlans=vlans).sharable(1_000)
        assert found is not None
        assert Subinterface(kind=kind, mode=found.mode, vlan=5 if vlans else None)
