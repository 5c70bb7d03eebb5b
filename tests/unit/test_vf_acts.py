"""What a claim asks of a VF is set on its PF whole or not at all, and nothing of it stays behind."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpf.layout import Hook
from driver import plan
from driver.clock import SystemClock
from driver.errors import NotNow, Refusal
from driver.execute import probe, vf
from driver.execute.actions import NodeActs
from driver.execute.engine import Engine, Token
from driver.execute.target import NotClean, Target, Vanished
from driver.model import InterfaceConfig, NicConfig, Preparation, VfConfig, VfDriver
from driver.plan import Act, Plan
from hw.errors import Busy, Refused
from hw.model import IfIndex, LinkSettings, VfLinkState, VfVlan, VlanProtocol
from hw.sriov import binding
from tests.unit.igb_world import ASKED, FRESH, OWN, RANDOM, VF, VF_LINK, Igb, prepared, target
from tests.unit.no_foreign import NO_FOREIGN

VLAN = VfVlan(id=100, qos=3)
ALL = NicConfig(
    interface=InterfaceConfig(hardware_address=ASKED),
    vf=VfConfig(vlan=VLAN, max_rate=100, spoof_check=False, trust=True),
)


@pytest.fixture
def igb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Igb:
    monkeypatch.setattr(vf, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr("driver.execute.actions.foreign_programs", lambda ifindex, own: ())
    monkeypatch.setattr("driver.execute.actions.detach_foreign", lambda ifindex, own: None)
    return Igb(tmp_path / "sys")


def engine(igb: Igb, foreign: Any = NO_FOREIGN) -> Engine[Target]:
    programs: Any = SimpleNamespace(
        attach=lambda *a: None, detach=lambda *a: None, links_of=lambda device: frozenset()
    )
    nothing: Any = None
    shaper: Any = SimpleNamespace(shape=nothing, unshape=nothing)
    acts = NodeActs(
        hook=Hook.TCX,
        accounting=nothing,
        programs=programs,
        fold=nothing,
        meters=nothing,
        host=igb.host,
        shaper=shaper,
        foreign=foreign,
    )
    journal: Any = SimpleNamespace(step=lambda *a: None)
    observer: Any = SimpleNamespace(at=lambda *a: None, step_done=lambda *a: None)
    return Engine(journal=journal, acts=acts.table(), clock=SystemClock(), observer=observer)


def prepare(igb: Igb, made: Preparation) -> None:
    engine(igb).run(plan.prepare(made, Hook.TCX), target(igb, made), Token(SystemClock()))


def home(igb: Igb, made: Preparation, *, reset: bool, foreign: Any = NO_FOREIGN) -> list[str]:
    way: Plan = plan.unprepare(made, reset=reset)
    return [str(problem) for problem in engine(igb, foreign).bring_home(way, target(igb, made))]


def as_before(igb: Igb) -> bool:
    """But for the address, which a PF of this kind tells from its VF's."""
    assert igb.vf is not None
    link = LinkSettings.of(igb.vf)
    return link == LinkSettings.of(VF_LINK) and replace(igb.held, mac=None) == FRESH


# --- set --------------------------------------------------------------------------------------------


def test_each_setting_is_a_message_of_its_own_in_a_safe_order(igb: Igb) -> None:
    prepare(igb, prepared(igb, config=ALL))
    assert [setting for setting, _ in igb.sent] == ["vlan", "mac", "rates", "spoof_check", "trust"]
    assert igb.held == replace(FRESH, mac=ASKED, vlan=VLAN, max_rate=100, spoof_check=False, trust=True)


def test_the_netdev_has_its_address_before_any_pod_sees_it_and_its_own_name_again(igb: Igb) -> None:
    prepare(igb, prepared(igb, config=ALL))
    assert igb.vf is not None
    assert (igb.vf.mac, igb.vf.name, igb.vf.altnames) == (ASKED, VF_LINK.name, VF_LINK.altnames)
    assert igb.probes == 1
    assert igb.text(f"bus/pci/devices/{VF}/driver_override") == ""


