"""Shaping by HTB: a limit, and classes that share it, on a link of one network namespace; queues by fq, whose
packets say when they leave; and ifb links.

Invariant: encoding and decoding are pure and total over what a kernel or a tenant can put in a message. Rates
are bytes per second and sizes bytes, of Ethernet frames without preamble and checksum: HTB counts the headers
of every segment that a packet stands for. A tree is changed in place, without losing what is queued, as long
as nobody else put another in its stead.

Layouts are those of uapi linux/pkt_sched.h.
"""

from __future__ import annotations

import contextlib
import errno
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NewType

from hw import wire
from hw.errors import HwError, NotFound, Refused
from hw.model import IfIndex, IfName
from hw.transport import Encode, Transport, header

Minor = NewType("Minor", int)
"""The lower half of a class id: a class within its qdisc."""

ROOT_HANDLE = 0x4B4E0000
"""Of our trees, in the upper half; the kernel numbers those that it names itself from 0x8000 on. A packet
whose priority is ROOT_HANDLE | minor goes to that class."""
TOP = Minor(1)
"""The class that has the whole limit."""

_RTM_NEWLINK = 16
_RTM_NEWQDISC = 36
_RTM_DELQDISC = 37
_RTM_GETQDISC = 38
_RTM_NEWTCLASS = 40
_RTM_DELTCLASS = 41
_RTM_GETTCLASS = 42
_NLM_F_EXCL = 0x200
_NLM_F_REPLACE = 0x100
_NLM_F_CREATE = 0x400

_TC = struct.Struct("=BxxxiIII")
_LINK = struct.Struct("=BxHiII")
_AT_ROOT = 0xFFFFFFFF
_TCA_KIND, _TCA_OPTIONS, _TCA_STATS2 = 1, 2, 7
_STATS_QUEUE = 3
_STATS_FIELDS = struct.Struct("=IIIII")
"""struct gnet_stats_queue: qlen, backlog, drops, requeues, overlimits."""
_HTB_PARMS, _HTB_INIT, _HTB_RATE64, _HTB_CEIL64 = 1, 2, 6, 7
_HTB_GLOBAL = struct.Struct("=IIIII")
"""struct tc_htb_glob: version, rate2quantum, default class, debug, direct packets."""
_HTB_OPTIONS = struct.Struct("=BBHhHIBBHhHIIIIII")
"""struct tc_htb_opt: two struct tc_ratespec, then buffer, cbuffer, quantum, level, prio."""
_HTB_VERSION = 3
_LINKLAYER_ETHERNET = 1
"""Else the kernel wants a table of times, as it did before it could divide."""
_U32 = 0xFFFFFFFF
_TICK_NS = 64
"""PSCHED_SHIFT is 6: HTB's bursts are times, in units of 64 ns."""
_FQ_CODEL = {"target": 1, "limit": 2, "ecn": 4, "memory": 9}
_CODEL_TARGET_US = 5_000
_CODEL_PACKETS = 10_240
_FQ = {"packets": 1, "flow_packets": 2}
_FQ_PRIOMAP = 16
_FQ_ONE_BAND = struct.pack("=i16B", 3, *[1] * 16)
"""struct tc_prio_qopt. A priority here is a class of ours and says nothing of fq's bands, which came with
6.7; older kernels look past it."""

_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 18, 1


class NoFairQueues(HwError):
    """This kernel has no fq_codel."""


class NoDepartures(HwError):
    """This kernel has no fq."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HtbClass:
    """A leaf of a tree. rate is its own, and up to ceil it takes what the others leave, those of a lower
    priority (a higher number) last. queue is how many bytes may wait."""

    minor: Minor
    rate: int
    ceil: int
    priority: int
    queue: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HtbTree:
    """A limit and its classes. default takes packets whose priority names none. burst is what may be sent at
    once after a pause; quantum what a class sends in its turn."""

    rate: int
    burst: int
    quantum: int
    default: Minor
    classes: tuple[HtbClass, ...]

    def __post_init__(self) -> None:
        minors = [TOP, *(each.minor for each in self.classes)]
        if len(set(minors)) < len(minors) or self.default not in minors[1:]:
            raise ValueError("the classes of a tree need a minor number each, and the default is one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class FqQueue:
    """Sends each packet when the packet says (skb->tstamp), by CLOCK_MONOTONIC. It has room for so many
    packets."""

    packets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """Of a link's root qdisc. drops counts packets, modulo 2**32, since it was put there."""

    kind: str
    handle: int
    backlog: int
    drops: int


