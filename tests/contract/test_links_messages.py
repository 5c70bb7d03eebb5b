"""What is sent for each operation is what the kernel's headers say, byte for byte.

The encoder is pyroute2's; these messages pin what we need of it, so that another version of it that
encodes otherwise is found here and not on a node.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hw.links import Links
from hw.model import (
    Direction,
    IfIndex,
    IfName,
    LinkFlags,
    MacAddress,
    VfLinkState,
    VfVlan,
    VlanProtocol,
)
from hw.netlink import LinkSocket
from hw.vf import VfRates

REQUEST_ACK = 0x5
LINK = IfIndex(7)
TARGET: Any = SimpleNamespace(fd=9, path="/pod")


class Recorder:
    """Stands in for the transport: keeps what would be sent, and answers nothing."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def change(self, what: str, encode: Callable[[int, int], bytes], flags: int = 0) -> None:
        self.sent.append(encode(REQUEST_ACK | flags, 1))

    def get(self, what: str, encode: Callable[[int, int], bytes], flags: int = 0) -> list[bytes]:
        self.change(what, encode, flags)
        return []

    def dump(self, what: str, encode: Callable[[int, int], bytes], kind: int) -> list[bytes]:
        self.sent.append(encode(0x301, 1))
        return []

    def close(self) -> None:
        pass


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def links(recorder: Recorder) -> LinkSocket:
    made = LinkSocket(None)
    made.close()
    made._transport = recorder  # type: ignore[assignment]
    return made


def message(kind: int, flags: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, 1, 0) + payload


