"""The policy's section about bandwidth is strict, and a VF's size follows from rule and index alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.errors import ConfigError
from driver.policy import NodePolicy, load_policy
from driver.policy.bandwidth import BandwidthRule, SizeClass
from driver.policy.sriov import PfSelector
from hw.model import (
    DeviceKind,
    HwDevice,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    NetdevsimIdentity,
    PciAddress,
    PciFacts,
    PciIdentity,
    SoftwareIdentity,
)

HEADER = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"
ADDRESS = PciAddress("0000:21:00.0")
PF = HwDevice(
    kind=DeviceKind.PF,
    identity=PciIdentity(ADDRESS),
    link=LinkInfo(
        ifindex=IfIndex(3), name=IfName("ens1f0"), flags=LinkFlags(0), link_type=1, mtu=1500, vf_count=4
    ),
    pci=PciFacts(address=ADDRESS, vendor="15b3", product="1017", numa_node=1),
)


def load(body: str) -> NodePolicy:
    return load_policy(HEADER + body, "policy.yaml")


def test_a_whole_rule_is_read() -> None:
    (rule,) = load(
        """
bandwidth:
  - match: {pfNames: ["ens*"], linkTypes: [ethernet]}
    speed: 100G
    percent: 80
    sizes: [{rate: 25G, vfs: 2}, {rate: 500M}]
"""
    ).port_bandwidth
    assert rule.match == PfSelector(
        pf_names=("ens*",), link_types=rule.match.link_types if rule.match else ()
    )
    assert (rule.speed, rule.percent) == (100_000, 80)
    assert rule.sizes == (SizeClass(rate=25_000, vfs=2), SizeClass(rate=500))
    assert load("reset: none\n").port_bandwidth == ()


@pytest.mark.parametrize(
    ("entry", "path", "said"),
    [
        ("{sizes: []}", "bandwidth[0].sizes", "must have 1 to 32 entries"),
        ("{speed: 25G}", "bandwidth[0]", "needs sizes"),
        ("{sizes: [{vfs: 2}]}", "bandwidth[0].sizes[0]", "needs rate"),
        ("{sizes: [{rate: 5}]}", "bandwidth[0].sizes[0].rate", "must be a string"),
        ("{sizes: [{rate: 5Gi}]}", "bandwidth[0].sizes[0].rate", "is not a rate like 500M"),
        ("{sizes: [{rate: 5G, vfs: 0}]}", "bandwidth[0].sizes[0].vfs", "must be 1 to 4096"),
        ("{sizes: [{rate: 5G, count: 1}]}", "bandwidth[0].sizes[0].count", "is not a known field"),
        ("{sizes: [{rate: '0'}]}", "bandwidth[0].sizes[0].rate", "must be more than 0"),
        ("{sizes: [{rate: 5G}], speed: '0'}", "bandwidth[0].speed", "must be more than 0"),
        ("{sizes: [{rate: 5G}], percent: 0}", "bandwidth[0].percent", "must be 1 to 1000"),
        ("{sizes: [{rate: 5G}], percent: 1.5}", "bandwidth[0].percent", "must be an integer"),
        ("{sizes: [{rate: 5G}, {rate: 1G, vfs: 1}]}", "bandwidth[0].sizes[0]", "only the last size"),
        ("{sizes: [{rate: 1G, vfs: 1}, {rate: 30G}], speed: 25G}", "bandwidth[0].sizes[1].rate", "gives out"),
        (
            "{sizes: [{rate: 20G}], speed: 25G, percent: 50}",
            "bandwidth[0].sizes[0].rate",
            "12500M, which is 50 %",
        ),
        ("{sizes: [{rate: 5G}], match: {}}", "bandwidth[0].match", "needs a criterion"),
    ],
)
def test_what_is_wrong_is_told_with_line_and_field(entry: str, path: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"bandwidth:\n  - {entry}\n")
    (problem,) = caught.value.problems
    assert problem.path == f"policy.yaml:4: {path}"
    assert said in problem.message


def test_two_rules_with_the_same_fault_are_two_problems_each_in_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        load("bandwidth:\n  - {sizes: [{rate: '0'}]}\n  - {speed: 1G, sizes: [{rate: 2G}]}\n")
    assert [problem.path for problem in caught.value.problems] == [
        "policy.yaml:4: bandwidth[0].sizes[0].rate",
        "policy.yaml:5: bandwidth[1].sizes[0].rate",
    ]


def test_the_first_rule_that_matches_a_pf_is_the_one() -> None:
    policy = load(
        "bandwidth:\n"
        "  - {match: {pfNames: [other]}, sizes: [{rate: 1G}]}\n"
        "  - {match: {vendors: [15b3], products: ['1017'], numaNodes: [1]}, sizes: [{rate: 2G}]}\n"
        "  - {sizes: [{rate: 3G}]}\n"
    )
    found = policy.bandwidth_of(PF)
    assert found is not None
    assert found.size_of(0) == 2_000
    simulated = policy.bandwidth_of(HwDevice(kind=DeviceKind.PF, identity=NetdevsimIdentity(1, 0), link=None))
    assert simulated is not None
    assert simulated.size_of(0) == 3_000
    software = HwDevice(
        kind=DeviceKind.NETDEV, identity=SoftwareIdentity("veth", IfIndex(7), None, None), link=None
    )
    assert policy.bandwidth_of(software) is None
    assert NodePolicy().bandwidth_of(PF) is None


def test_sizes_are_dealt_from_vf_0_on_and_what_is_left_over_has_none() -> None:
    counted = BandwidthRule(sizes=(SizeClass(rate=10, vfs=2), SizeClass(rate=5, vfs=1)))
    assert [counted.size_of(vf) for vf in range(5)] == [10, 10, 5, None, None]
    rest = BandwidthRule(sizes=(SizeClass(rate=10, vfs=1), SizeClass(rate=1)))
    assert [rest.size_of(vf) for vf in (0, 1, 127)] == [10, 1, 1]


@given(st.integers(1, 10_000_000), st.integers(1, 1000))
def test_what_is_given_out_is_never_more_than_the_percent_of_the_speed(speed: int, percent: int) -> None:
    rule = BandwidthRule(sizes=(SizeClass(rate=1),), percent=percent)
    budget = rule.budget(speed)
    assert budget is not None
    assert budget * 100 <= speed * percent < (budget + 1) * 100
    assert rule.budget(None) is None
    fixed = BandwidthRule(sizes=(SizeClass(rate=1),), percent=percent, speed=speed)
    assert fixed.budget(1) == fixed.budget(None) == budget
