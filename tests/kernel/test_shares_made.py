"""A share of a device is an interface of its own on it, known by what was on record before it was made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bpf.attach import LinkPair
from driver.errors import NotNow, Refusal
from driver.execute.actions import link_up, move_home, move_in
from driver.execute.share import ShareActs
from driver.execute.target import Target
from driver.model import InterfaceConfig, NicConfig, Share, ShareId
from hw import subinterface
from hw.errors import NotFound, Refused
from hw.model import DeviceKind, IfIndex, IfName, LinkSettings, MacAddress
from hw.netlink import LinkSocket
from hw.netns import host_netns, open_netns
from hw.subinterface import FIRST_INDEX, Subinterface, SubinterfaceKind, SubinterfaceMode
from kndsim.links import SimNetns, netns, private_host, soft_link, veth_pair
from tests.unit.journal_values import preparation

INDEX = IfIndex(FIRST_INDEX + 4711)
MAC = MacAddress("02:00:00:00:47:11")
KINDS = [
    Subinterface(kind=SubinterfaceKind.MACVLAN, mode=SubinterfaceMode.BRIDGE),
    Subinterface(kind=SubinterfaceKind.MACVLAN, mode=SubinterfaceMode.PRIVATE),
    Subinterface(kind=SubinterfaceKind.MACVLAN, mode=SubinterfaceMode.VEPA),
]
if os.environ.get("KND_SHARE_KINDS") == "all":
    # Said where it is known that the kernel has them: in guests (tests/vm/test_share_kinds.py).
    KINDS += [
        Subinterface(kind=SubinterfaceKind.IPVLAN, mode=SubinterfaceMode.L2),
        Subinterface(kind=SubinterfaceKind.IPVLAN, mode=SubinterfaceMode.L3),
        Subinterface(kind=SubinterfaceKind.VLAN, vlan=120),
    ]


@pytest.fixture(autouse=True)
def host() -> Iterator[SimNetns]:
    with private_host() as made:
        yield made


@pytest.fixture
def pod() -> Iterator[SimNetns]:
    with netns() as made:
        yield made


@pytest.fixture
def uplink() -> Iterator[IfIndex]:
    with veth_pair("up0", "far0") as (index, _):
        yield IfIndex(index)


@pytest.fixture
def home() -> Iterator[LinkSocket]:
    with LinkSocket(None) as links:
        yield links


class NoPrograms:
    """What is pinned for the share: nothing, or links that say whether the interface lives."""

    def __init__(self) -> None:
        self.pair: LinkPair | None = None

    def state(self, name: str) -> LinkPair | None:
        return self.pair


@contextmanager
def share(
    uplink: IfIndex, pod: SimNetns, made: Subinterface = KINDS[0], *, index: IfIndex = INDEX
) -> Iterator[tuple[Target, ShareActs, NoPrograms]]:
    with ExitStack() as stack:
        home = stack.enter_context(LinkSocket(None))
        parent = home.by_index(uplink)
        assert parent is not None
        known = preparation(0)
        record = replace(
            known,
            key=replace(known.key, share_id=ShareId("0b5c1a52-6f0c-4c55-9a3e-0d3b8d2f6a01")),
            kind=DeviceKind.SHARED,
            share=Share(interface=made, ifname=parent.name),
            identity=subinterface.identity(made, index, uplink),
            dies_with_netns=True,
            config=NicConfig(interface=InterfaceConfig(name=IfName("net1"))),
            baseline=replace(
                LinkSettings.of(parent),
                name=subinterface.name_at_home(index),
                mac=MAC if made.has_own_mac else parent.mac,
            ),
        )
        handle = stack.enter_context(open_netns(pod.path))
        programs = NoPrograms()
        yield (
            Target(
                preparation=record,
                attachment=None,
                home=home,
                home_netns=stack.enter_context(host_netns()),
                pod=stack.enter_context(LinkSocket(handle)),
                pod_netns=handle,
                hint=index,
            ),
            ShareActs(programs),  # type: ignore[arg-type]
            programs,
        )


@pytest.mark.parametrize("made", KINDS, ids=str)
def test_it_is_found_by_its_record_at_home_and_in_the_pod_and_ends_in_both(
    made: Subinterface, uplink: IfIndex, pod: SimNetns
) -> None:
    with share(uplink, pod, made) as (target, acts, _):
        acts.make(target)
        acts.make(target)
        link = target.find_at_home()
        assert link is not None
        assert (link.ifindex, link.kind, link.peer, link.up) == (INDEX, made.kind, uplink, False)
        assert link.mac == target.preparation.baseline.mac
        assert subinterface.is_ours(link)
        move_in(target)
        link_up(target)
        inside = target.find_in_pod()
        assert inside is not None
        assert (inside.ifindex, inside.name) == (INDEX, "net1")
        acts.make(target)
        assert target.find_at_home() is None
        move_home(target)
        assert target.find_at_home() is not None
        move_in(target)
        acts.remove(target)
        acts.remove(target)
        assert target.find_in_pod() is None
        assert target.find_at_home() is None


def test_the_device_underneath_stays_as_it_is(uplink: IfIndex, pod: SimNetns, home: LinkSocket) -> None:
    home.set_up(uplink)
    before = home.by_index(uplink)
    with share(uplink, pod) as (target, acts, _):
        acts.make(target)
        move_in(target)
        link_up(target)
        acts.remove(target)
    assert home.by_index(uplink) == before


@pytest.mark.parametrize("made", KINDS, ids=str)
def test_it_is_down_at_home_whatever_becomes_of_the_device_underneath(
    made: Subinterface, uplink: IfIndex, pod: SimNetns, home: LinkSocket
) -> None:
    with share(uplink, pod, made) as (target, acts, _):
        acts.make(target)
        for change in (home.set_up, home.set_down, home.set_up):
            change(uplink)
            link = target.find_at_home()
            assert link is not None
            assert not link.up
        acts.remove(target)


def test_where_its_index_is_another_interfaces_a_retry_is_asked_for(uplink: IfIndex, pod: SimNetns) -> None:
    with (
        share(uplink, pod) as (target, acts, _),
        soft_link("br0", "bridge", index=INDEX),
        pytest.raises(NotNow, match=f"another interface has the index {INDEX}"),
    ):
        acts.make(target)


def test_a_device_in_a_bridge_is_refused_with_a_reason(
    uplink: IfIndex, pod: SimNetns, host: SimNetns
) -> None:
    with share(uplink, pod) as (target, acts, _), soft_link("br0", "bridge") as bridge:
        host.netlink(lambda ipr: ipr.link("set", index=uplink, master=bridge))
        with pytest.raises(Refusal, match=r"cannot be made: .*EBUSY.* is in a bridge or bond") as raised:
            acts.make(target)
        assert raised.value.reason == "ShareRefused"


def test_without_the_device_underneath_it_is_asked_for_again(pod: SimNetns, home: LinkSocket) -> None:
    with veth_pair("up1", "far1") as (index, _), share(IfIndex(index), pod) as (target, acts, _):
        home.delete(IfIndex(index))
        with pytest.raises(NotNow, match="not there"):
            acts.make(target)


def test_one_that_a_pod_hides_is_neither_made_twice_nor_called_gone(uplink: IfIndex, pod: SimNetns) -> None:
    with share(uplink, pod) as (target, acts, programs), netns() as hidden:
        acts.make(target)
        move_in(target)
        pod.netlink(lambda ipr: ipr.link("set", index=INDEX, net_ns_fd=str(hidden.path)))
        programs.pair = SimpleNamespace(alive=True)  # type: ignore[assignment]
        for act in (acts.make, acts.remove):
            with pytest.raises(NotNow, match="in a network namespace that its pod made"):
                act(target)
        assert target.find_at_home() is None
        programs.pair = SimpleNamespace(alive=False)  # type: ignore[assignment]
        hidden.netlink(lambda ipr: ipr.link("del", index=INDEX))
        acts.make(target)
        assert target.find_at_home() is not None
        acts.remove(target)


def test_what_the_kernel_refuses_comes_with_its_words(uplink: IfIndex, home: LinkSocket) -> None:
    add = home.add_subinterface
    add(KINDS[0], index=INDEX, parent=uplink, name=IfName("one"))
    with pytest.raises(Refused, match=r"make 'two', a macvlan bridge, on link .*EEXIST"):
        add(KINDS[0], index=INDEX, parent=uplink, name=IfName("two"))
    with pytest.raises(Refused, match="EEXIST"):
        add(KINDS[0], index=IfIndex(INDEX + 1), parent=uplink, name=IfName("one"))
    with pytest.raises(NotFound):
        add(KINDS[0], index=IfIndex(INDEX + 2), parent=IfIndex(99_999), name=IfName("three"))
