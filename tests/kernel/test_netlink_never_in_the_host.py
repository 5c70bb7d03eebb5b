"""Nothing that is meant for a pod can land in the host's namespace.

Link 1, loopback, is in every namespace: an operation that went astray would find it and succeed.
"""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hw.errors import BadNetns, HwError
from hw.model import Direction, IfIndex, IfName, LinkFlags
from hw.netlink import LinkSocket
from hw.netns import NetnsHandle, host_netns, open_netns, run_in
from kndsim.links import SimNetns, netns, private_host, veth_pair
from kndsim.netns import in_thread

LO = IfIndex(1)


def add_altname(links: LinkSocket, index: IfIndex) -> None:
    links.remove_altnames(index, ["astray"])
    links.add_altnames(index, ["astray"])


CHANGES: dict[str, Callable[[LinkSocket, IfIndex], object]] = {
    "set_up": lambda links, index: links.set_up(index),
    "set_down": lambda links, index: links.set_down(index),
    "alias": lambda links, index: links.change(index, alias="astray"),
    "flags": lambda links, index: links.change(index, set_flags=LinkFlags.ALLMULTI),
    "address": lambda links, index: links.add_address(index, ipaddress.ip_interface("192.0.2.1/32")),
    "altnames": lambda links, index: add_altname(links, index),
    "clsact": lambda links, index: links.add_clsact(index),
}


@pytest.fixture(autouse=True)
def host() -> Iterator[SimNetns]:
    with private_host() as made:
        yield made


@pytest.fixture
def pod() -> Iterator[NetnsHandle]:
    with netns() as made, open_netns(made.path) as handle:
        yield handle


def everything_here() -> object:
    with LinkSocket(None) as here:
        links = here.dump()
        qdiscs = tuple(here.qdiscs(link.ifindex) for link in links)
        return links, here.all_addresses(), qdiscs, here.default_route_links()


@pytest.fixture(autouse=True)
def _host_is_unchanged(host: SimNetns) -> Iterator[None]:
    before = everything_here()
    yield
    assert everything_here() == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_pods_socket_acts_in_the_pod_from_every_thread(pod: NetnsHandle, name: str) -> None:
    change = CHANGES[name]
    with LinkSocket(pod) as links:
        made_elsewhere = in_thread(lambda: LinkSocket(pod))
        with made_elsewhere:
            for act in (lambda: change(links, LO), lambda: change(made_elsewhere, LO)):
                act()
                in_thread(act)
                run_in(pod, act)
        # A thread that is in the host all the same uses the pod's socket: still the pod.
        with host_netns() as home:
            run_in(home, lambda: change(links, LO))
        assert {link.name for link in links.dump()} == {"lo"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_socket_kept_from_opening_acts_in_the_pod(host: SimNetns, name: str) -> None:
    with netns() as made, open_netns(made.path, spare=True) as pod:
        before = threading.active_count(), os.listdir("/proc/self/fd")
        with LinkSocket(pod) as links:
            CHANGES[name](links, LO)
            assert pod.take_spare() is None
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (before[0], len(before[1]) - 1)


def test_a_kept_socket_that_is_another_pods_is_refused(pod: NetnsHandle) -> None:
    with netns() as made, open_netns(made.path, spare=True) as other:
        other.cookie = pod.cookie
        with pytest.raises(BadNetns, match="another network namespace"):
            LinkSocket(other)


def test_a_kept_socket_goes_with_its_handle() -> None:
    with netns() as made:
        before = len(os.listdir("/proc/self/fd"))
        with open_netns(made.path, spare=True):
            assert len(os.listdir("/proc/self/fd")) == before + 2
        assert len(os.listdir("/proc/self/fd")) == before


def test_two_pods_sockets_do_not_mix(pod: NetnsHandle) -> None:
    errors: list[BaseException] = []

    def name_it(links: LinkSocket, alias: str) -> None:
        try:
            for _ in range(50):
                links.change(LO, alias=alias)
                found = links.by_index(LO)
                assert found is not None
                assert found.alias == alias
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    with (
        netns() as other_made,
        open_netns(other_made.path) as other,
        LinkSocket(pod) as first,
        LinkSocket(other) as second,
    ):
        threads = [threading.Thread(target=name_it, args=pair) for pair in ((first, "one"), (second, "two"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("broken", ["closed", "a file", "the host's", "another pod's"])
def test_a_handle_gone_wrong_opens_nothing(pod: NetnsHandle, broken: str, name: str) -> None:
    """The descriptor's number has come to mean something else since the namespace was checked."""
    with netns() as other, open("/dev/null") as null, host_netns() as home:
        if broken == "closed":
            pod.close()
        else:
            stand_in = {"a file": null.fileno(), "the host's": home.fd, "another pod's": other.fd}[broken]
            os.dup2(stand_in, pod.fd, inheritable=False)
        with pytest.raises(BadNetns), LinkSocket(pod) as links:
            CHANGES[name](links, LO)
        assert other.link_names() == {"lo"}


def test_a_thread_whose_setns_fails_opens_nothing(pod: NetnsHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def setns(self, *_: object) -> int:
            return -1

    monkeypatch.setattr("hw.netns._libc", Refusing())
    with pytest.raises(BadNetns):
        LinkSocket(pod)


def test_a_thread_whose_setns_only_pretends_opens_nothing(
    pod: NetnsHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pretending:
        def setns(self, *_: object) -> int:
            return 0

    monkeypatch.setattr("hw.netns._libc", Pretending())
    called: list[int] = []
    with pytest.raises(BadNetns, match="did not take effect"):
        run_in(pod, lambda: called.append(1))
    with pytest.raises(BadNetns):
        LinkSocket(pod)
    assert called == []


def test_a_pod_that_is_gone_or_is_the_host_gives_no_handle(tmp_path: Path) -> None:
    (tmp_path / "left-over").write_text("")
    with netns() as made:
        gone = made.path
    for path in (gone, tmp_path / "left-over", tmp_path / "never", Path("/proc/self/ns/net")):
        with pytest.raises(HwError), open_netns(path) as handle, LinkSocket(handle) as links:
            links.set_down(LO)


def test_a_move_names_its_link_in_the_sockets_own_namespace(pod: NetnsHandle) -> None:
    """The same index is free in the host and taken in the pod: the pod's goes, nothing of the host."""
    with (
        netns() as made,
        veth_pair("p0", "p1", where=made) as (index, _),
        open_netns(made.path) as source,
        LinkSocket(source) as links,
        LinkSocket(pod) as target,
    ):
        links.move(IfIndex(index), pod, name=IfName("eth0"))
        assert [link.name for link in target.dump() if link.ifindex == index] == ["eth0"]
        target.move(IfIndex(index), source, name=IfName("p0"))


def test_a_filter_for_a_pod_is_not_put_on_the_hosts_link(pod: NetnsHandle) -> None:
    with LinkSocket(pod) as links, open("/dev/null") as null, pytest.raises(HwError):
        links.add_bpf_filter(LO, Direction.EGRESS, null.fileno(), "astray")
