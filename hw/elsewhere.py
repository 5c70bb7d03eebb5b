"""Links of other network namespaces, asked for from this one, many with one message.

Invariant: reads only, and nobody goes there: the kernel is told which namespace is meant by the number that
the host's own has for it. Once a namespace is no more, its number may be given to another one. So an answer
is of the link that was meant only if what is in it says so.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NewType

from hw.errors import NotFound
from hw.model import IfIndex
from hw.netns import NetnsHandle
from hw.transport import Encode, Transport, header, open_netlink
from hw.wire import attribute, attributes

Nsid = NewType("Nsid", int)
"""What the host's namespace calls another one."""
Place = tuple[Nsid, IfIndex]

_RTM_GETLINK = 18
_RTM_GETNSID = 90
_NETNSA_NSID = 1
_NETNSA_FD = 3
_GENERAL_HEADER = 4
_LINK_HEADER = 16
_IFLA_TARGET_NETNSID = 46
_NUMBER = struct.Struct("=i")
_TOGETHER = 16
"""Answers that fit in a socket's buffer as small as systems have it."""


class Elsewhere:
    """One socket of this namespace. A context manager."""

    def __init__(self) -> None:
        self._transport = Transport(open_netlink(None))

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def number_of(self, netns: NetnsHandle) -> Nsid | None:
        """Its number, for as long as it lives; None where it has none. It was given one when a link was first
        moved there."""
        wanted = bytes(_GENERAL_HEADER) + attribute(_NETNSA_FD, _NUMBER.pack(netns.fd))
        try:
            answer = self._transport.get(f"ask for the number of {netns.path}", _packed(_RTM_GETNSID, wanted))
        except NotFound:
            return None
        told = attributes(answer[0], _GENERAL_HEADER).get(_NETNSA_NSID) if answer else None
        number = _number(told)
        return Nsid(number) if number is not None and number >= 0 else None

    def links(self, places: Sequence[Place]) -> Iterator[bytes | None]:
        """Of each place the RTM_NEWLINK, with counters; None where there is nothing, or no answer came."""
        for start in range(0, len(places), _TOGETHER):
            asked = [_get_link(*place) for place in places[start : start + _TOGETHER]]
            yield from self._transport.get_each("read links in pods", asked)


def is_of(link: bytes, number: Nsid) -> bool:
    """Whether an answer is of that namespace. A kernel that knows of no others gives a link of its own."""
    return _number(attributes(link, _LINK_HEADER).get(_IFLA_TARGET_NETNSID)) == number


def _get_link(number: Nsid, ifindex: IfIndex) -> Encode:
    target = attribute(_IFLA_TARGET_NETNSID, _NUMBER.pack(number))
    return _packed(_RTM_GETLINK, struct.pack("=BxHiII", 0, 0, ifindex, 0, 0) + target)


def _packed(kind: int, payload: bytes) -> Encode:
    return lambda flags, sequence: header(kind, flags, sequence, payload)


def _number(told: bytes | None) -> int | None:
    return int(_NUMBER.unpack(told)[0]) if told is not None and len(told) == _NUMBER.size else None
