"""Network namespaces and links to test with: made here, gone with the context that made them.

Invariant: nothing is mounted and nothing is named in the host: a namespace lives by an open file of
this process, and its path is that file in /proc. Links are made inside such namespaces, or in the one
of this process, and every one made is deleted. Independent of hw, which it helps to test.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kndsim.netns import in_thread

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class SimNetns:
    """A network namespace of our own. path can be opened by any process that may look at this one."""

    def __init__(self) -> None:
        """OSError without CAP_SYS_ADMIN."""
        self.fd = in_thread(_unshare)

    @property
    def path(self) -> Path:
        return Path(f"/proc/{os.getpid()}/fd/{self.fd}")

    def close(self) -> None:
        """Let the kernel destroy it (some time later), unless something else holds it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def run(self, function: Callable[[], T]) -> T:
        """Call function in a thread inside the namespace."""

        def body() -> T:
            _setns(self.fd)
            return function()

        return in_thread(body)

    def netlink(self, function: Callable[[IPRoute], T]) -> T:
        """Call function with an IPRoute of the namespace; it must not be kept."""
        return self.run(lambda: _with_iproute(function))

    def link_index(self, name: str) -> int | None:
        """ifindex of a link by its name; None if there is none."""
        found = self.netlink(lambda ipr: ipr.link_lookup(ifname=name))
        return int(found[0]) if found else None

    def link_names(self) -> frozenset[str]:
        return frozenset(self.run(lambda: [name for _, name in socket.if_nameindex()]))


@contextlib.contextmanager
def netns() -> Iterator[SimNetns]:
    """A namespace for the length of the context."""
    made = SimNetns()
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def private_host() -> Iterator[SimNetns]:
    """Put the calling thread, and all threads it starts, into a new namespace; back at the end.

    Call it from the main thread: then the process's own namespace is the new one, which plays the host,
    and whatever goes wrong goes wrong there. loopback is up.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with netns() as made:
            made.netlink(lambda ipr: ipr.link("set", index=1, state="up"))
            _setns(made.fd)
            try:
                yield made
            finally:
                _setns(before)
    finally:
        os.close(before)


@contextlib.contextmanager
def veth_pair(
    name: str, peer: str, *, where: SimNetns | None = None, peer_where: SimNetns | None = None
) -> Iterator[tuple[int, int]]:
    """A veth pair: name in `where` and peer in `peer_where` (None: where the caller is). Yields the
    two ifindexes; deletes the pair wherever its ends are by then, as long as their namespaces live."""
    extra: dict[str, Any] = {"peer": {"ifname": peer}}
    if peer_where is not None:
        extra["peer"]["net_ns_fd"] = peer_where.fd

    def make(ipr: IPRoute) -> int:
        ipr.link("add", ifname=name, kind="veth", **extra)
        return _index_of(ipr, name)

    index = _netlink_in(where, make)
    peer_home = where if peer_where is None else peer_where
    peer_index = _netlink_in(peer_home, lambda ipr: _index_of(ipr, peer))
    try:
        yield index, peer_index
    finally:
        for home, number, kind in ((where, index, "veth"), (peer_home, peer_index, "veth")):
            delete_link(number, kind, where=home)


@contextlib.contextmanager
def soft_link(name: str, kind: str, *, where: SimNetns | None = None, **more: Any) -> Iterator[int]:
    """A link of a kind that the kernel has (ifb, bridge, dummy, vlan with link=...). Yields its ifindex."""

    def make(ipr: IPRoute) -> int:
        ipr.link("add", ifname=name, kind=kind, **more)
        return _index_of(ipr, name)

    index = _netlink_in(where, make)
    try:
        yield index
    finally:
        delete_link(index, kind, where=where)


def macvlan(
    name: str, lower: int, *, where: SimNetns | None = None
) -> contextlib.AbstractContextManager[int]:
    """A macvlan in bridge mode over the link of index lower."""
    return soft_link(name, "macvlan", where=where, link=lower, macvlan_mode="bridge")


def delete_link(ifindex: int, kind: str, *, where: SimNetns | None = None) -> None:
    """Delete a link if it is (still) there and of that kind: an index may be another link's by now."""
    if where is not None and where.fd < 0:
        return

    def delete(ipr: IPRoute) -> None:
        with contextlib.suppress(NetlinkError):
            (link,) = ipr.link("get", index=ifindex)
            info = link.get_attr("IFLA_LINKINFO")
            if info is not None and info.get_attr("IFLA_INFO_KIND") == kind:
                ipr.link("del", index=ifindex)

    _netlink_in(where, delete)


def _index_of(ipr: IPRoute, name: str) -> int:
    # By one message: a look-up by dump makes many links cost their number squared.
    (link,) = ipr.link("get", ifname=name)
    return int(link["index"])


def _netlink_in(where: SimNetns | None, function: Callable[[IPRoute], T]) -> T:
    if where is not None:
        return where.netlink(function)
    # A thread of its own here too: a pyroute2 socket is bound to the thread that first used it.
    return in_thread(lambda: _with_iproute(function))


def _with_iproute(function: Callable[[IPRoute], T]) -> T:
    with IPRoute() as ipr:
        return function(ipr)


def _unshare() -> int:
    if _libc.unshare(_CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot make a network namespace: {os.strerror(code)}")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter a network namespace: {os.strerror(code)}")
