"""Links in pods are read from the host's namespace, each answer of the namespace that was asked about."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from hw import wire
from hw.elsewhere import Elsewhere, Nsid, is_of
from hw.model import IfIndex, IfName
from hw.netlink import LinkSocket
from hw.netns import NetnsHandle, open_netns
from hw.statistics import link_statistics
from kndsim.links import SimNetns, netns, private_host, veth_pair

FAR = 400
"""More than a socket's buffer has room for the answers of."""


@pytest.fixture(autouse=True)
def host() -> Iterator[SimNetns]:
    with private_host() as made:
        yield made


@pytest.fixture
def pod() -> Iterator[NetnsHandle]:
    with netns() as made, open_netns(made.path) as handle:
        yield handle


@pytest.fixture
def moved(pod: NetnsHandle) -> Iterator[IfIndex]:
    """A veth in the pod, its peer at home."""
    with veth_pair("vh0", "vp0") as (index, _), LinkSocket(None) as home:
        home.move(IfIndex(index), pod, name=IfName("net1"))
        yield IfIndex(index)


def number(pod: NetnsHandle) -> Nsid:
    with Elsewhere() as elsewhere:
        found = elsewhere.number_of(pod)
    assert found is not None
    return found


def test_a_namespace_that_no_link_was_moved_to_has_no_number_and_is_given_none(pod: NetnsHandle) -> None:
    with Elsewhere() as elsewhere:
        assert elsewhere.number_of(pod) is None
        assert elsewhere.number_of(pod) is None


def test_a_link_in_a_pod_is_read_as_there_with_its_counters(pod: NetnsHandle, moved: IfIndex) -> None:
    with Elsewhere() as elsewhere, LinkSocket(pod) as there:
        there.set_up(moved)
        place = (number(pod), moved)
        (found,) = elsewhere.links([place])
        assert found is not None
        assert is_of(found, place[0])
        assert wire.link(found).name == "net1"
        assert link_statistics(found).keys() == there.statistics(moved).keys()


def test_a_link_of_the_host_with_the_same_index_is_never_taken_for_the_pods(
    pod: NetnsHandle, moved: IfIndex
) -> None:
    with Elsewhere() as elsewhere, LinkSocket(None) as home:
        own = next(link.ifindex for link in home.dump() if link.name == "vp0")
        assert list(elsewhere.links([(number(pod), own)])) == [None]
        assert list(elsewhere.links([(Nsid(number(pod) + 1), moved)])) == [None]
    with LinkSocket(pod) as there:
        assert there.by_index(own) is None


def test_many_are_asked_without_one_being_lost(pod: NetnsHandle, moved: IfIndex) -> None:
    place = (number(pod), moved)
    with Elsewhere() as elsewhere:
        places = [place, (place[0], IfIndex(moved + 1000))] * (FAR // 2)
        found = list(elsewhere.links(places))
    assert [link is not None for link in found] == [True, False] * (FAR // 2)


def test_a_number_is_its_namespaces_for_life_and_nothing_keeps_that_alive(moved: IfIndex) -> None:
    with netns() as made, open_netns(made.path) as handle, LinkSocket(None) as home:
        before = len(os.listdir("/proc/self/fd"))
        peer = next(link.ifindex for link in home.dump() if link.name == "vp0")
        home.move(peer, handle, name=IfName("net1"))
        assert number(handle) == number(handle)
        assert len(os.listdir("/proc/self/fd")) == before
        with Elsewhere() as elsewhere:
            (found,) = elsewhere.links([(number(handle), peer)])
        assert found is not None
        link = wire.link(found)
        assert link.ifindex == peer, os.strerror(errno.ENODEV)
