"""Plans: whatever is put into a pod or onto a device has its way back in the same plan, in order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bpf.layout import Hook
from driver import plan
from driver.model import (
    InterfaceConfig,
    NicConfig,
    Preparation,
    VfConfig,
    VfDriver,
    attachment_owner,
    preparation_owner,
)
from driver.plan import Act, Plan
from hw.model import DeviceKind, IfIndex, MacAddress, SoftwareIdentity, VfSettings, VfVlan
from tests.unit.journal_values import attachment, preparation

OWN_CHOICE = MacAddress("02:00:5e:00:00:01")
WITH_ADDRESSES = preparation(0, generation=7)
BARE = replace(WITH_ADDRESSES, config=NicConfig())
SOFTWARE = SoftwareIdentity("veth", IfIndex(5), None, None)
ATTACHMENT = attachment(0, generation=9)

ON_PF = replace(
    BARE,
    vf_baseline=VfSettings(vlan=VfVlan()),
    config=NicConfig(vf=VfConfig(vlan=VfVlan(id=7))),
    home_driver="igbvf",
)
ADDRESSED = replace(ON_PF, config=NicConfig(interface=InterfaceConfig(hardware_address=OWN_CHOICE)))
ON_PF_BY_FILE = replace(ON_PF, config=NicConfig(vf=VfConfig(vlan=VfVlan(id=7), driver=VfDriver.VFIO)))
BY_FILE = replace(BARE, config=NicConfig(vf=VfConfig(driver=VfDriver.VFIO)))

LOOKS = {Act.VERIFY, Act.VERIFY_VFIO, Act.VERIFY_VF}
"""Changes nothing."""
GOES_WITH_THE_MOVE = {Act.ADDRESS, Act.FILTER, Act.SHAPE}
"""The kernel drops it when the device leaves the netns."""
GOES_WITH_THE_FOLD = {Act.METER}
HOMEWARD = {
    *(
        Act.PUT_FOREIGN_BACK,
        Act.DISARM,
        Act.DOWN,
        Act.FOLD,
        Act.STRIP,
        Act.MOVE_HOME,
        Act.TIDY,
        Act.RESTORE,
    ),
    *(Act.UNBIND, Act.RESTORE_VF, Act.TO_KERNEL, Act.UNSHAPE),
}
"""Brings a device nearer to clean, whatever came before."""

OUTWARD = [
    pytest.param(made, id=f"{name}-{hook.value}-{'addresses' if which is WITH_ADDRESSES else 'bare'}")
    for hook in Hook
    for which in (WITH_ADDRESSES, BARE)
    for name, made in (
        ("prepare", plan.prepare(which, hook)),
        ("attach", plan.attach(ATTACHMENT, which, hook)),
    )
]
OUTWARD += [pytest.param(plan.prepare(ON_PF, hook), id=f"prepare-{hook.value}-on-pf") for hook in Hook]
HOME = [
    pytest.param(plan.unprepare(WITH_ADDRESSES), id="unprepare"),
    pytest.param(plan.unprepare(ON_PF, reset=True), id="unprepare-on-pf"),
    pytest.param(plan.unprepare(ON_PF_BY_FILE), id="unprepare-on-pf-by-file"),
    pytest.param(plan.tidy(WITH_ADDRESSES), id="tidy"),
    pytest.param(plan.detach(ATTACHMENT, BARE), id="detach"),
]


def acts(made: Plan) -> list[Act]:
    return [step.act for step in made.steps]


def undone(made: Plan) -> list[Act]:
    """The acts of a whole undo, as the engine runs them."""
    return [act for step in reversed(made.steps) for act in step.undo]


@pytest.mark.parametrize("made", OUTWARD)
def test_every_act_with_an_effect_is_undone_by_the_plan_it_is_in(made: Plan) -> None:
    undo = set(undone(made))
    for step in made.steps:
        if step.act in LOOKS | HOMEWARD:
            continue
        if step.act in GOES_WITH_THE_MOVE:
            assert Act.MOVE_HOME in undo
        elif step.act in GOES_WITH_THE_FOLD:
            assert Act.FOLD in undo
        else:
            assert step.undo, f"{step.act} has no undo"
    if Act.MOVE_IN in acts(made):
        assert Act.MOVE_HOME in undo
        assert Act.RESTORE in undo
    if Act.ARM in acts(made):
        assert Act.DISARM in undo


@pytest.mark.parametrize("made", [*OUTWARD, *HOME])
def test_an_undo_and_a_way_home_only_bring_a_device_nearer_to_clean(made: Plan) -> None:
    assert set(undone(made)) <= HOMEWARD
    if made.homeward:
        assert set(acts(made)) <= HOMEWARD | LOOKS
        assert not undone(made)


@pytest.mark.parametrize("made", [*OUTWARD, *HOME])
def test_no_act_is_in_a_plan_twice(made: Plan) -> None:
    """The journal keeps a step by its act's name."""
    assert len(set(acts(made))) == len(made.steps)


