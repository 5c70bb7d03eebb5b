"""The host's links, looked at and changed for the demo: each change is taken back.

Invariant: everything set here is a context manager that puts back what it found, and registers that
before it sets anything, so an interrupt in between leaves nothing behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute

from kndsim.demo.choice import SeenLink
from kndsim.netns import in_thread

T = TypeVar("T")

_IFF_UP = 1
_UDEV = Path("/run/udev")


def seen_links() -> tuple[SeenLink, ...]:
    """The links of this netns with what is on them."""
    return here(_seen_links)


def _seen_links(ipr: IPRoute) -> tuple[SeenLink, ...]:
    addresses: dict[int, list[str]] = {}
    for each in ipr.get_addr():
        addresses.setdefault(each["index"], []).append(str(each.get_attr("IFA_ADDRESS")))
    routes: dict[int, list[str]] = {}
    for each in ipr.get_routes():
        destination = each.get_attr("RTA_DST")
        text = f"{destination}/{each['dst_len']}" if destination else "default"
        for index in _hops(each):
            routes.setdefault(index, []).append(text)
    return tuple(
        SeenLink(
            index=link["index"],
            name=link.get_attr("IFLA_IFNAME"),
            up=bool(link["flags"] & _IFF_UP),
            master=link.get_attr("IFLA_MASTER"),
            lower=_lower(link),
            listeners=(link.get_attr("IFLA_PROMISCUITY") or 0) + (link.get_attr("IFLA_ALLMULTI") or 0),
            xdp=_has_xdp(link),
            addresses=tuple(addresses.get(link["index"], ())),
            routes=tuple(routes.get(link["index"], ())),
        )
        for link in ipr.get_links()
    )


def _hops(route: Any) -> Iterator[int]:
    index = route.get_attr("RTA_OIF")
    if index is not None:
        yield int(index)
    for hop in route.get_attr("RTA_MULTIPATH") or ():
        yield int(hop["oif"])


def _lower(link: Any) -> int | None:
    index = link.get_attr("IFLA_LINK")
    elsewhere = link.get_attr("IFLA_LINK_NETNSID") is not None
    return None if index is None or elsewhere or index == link["index"] else int(index)


def _has_xdp(link: Any) -> bool:
    xdp = link.get_attr("IFLA_XDP")
    return bool(xdp is not None and xdp.get_attr("IFLA_XDP_ATTACHED"))


def here(function: Callable[[IPRoute], T]) -> T:
    """Call function with an IPRoute of the caller's namespace, in a thread that ends."""

    def body() -> T:
        with IPRoute() as ipr:
            return function(ipr)

    return in_thread(body)


def link_index(name: str) -> int | None:
    """ifindex of a link of this netns by its name; None if there is none."""
    found = here(lambda ipr: list(ipr.link_lookup(ifname=name)))
    return int(found[0]) if found else None


def udev_is_done(index: int) -> bool:
    """Whether udev, if there is one, has named a new link: it writes a record after that."""
    return not (_UDEV / "control").exists() or (_UDEV / "data" / f"n{index}").exists()


@contextlib.contextmanager
def written(path: Path, value: str) -> Iterator[None]:
    """A kernel file that holds value for the length of the context; one that is not there is let be."""
    try:
        before = path.read_text().strip()
    except FileNotFoundError:
        yield
        return
    if before == value:
        yield
        return
    try:
        path.write_text(value)
        yield
    finally:
        path.write_text(before)


@contextlib.contextmanager
def link_up(name: str) -> Iterator[None]:
    """A link of this netns that is up for the length of the context."""
    index = link_index(name)
    assert index is not None

    if here(lambda ipr: bool(ipr.get_links(index)[0]["flags"] & _IFF_UP)):
        yield
        return
    try:
        here(lambda ipr: ipr.link("set", index=index, state="up"))
        yield
    finally:
        here(lambda ipr: ipr.link("set", index=index, state="down"))
