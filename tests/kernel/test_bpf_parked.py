"""Programs that others had on a device before a pod got it: off for the pod's time where wished, and back at
exactly their place; an owner has the last word, and a crash anywhere changes nothing of that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from bpf import parked as parked_module
from bpf import sys, xdp
from bpf.attach import RETURN_UNSPEC
from bpf.errors import Ambiguous, CallRefused
from bpf.foreign import ForeignHook, Own, detach_foreign, foreign_programs
from bpf.parked import Parked
from kndsim.links import netns
from kndsim.waiting import wait_until
from tests.kernel.bpf_node import NAME, Node
from tests.kernel.test_bpf_foreign import PASS_XDP, attach_without_link, attach_xdp_by_netlink

HOOKS = (sys.AttachType.TCX_EGRESS, sys.AttachType.TCX_INGRESS)
SKB = sys.XDP_FLAGS_SKB_MODE


@pytest.fixture
def parked(node: Node) -> Parked:
    return Parked(node.pins)


def tcx(name: str = "theirs") -> sys.ProgramFd:
    return sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name=name)


def at_hooks(node: Node) -> list[tuple[sys.Attached, ...]]:
    return [sys.prog_query(node.device, hook) for hook in HOOKS]


@dataclass(frozen=True, slots=True)
class Theirs:
    """An owner's: a link, a program without one, and another link, at both tcx hooks in that order."""

    links: tuple[sys.LinkFd, ...]
    before: list[tuple[sys.Attached, ...]]


@pytest.fixture
def theirs(node: Node, tcx_kernel: None) -> Iterator[Theirs]:
    del tcx_kernel
    with contextlib.ExitStack() as stack:
        links = []
        for hook in HOOKS:
            # Its owner closes programs once they are attached, as all do.
            with tcx() as first, tcx() as second, tcx() as third:
                links.append(stack.enter_context(sys.link_create(first, node.device, hook)))
                attach_without_link(second, node.device, hook)
                links.append(stack.enter_context(sys.link_create(third, node.device, hook)))
        yield Theirs(tuple(links), at_hooks(node))


def test_what_is_taken_off_runs_no_more_and_comes_back_to_its_place(
    node: Node, parked: Parked, theirs: Theirs
) -> None:
    noted = parked.note(NAME, node.device, Own(), off=True)
    assert len(noted) == 6
    off = at_hooks(node)
    assert [[each.link for each in at] for at in off] == [[each.link for each in at] for at in theirs.before]
    running = {each.program for at in off for each in at}
    assert not running & {each.program for at in theirs.before for each in at}
    assert parked.is_off(NAME)
    assert parked.note(NAME, node.device, Own(), off=True) == (), "nothing is taken off twice"
    assert at_hooks(node) == off
    assert foreign_programs(node.device, own=parked.own(NAME)) == ()
    for _ in range(2):
        parked.put_back(NAME, node.device)
        assert at_hooks(node) == theirs.before
    assert not parked.is_off(NAME)
    assert foreign_programs(node.device, own=parked.own(NAME)) == ()
    parked.forget(NAME)
    parked.forget(NAME)
    assert parked.names() == frozenset()
    assert at_hooks(node) == theirs.before


def test_what_is_kept_stays_and_a_tenants_goes(node: Node, parked: Parked, theirs: Theirs) -> None:
    assert len(parked.note(NAME, node.device, Own(), off=False)) == 6
    assert at_hooks(node) == theirs.before
    with tcx("tenant") as tenant, sys.link_create(tenant, node.device, HOOKS[0]):
        (gone,) = detach_foreign(node.device, own=parked.own(NAME))
        assert gone.program == sys.prog_id(tenant)
    assert at_hooks(node) == theirs.before
    assert all("theirs" in each for each in parked.described(NAME))


def test_a_program_outlives_its_owner_and_the_next_agent_puts_it_back(node: Node, theirs: Theirs) -> None:
    Parked(node.pins).note(NAME, node.device, Own(), off=True)
    Parked(node.pins).put_back(NAME, node.device)
    assert at_hooks(node) == theirs.before


def test_an_owner_that_changed_its_link_meanwhile_has_the_last_word(
    node: Node, parked: Parked, theirs: Theirs
) -> None:
    parked.note(NAME, node.device, Own(), off=True)
    with tcx("newer") as newer:
        sys.link_update(theirs.links[0], newer)
        parked.put_back(NAME, node.device)
        after = at_hooks(node)
        assert after[0][0].program == sys.prog_id(newer)
        assert (after[0][1:], after[1]) == (theirs.before[0][1:], theirs.before[1])


def test_of_an_owner_that_went_nothing_comes_back(node: Node, parked: Parked, theirs: Theirs) -> None:
    parked.note(NAME, node.device, Own(), off=True)
    for link in theirs.links:
        link.close()
    wait_until(lambda: [len(each) for each in at_hooks(node)] == [1, 1], within=5.0, what="links are gone")
    parked.put_back(NAME, node.device)
    assert at_hooks(node) == [(at[1],) for at in theirs.before]


def test_a_place_that_the_pod_emptied_is_filled_again(node: Node, parked: Parked, theirs: Theirs) -> None:
    parked.note(NAME, node.device, Own(), off=True)
    with sys.prog_get_fd_by_id(at_hooks(node)[0][1].program) as standin:
        sys.prog_detach(standin, node.device, HOOKS[0])
    parked.put_back(NAME, node.device)
    before, after = theirs.before[0], at_hooks(node)[0]
    assert after == (before[0], before[2], before[1]), "at the end, since its place is no more"


