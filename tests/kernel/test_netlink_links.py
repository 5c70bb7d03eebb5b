"""What hw.netlink does to links is what was asked, in the namespace it was asked for."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hw.errors import Busy, NotFound, Refused
from hw.model import IfIndex, IfName, LinkFlags, LinkInfo, MacAddress
from hw.netlink import LinkSocket
from hw.netns import NetnsHandle, host_netns, open_netns
from hw.transport import header
from kndsim.links import SimNetns, macvlan, netns, private_host, soft_link, veth_pair

MAC = MacAddress("02:00:00:00:00:07")


@pytest.fixture(autouse=True)
def host() -> Iterator[SimNetns]:
    with private_host() as made:
        yield made


@pytest.fixture
def pod_netns() -> Iterator[NetnsHandle]:
    with netns() as made, open_netns(made.path) as handle:
        yield handle


@pytest.fixture
def here() -> Iterator[LinkSocket]:
    with LinkSocket(None) as links:
        yield links


@pytest.fixture
def pod(pod_netns: NetnsHandle) -> Iterator[LinkSocket]:
    with LinkSocket(pod_netns) as links:
        yield links


@pytest.fixture
def veth() -> Iterator[IfIndex]:
    with veth_pair("vh0", "vp0") as (index, _):
        yield IfIndex(index)


def only(links: LinkSocket, ifindex: IfIndex) -> LinkInfo:
    found = links.by_index(ifindex)
    assert found is not None
    return found


def wait_until(true: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not come true in time"


def test_dump_and_by_index_agree(here: LinkSocket, veth: IfIndex) -> None:
    found = only(here, veth)
    assert found in here.dump()
    assert (found.name, found.kind, found.link_type, found.up) == ("vh0", "veth", 1, False)
    assert found.peer is not None
    assert only(here, found.peer).peer == veth
    assert found.peer_nsid is None
    assert here.by_index(IfIndex(9999)) is None


def test_move_does_name_mac_and_mtu_in_one_and_keeps_the_ifindex(
    here: LinkSocket, pod: LinkSocket, pod_netns: NetnsHandle
) -> None:
    with veth_pair("a" * 15, "vp0") as (index, _):
        link = IfIndex(index)
        here.move(link, pod_netns, name=IfName("eth0"), mtu=1400, mac=MAC)
        assert here.by_index(link) is None
        there = only(pod, link)
        assert (there.name, there.mtu, there.mac, there.up) == ("eth0", 1400, MAC, False)
        assert there.peer_nsid is not None


def test_a_running_link_is_moved_and_arrives_down(
    here: LinkSocket, pod: LinkSocket, pod_netns: NetnsHandle, veth: IfIndex
) -> None:
    here.set_up(veth)
    here.add_address(veth, ipaddress.ip_interface("192.0.2.1/24"))
    here.move(veth, pod_netns, name=IfName("net1"))
    assert not only(pod, veth).up
    assert pod.addresses(veth) == ()


def test_move_home_again_under_the_old_name(
    here: LinkSocket, pod: LinkSocket, pod_netns: NetnsHandle, veth: IfIndex
) -> None:
    before = only(here, veth)
    here.move(veth, pod_netns, name=IfName("eth0"), mac=MAC)
    with host_netns() as home:
        pod.move(veth, home, name=before.name, mac=before.mac)
    assert only(here, veth) == before


def test_a_wanted_ifindex_is_given_or_the_move_refused(
    here: LinkSocket, pod: LinkSocket, pod_netns: NetnsHandle, veth: IfIndex
) -> None:
    with pytest.raises(Busy):
        here.move(veth, pod_netns, name=IfName("eth0"), new_ifindex=IfIndex(1))
    assert only(here, veth).name == "vh0"
    here.move(veth, pod_netns, name=IfName("eth0"), new_ifindex=IfIndex(4242))
    assert only(pod, IfIndex(4242)).name == "eth0"


def test_a_taken_name_is_refused_with_the_reason(
    here: LinkSocket, pod: LinkSocket, pod_netns: NetnsHandle, veth: IfIndex
) -> None:
    with pytest.raises(Refused) as caught:
        here.move(veth, pod_netns, name=IfName("lo"))
    assert caught.value.errno == errno.EEXIST
    assert f"link {veth}" in str(caught.value)
    # Where the link is then is not promised, only that it is not lost.
    assert [links for links in (here, pod) if links.by_index(veth)]


def test_change_sets_every_compared_setting(here: LinkSocket, veth: IfIndex) -> None:
    here.change(
        veth,
        name=IfName("new0"),
        mtu=1300,
        mac=MAC,
        alias="Büro, 2. Stock",
        txqlen=7,
        group=9,
        gso_max_size=30000,
        gro_max_size=20000,
        set_flags=LinkFlags.NOARP | LinkFlags.ALLMULTI,
        clear_flags=LinkFlags.MULTICAST,
    )
    link = only(here, veth)
    assert (link.name, link.mtu, link.mac, link.alias) == ("new0", 1300, MAC, "Büro, 2. Stock")
    assert (link.txqlen, link.group, link.gso_max_size, link.gro_max_size) == (7, 9, 30000, 20000)
    assert LinkFlags.NOARP in link.flags
    assert LinkFlags.ALLMULTI in link.flags
    assert LinkFlags.MULTICAST not in link.flags
    here.change(veth, alias="", clear_flags=LinkFlags.NOARP | LinkFlags.ALLMULTI)
    link = only(here, veth)
    assert link.alias == ""
    assert not link.flags & (LinkFlags.NOARP | LinkFlags.ALLMULTI)


def test_a_change_of_nothing_asks_nothing(here: LinkSocket) -> None:
    here.change(IfIndex(9999))


def test_setting_and_clearing_one_flag_is_a_mistake(here: LinkSocket, veth: IfIndex) -> None:
    with pytest.raises(ValueError, match="UP"):
        here.change(veth, set_flags=LinkFlags.UP, clear_flags=LinkFlags.UP | LinkFlags.NOARP)


def test_up_and_down(here: LinkSocket, veth: IfIndex) -> None:
    here.set_up(veth)
    assert only(here, veth).up
    here.set_down(veth)
    assert not only(here, veth).up


def test_a_refusal_carries_errno_and_the_kernels_words(here: LinkSocket, veth: IfIndex) -> None:
    with pytest.raises(Refused) as caught:
        here.change(veth, mtu=7)
    assert caught.value.errno == errno.EINVAL
    assert "mtu" in caught.value.extack
    with pytest.raises(NotFound, match="9999"):
        here.set_up(IfIndex(9999))


def test_addresses_of_both_families_are_added_once(here: LinkSocket, veth: IfIndex) -> None:
    wanted = [ipaddress.ip_interface(text) for text in ("192.0.2.9/24", "192.0.2.77/32", "2001:db8::5/64")]
    for _ in range(2):
        for address in wanted:
            here.add_address(veth, address)
    assert set(here.addresses(veth)) == set(wanted)
    with pytest.raises(NotFound):
        here.add_address(IfIndex(9999), wanted[0])


def test_altnames_are_added_and_removed_whatever_bytes_they_are(here: LinkSocket, veth: IfIndex) -> None:
    tenants = ["a-name-longer-than-fifteen", "n\u00e4me", "\udcff\udcfe", 'quote"$(x)']
    here.add_altnames(veth, tenants)
    assert set(only(here, veth).altnames) == set(tenants)
    here.remove_altnames(veth, [*tenants, "never-had"])
    assert only(here, veth).altnames == ()
    with pytest.raises(Refused) as caught:
        here.add_altnames(veth, ["lo"])
    assert caught.value.errno == errno.EEXIST
    here.add_altnames(veth, [])


def test_a_name_that_is_not_text_is_read_and_replaced(here: LinkSocket, veth: IfIndex) -> None:
    here.change(veth, name=IfName("\udcff\x1b[2J"), alias="\udcfe" * 200)
    assert (only(here, veth).name, only(here, veth).alias) == ("\udcff\x1b[2J", "\udcfe" * 200)
    here.change(veth, name=IfName("vh0"), alias="")
    assert only(here, veth).name == "vh0"


def test_default_routes_of_both_families_and_every_hop(host: SimNetns, here: LinkSocket) -> None:
    assert here.default_route_links() == frozenset()
    with veth_pair("d0", "d1") as (d0, d1), veth_pair("d2", "d3") as (d2, d3):
        for number, index in enumerate((d0, d1, d2, d3)):
            here.set_up(IfIndex(index))
            here.add_address(IfIndex(index), ipaddress.ip_interface(f"198.51.{number}.1/24"))
        hops = [{"gateway": f"198.51.{number}.9"} for number in (0, 1)]
        host.netlink(lambda ipr: ipr.route("add", family=2, dst="default", multipath=hops))
        host.netlink(lambda ipr: ipr.route("add", family=2, dst="default", oif=d3, table=77))
        host.netlink(lambda ipr: ipr.route("add", dst="10.9.0.0/16", oif=d3))
        assert here.default_route_links() == {d0, d1}
        host.netlink(lambda ipr: ipr.route("add", dst="default", oif=d2, family=10))
        assert here.default_route_links() == {d0, d1, d2}


def test_a_dump_of_many_links_is_whole(here: LinkSocket) -> None:
    with netns() as made, open_netns(made.path) as handle, LinkSocket(handle) as links:

        def fill(ipr: object) -> None:
            for number in range(150):
                ipr.link("add", ifname=f"many{number}", kind="ifb")  # type: ignore[attr-defined]

        made.netlink(fill)
        assert len({link.name for link in links.dump()}) == 151


def test_a_dying_namespace_destroys_its_veth(here: LinkSocket) -> None:
    with veth_pair("vh0", "vp0") as (index, _):
        with netns() as made, open_netns(made.path) as handle:
            here.move(IfIndex(index), handle, name=IfName("eth0"))
        wait_until(lambda: here.by_index(IfIndex(index)) is None)
        wait_until(lambda: len(here.dump()) == 1)


def test_a_macvlan_knows_its_lower_device_also_from_within_the_pod(
    here: LinkSocket, pod: LinkSocket, pod_netns: NetnsHandle, veth: IfIndex
) -> None:
    with macvlan("mv0", veth) as index:
        link = IfIndex(index)
        assert (only(here, link).kind, only(here, link).peer) == ("macvlan", veth)
        here.move(link, pod_netns, name=IfName("net1"))
        assert (only(pod, link).kind, only(pod, link).peer) == ("macvlan", veth)
        with host_netns() as home:
            pod.move(link, home, name=IfName("mv0"))


def test_a_ports_bridge_is_its_master(host: SimNetns, here: LinkSocket, veth: IfIndex) -> None:
    with soft_link("br0", "bridge") as bridge:
        host.netlink(lambda ipr: ipr.link("set", index=veth, master=bridge))
        assert only(here, veth).master == bridge


def test_default_routes_by_nexthop_objects_are_found(host: SimNetns, here: LinkSocket) -> None:
    """Also where the kernel is told not to repeat a nexthop's link in the route."""
    Path("/proc/sys/net/ipv4/nexthop_compat_mode").write_text("0")
    group = struct.pack("=IBBHIBBH", 1, 0, 0, 0, 2, 0, 0, 0)
    with veth_pair("d0", "d1") as (d0, d1), LinkSocket(None) as raw:
        for index in (d0, d1):
            here.set_up(IfIndex(index))
        for number, index in enumerate((d0, d1)):
            here.add_address(IfIndex(index), ipaddress.ip_interface(f"198.51.{number}.1/24"))
            gateway = bytes((198, 51, number, 9))
            add_nexthop(raw, attribute(1, number + 1) + attribute(5, index) + attribute(6, gateway))
        add_nexthop(raw, attribute(1, 10) + attribute(2, group), family=socket.AF_UNSPEC)
        route = struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 254, 4, 0, 1, 0) + attribute(30, 10)
        send(raw, 24, route)
        assert here.default_route_links() == {d0, d1}


def attribute(kind: int, value: int | bytes) -> bytes:
    data = struct.pack("=I", value) if isinstance(value, int) else value
    return struct.pack("=HH", 4 + len(data), kind) + data


def add_nexthop(links: LinkSocket, attributes: bytes, family: int = socket.AF_INET) -> None:
    send(links, 104, struct.pack("=BBBBI", family, 0, 4, 0, 0) + attributes)


def send(links: LinkSocket, kind: int, payload: bytes) -> None:
    links._transport.change(
        "set up a test", lambda flags, number: header(kind, flags, number, payload), 0x600
    )
