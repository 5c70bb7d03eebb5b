"""What keeps limits, as the kernel has it: made, changed, put back and taken off, without any traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from driver.qos import EgressShaper
from hw.model import LinkInfo
from hw.qdisc import ROOT_HANDLE
from tests.kernel.limited_pair import SLOT, Pair

pytestmark = [pytest.mark.usefixtures("tcx_kernel"), pytest.mark.timeout(120)]


def link(pair: Pair) -> LinkInfo:
    assert pair.target.pod is not None
    found = pair.target.pod.by_index(pair.ifindex)
    assert found is not None
    return found


def detours(pair: Pair) -> list[LinkInfo]:
    assert pair.target.pod is not None
    return [each for each in pair.target.pod.dump() if each.kind == "ifb"]


def has_queue(pair: Pair) -> bool:
    assert pair.target.pod is not None
    root = pair.target.pod.shaping.root(pair.ifindex)
    return root is not None and root.handle == ROOT_HANDLE


def test_limits_are_made_changed_in_place_and_taken_off_without_a_trace(pair: Pair) -> None:
    before = link(pair)
    assert (has_queue(pair), detours(pair)) == (False, [])
    for egress, ingress in ((100, 200), (50, 10), (100_000, 40_000)):
        pair.limit(egress=egress, ingress=ingress)
        assert pair.shaper.is_shaped(pair.target)
        assert has_queue(pair)
        (detour,) = detours(pair)
        assert detour.up
        assert pair.accounting.limits.detour(SLOT) == detour.ifindex
    pair.limit()
    assert (has_queue(pair), detours(pair)) == (False, [])
    assert pair.accounting.limits.detour(SLOT) == 0
    assert link(pair).gso_max_size == before.gso_max_size


def test_packets_that_stand_for_many_are_kept_short_at_a_low_limit(pair: Pair) -> None:
    pair.limit(egress=100)
    assert link(pair).gso_max_size == 12_500
    pair.limit(egress=1)
    assert link(pair).gso_max_size == 2 * 1500 + 400


@pytest.mark.parametrize("what", ["queue", "detour", "queue-of-detour", "down"])
def test_what_a_tenant_takes_off_is_missed_and_put_back(pair: Pair, what: str) -> None:
    pair.limit(egress=100, ingress=100)
    pod = pair.target.pod
    assert pod is not None
    (detour,) = detours(pair)
    if what == "queue":
        pod.shaping.unshape(pair.ifindex)
    elif what == "detour":
        pod.delete(detour.ifindex)
    elif what == "queue-of-detour":
        pod.shaping.unshape(detour.ifindex)
    else:
        pod.set_down(detour.ifindex)
    assert not pair.shaper.is_shaped(pair.target)
    pair.shaper.shape(pair.target)
    assert pair.shaper.is_shaped(pair.target)
    assert len(detours(pair)) == 1


def test_an_end_leaves_no_link_and_no_rule_and_may_come_twice(pair: Pair) -> None:
    pair.limit(egress=100, ingress=100)
    for _ in range(2):
        pair.shaper.unshape(pair.target)
        assert detours(pair) == []
        assert pair.accounting.limits.detour(SLOT) == 0


def test_what_keeps_a_limit_is_chosen_when_there_is_one_first_and_htb_where_there_is_no_fq(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pod = pair.target.pod
    assert pod is not None
    kinds = []
    for shaper, limit in (("fq", 100), ("htb", 50), ("htb", 0), ("htb", 50), ("fq", 20)):
        pair.policy = replace(pair.policy, shaper=EgressShaper(shaper))
        pair.limit(egress=limit)
        assert pair.shaper.is_shaped(pair.target)
        assert has_queue(pair) == bool(limit)
        root = pod.shaping.root(pair.ifindex)
        kinds.append(root.kind if root is not None and limit else "")
        assert pair.accounting.limits.departs(SLOT) == (kinds[-1] == "fq")
    assert kinds[1:] == [kinds[0], "", "htb", "htb"]
    assert kinds[0] == ("htb" if "limits are kept by htb on this node" in caplog.text else "fq")
