"""A pod has the IPoIB interface of the partition that its claim chose, counted with the device from its first
packet on; and of it nothing stays, whatever happened."""

from __future__ import annotations

import errno
import ipaddress
from dataclasses import replace
from pathlib import Path

import pytest

from bpf.errors import CallRefused
from bpf.layout import Framing, Hook
from driver import plan
from driver.clock import SystemClock
from driver.errors import Refusal
from driver.execute.engine import EXPECTED, Token, UndoFailed
from driver.model import Preparation
from driver.plan import Act
from driver.rdma import IpoibConfig
from hw.errors import Refused
from hw.ipoib import IpoibMode
from hw.model import IfIndex, IfName
from tests.unit.ipoib_world import PARTITION, WISH, World
from tests.unit.journal_values import attachment

ADDRESS = ipaddress.ip_interface("192.0.2.7/24")
FULL = replace(WISH, addresses=(ADDRESS,))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path / "sys", monkeypatch)


def attach(world: World, made: Preparation) -> None:
    world.engine().run(plan.attach(attachment(0), made, Hook.TCX), world.target(made), Token(SystemClock()))


def detach(world: World, made: Preparation, *, pod: bool = True) -> list[str]:
    way = plan.detach(attachment(0), made)
    return [str(problem) for problem in world.engine().bring_home(way, world.target(made, pod=pod))]


def assert_nothing_left(world: World, made: Preparation) -> None:
    assert world.children() == []
    assert list(world.programs.on) == [made.key.device]
    assert [link.name for link in world.home.dump()] == [world.vf.name]
    assert world.pod.dump() == ()


def test_it_is_in_the_pod_with_name_mtu_and_addresses_and_up_after_its_ports_own(world: World) -> None:
    made = world.preparation(FULL)
    attach(world, made)
    (child,) = world.children()
    assert (child.name, child.mtu, child.up, child.peer) == ("ib1", 2000, True, world.vf.ifindex)
    assert world.pod.addresses(child.ifindex) == (ADDRESS,)
    assert world.made == [(PARTITION, IpoibMode.DATAGRAM)]
    acts = [step.act for step in plan.attach(attachment(0), made, Hook.TCX).steps]
    assert acts.index(Act.IPOIB_MAKE) < acts.index(Act.MOVE_IN) < acts.index(Act.IPOIB_IN)
    assert acts.index(Act.UP) < acts.index(Act.IPOIB_UP)


def test_it_counts_into_the_devices_slot_before_it_leaves_home(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world.preparation()
    seen: list[object] = []
    move = type(world.home).move

    def watched(netns: object, ifindex: IfIndex, *args: object, **more: object) -> None:
        seen.extend(entry for entry in world.programs.on.values() if entry[0] == ifindex)
        move(netns, ifindex, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(type(world.home), "move", watched)
    attach(world, made)
    (child,) = world.children()
    assert (child.ifindex, made.slot, Framing.IPOIB) in seen


def test_without_programs_there_is_no_interface(world: World) -> None:
    made = world.preparation()
    world.programs.refuses = CallRefused("attach", errno.EINVAL)
    with pytest.raises(CallRefused):
        attach(world, made)
    assert_nothing_left(world, made)


def test_a_claim_that_asks_for_none_has_no_step_of_it(world: World) -> None:
    made = world.preparation(None)
    steps = plan.attach(attachment(0), made, Hook.TCX).steps + plan.detach(attachment(0), made).steps
    assert [step.act for step in steps if "ipoib" in step.act] == []


def test_it_goes_with_the_detach_and_before_the_counters_are_read(world: World) -> None:
    made = world.preparation(FULL)
    attach(world, made)
    assert detach(world, made) == []
    assert_nothing_left(world, made)
    assert world.folded == 1
    acts = [step.act for step in plan.detach(attachment(0), made).steps]
    assert acts.index(Act.IPOIB_FOLD) < acts.index(Act.IPOIB_REMOVE) < acts.index(Act.FOLD)
    assert detach(world, made) == []


@pytest.mark.parametrize("refund", [True, False])
def test_after_a_netns_that_died_unseen_it_is_found_at_home_or_gone_and_its_counts_are_kept(
    world: World, refund: bool
) -> None:
    made = world.preparation()
    attach(world, made)
    world.netns_ends(refund=refund)
    assert detach(world, made, pod=False) == []
    assert_nothing_left(world, made)
    assert world.folded == 1


@pytest.mark.parametrize("last", range(9))
def test_a_crash_after_any_step_is_undone_whole(world: World, last: int) -> None:
    made = world.preparation(FULL)
    way = plan.attach(attachment(0), made, Hook.TCX)
    engine = world.engine()
    for step in way.steps[:last]:
        engine._acts[step.act](world.target(made))
    world.engine().undo(way, world.target(made))
    assert_nothing_left(world, made)


def test_a_crash_before_it_had_programs_is_undone_though_udev_named_it(world: World) -> None:
    made = world.preparation()
    world.home.add_ipoib(world.vf.ifindex, IfName("ibp33s0.8001"), PARTITION, IpoibMode.DATAGRAM)
    world.engine().undo(plan.attach(attachment(0), made, Hook.TCX), world.target(made))
    assert_nothing_left(world, made)


def test_one_that_a_tenant_made_and_named_like_ours_is_not_taken_for_it(world: World) -> None:
    made = world.preparation(FULL)
    attach(world, made)
    (ours,) = world.children()
    world.pod.change(ours.ifindex, name="else")
    world.pod.add_ipoib(world.vf.ifindex, WISH.name, PARTITION, IpoibMode.DATAGRAM)
    assert detach(world, made) == []
    assert_nothing_left(world, made)


def test_one_that_its_pod_hid_is_told_of_and_stays_counted_until_it_is_back(world: World) -> None:
    made = world.preparation()
    attach(world, made)
    (ours,) = world.children()
    world.hidden.links[ours.ifindex] = world.pod.links.pop(ours.ifindex)
    (problem,) = detach(world, made)
    assert "in a network namespace that its pod made" in problem
    assert any(ours.ifindex == entry[0] for entry in world.programs.on.values())
    with pytest.raises(UndoFailed, match="in a network namespace that its pod made"):
        attach(world, made)
    world.home.links[ours.ifindex] = world.hidden.links.pop(ours.ifindex)
    assert detach(world, made) == []
    assert_nothing_left(world, made)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (IpoibConfig(name=IfName("ib1"), mode=IpoibMode.CONNECTED), "partition 0x0001 in mode connected"),
        (replace(WISH, mtu=4000), r"cannot have an MTU of 4000 \(rdma.ipoib\).* has 2044 by itself"),
    ],
)
def test_what_its_driver_refuses_is_a_lasting_refusal_and_nothing_stays(
    world: World, wish: IpoibConfig, words: str
) -> None:
    world.largest = 2044
    made = world.preparation(wish)
    with pytest.raises(Refusal, match=words):
        attach(world, made)
    assert_nothing_left(world, made)


def test_an_error_of_the_kernel_that_a_retry_can_mend_is_no_lasting_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*args: object) -> None:
        raise Refused("make", errno.ENOMEM)

    made = world.preparation()
    monkeypatch.setattr(world.home, "add_ipoib", busy)
    with pytest.raises(EXPECTED) as error:
        attach(world, made)
    assert not isinstance(error.value, Refusal)
    assert_nothing_left(world, made)
