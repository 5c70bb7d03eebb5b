"""Messages are read for what they say; broken framing is an HwError and nothing else."""

from __future__ import annotations

import contextlib
import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw import wire
from hw.errors import HwError
from hw.model import Direction, IfIndex, LinkFlags, MacAddress
from hw.monitor import changed_links, concerns_hardware


def attr(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def link_payload(*attrs: bytes, index: int = 5, flags: int = 0x1003) -> bytes:
    return struct.pack("=BxHiII", 0, 1, index, flags, 0) + b"".join(attrs)


def message(kind: int, payload: bytes, flags: int = 0, sequence: int = 1) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def test_a_link_is_read_whole() -> None:
    link = wire.link(
        link_payload(
            attr(3, b"eth0\0"),
            attr(4, u32(1500)),
            attr(1, bytes.fromhex("020000000007")),
            attr(54, bytes.fromhex("b83fd2000001")),
            attr(10, u32(9)),
            attr(5, u32(4)),
            attr(37, struct.pack("=i", 2)),
            attr(20, b"rack 7\0"),
            attr(0x8000 | 52, attr(53, b"enp1s0\0") + attr(53, b"longer-than-fifteen\0")),
            attr(13, u32(1000)),
            attr(27, u32(3)),
            attr(41, u32(65536)),
            attr(58, u32(65535)),
            attr(16, b"\x06"),
            attr(33, b"\x01"),
            attr(0x8000 | 43, attr(2, b"\x04") + attr(5, u32(12)) + attr(6, u32(11)) + attr(4, u32(11))),
            attr(18, attr(1, b"veth\0")),
            attr(57, b"pci\0"),
            attr(56, b"0000:3b:00.2\0"),
            attr(36, b"\xe8\xeb"),
            attr(38, b"p0\0"),
        )
    )
    assert (link.ifindex, link.name, link.link_type, link.mtu, link.kind) == (5, "eth0", 1, 1500, "veth")
    assert (link.mac, link.permanent_mac) == ("02:00:00:00:00:07", "b8:3f:d2:00:00:01")
    assert (link.master, link.peer, link.peer_nsid) == (9, 4, 2)
    assert (link.alias, link.altnames) == ("rack 7", ("enp1s0", "longer-than-fifteen"))
    assert (link.txqlen, link.group, link.gso_max_size, link.gro_max_size) == (1000, 3, 65536, 65535)
    assert (link.operstate, link.carrier, link.xdp_prog_ids) == (6, True, (11, 12))
    assert (link.parent_bus, link.parent_device) == ("pci", "0000:3b:00.2")
    assert (link.phys_switch_id, link.phys_port_name) == ("e8eb", "p0")
    assert link.flags == LinkFlags.UP | LinkFlags.MULTICAST | LinkFlags(2)
    assert link.up


def test_what_a_link_does_not_say_is_none() -> None:
    link = wire.link(link_payload(attr(3, b"lo\0"), attr(1, bytes(6))))
    assert (link.mac, link.permanent_mac, link.kind, link.peer_nsid, link.gso_max_size) == (None,) * 5
    assert (link.alias, link.altnames, link.xdp_prog_ids) == ("", (), ())


def test_an_ipoib_address_has_twenty_bytes() -> None:
    link = wire.link(link_payload(attr(1, bytes(range(20)))))
    assert link.mac == MacAddress(":".join(f"{n:02x}" for n in range(20)))


def test_names_of_any_bytes_survive_both_ways() -> None:
    odd = bytes(set(range(1, 256)) - set(b"/: "))
    link = wire.link(link_payload(attr(3, odd + b"\0"), attr(20, b"\xff\0")))
    assert wire.raw(link.name) == odd
    assert wire.raw(link.alias) == b"\xff"


@pytest.mark.parametrize(
    ("family", "data", "text"),
    [(2, bytes([192, 0, 2, 5]), "192.0.2.5/24"), (10, bytes(15) + b"\1", "::1/24")],
)
def test_addresses(family: int, data: bytes, text: str) -> None:
    payload = struct.pack("=BBBBi", family, 24, 0, 0, 7) + attr(1, data)
    assert wire.address(payload) == (7, ipaddress.ip_interface(text))


def test_the_own_end_of_a_point_to_point_address_is_taken() -> None:
    payload = (
        struct.pack("=BBBBi", 2, 32, 0, 0, 7) + attr(1, bytes([10, 0, 0, 9])) + attr(2, bytes([10, 0, 0, 1]))
    )
    assert wire.address(payload) == (7, ipaddress.ip_interface("10.0.0.1/32"))


def test_an_address_of_another_family_or_length() -> None:
    assert wire.address(struct.pack("=BBBBi", 28, 8, 0, 0, 7) + attr(1, b"\1")) is None
    with pytest.raises(HwError):
        wire.address(struct.pack("=BBBBi", 2, 99, 0, 0, 7) + attr(1, b"\1\2\3\4"))


def route_payload(*attrs: bytes, prefix: int = 0, kind: int = 1, table: int = 254) -> bytes:
    return struct.pack("=BBBBBBBBI", 2, prefix, 0, 0, table, 3, 0, kind, 0) + b"".join(attrs)


def test_routes() -> None:
    hops = b"".join(struct.pack("=HBBi", 16, 0, 0, index) + attr(5, bytes(4)) for index in (3, 4))
    assert wire.route(route_payload(attr(9, hops))) == wire.Route(254, True, (IfIndex(3), IfIndex(4)), None)
    assert wire.route(route_payload(attr(4, u32(6)), attr(15, u32(1000)))) == wire.Route(
        1000, True, (IfIndex(6),), None
    )
    assert wire.route(route_payload(attr(30, u32(8)))) == wire.Route(254, True, (), 8)
    assert wire.route(route_payload(kind=6)) is None
    with pytest.raises(HwError):
        wire.route(route_payload(attr(9, bytes(8))))


def test_a_filter_is_ours_to_read_only_on_clsact() -> None:
    options = attr(0x8000 | 2, attr(7, b"acct\0") + attr(11, u32(77)) + attr(8, u32(1)))
    payload = struct.pack("=BxxxiIII", 0, 5, 1, wire.TC_EGRESS, 1 << 16) + attr(1, b"bpf\0") + options
    found = wire.bpf_filter(payload)
    assert found is not None
    index, filter_ = found
    assert index == 5
    assert (filter_.direction, filter_.name, filter_.prog_id) == (Direction.EGRESS, "acct", 77)
    assert (filter_.handle, filter_.priority, filter_.direct_action) == (1, 1, True)
    other = struct.pack("=BxxxiIII", 0, 5, 1, 0x10000, 1 << 16) + attr(1, b"bpf\0") + options
    assert wire.bpf_filter(other) is None


@pytest.mark.parametrize("capped", [True, False])
def test_the_kernels_words_are_found(capped: bool) -> None:
    request = message(16, b"12345678")
    echoed, flags = (request[:16], 0x300) if capped else (request, 0x200)
    payload = struct.pack("=i", -22) + echoed + attr(1, b"mtu less than device minimum\0")
    (found,) = wire.messages(message(wire.NLMSG_ERROR, payload, flags))
    assert wire.error_of(found) == (22, "mtu less than device minimum")


def test_an_ack_and_the_end_of_a_dump_are_no_error() -> None:
    (ack,) = wire.messages(message(wire.NLMSG_ERROR, struct.pack("=i", 0) + bytes(16), 0x100))
    assert wire.error_of(ack) == (0, "")
    (done,) = wire.messages(message(wire.NLMSG_DONE, struct.pack("=i", -16) + attr(1, b"why\0"), 0x202))
    assert wire.error_of(done) == (16, "why")


def test_messages_are_split_at_four_bytes() -> None:
    first = message(16, b"abcde")
    found = list(wire.messages(first + bytes(3) + message(17, b"", sequence=2)))
    assert [(one.type, one.sequence, one.payload) for one in found] == [(16, 1, b"abcde"), (17, 2, b"")]


@pytest.mark.parametrize(
    "data", [b"\0", bytes(16), struct.pack("=IHHII", 15, 1, 0, 0, 0), struct.pack("=IHHII", 17, 1, 0, 0, 0)]
)
def test_broken_framing_is_said(data: bytes) -> None:
    with pytest.raises(HwError, match="netlink"):
        list(wire.messages(data))


@pytest.mark.parametrize("data", [struct.pack("=HH", 3, 1), struct.pack("=HH", 9, 1) + b"1234", bytes(4)])
def test_broken_attributes_are_said(data: bytes) -> None:
    with pytest.raises(HwError, match="attribute"):
        wire.attributes(data)


PARSERS = (wire.link, wire.address, wire.route, wire.nexthop, wire.qdisc, wire.bpf_filter)


@given(st.binary(max_size=200))
def test_noise_is_an_hw_error_and_nothing_else(data: bytes) -> None:
    for parse in (*PARSERS, lambda data: list(wire.messages(data)), changed_links):
        with contextlib.suppress(HwError):
            parse(data)
    concerns_hardware(data)


@given(st.lists(st.tuples(st.integers(1, 60), st.binary(max_size=24)), max_size=8))
def test_noise_in_attributes_is_an_hw_error_and_nothing_else(pairs: list[tuple[int, bytes]]) -> None:
    body = b"".join(attr(kind, data) for kind, data in pairs)
    heads = (
        link_payload(),
        struct.pack("=BBBBi", 2, 24, 0, 0, 7),
        route_payload(),
        bytes(8),
        bytes(20),
        bytes(20),
    )
    for head, parse in zip(heads, PARSERS, strict=True):
        with contextlib.suppress(HwError):
            parse(head + body)


def test_the_monitor_reads_the_index_of_links_and_addresses() -> None:
    data = (
        message(wire.RTM_NEWLINK, link_payload(index=5))
        + message(wire.RTM_DELLINK, link_payload(index=6))
        + message(wire.RTM_NEWADDR, struct.pack("=BBBBi", 2, 24, 0, 0, 7))
        + message(wire.RTM_NEWROUTE, route_payload())
    )
    assert changed_links(data).keys() == {5, 6, 7}


@pytest.mark.parametrize(
    ("event", "concerns"),
    [
        (b"add@/devices/x\0ACTION=add\0SUBSYSTEM=infiniband\0SEQNUM=1\0", True),
        (b"bind@/devices/x\0ACTION=bind\0SUBSYSTEM=pci\0", True),
        (b"add@/devices/x\0ACTION=add\0SUBSYSTEM=net\0", False),
        (b"move@/devices/x\0ACTION=move\0SUBSYSTEM=pci\0", False),
        (b"libudev\0\xfe\xed\xca\xfe", False),
        (b"", False),
    ],
)
def test_uevents_that_matter(event: bytes, concerns: bool) -> None:
    assert concerns_hardware(event) is concerns
