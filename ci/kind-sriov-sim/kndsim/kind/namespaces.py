"""Nodes as network namespaces, and links seen in and moved between them.

Invariant: no thread but one made for it enters a namespace, and no namespace is held open: one that was kept
alive by an open file would keep a dead node's devices from coming home.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kndsim.kind.engine import Engine, EngineFailed
from kndsim.kind.model import DeviceId, SeenLink
from kndsim.netns import in_netns

T = TypeVar("T")

CONTAINER = "container:"
"""Before a container's name, where a plan says where a node's namespace is."""
FIRST = Path("/proc/self/ns/net")
"""The namespace of this process, which has to be the machine's first."""


class NodeAway(Exception):
    """A node has no namespace now; a sentence says why."""


class CannotMove(Exception):
    """A sentence that names the link."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Where each node's namespace is found, asked anew each time."""

    where: Mapping[str, str]
    engine: Engine | None = None

    def path(self, node: str) -> Path:
        """NodeAway if it has none now."""
        where = self.where[node]
        if not where.startswith(CONTAINER):
            path = Path(where)
        elif self.engine is None:
            raise NodeAway(f"node {node} is a container, and no engine was named")
        else:
            try:
                path = Path(f"/proc/{self.engine.pid(where.removeprefix(CONTAINER))}/ns/net")
            except EngineFailed as error:
                raise NodeAway(str(error)) from error
        if not path.exists():
            raise NodeAway(f"node {node} has no network namespace at {path}")
        return path


def links(where: Path = FIRST) -> list[SeenLink]:
    """All links of a namespace."""
    return in_netns(where, lambda: _with_iproute(lambda ipr: [_seen(link) for link in ipr.get_links()]))


def find(id: DeviceId, where: Path = FIRST) -> SeenLink | None:
    return next((link for link in links(where) if link.id == id), None)


def move(ifindex: int, to: Path, name: str, *, source: Path = FIRST) -> None:
    """Put a link of one namespace into another under a name, by one message; CannotMove."""
    with _opened(to) as fd:
        # The kernel would move it under the name it has, and then fail to rename it.
        if any(link.name == name for link in links(to)):
            raise CannotMove(f"link {ifindex} does not go to {to}, which has a {name} already")
        try:
            in_netns(
                source,
                lambda: _with_iproute(lambda ipr: ipr.link("set", index=ifindex, net_ns_fd=fd, ifname=name)),
            )
        except NetlinkError as error:
            raise CannotMove(f"link {ifindex} does not go to {to} as {name}: {error}") from error


def add_veth(far: str, far_in: Path, near: str, near_in: Path, bridge: int) -> None:
    """A veth pair: near in a node, far up in the bridge of index `bridge`. CannotMove if near is taken."""
    with _opened(near_in) as fd:

        def body(ipr: IPRoute) -> None:
            ipr.link("add", ifname=far, kind="veth", peer={"ifname": near, "net_ns_fd": fd})
            (index,) = ipr.link_lookup(ifname=far)
            ipr.link("set", index=index, master=bridge, state="up")

        try:
            in_netns(far_in, lambda: _with_iproute(body))
        except NetlinkError as error:
            raise CannotMove(f"there will be no veth {near} at {near_in}: {error}") from error


def drop_altname(ifindex: int, name: str, where: Path) -> None:
    """Nothing happens if the link has no such alternative name."""

    def body(ipr: IPRoute) -> None:
        with contextlib.suppress(NetlinkError):
            ipr.link("property_del", index=ifindex, altname=name)

    in_netns(where, lambda: _with_iproute(body))


def set_up(name: str, where: Path) -> None:
    """A link that is there."""
    in_netns(where, lambda: _with_iproute(lambda ipr: ipr.link("set", ifname=name, state="up")))


def add_bridge(name: str, where: Path) -> int:
    """Its ifindex; up."""

    def body(ipr: IPRoute) -> int:
        ipr.link("add", ifname=name, kind="bridge")
        (index,) = ipr.link_lookup(ifname=name)
        ipr.link("set", index=index, state="up")
        return int(index)

    return in_netns(where, lambda: _with_iproute(body))


def _seen(link: Any) -> SeenLink:
    bus, device = link.get_attr("IFLA_PARENT_DEV_BUS_NAME"), link.get_attr("IFLA_PARENT_DEV_NAME")
    port = link.get_attr("IFLA_PHYS_PORT_NAME") or ""
    id = DeviceId(str(bus), str(device), str(port)) if bus and device else None
    return SeenLink(int(link["index"]), str(link.get_attr("IFLA_IFNAME")), id)


def _with_iproute(function: Callable[[IPRoute], T]) -> T:
    with IPRoute() as ipr:
        return function(ipr)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NodeAway(f"no network namespace at {path}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)