def attr(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def link(*attrs: bytes, kind: int = 19, flags: int = 0, mask: int = 0, more: int = 0) -> bytes:
    header = struct.pack("=BxHiII", 0, 0, LINK, flags, mask)
    return message(kind, REQUEST_ACK | more, header + b"".join(attrs))


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def tc(parent: int, handle: int, info: int, *attrs: bytes) -> bytes:
    return struct.pack("=BxxxiIII", 0, 7, handle, parent, info) + b"".join(attrs)


def vf(entry: bytes) -> bytes:
    """IFLA_VFINFO_LIST with one IFLA_VF_INFO, as struct ifla_vf_* of uapi linux/if_link.h."""
    return link(attr(22, attr(1, entry)))


CASES: dict[str, tuple[Callable[[LinkSocket], object], bytes]] = {
    "move": (
        lambda links: links.move(
            LINK, TARGET, name=IfName("eth0"), mtu=1400, mac=MacAddress("02:00:00:00:00:07")
        ),
        link(
            attr(28, u32(9)),
            attr(3, b"eth0\0"),
            attr(4, u32(1400)),
            attr(1, bytes.fromhex("020000000007")),
        ),
    ),
    "move to an index": (
        lambda links: links.move(LINK, TARGET, name=IfName("e"), new_ifindex=IfIndex(77)),
        link(attr(28, u32(9)), attr(3, b"e\0"), attr(49, u32(77))),
    ),
    "IPoIB address": (
        lambda links: links.change(LINK, mac=MacAddress(":".join(["ab"] * 20))),
        link(attr(1, b"\xab" * 20)),
    ),
    "up": (lambda links: links.set_up(LINK), link(flags=1, mask=1)),
    "down": (lambda links: links.set_down(LINK), link(flags=0, mask=1)),
    "flags": (
        lambda links: links.change(LINK, set_flags=LinkFlags.NOARP, clear_flags=LinkFlags.PROMISC),
        link(flags=0x80, mask=0x180),
    ),
    "settings": (
        lambda links: links.change(LINK, alias="ü", txqlen=1, group=2, gso_max_size=3, gro_max_size=4),
        link(
            attr(20, "ü".encode() + b"\0"),
            attr(13, u32(1)),
            attr(27, u32(2)),
            attr(41, u32(3)),
            attr(58, u32(4)),
        ),
    ),
    "altnames": (
        lambda links: links.add_altnames(LINK, ["one", "\udcff"]),
        link(attr(0x8000 | 52, attr(53, b"one\0") + attr(53, b"\xff\0")), kind=108, more=0x600),
    ),
    "altname off": (
        lambda links: links.remove_altnames(LINK, ["one"]),
        link(attr(0x8000 | 52, attr(53, b"one\0")), kind=109),
    ),
    "VF address": (
        lambda links: links.set_vf(LINK, 3, "mac", MacAddress("02:aa:00:00:00:01")),
        vf(attr(1, u32(3) + bytes.fromhex("02aa00000001") + bytes(26))),
    ),
    "VF address off": (
        lambda links: links.set_vf(LINK, 3, "mac", None),
        vf(attr(1, u32(3) + bytes(32))),
    ),
    "VF vlan": (
        lambda links: links.set_vf(LINK, 3, "vlan", VfVlan(id=100, qos=5)),
        vf(attr(12, attr(1, u32(3) + u32(100) + u32(5) + b"\x81\x00\0\0"))),
    ),
    "VF service vlan": (
        lambda links: links.set_vf(LINK, 3, "vlan", VfVlan(id=4094, protocol=VlanProtocol.SERVICE)),
        vf(attr(12, attr(1, u32(3) + u32(4094) + u32(0) + b"\x88\xa8\0\0"))),
    ),
    "VF rates": (
        lambda links: links.set_vf(LINK, 3, "rates", VfRates(100, 2500)),
        vf(attr(6, u32(3) + u32(100) + u32(2500))),
    ),
    "VF spoof check": (
        lambda links: links.set_vf(LINK, 3, "spoof_check", False),
        vf(attr(4, u32(3) + u32(0))),
    ),
    "VF trust": (
        lambda links: links.set_vf(LINK, 3, "trust", True),
        vf(attr(9, u32(3) + u32(1))),
    ),
    "VF link state": (
        lambda links: links.set_vf(LINK, 3, "link_state", VfLinkState.DISABLE),
        vf(attr(5, u32(3) + u32(2))),
    ),
    "VF settings": (
        lambda links: links.vf_settings(LINK, 3),
        link(attr(29, u32(9)), kind=18),
    ),
    "IPv4 address": (
        lambda links: links.add_address(LINK, ipaddress.ip_interface("192.0.2.5/24")),
        message(
            20,
            REQUEST_ACK | 0x500,
            struct.pack("=BBBBi", 2, 24, 0, 0, 7)
            + attr(1, bytes([192, 0, 2, 5]))
            + attr(2, bytes([192, 0, 2, 5]))
            + attr(4, bytes([192, 0, 2, 255])),
        ),
    ),
    "IPv6 address": (
        lambda links: links.add_address(LINK, ipaddress.ip_interface("2001:db8::5/64")),
        message(
            20,
            REQUEST_ACK | 0x500,
            struct.pack("=BBBBi", 10, 64, 0, 0, 7) + attr(1, ipaddress.ip_address("2001:db8::5").packed),
        ),
    ),
    "clsact": (
        lambda links: links.add_clsact(LINK),
        message(36, REQUEST_ACK | 0x600, tc(0xFFFFFFF1, 0xFFFF0000, 0, attr(1, b"clsact\0"))),
    ),
    "clsact off": (
        lambda links: links.del_clsact(LINK),
        message(37, REQUEST_ACK, tc(0xFFFFFFF1, 0xFFFF0000, 0, attr(1, b"clsact\0"))),
    ),
    "egress filter": (
        lambda links: links.add_bpf_filter(LINK, Direction.EGRESS, 11, "acct"),
        message(
            44,
            REQUEST_ACK | 0x500,
            tc(
                0xFFFFFFF3,
                1,
                0x10300,
                attr(1, b"bpf\0"),
                attr(2, attr(6, u32(11)) + attr(7, b"acct\0") + attr(8, u32(1))),
            ),
        ),
    ),
    "one link": (
        lambda links: links.by_index(LINK),
        link(attr(29, u32(8)), kind=18),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_request_is_what_the_kernels_headers_say(links: LinkSocket, recorder: Recorder, name: str) -> None:
    act, wanted = CASES[name]
    act(links)
    assert recorder.sent == [wanted]


def test_xdp_is_taken_off_in_each_mode_by_its_own_message(links: LinkSocket, recorder: Recorder) -> None:
    links.clear_xdp(LINK)
    assert recorder.sent == [
        link(attr(0x8000 | 43, attr(1, struct.pack("=i", -1)) + attr(3, u32(mode)))) for mode in (2, 4, 8)
    ]


def test_an_ingress_filter_differs_only_in_its_parent(links: LinkSocket, recorder: Recorder) -> None:
    for direction in Direction:
        links.add_bpf_filter(LINK, direction, 11, "acct")
    egress, ingress = recorder.sent
    assert ingress == egress.replace(u32(0xFFFFFFF3), u32(0xFFFFFFF2))


def test_a_socket_is_what_consumers_are_promised(links: LinkSocket) -> None:
    promised: Links = links
    assert all(callable(getattr(promised, name)) for name in vars(Links) if not name.startswith("_"))