@pytest.mark.parametrize("hook", Hook)
def test_nothing_passes_uncounted_on_the_way_in(hook: Hook) -> None:
    prepared = acts(plan.prepare(WITH_ADDRESSES, hook))
    attached = acts(plan.attach(ATTACHMENT, WITH_ADDRESSES, hook))
    assert attached[0] is Act.ZERO_SLOT
    assert attached[-2:] == [Act.UP, Act.METER]
    if hook is Hook.TCX:
        assert Act.ARM in prepared
        assert Act.FILTER not in attached
    else:
        assert Act.ARM not in prepared
        assert attached.index(Act.MOVE_IN) < attached.index(Act.FILTER) < attached.index(Act.UP)


@pytest.mark.parametrize("hook", Hook)
def test_nothing_passes_uncounted_on_the_way_out(hook: Hook) -> None:
    """The link is down before its counters are read for the last time, also where an attach is undone."""
    for order in (acts(plan.detach(ATTACHMENT, BARE)), undone(plan.attach(ATTACHMENT, WITH_ADDRESSES, hook))):
        assert order.index(Act.DOWN) < order.index(Act.FOLD)
    # What its queues dropped is read of them.
    leaving = acts(plan.detach(ATTACHMENT, BARE))
    assert leaving.index(Act.FOLD) < leaving.index(Act.UNSHAPE) < leaving.index(Act.MOVE_HOME)


@pytest.mark.parametrize(
    "order",
    [acts(plan.detach(ATTACHMENT, BARE)), undone(plan.attach(ATTACHMENT, BARE, Hook.TCX))],
    ids=["detach", "undo"],
)
def test_a_device_is_emptied_then_moved_then_restored(order: list[Act]) -> None:
    wanted = [Act.DOWN, Act.STRIP, Act.MOVE_HOME, Act.RESTORE]
    assert sorted(wanted, key=order.index) == wanted


@pytest.mark.parametrize("made", HOME)
def test_a_way_home_ends_with_a_look_at_the_device(made: Plan) -> None:
    assert made.homeward
    assert acts(made)[-1] is Act.VERIFY


def test_programs_stay_on_a_device_until_it_is_unprepared() -> None:
    assert Act.DISARM not in acts(plan.detach(ATTACHMENT, BARE))
    assert acts(plan.unprepare(WITH_ADDRESSES))[0] is Act.DISARM


def test_what_others_have_on_a_device_is_on_record_before_it_is_touched_and_back_before_it_is_reset() -> None:
    assert acts(plan.prepare(ON_PF, Hook.TCX))[0] is Act.NOTE_FOREIGN
    order = acts(plan.unprepare(ON_PF, reset=True))
    assert order.index(Act.DISARM) < order.index(Act.PUT_FOREIGN_BACK) < order.index(Act.UNBIND)
    assert not {Act.NOTE_FOREIGN} & set(acts(plan.prepare(BY_FILE, Hook.TCX)))


def test_addresses_are_a_step_only_where_there_are_some() -> None:
    assert Act.ADDRESS in acts(plan.attach(ATTACHMENT, WITH_ADDRESSES, Hook.TCX))
    assert Act.ADDRESS not in acts(plan.attach(ATTACHMENT, BARE, Hook.TCX))


@pytest.mark.parametrize("which", [WITH_ADDRESSES, BARE])
def test_a_plan_is_the_record_it_is_made_for(which: Preparation) -> None:
    for made in (plan.prepare(which, Hook.TCX), plan.unprepare(which), plan.tidy(which)):
        assert (made.owner, made.generation) == (preparation_owner(which.key), 7)
    for made in (plan.attach(ATTACHMENT, which, Hook.TCX), plan.detach(ATTACHMENT, BARE)):
        assert (made.owner, made.generation) == (attachment_owner(ATTACHMENT.id), 9)