@dataclass(frozen=True, slots=True)
class _Found:
    """A class as it is."""

    parent: int
    rate: int
    ceil: int
    priority: int


class Qdiscs:
    """Over a LinkSocket's transport, and so in its namespace, which errors call where. Raises hw.errors."""

    def __init__(self, transport: Transport, where: str) -> None:
        self._transport = transport
        self._where = where

    def shape(self, ifindex: IfIndex, tree: HtbTree, *, fair: bool) -> None:
        """Make tree the link's root qdisc, or change the one that is there into it.

        fair: what waits in a class waits by flow, and is marked rather than dropped where it can be;
        NoFairQueues where the kernel cannot.
        """
        if not self._is_ours(ifindex, tree):
            self._begin(ifindex, tree)
        self._set_class(ifindex, TOP, _AT_ROOT, _options(tree.rate, tree.rate, 0, tree))
        for each in tree.classes:
            parent = ROOT_HANDLE | TOP
            self._set_class(ifindex, each.minor, parent, _options(each.rate, each.ceil, each.priority, tree))
            self._set_queue(ifindex, each, fair=fair)

    def queue(self, ifindex: IfIndex, wanted: FqQueue) -> None:
        """Make it the link's root qdisc, or change the one that is there into it. NoDepartures where the
        kernel has none."""
        if self._fq(ifindex) is None:
            self._clear(ifindex)
        encode = _message(_RTM_NEWQDISC, ifindex, ROOT_HANDLE, _AT_ROOT, "fq", _fq_options(wanted))
        try:
            self._transport.change(
                self._what("set a fq queue of", ifindex), encode, _NLM_F_CREATE | _NLM_F_REPLACE
            )
        except Refused as error:
            if error.errno == errno.ENOENT:
                raise NoDepartures(str(error)) from error
            raise

    def is_queued(self, ifindex: IfIndex, wanted: FqQueue) -> bool:
        """Whether the link's root qdisc is that, now."""
        return self._fq(ifindex) == wanted

    def unshape(self, ifindex: IfIndex) -> None:
        """Take our tree or queue off; another's, or none, is left as it is."""
        found = self.root(ifindex)
        if found is None or found.handle != ROOT_HANDLE:
            return
        encode = _message(_RTM_DELQDISC, ifindex, 0, _AT_ROOT)
        with contextlib.suppress(NotFound):
            self._transport.change(self._what("take the limit off", ifindex), encode)

    def is_shaped(self, ifindex: IfIndex, tree: HtbTree) -> bool:
        """Whether the link's root qdisc limits as tree says, now."""
        if not self._is_ours(ifindex, tree):
            return False
        found = self._classes(ifindex)
        wanted = {TOP: (tree.rate, tree.rate)} | {each.minor: (each.rate, each.ceil) for each in tree.classes}
        return {minor: (each.rate, each.ceil) for minor, each in found.items()} == wanted

    def root(self, ifindex: IfIndex) -> QueueStats | None:
        """The link's root qdisc; None where it has none of its own."""
        for payload in self._dump_qdiscs(ifindex):
            index, handle, parent, attributes = _parsed(payload)
            if index == ifindex and parent == _AT_ROOT:
                backlog, drops = _queue_stats(attributes)
                kind = wire.text(attributes.get(_TCA_KIND, b""))
                return QueueStats(kind=kind, handle=handle, backlog=backlog, drops=drops)
        return None

    def add_ifb(self, name: IfName) -> None:
        """Make an ifb link: a device whose transmit queue is another's receive queue. Refused with EEXIST
        where the name is taken, Unsupported where the kernel has none."""
        kind = wire.attribute(_IFLA_INFO_KIND, b"ifb")
        payload = (
            _LINK.pack(0, 0, 0, 0, 0)
            + wire.attribute(_IFLA_IFNAME, wire.raw(name) + b"\0")
            + wire.attribute(_IFLA_LINKINFO, kind)
        )
        encode = _encoded(_RTM_NEWLINK, payload)
        self._transport.change(
            f"make an ifb link {name!a} in {self._where}", encode, _NLM_F_CREATE | _NLM_F_EXCL
        )

    # --- one message each -----------------------------------------------------------------------------

    def _begin(self, ifindex: IfIndex, tree: HtbTree) -> None:
        """HTB's default class cannot be changed: whatever is in its place goes with all its classes."""
        self._clear(ifindex)
        options = wire.attribute(_HTB_INIT, _HTB_GLOBAL.pack(_HTB_VERSION, 10, tree.default, 0, 0))
        encode = _message(_RTM_NEWQDISC, ifindex, ROOT_HANDLE, _AT_ROOT, "htb", options)
        self._transport.change(self._what("limit", ifindex), encode, _NLM_F_CREATE | _NLM_F_REPLACE)

    def _clear(self, ifindex: IfIndex) -> None:
        encode = _message(_RTM_DELQDISC, ifindex, 0, _AT_ROOT)
        with contextlib.suppress(NotFound):
            try:
                self._transport.change(self._what("take the qdisc off", ifindex), encode)
            except Refused as error:
                # There is none but the kernel's own.
                if error.errno not in (errno.ENOENT, errno.EINVAL):
                    raise

    def _set_class(self, ifindex: IfIndex, minor: Minor, parent: int, options: bytes) -> None:
        encode = _message(_RTM_NEWTCLASS, ifindex, ROOT_HANDLE | minor, parent, "htb", options)
        self._transport.change(self._what("set a traffic class of", ifindex), encode, _NLM_F_CREATE)

    def _set_queue(self, ifindex: IfIndex, leaf: HtbClass, *, fair: bool) -> None:
        kind, options = ("fq_codel", _fq_codel(leaf)) if fair else ("bfifo", struct.pack("=I", leaf.queue))
        encode = _message(_RTM_NEWQDISC, ifindex, 0, ROOT_HANDLE | leaf.minor, kind, options)
        try:
            self._transport.change(
                self._what(f"set a {kind} queue of", ifindex), encode, _NLM_F_CREATE | _NLM_F_REPLACE
            )
        except Refused as error:
            if fair and error.errno == errno.ENOENT:
                raise NoFairQueues(str(error)) from error
            raise

    # --- reading --------------------------------------------------------------------------------------

    def _is_ours(self, ifindex: IfIndex, tree: HtbTree) -> bool:
        """Whether there is a tree of the same form, whatever its rates are."""
        for payload in self._dump_qdiscs(ifindex):
            index, handle, parent, attributes = _parsed(payload)
            if (index, handle, parent) != (ifindex, ROOT_HANDLE, _AT_ROOT):
                continue
            # Another kind's options need not even be attributes, and our number is anybody's to take.
            if wire.text(attributes.get(_TCA_KIND, b"")) != "htb":
                return False
            told = wire.attributes(attributes.get(_TCA_OPTIONS, b"")).get(_HTB_INIT, b"")
            if len(told) < _HTB_GLOBAL.size:
                return False
            parents = {minor: found.parent for minor, found in self._classes(ifindex).items()}
            wanted = {TOP: _AT_ROOT} | {each.minor: ROOT_HANDLE | TOP for each in tree.classes}
            return _HTB_GLOBAL.unpack_from(told)[2] == tree.default and parents == wanted
        return False

    def _fq(self, ifindex: IfIndex) -> FqQueue | None:
        """Ours, as it is; None where the root is something else. One with less room for a flow
        has only that."""
        for payload in self._dump_qdiscs(ifindex):
            index, handle, parent, attributes = _parsed(payload)
            if (index, handle, parent) != (ifindex, ROOT_HANDLE, _AT_ROOT):
                continue
            if wire.text(attributes.get(_TCA_KIND, b"")) != "fq":
                return None
            told = wire.attributes(attributes.get(_TCA_OPTIONS, b""))
            rooms = [told.get(number, b"") for number in _FQ.values()]
            if any(len(room) != 4 for room in rooms):
                return None
            return FqQueue(packets=min(int.from_bytes(room, sys.byteorder) for room in rooms))
        return None

    def _classes(self, ifindex: IfIndex) -> Mapping[Minor, _Found]:
        encode = _message(_RTM_GETTCLASS, ifindex, 0, 0)
        what = self._what("read the traffic classes of", ifindex)
        return dict(_found(ifindex, self._transport.dump(what, encode, _RTM_NEWTCLASS)))

    def _dump_qdiscs(self, ifindex: IfIndex) -> list[bytes]:
        encode = _message(_RTM_GETQDISC, ifindex, 0, 0)
        return self._transport.dump(self._what("read the qdiscs of", ifindex), encode, _RTM_NEWQDISC)

    def _what(self, verb: str, ifindex: IfIndex) -> str:
        return f"{verb} link {ifindex} of {self._where}"