def test_what_the_pod_took_off_is_there_again_though_it_was_kept(
    node: Node, parked: Parked, theirs: Theirs
) -> None:
    with sys.prog_load(sys.ProgramType.XDP, PASS_XDP, name="theirs") as program:
        node.host.netlink(lambda ipr: attach_xdp_by_netlink(ipr, program, node.device))
    had = xdp.attached_programs(node.device)
    parked.note(NAME, node.device, Own(), off=False)
    with sys.prog_get_fd_by_id(theirs.before[0][1].program) as second:
        sys.prog_detach(second, node.device, HOOKS[0])
    (mode,) = had
    xdp.detach(node.device, mode)
    parked.put_back(NAME, node.device)
    assert xdp.attached_programs(node.device) == had
    first, second_at, third = theirs.before[0]
    assert at_hooks(node) == [(first, third, second_at), theirs.before[1]]
    xdp.detach(node.device, mode)
    parked.put_back(NAME, node.device)
    assert xdp.attached_programs(node.device) == {}, "what its owner takes off at home stays off"


@pytest.mark.parametrize("cut", range(6))
def test_a_crash_while_it_is_put_back_is_healed_by_putting_it_back_again(
    node: Node, parked: Parked, theirs: Theirs, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked.note(NAME, node.device, Own(), off=True)
    left, amend = [cut], Parked._amend

    def dying(*arguments: Any, **more: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Crash
        amend(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Parked, "_amend", dying)
        with pytest.raises(Crash):
            parked.put_back(NAME, node.device)
    assert parked.is_off(NAME)
    Parked(node.pins).put_back(NAME, node.device)
    assert at_hooks(node) == theirs.before


class Crash(BaseException):
    """Of the agent."""


@pytest.mark.parametrize("cut", range(6))
def test_a_crash_between_record_and_change_is_healed_by_either_way(
    node: Node, theirs: Theirs, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [cut]

    def crash(real: object) -> object:
        def call(*arguments: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return real(*arguments)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patched:
        patched.setattr(parked_module.sys, "link_update", crash(sys.link_update))
        patched.setattr(parked_module.sys, "prog_attach", crash(sys.prog_attach))
        with pytest.raises(Crash):
            Parked(node.pins).note(NAME, node.device, Own(), off=True)
    if cut % 2:
        Parked(node.pins).note(NAME, node.device, Own(), off=True)
        assert not {e.program for at in at_hooks(node) for e in at} & {
            e.program for at in theirs.before for e in at
        }
    Parked(node.pins).put_back(NAME, node.device)
    assert at_hooks(node) == theirs.before


def test_where_one_cannot_be_taken_off_none_is(
    node: Node, parked: Parked, theirs: Theirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CallRefused("replacing", 12)

    monkeypatch.setattr(parked_module.sys, "prog_attach", refuse)
    with pytest.raises(CallRefused):
        parked.note(NAME, node.device, Own(), off=True)
    assert at_hooks(node) == theirs.before
    assert parked.names() == frozenset()


@pytest.mark.parametrize("by_link", [True, False])
def test_an_xdp_program_is_taken_off_and_put_back(node: Node, parked: Parked, by_link: bool) -> None:
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(sys.prog_load(sys.ProgramType.XDP, PASS_XDP, name="theirs"))
        if by_link:
            stack.enter_context(sys.link_create(program, node.device, sys.AttachType.XDP, flags=SKB))
        else:
            node.host.netlink(lambda ipr: attach_xdp_by_netlink(ipr, program, node.device))
        before = xdp.attached_programs(node.device)
        (noted,) = parked.note(NAME, node.device, Own(), off=True)
        assert (noted.hook, noted.program) == (ForeignHook.XDP, sys.prog_id(program))
        off = xdp.attached_programs(node.device)
        assert off.keys() == before.keys()
        assert off != before
        assert foreign_programs(node.device, own=parked.own(NAME)) == ()
        parked.put_back(NAME, node.device)
        assert xdp.attached_programs(node.device) == before
        if not by_link:
            parked.forget(NAME)
            parked.note(NAME, node.device, Own(), off=True)
            (mode,) = before
            xdp.detach(node.device, mode)
            parked.put_back(NAME, node.device)
            assert xdp.attached_programs(node.device) == before, "also where the pod took away what stood in"


def test_an_xdp_link_that_may_be_another_devices_is_refused_and_left(node: Node, parked: Parked) -> None:
    with netns() as pod, sys.prog_load(sys.ProgramType.XDP, PASS_XDP, name="theirs") as program:
        pod.netlink(
            lambda ipr: ipr.link(
                "add", ifname="ktwin", kind="veth", index=node.device, peer={"ifname": "ktwinw"}
            )
        )

        def link() -> sys.LinkFd:
            return sys.link_create(program, node.device, sys.AttachType.XDP, flags=SKB)

        with pod.run(link), link():
            before = xdp.attached_programs(node.device)
            with pytest.raises(Ambiguous, match="2 links could be its own"):
                parked.note(NAME, node.device, Own(), off=True)
            assert xdp.attached_programs(node.device) == before
            assert parked.names() == frozenset()


def test_a_device_without_any_leaves_nothing(node: Node, parked: Parked) -> None:
    assert parked.note(NAME, node.device, Own(), off=True) == ()
    parked.put_back(NAME, None)
    parked.forget(NAME)
    assert parked.own(NAME) == Own()
    assert parked.names() == frozenset()
