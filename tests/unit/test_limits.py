"""Who keeps which limit is decided by config, device and policy alone, and refused where nobody could."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf.limits import NO_MARK
from driver import limits
from driver.errors import ConfigError
from driver.limits import KeptBy
from driver.model import Device, NicConfig, VfConfig, VfDriver
from driver.qos import DEFAULT_CLASSES, PodLimits, PodMarks, QosClass, QosPolicy
from driver.rdma import IpoibConfig, RdmaConfig
from driver.traffic import Enforcement, QosConfig
from hw.model import DeviceKind, Direction, IfName, VfSettings
from hw.qdisc import ROOT_HANDLE, FqQueue, HtbTree
from tests.unit.claims_world import A, device

POLICY = QosPolicy(classes=DEFAULT_CLASSES)
NETDEV = device(A, 20)
VF = replace(NETDEV, kind=DeviceKind.VF, vf=VfSettings(max_rate=0), driver="igbvf")
FILES = VfConfig(driver=VfDriver.VFIO)


def asked(vf: VfConfig | None = None, **fields: object) -> NicConfig:
    return NicConfig(qos=QosConfig(**fields), vf=vf or VfConfig())  # type: ignore[arg-type]


SENDS = asked(egress_rate=100)
SOFTWARE = asked(egress_rate=100, enforcement=Enforcement.SOFTWARE)
HARDWARE = asked(egress_rate=100, enforcement=Enforcement.HARDWARE)


@pytest.mark.parametrize(
    ("of", "config", "by"),
    [
        (NETDEV, SENDS, Enforcement.SOFTWARE),
        (VF, SENDS, Enforcement.HARDWARE),
        (VF, asked(FILES, egress_rate=100), Enforcement.HARDWARE),
        (replace(VF, vf=None), SENDS, Enforcement.SOFTWARE),
        (VF, asked(ingress_rate=100), Enforcement.SOFTWARE),
        (VF, SOFTWARE, Enforcement.SOFTWARE),
        (replace(VF, vf=None), HARDWARE, Enforcement.HARDWARE),
    ],
)
def test_auto_is_the_device_where_it_can_be_told(of: Device, config: NicConfig, by: Enforcement) -> None:
    assert limits.settled(of, config).qos.enforcement is by


def test_a_device_that_refuses_leaves_it_to_the_kernel_only_where_it_may() -> None:
    settled = limits.settled(VF, SENDS)
    other = limits.instead(settled, asked=SENDS)
    assert other is not None
    assert other.qos.enforcement is Enforcement.SOFTWARE
    least = asked(egress_rate=100, egress_min_rate=10)
    files = asked(FILES, egress_rate=100)
    for config in (HARDWARE, least, files):
        assert limits.instead(limits.settled(VF, config), asked=config) is None
    assert limits.instead(limits.settled(NETDEV, SENDS), asked=SENDS) is None


@pytest.mark.parametrize(
    ("of", "config", "path"),
    [
        (NETDEV, asked(traffic_class="gold"), "qos.class"),
        (NETDEV, HARDWARE, "qos.enforcement"),
        (NETDEV, asked(egress_min_rate=1), "qos.egress.minRate"),
        (VF, asked(egress_min_rate=1, enforcement=Enforcement.SOFTWARE), "qos.egress.minRate"),
        (VF, asked(FILES, ingress_rate=1), "qos.ingress.rate"),
        (VF, asked(FILES, egress_rate=1, egress_burst=9000), "qos.egress.burst"),
        (VF, asked(FILES, traffic_class="bulk"), "qos.class"),
        (VF, asked(FILES, egress_rate=1, enforcement=Enforcement.SOFTWARE), "qos.enforcement"),
    ],
)
def test_what_nobody_could_keep_is_refused_with_its_field(of: Device, config: NicConfig, path: str) -> None:
    with pytest.raises(ConfigError) as raised:
        limits.check(of, config, POLICY)
    assert [problem.path for problem in raised.value.problems] == [path]


@pytest.mark.parametrize("config", [SENDS, SOFTWARE, asked(ingress_rate=5, traffic_class="bulk"), asked()])
@pytest.mark.parametrize("of", [NETDEV, VF])
def test_what_can_be_kept_is_taken(of: Device, config: NicConfig) -> None:
    limits.check(of, config, POLICY)


def test_a_limit_that_would_not_bind_an_ipoib_interface_is_refused_and_its_pfs_is_taken() -> None:
    ipoib = RdmaConfig(partition=1, ipoib=IpoibConfig(name=IfName("ib1")))
    for config in (SOFTWARE, asked(ingress_rate=5)):
        with pytest.raises(ConfigError, match=r"rdma.ipoib: .*its port's own interface alone"):
            limits.check(VF, replace(config, rdma=ipoib), POLICY)
    sends = replace(SENDS, rdma=ipoib)
    limits.check(VF, sends, POLICY)
    assert limits.instead(limits.settled(VF, sends), asked=sends) is None


def test_without_limits_nothing_is_done_to_an_interface() -> None:
    made = limits.shaping(asked(), POLICY, mtu=1500)
    assert (made.egress, made.ingress, made.gso_max_size) == (None, None, None)
    assert not any(made.rules_with(0).pack())


def test_a_limit_in_hardware_needs_no_queue_unless_the_policy_is_stricter() -> None:
    assert limits.shaping(HARDWARE, POLICY, mtu=1500).egress is None
    strict = replace(POLICY, limits=PodLimits(egress=50))
    made = limits.shaping(HARDWARE, strict, mtu=1500)
    assert made.egress is not None
    assert made.egress.rate == 50 * 125_000
    loose = replace(POLICY, limits=PodLimits(egress=500))
    assert limits.shaping(HARDWARE, loose, mtu=1500).egress is None


@given(st.integers(1, 400_000), st.integers(576, 9216), st.integers(0, 100), st.integers(1, 100))
def test_a_tree_is_one_that_the_kernel_takes_and_that_keeps_its_word(
    rate: int, mtu: int, guaranteed: int, ceiling: int
) -> None:
    own = QosClass(name="own", index=0, guaranteed=min(guaranteed, ceiling), ceiling=ceiling)
    policy = QosPolicy(classes=(own, QosClass(name="rest", index=1)))
    config = asked(egress_rate=rate, ingress_rate=rate, enforcement=Enforcement.SOFTWARE)
    made = limits.shaping(config, policy, mtu=mtu)
    assert made.gso_max_size is not None
    # Two segments fit, and one packet is over within 1 ms, whichever is more.
    assert made.gso_max_size == min(max(rate * 125, 2 * mtu + 400), 65536)
    for tree in (made.egress, made.ingress):
        assert tree is not None
        assert tree.rate == rate * 125_000
        assert tree.burst >= mtu
        for leaf in tree.classes:
            assert 0 < leaf.rate <= tree.rate
            assert leaf.ceil <= tree.rate
            assert leaf.queue >= 4 * mtu
        assert sum(leaf.rate for leaf in tree.classes) <= tree.rate * 1.01
        (queue,) = {leaf.queue for leaf in tree.classes}
        backstop = made.rules.police[tree is made.ingress]
        assert backstop is not None
        assert backstop.rate == tree.rate * 5 // 4
        assert backstop.burst >= max(2 * 65536, queue + tree.burst)
        shares = made.rules.guaranteed[tree is made.ingress]
        assert shares == (*[leaf.rate for leaf in tree.classes], *[0] * 6)


@given(st.integers(1, 400_000), st.integers(576, 9216), st.none() | st.integers(1, 1 << 30))
def test_times_of_departure_keep_the_limit_itself_and_wait_as_long_as_a_tree(
    rate: int, mtu: int, burst: int | None
) -> None:
    config = asked(egress_rate=rate, egress_burst=burst, ingress_rate=rate, enforcement=Enforcement.SOFTWARE)
    tree, made = (limits.shaping(config, POLICY, mtu=mtu, departs=each) for each in (False, True))
    assert isinstance(tree.egress, HtbTree)
    assert isinstance(made.egress, FqQueue)
    police = made.rules.police[0]
    assert police is not None
    assert (police.rate, made.rules.credit) == (tree.egress.rate, tree.egress.burst)
    assert police.burst - tree.egress.burst == tree.egress.classes[0].queue
    assert made.egress.packets >= police.burst // 64
    assert made.rules.guaranteed == tree.rules.guaranteed
    assert (made.ingress, made.gso_max_size) == (tree.ingress, tree.gso_max_size)
    assert tree.rules.credit is None
    assert made.rules.pack()


def test_what_comes_in_is_policed_where_there_is_no_detour() -> None:
    made = limits.shaping(asked(ingress_rate=100), POLICY, mtu=1500)
    by_detour, without = made.rules_with(7), made.rules_with(0)
    assert (by_detour.detour, by_detour.queues) == (7, (0, ROOT_HANDLE))
    assert (without.detour, without.queues) == (0, (0, 0))
    told = [each.police[1].rate for each in (by_detour, without) if each.police[1] is not None]
    assert told == [15_625_000, 12_500_000]
    assert any(by_detour.guaranteed[1])
    assert not any(without.guaranteed[1])


def test_marks_and_the_class_follow_config_and_policy() -> None:
    marked = replace(POLICY, classes=(QosClass(name="a", index=0), QosClass(name="b", index=1, mark=8)))
    rules = limits.shaping(asked(traffic_class="b"), marked, mtu=1500).rules
    assert rules.one_class == 1
    assert rules.marks == (NO_MARK, 8, *[NO_MARK] * 6)
    cleared = replace(marked, marks=PodMarks.CLEAR)
    assert limits.shaping(asked(traffic_class="b"), cleared, mtu=1500).rules.one_class == 1
    rules = limits.shaping(asked(), cleared, mtu=1500).rules
    assert (rules.one_class, rules.marks[:2]) == (0, (0, 8))
    assert limits.shaping(asked(traffic_class="gone"), marked, mtu=1500).rules.one_class is None


def test_what_is_kept_is_told_with_what_keeps_it() -> None:
    both = asked(egress_rate=100, ingress_rate=50, enforcement=Enforcement.SOFTWARE)
    assert [(each.direction, each.rate, each.by) for each in limits.kept(both, POLICY, detour=True)] == [
        (Direction.EGRESS, 100, KeptBy.QUEUE),
        (Direction.INGRESS, 50, KeptBy.DETOUR),
    ]
    told = [str(each) for each in limits.kept(SOFTWARE, POLICY, detour=False, departs=True)]
    assert told == ["egress at most 100 Mb/s (fq, cooperative)"]
    (egress,) = limits.kept(HARDWARE, POLICY, detour=False)
    assert str(egress) == "egress at most 100 Mb/s (device)"
    strict = replace(POLICY, limits=PodLimits(egress=50, ingress=40))
    told = [str(each) for each in limits.kept(HARDWARE, strict, detour=False)]
    assert told == ["egress at most 50 Mb/s (htb, cooperative)", "ingress at most 40 Mb/s (police)"]
    by_file = asked(FILES, egress_rate=100, enforcement=Enforcement.HARDWARE)
    assert [each.by for each in limits.kept(by_file, strict, detour=False)] == [KeptBy.DEVICE]