# --- encoding -----------------------------------------------------------------------------------------


def _encoded(kind: int, payload: bytes) -> Encode:
    return lambda flags, sequence: header(kind, flags, sequence, payload)


def _message(
    kind: int, ifindex: IfIndex, handle: int, parent: int, name: str = "", options: bytes = b""
) -> Encode:
    """struct tcmsg with TCA_KIND and TCA_OPTIONS."""
    payload = _TC.pack(0, ifindex, handle, parent, 0)
    if name:
        payload += wire.attribute(_TCA_KIND, name.encode() + b"\0") + wire.attribute(_TCA_OPTIONS, options)
    return _encoded(kind, payload)


def _options(rate: int, ceil: int, priority: int, tree: HtbTree) -> bytes:
    """TCA_OPTIONS of a class."""
    packed = _HTB_OPTIONS.pack(
        *(0, _LINKLAYER_ETHERNET, 0, 0, 0, min(rate, _U32)),
        *(0, _LINKLAYER_ETHERNET, 0, 0, 0, min(ceil, _U32)),
        *(_ticks(tree.burst, rate), _ticks(tree.burst, ceil), tree.quantum, 0, priority),
    )
    options = wire.attribute(_HTB_PARMS, packed)
    # Only these say what does not fit in 32 bits: 34 Gbit/s and more.
    if rate > _U32:
        options += wire.attribute(_HTB_RATE64, struct.pack("=Q", rate))
    if ceil > _U32:
        options += wire.attribute(_HTB_CEIL64, struct.pack("=Q", ceil))
    return options