def test_a_driver_that_takes_an_address_is_not_probed_for_it(igb: Igb) -> None:
    made = prepared(igb, config=NicConfig(interface=InterfaceConfig(hardware_address=OWN)))
    prepare(igb, made)
    assert (igb.held.mac, igb.probes) == (OWN, 0)


def test_setting_again_changes_nothing(igb: Igb) -> None:
    made = prepared(igb, config=ALL)
    prepare(igb, made)
    igb.sent.clear()
    vf.set_vf(target(igb, made), igb.host)
    assert (igb.sent, igb.probes) == ([], 1)


def test_with_vfio_the_address_is_set_on_the_pf_alone(igb: Igb) -> None:
    by_file = replace(ALL, vf=replace(ALL.vf, driver=VfDriver.VFIO))
    vf.set_vf(target(igb, prepared(igb, config=by_file)), igb.host)
    assert (igb.held.mac, igb.probes) == (ASKED, 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (VfConfig(min_rate=10, max_rate=100), r"vf\.minRate 10M and vf\.maxRate 100M.*igb.*EINVAL"),
        (VfConfig(link_state=VfLinkState.DISABLE), r"vf\.linkState disable.*igb.*ENOTSUP"),
        (VfConfig(vlan=VfVlan(id=7, protocol=VlanProtocol.SERVICE)), r"vf\.vlan 7.*802\.1ad.*igb"),
    ],
)
def test_what_a_driver_cannot_do_is_refused_with_field_device_and_driver(
    igb: Igb, config: VfConfig, words: str
) -> None:
    with pytest.raises(Refusal, match=f"dev-0 cannot have {words}"):
        prepare(igb, prepared(igb, config=NicConfig(vf=config)))
    assert as_before(igb)


@pytest.mark.parametrize("setting", ["mac", "rates", "spoof_check", "trust"])
def test_what_was_set_before_a_refusal_is_put_back(igb: Igb, setting: str) -> None:
    made = prepared(igb, config=ALL)
    igb.refused[setting] = Refused("set", errno.EINVAL)
    with pytest.raises(Refusal):
        prepare(igb, made)
    igb.refused.clear()
    assert as_before(igb)
    assert home(igb, made, reset=False) == []
    assert (igb.vf.mac if igb.vf else None) == OWN


