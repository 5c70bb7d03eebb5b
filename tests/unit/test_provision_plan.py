"""What is done about a PF: what the policy says, never under a user, and never to what others made."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.policy.sriov import LinkType, PfRule, PfSelector, VfDefaults
from driver.provision.plan import Maker, PortPlan, Verdict, plan, removal
from driver.provision.records import Making
from hw.model import IfIndex, PciAddress
from hw.ports import SriovPort
from tests.unit.provision_world import OLD_BOOT, PF, known, making, pf_link, port, vf_address

FOUR = PfRule(vfs=4)
TWO = PfRule(vfs=2)
NONE = PfRule(vfs=0)
OTHER = PciAddress("0000:22:00.0")


def one(port: SriovPort, rule: PfRule | None, *makings: Making, **more: Any) -> PortPlan:
    return plan([port], [rule] if rule else [], known(*makings, **more))[port.address]


def test_vfs_are_made_where_there_are_none() -> None:
    decided = one(port(), FOUR)
    assert (decided.verdict, decided.maker) == (Verdict.MAKE, Maker.NOBODY)


def test_what_is_as_it_should_be_is_left() -> None:
    assert one(port(4), FOUR, making(FOUR)).verdict is Verdict.FINE
    assert one(port(0), NONE).verdict is Verdict.FINE
    assert one(port(0), None).verdict is Verdict.NONE


def test_another_number_and_other_defaults_are_made_anew() -> None:
    assert one(port(4), TWO, making(FOUR)).verdict is Verdict.MAKE
    trusted = PfRule(vfs=4, vf=VfDefaults(trust=True))
    assert one(port(4), trusted, making(FOUR)).verdict is Verdict.MAKE
    assert one(port(4), NONE, making(FOUR)).verdict is Verdict.REMOVE


def test_what_someone_took_to_none_is_made_again() -> None:
    assert one(port(0), FOUR, making(FOUR)).verdict is Verdict.MAKE


def test_after_a_reboot_vfs_are_made_again() -> None:
    assert one(port(0), FOUR, making(FOUR, boot_id=OLD_BOOT)).verdict is Verdict.MAKE


def test_a_record_of_another_boot_is_no_claim_on_vfs() -> None:
    decided = one(port(4), TWO, making(FOUR, boot_id=OLD_BOOT))
    assert (decided.verdict, decided.maker) == (Verdict.REFUSED, Maker.OTHERS)
    assert "others made the 4 VFs" in decided.why


@pytest.mark.parametrize("number", [0, 4])
def test_what_was_begun_is_finished_from_either_number(number: int) -> None:
    begun = making(TWO, previous=4, done=False)
    assert one(port(number), TWO, begun).verdict is Verdict.MAKE
    assert one(port(2), TWO, begun).verdict is Verdict.MAKE


def test_the_vfs_of_others_are_never_touched() -> None:
    fine = one(port(4), FOUR)
    assert (fine.verdict, fine.maker) == (Verdict.FINE, Maker.OTHERS)
    assert "nothing was set" in fine.why
    assert one(port(3), FOUR).verdict is Verdict.REFUSED
    changed = one(port(3), FOUR, making(FOUR))
    assert (changed.verdict, changed.maker) == (Verdict.REFUSED, Maker.OTHERS)
    assert "someone has made 3 of that" in changed.why


def test_external_vfs_are_counted_and_nothing_else() -> None:
    external = PfRule(vfs=4, external=True)
    assert one(port(4), external).verdict is Verdict.FINE
    decided = one(port(0), external)
    assert decided.verdict is Verdict.REFUSED
    assert "has 0 VFs, and others should have made 4" in decided.why
    assert one(port(2), external, making(TWO)).verdict is Verdict.REFUSED


def test_more_than_the_hardware_has_is_refused() -> None:
    decided = one(port(), PfRule(vfs=8))
    assert decided.verdict is Verdict.REFUSED
    assert "8 VFs" in decided.why
    assert "can have 7" in decided.why


@pytest.mark.parametrize("held", ["pci-0000-21-00-0", "pci-0000-21-10-1", "pci-0000-21-10-1-p1"])
def test_nothing_goes_through_none_under_a_holder(held: str) -> None:
    decided = one(port(4), TWO, making(FOUR), held={held: "is held by claim a/b"})
    assert decided.verdict is Verdict.REFUSED
    assert f"{held} is held by claim a/b" in decided.why
    assert not decided.unfinished


def test_another_pfs_holder_is_in_nobodys_way() -> None:
    held = {"pci-0000-21-00-01": "is held", "pci-0000-22-00-0": "is held"}
    assert one(port(4), TWO, making(FOUR), held=held).verdict is Verdict.MAKE


def test_a_vf_that_was_there_before_a_reboot_is_in_nobodys_way() -> None:
    old = making(FOUR, boot_id=OLD_BOOT)
    assert one(port(0), FOUR, old, held={"pci-0000-21-10-1": "is held"}).verdict is Verdict.MAKE


def test_vfs_that_others_use_stay() -> None:
    used = port(4, vfs_in_use="its VF 0000:21:10.0 is bound to vfio-pci")
    decided = one(used, TWO, making(FOUR))
    assert (decided.verdict, "vfio-pci" in decided.why) == (Verdict.REFUSED, True)


def test_a_pf_of_the_hosts_own_is_left_alone_unless_allowed() -> None:
    uplink = port(in_use="in use by the host: it has an address")
    decided = one(uplink, FOUR)
    assert decided.verdict is Verdict.REFUSED
    assert "it has an address" in decided.why
    assert one(uplink, PfRule(vfs=4, allow_host_uplink=True)).verdict is Verdict.MAKE
    made = port(4, in_use="in use by the host: it has an address")
    assert one(made, TWO, making(FOUR)).verdict is Verdict.REFUSED
    assert one(made, FOUR, making(FOUR)).verdict is Verdict.FINE


def test_a_pf_without_its_netdev_is_refused_and_one_that_is_a_switch_is_not() -> None:
    assert "no netdev" in one(port(links=()), FOUR).why
    assert one(port(links=(pf_link(phys_switch_id="aa"),)), FOUR).verdict is Verdict.MAKE


def test_a_rule_that_is_gone_leaves_its_vfs_and_says_so() -> None:
    decided = one(port(4), None, making(FOUR))
    assert (decided.verdict, decided.maker) == (Verdict.NONE, Maker.KND)
    assert "vfs: 0" in decided.why
    half = one(port(4), None, making(FOUR, done=False))
    assert (half.verdict, half.unfinished) == (Verdict.REMOVE, True)


def test_the_first_rule_that_matches_is_the_one() -> None:
    rules = [
        PfRule(vfs=1, match=PfSelector(numa_nodes=(3,))),
        PfRule(vfs=2, match=PfSelector(link_types=(LinkType.ETHERNET,))),
        PfRule(vfs=3),
    ]
    assert plan([port()], rules, known())[PF].rule == rules[1]


def test_ports_of_a_bond_change_together_or_not_at_all() -> None:
    allowed = PfRule(vfs=4, allow_host_uplink=True)
    bond = IfIndex(9)
    both = [port(bond=bond), port(address=OTHER, bond=bond)]
    assert {each.verdict for each in plan(both, [allowed], known()).values()} == {Verdict.MAKE}
    held = plan(both, [allowed], known(held={"pci-0000-22-00-0": "is held"}))
    assert {each.verdict for each in held.values()} == {Verdict.REFUSED}
    assert "bond" in held[PF].why
    alone = PfRule(vfs=4, allow_host_uplink=True, match=PfSelector(addresses=(PF,)))
    assert plan(both, [alone], known())[PF].verdict is Verdict.REFUSED
    apart = [port(bond=bond), port(address=OTHER, bond=IfIndex(10))]
    assert plan(apart, [alone], known())[PF].verdict is Verdict.MAKE


def test_a_node_that_is_left_loses_only_what_this_driver_made() -> None:
    assert removal(port(4), making(FOUR), known()).verdict is Verdict.REMOVE
    assert removal(port(0), making(FOUR), known()).verdict is Verdict.REMOVE
    assert removal(port(4), None, known()).verdict is Verdict.NONE
    assert removal(port(3), making(FOUR), known()).verdict is Verdict.NONE
    held = known(held={"pci-0000-21-10-0": "is held"})
    assert removal(port(4), making(FOUR), held).verdict is Verdict.REFUSED


RULES = (
    st.none()
    | st.builds(PfRule, vfs=st.integers(0, 9), allow_host_uplink=st.booleans())
    | st.builds(PfRule, vfs=st.integers(0, 9), external=st.just(True))
)
MAKINGS = st.none() | st.builds(
    lambda vfs, previous, done, old: making(
        PfRule(vfs=vfs), previous=previous, done=done, **({"boot_id": OLD_BOOT} if old else {})
    ),
    st.integers(0, 7),
    st.integers(0, 7),
    st.booleans(),
    st.booleans(),
)


@given(
    num=st.integers(0, 7),
    rule=RULES,
    record=MAKINGS,
    held=st.none() | st.integers(-1, 6),
    in_use=st.booleans(),
)
def test_whatever_there_is_nothing_of_others_and_nothing_in_use_is_changed(
    num: int, rule: PfRule | None, record: Making | None, held: int | None, in_use: bool
) -> None:
    where = port(num, in_use="in use by the host: it has an address" if in_use else "")
    names = (
        {}
        if held is None
        else {f"pci-{vf_address(held) if held >= 0 else PF}".replace(":", "-").replace(".", "-"): "is held"}
    )
    decided = one(where, rule, *([record] if record else []), held=names)
    touched = decided.changes and num > 0
    ours = record is not None and record.boot_id != OLD_BOOT and num in (record.vfs, record.previous)
    assert not touched or ours
    assert not touched or held is None or held >= num
    if decided.verdict is Verdict.MAKE:
        assert rule is not None
        assert not rule.external
        assert 0 < rule.vfs <= where.total_vfs
        assert not in_use or rule.allow_host_uplink
    if decided.verdict is Verdict.REFUSED:
        assert decided.why


def test_vfs_that_others_made_anew_at_the_same_place_are_not_claimed() -> None:
    ours = making(FOUR, instance=71)
    assert one(port(4, instance=71), FOUR, ours).maker is Maker.KND
    taken = one(port(4, instance=72), FOUR, ours)
    assert (taken.maker, taken.verdict) == (Maker.OTHERS, Verdict.FINE)
    assert "someone has made them anew, so nothing was set on them" in taken.why
    # What is under way has no instance yet, nor has what an earlier version made.
    assert one(port(4, instance=72), FOUR, making(FOUR, instance=71, done=False)).maker is Maker.KND
    assert one(port(4, instance=72), FOUR, making(FOUR)).maker is Maker.KND