def _ticks(size: int, rate: int) -> int:
    return min(size * 1_000_000_000 // rate // _TICK_NS + 1, _U32)


def _fq_codel(leaf: HtbClass) -> bytes:
    values = {
        "target": _CODEL_TARGET_US,
        "limit": _CODEL_PACKETS,
        "ecn": 1,
        # Counted with the kernel's own bookkeeping, which for small packets is several times their size.
        "memory": leaf.queue * 8,
    }
    return b"".join(
        wire.attribute(_FQ_CODEL[name], struct.pack("=I", min(value, _U32))) for name, value in values.items()
    )


def _fq_options(wanted: FqQueue) -> bytes:
    room = struct.pack("=I", min(wanted.packets, _U32))
    return b"".join(wire.attribute(number, room) for number in _FQ.values()) + wire.attribute(
        _FQ_PRIOMAP, _FQ_ONE_BAND
    )


# --- decoding -----------------------------------------------------------------------------------------


def _parsed(payload: bytes) -> tuple[int, int, int, dict[int, bytes]]:
    """ifindex, handle, parent and attributes of a tcmsg. HwError where it is none."""
    if len(payload) < _TC.size:
        raise HwError("netlink: a traffic control message without its header")
    _, index, handle, parent, _ = _TC.unpack_from(payload)
    return index, handle, parent, wire.attributes(payload, _TC.size)


def _queue_stats(attributes: Mapping[int, bytes]) -> tuple[int, int]:
    """Backlog in bytes and dropped packets; zeros where the kernel does not tell."""
    told = wire.attributes(attributes.get(_TCA_STATS2, b"")).get(_STATS_QUEUE, b"")
    if len(told) < _STATS_FIELDS.size:
        return 0, 0
    _, backlog, drops, _, _ = _STATS_FIELDS.unpack_from(told)
    return backlog, drops


def _found(ifindex: IfIndex, answer: list[bytes]) -> Iterator[tuple[Minor, _Found]]:
    """Our classes in a dump of a link's classes."""
    for payload in answer:
        index, handle, parent, attributes = _parsed(payload)
        options = wire.attributes(attributes.get(_TCA_OPTIONS, b""))
        told = options.get(_HTB_PARMS, b"")
        if index != ifindex or handle & 0xFFFF0000 != ROOT_HANDLE or len(told) < _HTB_OPTIONS.size:
            continue
        fields = _HTB_OPTIONS.unpack_from(told)
        rate, ceil = (
            int.from_bytes(options[wide], "little") if len(options.get(wide, b"")) == 8 else narrow
            for wide, narrow in ((_HTB_RATE64, fields[5]), (_HTB_CEIL64, fields[11]))
        )
        yield Minor(handle & 0xFFFF), _Found(parent, rate, ceil, fields[16])
