"""clsact, its filters and XDP programs: put on, listed, replaced and taken off."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator

import pytest

from hw.errors import NotFound, Refused
from hw.model import Direction, IfIndex
from hw.netlink import LinkSocket
from hw.netns import open_netns
from kndsim.links import SimNetns, netns, private_host, soft_link, veth_pair

SCHED_CLS, XDP = 3, 6
_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_libc = ctypes.CDLL(None, use_errno=True)


def load_program(kind: int, answer: int) -> int:
    """The descriptor of a program that answers a number: `r0 = answer; exit`."""
    code = struct.pack("=BBhi", 0xB7, 0, 0, answer) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    code_buffer, license_buffer = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "=IIQQ", kind, 2, ctypes.addressof(code_buffer), ctypes.addressof(license_buffer)
    ).ljust(64, b"\0")
    fd = _libc.syscall(_BPF, 5, ctypes.create_string_buffer(attr, len(attr)), len(attr))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return int(fd)


@pytest.fixture(autouse=True)
def host() -> Iterator[SimNetns]:
    with private_host() as made:
        yield made


@pytest.fixture
def here() -> Iterator[LinkSocket]:
    with LinkSocket(None) as links:
        yield links


@pytest.fixture
def veth() -> Iterator[IfIndex]:
    with veth_pair("vh0", "vp0") as (index, _):
        yield IfIndex(index)


@pytest.fixture
def programs() -> Iterator[tuple[int, int]]:
    made = load_program(SCHED_CLS, -1), load_program(SCHED_CLS, 0)
    yield made
    for fd in made:
        os.close(fd)


def test_clsact_comes_and_goes_and_repeats_are_harmless(here: LinkSocket, veth: IfIndex) -> None:
    assert "clsact" not in here.qdiscs(veth)
    for _ in range(2):
        here.add_clsact(veth)
        assert here.qdiscs(veth).count("clsact") == 1
    for _ in range(2):
        here.del_clsact(veth)
        assert "clsact" not in here.qdiscs(veth)


def test_clsact_on_a_link_that_is_not_there_is_not_found(here: LinkSocket) -> None:
    with pytest.raises(NotFound):
        here.add_clsact(IfIndex(9999))
    with pytest.raises(NotFound):
        here.del_clsact(IfIndex(9999))
    assert here.bpf_filters(IfIndex(9999)) == ()
    assert here.qdiscs(IfIndex(9999)) == ()


def test_an_ingress_qdisc_of_another_is_not_taken_for_ours(
    host: SimNetns, here: LinkSocket, veth: IfIndex
) -> None:
    host.netlink(lambda ipr: ipr.tc("add", "ingress", veth))
    with pytest.raises(Refused):
        here.add_clsact(veth)
    assert "ingress" in here.qdiscs(veth)


def test_one_filter_per_direction_replaced_in_place(
    here: LinkSocket, veth: IfIndex, programs: tuple[int, int]
) -> None:
    assert here.bpf_filters(veth) == ()
    here.add_clsact(veth)
    assert here.bpf_filters(veth) == ()
    for direction in Direction:
        here.add_bpf_filter(veth, direction, programs[0], f"knd_{direction.name.lower()}")
    before = here.bpf_filters(veth)
    assert {(found.direction, found.name) for found in before} == {
        (Direction.EGRESS, "knd_egress"),
        (Direction.INGRESS, "knd_ingress"),
    }
    assert all(found.direct_action and found.handle == 1 and found.priority == 1 for found in before)
    assert len({found.prog_id for found in before}) == 1
    here.add_bpf_filter(veth, Direction.EGRESS, programs[1], "knd_egress")
    after = {found.direction: found.prog_id for found in here.bpf_filters(veth)}
    assert len(here.bpf_filters(veth)) == 2
    assert after[Direction.EGRESS] != after[Direction.INGRESS] == before[0].prog_id
    here.del_clsact(veth)
    assert here.bpf_filters(veth) == ()


def test_a_filter_without_clsact_or_program_is_refused(
    here: LinkSocket, veth: IfIndex, programs: tuple[int, int]
) -> None:
    with pytest.raises(Refused):
        here.add_bpf_filter(veth, Direction.EGRESS, programs[0], "x")
    here.add_clsact(veth)
    with open("/dev/null") as null, pytest.raises(Refused):
        here.add_bpf_filter(veth, Direction.EGRESS, null.fileno(), "x")
    assert here.bpf_filters(veth) == ()


def test_filters_are_put_on_links_of_a_pod(programs: tuple[int, int]) -> None:
    with (
        netns() as made,
        soft_link("ifb0", "ifb", where=made) as index,
        open_netns(made.path) as handle,
        LinkSocket(handle) as pod,
        LinkSocket(None) as here,
    ):
        pod.add_clsact(IfIndex(index))
        pod.add_bpf_filter(IfIndex(index), Direction.INGRESS, programs[0], "acct")
        assert [found.name for found in pod.bpf_filters(IfIndex(index))] == ["acct"]
        assert here.bpf_filters(IfIndex(index)) == ()


def test_xdp_programs_are_taken_off(host: SimNetns, here: LinkSocket, veth: IfIndex) -> None:
    fd = load_program(XDP, 2)
    try:
        for flags in ("xdpgeneric", "xdp"):
            mode = {"xdpgeneric": 2, "xdp": 4}[flags]
            xdp = {"attrs": [["IFLA_XDP_FD", fd], ["IFLA_XDP_FLAGS", mode]]}
            host.netlink(lambda ipr, xdp=xdp: ipr.link("set", index=veth, IFLA_XDP=xdp))  # type: ignore[misc]
            found = here.by_index(veth)
            assert found is not None
            assert len(found.xdp_prog_ids) == 1
            here.clear_xdp(veth)
            found = here.by_index(veth)
            assert found is not None
            assert found.xdp_prog_ids == ()
    finally:
        os.close(fd)
    here.clear_xdp(veth)
    with pytest.raises(NotFound):
        here.clear_xdp(IfIndex(9999))
