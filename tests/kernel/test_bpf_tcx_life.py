"""tcx links through a device's life: moves, renames, restarts, crashes, what a pod's root may do."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from bpf import attach as attach_module
from bpf import sys
from bpf.accounting import Accounting
from bpf.attach import TcxPrograms, child_of, probe_tcx
from bpf.cache import ProgramCache
from bpf.errors import BpfError, BpffsMissing, CallRefused
from bpf.layout import Framing, Hook
from bpf.loaded import place_of
from kndsim.links import netns, veth_pair
from tests.kernel.bpf_node import NAME, OTHER_SLOT, SLOT, Node, both_ways, link_up
from tests.kernel.bpf_traffic import send_frames

pytestmark = pytest.mark.usefixtures("tcx_kernel")


def test_both_directions_are_counted_as_the_pod_sees_them(node: Node) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    send_frames(node.host, "kdev", 3)
    send_frames(node.host, "kwire", 5)
    node.assert_counted(3, 5)
    pair = node.tcx.state(NAME)
    assert pair is not None
    assert pair.complete
    assert {half.ifindex for half in (pair.egress, pair.ingress) if half} == {node.device}


def test_counting_goes_on_through_moves_and_renames(node: Node) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    both_ways(node, 10)
    node.assert_counted(10, 10)
    with netns() as pod:
        node.host.netlink(lambda ipr: ipr.link("set", index=node.device, net_ns_fd=pod.fd))
        link_up(pod, node.device)
        both_ways(node, 10, pod)
        node.assert_counted(20, 20)
        pod.netlink(lambda ipr: ipr.link("set", index=node.device, state="down"))
        pod.netlink(lambda ipr: ipr.link("set", index=node.device, ifname="net1"))
        link_up(pod, node.device)
        both_ways(node, 10, pod, "net1")
        node.assert_counted(30, 30)
        pod.netlink(lambda ipr: ipr.link("set", index=node.device, net_ns_fd=node.host.fd))
        link_up(node.host, node.device)
        both_ways(node, 10, name="net1")
        node.assert_counted(40, 40)


def test_counting_outlives_the_agent_and_goes_on_with_the_next(node: Node, cache: ProgramCache) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    before = node.tcx.state(NAME)
    node.accounting.close()
    both_ways(node, 4)
    with Accounting.open(node.pins, cache.ensure()) as again:
        node.accounting, node.tcx = again, TcxPrograms(node.pins, again)
        node.assert_counted(4, 4)
        assert node.tcx.names() == {NAME}
        assert node.tcx.repoint_all({NAME: SLOT}) == frozenset()
        both_ways(node, 4)
        node.assert_counted(8, 8)
        after = node.tcx.state(NAME)
    assert before is not None
    assert before.egress is not None
    assert after is not None
    assert after.egress is not None
    assert after.egress.link == before.egress.link, "re-pointed, not attached again"
    assert after.egress.program != before.egress.program


def test_repointing_reaches_devices_in_pods_and_names_what_is_wanting(node: Node) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    with netns() as pod:
        node.host.netlink(lambda ipr: ipr.link("set", index=node.device, net_ns_fd=pod.fd))
        link_up(pod, node.device)
        assert node.tcx.repoint_all({NAME: OTHER_SLOT, "never-seen": SLOT}) == {"never-seen"}
        both_ways(node, 6, pod)
        node.assert_counted(6, 6, OTHER_SLOT)


def test_what_is_made_on_a_device_counts_into_its_slot_and_goes_with_it(node: Node) -> None:
    """wire stands for it: there is no IPoIB here. Read as IPoIB, the kernel's own IPv6 chatter is no IP."""
    node.host.run(lambda: Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1"))
    node.tcx.attach(NAME, node.device, SLOT)
    node.tcx.attach(child_of(NAME), node.wire, SLOT, Framing.IPOIB)
    assert node.tcx.names() == {NAME}
    assert node.tcx.is_on(child_of(NAME), node.wire)
    assert not node.tcx.is_on(child_of(NAME), node.device)
    both_ways(node, 3)
    node.assert_counted(6, 6)
    assert node.tcx.repoint_all({NAME: OTHER_SLOT}) == frozenset()
    child = node.tcx.state(child_of(NAME))
    assert child is not None
    assert child.egress is not None
    with sys.prog_get_fd_by_id(child.egress.program) as program:
        place = place_of(program)
    assert place is not None
    assert (place.slot, place.framing) == (OTHER_SLOT, Framing.IPOIB)
    node.tcx.detach(NAME)
    assert node.tcx.names() == frozenset()
    assert sys.prog_query(node.wire, sys.AttachType.TCX_EGRESS) == ()


def test_attaching_again_never_counts_twice(node: Node) -> None:
    for slot in (SLOT, SLOT, OTHER_SLOT):
        node.tcx.attach(NAME, node.device, slot)
        hooks = (sys.AttachType.TCX_EGRESS, sys.AttachType.TCX_INGRESS)
        assert [len(sys.prog_query(node.device, hook)) for hook in hooks] == [1, 1]
    both_ways(node, 3)
    node.assert_counted(3, 3, OTHER_SLOT)


def test_detaching_takes_both_off_wherever_the_device_is_and_may_be_repeated(node: Node) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    with netns() as pod:
        node.host.netlink(lambda ipr: ipr.link("set", index=node.device, net_ns_fd=pod.fd))
        link_up(pod, node.device)
        node.tcx.detach(NAME)
        both_ways(node, 2, pod)
        node.assert_counted(0, 0)
    node.tcx.detach(NAME)
    assert node.tcx.names() == frozenset()
    assert node.tcx.state(NAME) is None


def test_a_detached_program_counts_no_more_though_others_hold_its_link(node: Node) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    with sys.obj_get_link(node.pins / "links" / f"{NAME}-eg"):
        node.tcx.detach(NAME)
        both_ways(node, 2)
    node.assert_counted(0, 0)


def test_root_in_the_pod_cannot_take_the_programs_off(node: Node) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    with netns() as pod:
        node.host.netlink(lambda ipr: ipr.link("set", index=node.device, net_ns_fd=pod.fd))
        link_up(pod, node.device)

        def attack(ipr: IPRoute) -> None:
            ipr.tc("add", "clsact", index=node.device)
            ipr.tc("del", "clsact", index=node.device)
            for hook in (sys.AttachType.TCX_EGRESS, sys.AttachType.TCX_INGRESS):
                (entry,) = sys.prog_query(node.device, hook)
                with (
                    sys.prog_get_fd_by_id(entry.program) as program,
                    pytest.raises(CallRefused, match=r"EBUSY|EINVAL|EPERM|ENOENT"),
                ):
                    sys.prog_detach(program, node.device, hook)

        pod.netlink(attack)
        both_ways(node, 5, pod)
        node.assert_counted(5, 5)


# --- what a crash or a vanished device leaves -------------------------------------------------------


def half_gone(node: Node) -> None:
    unpin(node, "in", sys.AttachType.TCX_INGRESS)


def other_half_gone(node: Node) -> None:
    unpin(node, "eg", sys.AttachType.TCX_EGRESS)


def unpin(node: Node, way: str, hook: sys.AttachType) -> None:
    """The kernel lets go of a link some time after its last pin: wait, or it would count in our test."""
    (node.pins / "links" / f"{NAME}-{way}").unlink()
    deadline = time.monotonic() + 5
    while sys.prog_query(node.device, hook):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def detached_not_unpinned(node: Node) -> None:
    with sys.obj_get_link(node.pins / "links" / f"{NAME}-eg") as link:
        sys.link_detach(link)


@pytest.mark.parametrize("crash", [half_gone, other_half_gone, detached_not_unpinned])
def test_attach_heals_what_a_crash_left(node: Node, crash: Callable[[Node], None]) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    crash(node)
    pair = node.tcx.state(NAME)
    assert pair is not None
    assert not pair.complete
    assert node.tcx.names() == {NAME}
    assert node.tcx.repoint_all({NAME: SLOT}) == {NAME}
    node.tcx.attach(NAME, node.device, SLOT)
    both_ways(node, 7)
    node.assert_counted(7, 7)
    node.tcx.detach(NAME)
    assert not any((node.pins / "links").iterdir())


@pytest.mark.parametrize("crash", [half_gone, other_half_gone, detached_not_unpinned])
def test_detach_clears_what_a_crash_left(node: Node, crash: Callable[[Node], None]) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    crash(node)
    node.tcx.detach(NAME)
    assert not any((node.pins / "links").iterdir())


def test_a_device_made_anew_under_the_same_name_is_attached_anew(node: Node) -> None:
    with veth_pair("kold", "koldw") as (old, _):
        node.tcx.attach(NAME, old, SLOT)
    pair = node.tcx.state(NAME)
    assert pair is not None
    assert (pair.egress is not None and pair.egress.ifindex, pair.complete) == (0, False)
    node.tcx.attach(NAME, node.device, SLOT)
    both_ways(node, 2)
    node.assert_counted(2, 2)


def test_a_link_on_another_device_of_the_same_number_is_not_taken_for_ours(node: Node) -> None:
    """The device of that name is in a pod; meant is another one that has its number here."""
    node.tcx.attach(NAME, node.device, SLOT)
    with netns() as pod:
        node.host.netlink(lambda ipr: ipr.link("set", index=node.device, net_ns_fd=pod.fd))

        def twin(ipr: IPRoute) -> None:
            ipr.link("add", ifname="ktwin", kind="veth", index=node.device, peer={"ifname": "ktwinw"})

        node.host.netlink(twin)
        try:
            for name in ("ktwin", "ktwinw"):
                link_up(node.host, node.host.link_index(name) or 0)
            node.tcx.attach(NAME, node.device, OTHER_SLOT)
            send_frames(node.host, "ktwin", 4)
            node.assert_counted(4, 0, OTHER_SLOT)
        finally:
            node.host.netlink(lambda ipr: ipr.link("del", ifname="ktwin"))


def test_a_failure_half_way_leaves_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = sys.obj_pin, []

    def second_pin_fails(thing: sys.Fd, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise CallRefused("pinning", errno.ENOSPC)
        real(thing, path)

    monkeypatch.setattr(attach_module.sys, "obj_pin", second_pin_fails)
    with pytest.raises(CallRefused, match="ENOSPC"):
        node.tcx.attach(NAME, node.device, SLOT)
    both_ways(node, 3)
    node.assert_counted(0, 0)
    assert not any((node.pins / "links").iterdir())


def test_a_failure_half_way_puts_the_old_programs_back(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.tcx.attach(NAME, node.device, SLOT)
    real, calls = sys.link_update, []

    def second_update_fails(link: sys.LinkFd, program: sys.ProgramFd) -> None:
        calls.append(link)
        if len(calls) == 2:
            raise CallRefused("replacing", errno.ENOMEM)
        real(link, program)

    monkeypatch.setattr(attach_module.sys, "link_update", second_update_fails)
    with pytest.raises(CallRefused, match="ENOMEM"):
        node.tcx.attach(NAME, node.device, OTHER_SLOT)
    both_ways(node, 3)
    node.assert_counted(3, 3)


def test_attaching_leaks_no_descriptor(node: Node) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    node.tcx.attach(NAME, node.device, SLOT)
    before = descriptors()
    for slot in (SLOT, OTHER_SLOT):
        node.tcx.attach(NAME, node.device, slot)
        node.tcx.repoint_all({NAME: slot})
        node.tcx.state(NAME)
    node.tcx.detach(NAME)
    with pytest.raises(CallRefused, match="ENODEV"):
        node.tcx.attach(NAME, 4_000_000, SLOT)
    assert descriptors() == before


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a/b", "x" * 201])
def test_a_name_that_cannot_be_a_pin_is_refused(node: Node, name: str) -> None:
    for use in (lambda: node.tcx.attach(name, node.device, SLOT), lambda: node.tcx.detach(name)):
        with pytest.raises(ValueError, match="cannot name a BPF pin"):
            use()


def test_something_else_at_a_pins_place_is_named_and_left(node: Node) -> None:
    path = node.pins / "links" / f"{NAME}-eg"
    with sys.map_create(sys.MapType.ARRAY, key_size=4, value_size=4, max_entries=1, name="odd") as odd:
        sys.obj_pin(odd, path)
    with pytest.raises(BpfError, match=str(path)):
        node.tcx.state(NAME)
    assert path.exists()


def test_links_are_not_kept_where_no_bpffs_is(node: Node, tmp_path: Path) -> None:
    with pytest.raises(BpffsMissing):
        TcxPrograms(tmp_path / "pins", node.accounting)


def test_the_probe_finds_tcx_and_touches_no_link_here(node: Node) -> None:
    loopback = [
        (hook, sys.prog_query(1, hook)) for hook in (sys.AttachType.TCX_EGRESS, sys.AttachType.TCX_INGRESS)
    ]
    names = node.host.link_names()
    assert probe_tcx() is Hook.TCX
    assert node.host.link_names() == names
    assert all(not found for _, found in loopback)
    assert not sys.prog_query(1, sys.AttachType.TCX_INGRESS)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_kernel_without_tcx_is_told_by_its_refusal(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_args: object) -> sys.LinkFd:
        raise CallRefused("attaching", code)

    monkeypatch.setattr(attach_module.sys, "link_create", refuse)
    assert probe_tcx() is Hook.CLSACT