def test_what_a_pf_says_it_did_and_did_not_is_refused(igb: Igb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(igb, "set_vf", lambda *a: None)
    with pytest.raises(Refusal, match=r"igb did not do as asked: vf\.maxRate is 0, asked for is 100M"):
        prepare(igb, prepared(igb, config=NicConfig(vf=VfConfig(max_rate=100))))


def test_a_busy_pf_is_asked_again_later(igb: Igb) -> None:
    igb.refused["vlan"] = Busy("set", errno.EBUSY)
    with pytest.raises(NotNow):
        prepare(igb, prepared(igb, config=ALL))


# --- home -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("given", [None, OWN])
def test_everything_is_as_before_for_the_next_one(tmp_path: Path, igb: Igb, reset: bool, given: Any) -> None:
    igb = Igb(tmp_path / "other", given=given)
    made = prepared(igb, config=ALL)
    prepare(igb, made)
    assert home(igb, made, reset=reset) == []
    assert as_before(igb)
    assert igb.held.mac == OWN
    assert igb.pinned == (given is not None)


def test_between_tenants_the_driver_begins_anew_and_the_pf_is_changed_while_nobody_drives(igb: Igb) -> None:
    made = prepared(igb)
    acts = [step.act for step in plan.unprepare(made, reset=True).steps]
    assert acts == [
        *(Act.DISARM, Act.PUT_FOREIGN_BACK, Act.UNBIND, Act.RESTORE_VF, Act.TO_KERNEL),
        *(Act.RESTORE, Act.VERIFY_VF, Act.VERIFY),
    ]
    assert home(igb, made, reset=True) == []
    assert igb.probes == 1
    assert as_before(igb)
    assert igb.vf is not None
    assert igb.vf.ifindex != VF_LINK.ifindex


def test_where_policy_wants_no_reset_the_driver_is_left_alone(igb: Igb) -> None:
    made = prepared(igb)
    assert home(igb, made, reset=False) == []
    assert igb.probes == 0


def test_what_is_on_a_netdev_that_its_driver_made_anew_is_not_taken_for_a_tenants(igb: Igb) -> None:
    """Its owner may be there before the baseline is restored. Where no driver let go, nothing is anew."""
    between: list[bool] = []
    foreign = SimpleNamespace(**{**vars(NO_FOREIGN), "forget": lambda target: between.append(igb.vf is None)})
    made = prepared(igb)
    assert home(igb, made, reset=False, foreign=foreign) == []
    there, igb.vf = igb.vf, None
    assert home(igb, made, reset=True, foreign=foreign) != [], "it is in somebody's hands"
    assert between == []
    igb.vf = there
    assert home(igb, made, reset=True, foreign=foreign) == []
    assert between == [True]


def test_a_random_address_after_the_probe_does_not_stay(igb: Igb) -> None:
    """igbvf makes one up each time where it was given none."""
    made = prepared(igb)
    assert home(igb, made, reset=True) == []
    assert igb.vf is not None
    assert igb.vf.mac == OWN != RANDOM


@pytest.mark.parametrize("looks", range(1, 9))
def test_what_udev_adds_to_a_new_netdev_does_not_stay_whenever_it_comes(
    igb: Igb, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """It names it when its driver has made it, and takes its time."""
    igb.with_udev()
    is_done = igb.host.udev.is_done
    monkeypatch.setattr(igb.host.udev, "is_done", lambda index: (igb.dump(), is_done(index))[1])
    made = prepared(igb)
    probe.release(target(igb, made), igb.host)
    igb.named_in = looks
    assert home(igb, made, reset=True) == []
    assert igb.named_in <= 0
    assert as_before(igb)


@pytest.mark.parametrize("number", range(3, 8))
def test_what_udev_adds_to_a_netdev_that_came_home_does_not_stay(
    igb: Igb, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    igb.with_udev()
    (igb.udev / f"data/n{VF_LINK.ifindex}").unlink()
    igb.named_in = number
    looks = igb.host.udev.is_done
    monkeypatch.setattr(igb.host.udev, "is_done", lambda index: (igb.dump(), looks(index))[1])
    assert home(igb, prepared(igb), reset=False) == []
    assert as_before(igb)


def test_an_udev_that_does_not_come_is_not_waited_for_for_ever(
    igb: Igb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hw.udev.PATIENCE", 0.05)
    igb.with_udev()
    assert home(igb, prepared(igb), reset=True) == []


def test_a_vf_that_was_cut_off_between_two_drivers_goes_on_from_there(igb: Igb) -> None:
    made = prepared(igb, config=ALL)
    prepare(igb, made)
    probe.release(target(igb, made), igb.host)
    assert igb.vf is None
    assert home(igb, made, reset=True) == []
    assert as_before(igb)


def test_a_vf_that_is_elsewhere_is_neither_probed_nor_put_into_the_hosts_vlan(igb: Igb) -> None:
    made = prepared(igb, config=ALL)
    prepare(igb, made)
    there, igb.vf = igb.vf, None
    igb.sent.clear()
    with pytest.raises(NotNow, match="not in the host's network namespace"):
        probe.release(target(igb, made), igb.host)
    with pytest.raises(NotNow, match="whoever has it drives it"):
        vf.restore_vf(target(igb, made), igb.host)
    assert binding.driver_of(igb, VF) == "igbvf"
    assert igb.sent == []
    igb.vf = there
    assert home(igb, made, reset=True) == []


def test_a_vf_that_its_holder_still_drives_by_its_files_keeps_its_vlan(igb: Igb) -> None:
    by_file = replace(ALL, vf=replace(ALL.vf, driver=VfDriver.VFIO))
    made = prepared(igb, config=by_file)
    vf.set_vf(target(igb, made), igb.host)
    binding.bind(igb, VF, "vfio-pci")
    with pytest.raises(NotNow, match="still bound to vfio-pci"):
        vf.restore_vf(target(igb, made), igb.host)
    assert igb.held.vlan == VLAN


def test_a_vf_that_others_bound_is_theirs(igb: Igb) -> None:
    made = prepared(igb)
    binding.bind(igb, VF, "uio")
    for act in (probe.release, probe.to_kernel):
        with pytest.raises(Vanished, match="bound to uio by others"):
            act(target(igb, made), igb.host)
    assert binding.driver_of(igb, VF) == "uio"


def test_a_driver_that_makes_no_netdev_withholds_the_vf(igb: Igb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "NETDEV_SECONDS", 0.05)
    made = prepared(igb)
    igb.makes_netdevs = False
    assert any("igbvf made no netdev" in problem for problem in home(igb, made, reset=True))
    igb.makes_netdevs = True
    binding.unbind(igb, VF)
    assert home(igb, made, reset=True) == []


def test_what_its_pf_holds_otherwise_is_named_field_by_field(igb: Igb) -> None:
    made = prepared(igb)
    igb.held = replace(FRESH, mac=ASKED, vlan=VLAN, max_rate=5, trust=True)
    with pytest.raises(NotClean) as caught:
        vf.verify_vf(target(igb, made))
    told = str(caught.value)
    for words in (
        "vlan on its PF is 100 qos 3",
        "mac on its PF",
        "max_rate on its PF is 5M, should be 0",
        "trust on its PF is True",
    ):
        assert words in told
    assert "spoof_check" not in told


def test_what_cannot_be_put_back_withholds_the_vf_and_the_rest_is_put_back(igb: Igb) -> None:
    made = prepared(igb, config=ALL)
    prepare(igb, made)
    igb.refused["vlan"] = Refused("set vlan", errno.EIO)
    problems = home(igb, made, reset=True)
    assert [problem for problem in problems if problem.startswith("verify-on-pf") and "vlan" in problem]
    assert replace(igb.held, mac=None, vlan=None) == replace(FRESH, vlan=None)
    igb.refused.clear()
    assert home(igb, made, reset=True) == []


def test_a_trusted_tenants_own_address_does_not_stay_on_the_pf(tmp_path: Path, igb: Igb) -> None:
    igb = Igb(tmp_path / "given", given=OWN)
    made = prepared(igb, config=NicConfig(vf=VfConfig(trust=True)))
    prepare(igb, made)
    igb.held = replace(igb.held, mac=ASKED)
    assert home(igb, made, reset=True) == []
    assert (igb.held.mac, igb.pinned) == (OWN, True)


def test_without_a_pf_in_sight_nothing_is_set_and_the_way_home_does_without(igb: Igb) -> None:
    made = prepared(igb, vf_baseline=None, config=ALL)
    assert made.vf_wanted is None
    assert Act.SET_VF not in [step.act for step in plan.prepare(made, Hook.TCX).steps]
    assert not {Act.RESTORE_VF, Act.VERIFY_VF} & {step.act for step in plan.unprepare(made).steps}


def test_a_pf_that_went_away_is_no_reason_to_call_a_vf_clean(
    igb: Igb, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(igb, config=ALL)
    prepare(igb, made)
    monkeypatch.setattr(igb, "dump", lambda: (igb.vf,))
    assert any("the PF of dev-0" in problem for problem in home(igb, made, reset=False))


def test_the_next_prepare_finds_the_vf_by_its_identity_under_its_new_index(igb: Igb) -> None:
    made = prepared(igb)
    home(igb, made, reset=True)
    stale = replace(target(igb, made), hint=IfIndex(7))
    found = stale.find_at_home()
    assert found is not None
    assert found.ifindex != 7
