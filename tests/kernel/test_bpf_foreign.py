"""Programs that a tenant or another agent left on a device: found, taken off, and nobody else's hit."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bpf import foreign, sys, xdp
from bpf.attach import RETURN_UNSPEC, pinned_links
from bpf.errors import Ambiguous, CallRefused
from bpf.foreign import ForeignHook, Own, detach_foreign, foreign_programs
from kndsim.links import netns
from tests.bpf.bpffs import mounted_bpffs
from tests.kernel.bpf_node import NAME, SLOT, Node, both_ways, link_up

BPF_PROG_ATTACH = 8
PASS_XDP = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)


@pytest.fixture
def tcx_program() -> Iterator[sys.ProgramFd]:
    with sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="tenant") as program:
        yield program


@pytest.fixture
def xdp_program() -> Iterator[sys.ProgramFd]:
    with sys.prog_load(sys.ProgramType.XDP, PASS_XDP, name="tenant") as program:
        yield program


def attach_without_link(program: sys.ProgramFd, ifindex: int, where: sys.AttachType) -> None:
    packed = struct.pack("=IIIIIIQ", ifindex, program.fd, where, 0, 0, 0, 0)
    sys._bpf(BPF_PROG_ATTACH, ctypes.create_string_buffer(packed, len(packed)))


def attach_xdp_by_netlink(ipr: IPRoute, program: sys.ProgramFd, ifindex: int) -> None:
    ipr.link("set", index=ifindex, xdp={"attrs": [("IFLA_XDP_FD", program.fd), ("IFLA_XDP_FLAGS", 2)]})


@pytest.mark.usefixtures("tcx_kernel")
def test_what_a_tenant_left_is_taken_off_and_ours_stays(
    node: Node, tcx_program: sys.ProgramFd, xdp_program: sys.ProgramFd
) -> None:
    """The tenant pins its links in a bpffs of its own, so that they outlive it."""
    node.tcx.attach(NAME, node.device, SLOT)
    with mounted_bpffs() as theirs, netns() as pod:
        node.host.netlink(lambda ipr: ipr.link("set", index=node.device, net_ns_fd=pod.fd))
        link_up(pod, node.device)

        def settle_in() -> None:
            for hook in (sys.AttachType.TCX_EGRESS, sys.AttachType.TCX_INGRESS):
                with sys.link_create(tcx_program, node.device, hook) as link:
                    sys.obj_pin(link, theirs / hook.name.lower())
            with sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="second") as second:
                attach_without_link(second, node.device, sys.AttachType.TCX_EGRESS)
            flags = sys.XDP_FLAGS_SKB_MODE
            with sys.link_create(xdp_program, node.device, sys.AttachType.XDP, flags=flags) as link:
                sys.obj_pin(link, theirs / "xdp")

        pod.run(settle_in)
        own = Own(pinned_links(node.pins))
        found = pod.run(lambda: foreign_programs(node.device, own=own))
        assert [program.hook for program in found] == [
            ForeignHook.TCX_EGRESS,
            ForeignHook.TCX_EGRESS,
            ForeignHook.TCX_INGRESS,
            ForeignHook.XDP,
        ]
        assert sorted(len(program.links) for program in found) == [0, 1, 1, 1]
        assert pod.run(lambda: detach_foreign(node.device, own=own)) == found
        assert pod.run(lambda: foreign_programs(node.device, own=own)) == ()
        assert pod.run(lambda: detach_foreign(node.device, own=own)) == ()
        both_ways(node, 3, pod)
        node.assert_counted(3, 3)


def test_xdp_attached_by_netlink_is_taken_off(node: Node, xdp_program: sys.ProgramFd) -> None:
    node.host.netlink(lambda ipr: attach_xdp_by_netlink(ipr, xdp_program, node.device))
    (found,) = detach_foreign(node.device, own=Own())
    assert (found.hook, found.program, found.links) == (ForeignHook.XDP, sys.prog_id(xdp_program), ())
    assert xdp.attached_programs(node.device) == {}


def test_another_pods_xdp_of_the_same_number_and_program_is_never_hit(
    node: Node, xdp_program: sys.ProgramFd
) -> None:
    with netns() as pod:

        def twin(ipr: IPRoute) -> None:
            ipr.link("add", ifname="ktwin", kind="veth", index=node.device, peer={"ifname": "ktwinw"})

        pod.netlink(twin)
        flags = sys.XDP_FLAGS_SKB_MODE

        def link() -> sys.LinkFd:
            return sys.link_create(xdp_program, node.device, sys.AttachType.XDP, flags=flags)

        with pod.run(link) as theirs:
            node.host.netlink(lambda ipr: attach_xdp_by_netlink(ipr, xdp_program, node.device))
            detach_foreign(node.device, own=Own())
            assert xdp.attached_programs(node.device) == {}
            assert sys.link_info(theirs).ifindex == node.device, "the one by netlink was meant"
            with link() as here:
                with pytest.raises(Ambiguous, match="2 links could be its own"):
                    detach_foreign(node.device, own=Own())
                assert sys.link_info(theirs).ifindex == node.device
                assert sys.link_info(here).ifindex == node.device


def test_a_device_that_is_gone_is_an_error_with_its_number(node: Node) -> None:
    with pytest.raises((CallRefused, OSError), match=r"4000000|No such device"):
        detach_foreign(4_000_000, own=Own())


def test_a_kernel_without_tcx_has_only_xdp_to_list(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> tuple[sys.Attached, ...]:
        raise CallRefused("listing", errno.EINVAL)

    monkeypatch.setattr(foreign.sys, "prog_query", refuse)
    assert foreign_programs(node.device, own=Own()) == ()


def test_root_in_the_pod_cannot_replace_an_xdp_link_either(node: Node, xdp_program: sys.ProgramFd) -> None:
    """The kernel's rule that telling links from netlink's programs rests on."""
    flags = sys.XDP_FLAGS_SKB_MODE
    with (
        sys.link_create(xdp_program, node.device, sys.AttachType.XDP, flags=flags),
        pytest.raises(NetlinkError, match="Device or resource busy"),
    ):
        node.host.netlink(lambda ipr: attach_xdp_by_netlink(ipr, xdp_program, node.device))