@pytest.mark.parametrize("made", OUTWARD)
def test_every_step_asks_for_some_time_and_all_of_an_attach_fit_into_a_hook(made: Plan) -> None:
    """A prepare has kubelet's tens of seconds, and asks nothing of a PF unless the claim does."""
    assert all(step.budget > 0 for step in made.steps)
    assert sum(step.budget for step in made.steps if step.act is not Act.SET_VF) < 0.5


# --- what is set on a VF's PF ------------------------------------------------------------------------


@pytest.mark.parametrize("which", [ON_PF, ADDRESSED, ON_PF_BY_FILE])
def test_a_vf_is_set_before_anybody_can_drive_it_and_put_back_when_nobody_can(which: Preparation) -> None:
    made = plan.prepare(which, Hook.TCX)
    order = acts(made)
    assert order.index(Act.SET_VF) == order.index(Act.TIDY) + 1
    back = [act for act in undone(made) if act is not Act.PUT_FOREIGN_BACK]
    assert back[-2:] == [Act.RESTORE_VF, Act.RESTORE]
    if which.by_file:
        assert back.index(Act.TO_KERNEL) < back.index(Act.RESTORE_VF)


def test_a_pf_is_left_alone_where_nothing_is_asked_of_it() -> None:
    assert Act.SET_VF not in acts(plan.prepare(replace(ON_PF, config=NicConfig()), Hook.TCX))


@pytest.mark.parametrize("which", [ON_PF, ON_PF_BY_FILE])
def test_on_the_way_home_the_pf_is_changed_while_no_driver_has_the_vf(which: Preparation) -> None:
    order = acts(plan.unprepare(which, reset=True))
    assert order.index(Act.UNBIND) + 1 == order.index(Act.RESTORE_VF) == order.index(Act.TO_KERNEL) - 1
    assert order[-2:] == [Act.VERIFY_VF, Act.VERIFY]


@pytest.mark.parametrize(
    "which",
    [replace(ON_PF, home_driver=""), replace(ON_PF, kind=DeviceKind.PF), replace(ON_PF, identity=SOFTWARE)],
)
def test_only_a_vf_whose_driver_is_known_is_probed_anew(which: Preparation) -> None:
    assert not {Act.UNBIND, Act.TO_KERNEL} & set(acts(plan.unprepare(which, reset=True)))


def test_after_a_reboot_the_pf_is_told_again_before_the_next_attach() -> None:
    assert acts(plan.tidy(ON_PF)) == [Act.RESTORE, Act.SET_VF, Act.VERIFY]
    assert acts(plan.tidy(ON_PF_BY_FILE)) == [Act.SET_VF, Act.TO_VFIO, Act.VERIFY_VFIO]


# --- a device that is given by its files -------------------------------------------------------------


@pytest.mark.parametrize("hook", Hook)
def test_a_device_given_by_its_files_is_neither_moved_nor_counted(hook: Hook) -> None:
    made = [*acts(plan.prepare(BY_FILE, hook)), *acts(plan.attach(ATTACHMENT, BY_FILE, hook))]
    assert not {Act.ARM, Act.MOVE_IN, Act.FILTER, Act.UP} & set(made)
    assert made[-2:] == [Act.VERIFY_VFIO, Act.METER]


@pytest.mark.parametrize("hook", Hook)
def test_taking_a_device_from_its_driver_is_undone_down_to_its_baseline(hook: Hook) -> None:
    assert undone(plan.prepare(BY_FILE, hook)) == [Act.TO_KERNEL, Act.RESTORE]
    assert acts(plan.unprepare(BY_FILE)) == [Act.UNBIND, Act.TO_KERNEL, Act.RESTORE, Act.VERIFY]


def test_a_sandbox_made_anew_finds_its_device_bound_as_it_was_prepared() -> None:
    """There is no second prepare: what a detach leaves is what the next attach takes."""
    assert acts(plan.detach(ATTACHMENT, BY_FILE)) == [Act.FOLD, Act.VERIFY_VFIO]
    assert acts(plan.tidy(BY_FILE)) == [Act.TO_VFIO, Act.VERIFY_VFIO]
