"""What is asked of the kernel is what was meant: others' code reads the same in our messages."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from hw.model import Direction, IfIndex, IfName, LinkFlags, MacAddress
from hw.netlink import LinkSocket

INDEX = IfIndex(5)
MAC = MacAddress("02:00:5e:10:00:01")


class Asked:
    """Takes the place of a transport, and the kernel's word that all is well."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []

    def change(self, what: str, encode: Callable[[int, int], bytes], flags: int = 0) -> None:
        self.requests.append(encode(flags, 7))

    def dump(self, what: str, encode: Callable[[int, int], bytes], kind: int) -> list[bytes]:
        self.requests.append(encode(0, 7))
        return []


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def links(asked: Asked) -> LinkSocket:
    made: Any = LinkSocket.__new__(LinkSocket)
    made._transport, made._where = asked, "the host"
    found: LinkSocket = made
    return found


def read(request: bytes, form: Any = ifinfmsg) -> Any:
    message = form(request)
    message.decode()
    assert message["header"]["length"] == len(request)
    return message


def test_a_move_is_one_message_with_everything(asked: Asked, links: LinkSocket) -> None:
    pod: Any = SimpleNamespace(fd=9, path="pod")
    links.move(INDEX, pod, name=IfName("net1"), mtu=1400, mac=MAC, new_ifindex=INDEX)
    links.move(INDEX, pod, name=IfName("net1"))
    whole, least = map(read, asked.requests)
    assert (whole["index"], whole["header"]["type"]) == (INDEX, 19)
    assert {name: whole.get_attr(name) for name, _ in whole["attrs"]} == {
        "IFLA_NET_NS_FD": 9,
        "IFLA_IFNAME": "net1",
        "IFLA_NEW_IFINDEX": INDEX,
        "IFLA_MTU": 1400,
        "IFLA_ADDRESS": MAC,
    }
    assert [name for name, _ in least["attrs"]] == ["IFLA_NET_NS_FD", "IFLA_IFNAME"]


def test_a_change_sets_what_is_given_and_nothing_else(asked: Asked, links: LinkSocket) -> None:
    links.change(INDEX, name=IfName("eth0"), alias="", txqlen=0, group=3, link_mode=1, mac=MAC)
    links.change(INDEX, gso_max_size=4000, gro_max_size=5000, gso_max_segs=17)
    links.change(INDEX, set_flags=LinkFlags.UP, clear_flags=LinkFlags.PROMISC)
    links.change(INDEX)
    names, sizes, flags = map(read, asked.requests)
    assert {name: names.get_attr(name) for name, _ in names["attrs"]} == {
        "IFLA_IFNAME": "eth0",
        "IFLA_IFALIAS": "",
        "IFLA_TXQLEN": 0,
        "IFLA_GROUP": 3,
        "IFLA_LINKMODE": 1,
        "IFLA_ADDRESS": MAC,
    }
    assert {name: sizes.get_attr(name) for name, _ in sizes["attrs"]} == {
        "IFLA_GSO_MAX_SIZE": 4000,
        "IFLA_GRO_MAX_SIZE": 5000,
        "IFLA_GSO_MAX_SEGS": 17,
    }
    assert (flags["flags"], flags["change"], flags["attrs"]) == (
        LinkFlags.UP,
        LinkFlags.UP | LinkFlags.PROMISC,
        [],
    )


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        (
            "198.18.0.2/24",
            {"IFA_ADDRESS": "198.18.0.2", "IFA_LOCAL": "198.18.0.2", "IFA_BROADCAST": "198.18.0.255"},
        ),
        ("198.18.0.2/31", {"IFA_ADDRESS": "198.18.0.2", "IFA_LOCAL": "198.18.0.2"}),
        ("2001:db8::5/64", {"IFA_ADDRESS": "2001:db8::5"}),
    ],
)
def test_an_address_has_the_parts_that_its_family_has(
    asked: Asked, links: LinkSocket, address: str, wanted: dict[str, str]
) -> None:
    given = ipaddress.ip_interface(address)
    links.add_address(INDEX, given)
    message = read(asked.requests[0], ifaddrmsg)
    assert (message["index"], message["prefixlen"]) == (INDEX, given.network.prefixlen)
    assert message["family"] == (2 if given.version == 4 else 10)
    assert {name: message.get_attr(name) for name, _ in message["attrs"]} == wanted


def test_more_names_and_programs_are_nested_as_the_kernel_wants_it(asked: Asked, links: LinkSocket) -> None:
    links.add_altnames(INDEX, ["a", "longer-name"])
    links.clear_xdp(INDEX)
    names, *modes = map(read, asked.requests)
    assert names.get_attr("IFLA_PROP_LIST").get_attrs("IFLA_ALT_IFNAME") == ["a", "longer-name"]
    told = [mode.get_attr("IFLA_XDP") for mode in modes]
    assert [(each.get_attr("IFLA_XDP_FD"), each.get_attr("IFLA_XDP_FLAGS")) for each in told] == [
        (-1, 2),
        (-1, 4),
        (-1, 8),
    ]


def test_filters_hang_on_the_hook_of_their_direction(asked: Asked, links: LinkSocket) -> None:
    links.add_clsact(INDEX)
    links.add_bpf_filter(INDEX, Direction.EGRESS, 12, "knd_out")
    qdisc, made = (read(request, tcmsg) for request in asked.requests)
    assert (qdisc["handle"], qdisc["parent"], qdisc.get_attr("TCA_KIND")) == (
        0xFFFF0000,
        0xFFFFFFF1,
        "clsact",
    )
    assert (made["index"], made["handle"], made["parent"]) == (INDEX, 1, 0xFFFFFFF3)
    options = made.get_attr("TCA_OPTIONS")
    assert options.get_attr("TCA_BPF_FD") == 12
    assert options.get_attr("TCA_BPF_NAME") == "knd_out"
