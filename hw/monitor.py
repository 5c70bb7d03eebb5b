"""Hears of changes to the links of the host's namespace, and of hardware that comes and goes.

Invariant: says what to look at again, never what is. Events that come together are told together, and
whenever one may have been lost (the kernel's buffer ran over, a message made no sense) the answer is
RESCAN. Events cost the same however many devices there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Final

from hw import wire
from hw.errors import HwError
from hw.model import IfIndex, LinkInfo
from hw.rdma import nldev
from hw.rdma.netlink import SUBSYSTEM
from hw.rdma.wire import NETLINK_RDMA, NOTIFY_GROUP
from hw.transport import open_netlink

log = logging.getLogger(__name__)

RESCAN: Final = None
"""Told instead of a set of ifindexes: look at everything."""
SETTLE_SECONDS = 0.05
"""How long events are gathered after the first: a move makes about ten of them."""

_RTMGRP_LINK = 1
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100
_GROUPS = _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR
_NETLINK_KOBJECT_UEVENT = 15
_UEVENT_GROUP = 1
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 4 * 1024 * 1024
_DATAGRAM_BYTES = 64 * 1024
_LINK_MESSAGES = frozenset({wire.RTM_NEWLINK, wire.RTM_DELLINK})
_ADDRESS_MESSAGES = frozenset({wire.RTM_NEWADDR, wire.RTM_NEWADDR + 1})
_HARDWARE = frozenset({b"infiniband", b"pci", b"netdevsim"})
_ACTIONS = frozenset({b"add", b"remove", b"bind", b"unbind", b"change"})


class LinkMonitor:
    """Iterate to hear; a context manager. For use within one asyncio loop.

    Yields a frozenset of the ifindexes whose link or addresses changed (gone ones included), or RESCAN.
    Listens from the moment it is made, so scan after making it. uevents False leaves out what netlink
    links do not tell: RDMA devices, and PCI functions whose driver was bound or unbound.

    RDMA devices that come, go or change their netns are uevents; which netdev is whose port is told by
    NETLINK_RDMA, on kernels that do (6.13).
    """

    def __init__(self, *, settle: float = SETTLE_SECONDS, uevents: bool = True) -> None:
        self._settle = settle
        self._links = _listen(socket.NETLINK_ROUTE, _GROUPS)
        self._uevents: socket.socket | None = None
        self._rdma: socket.socket | None = None
        if uevents:
            try:
                self._uevents = _listen(_NETLINK_KOBJECT_UEVENT, _UEVENT_GROUP)
            except OSError as error:
                log.warning("changes of RDMA devices and of drivers are not heard of: %s", error)
            self._hear_rdma()

    def _hear_rdma(self) -> None:
        """Once the kernel has RDMA: a socket that is opened before has it load its core."""
        if self._rdma is None and SUBSYSTEM.exists():
            try:
                self._rdma = _listen(NETLINK_RDMA, NOTIFY_GROUP)
            except OSError as error:
                log.warning("which netdevs are ports of RDMA devices is not heard of: %s", error)

    def _sockets(self) -> list[socket.socket]:
        return [sock for sock in (self._links, self._uevents, self._rdma) if sock is not None]

    def close(self) -> None:
        for sock in self._sockets():
            sock.close()

    def __enter__(self) -> LinkMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[frozenset[IfIndex] | None]:
        return self.hear()

    async def hear(
        self, is_nothing: Callable[[LinkInfo], bool] = lambda link: False
    ) -> AsyncIterator[frozenset[IfIndex] | None]:
        """As iterating, without links of which is_nothing says so as the kernel told them last. Most of what
        is heard is about a CNI's links: to tell that by the message spares a question and a thread for each.
        """
        while True:
            await self._readable()
            await asyncio.sleep(self._settle)
            changed = self.read(is_nothing)
            if changed is RESCAN or changed:
                yield changed

    def read(self, is_nothing: Callable[[LinkInfo], bool] = lambda link: False) -> frozenset[IfIndex] | None:
        """What was heard since the last read, without waiting; an empty set if nothing."""
        changed: dict[IfIndex, bytes | None] = {}
        whole = True
        datagrams, complete = _drain(self._links)
        whole = whole and complete
        for data in datagrams:
            try:
                changed.update(changed_links(data))
            except HwError as error:
                log.warning("a message about links makes no sense, everything is looked at: %s", error)
                whole = False
        told = frozenset(index for index, last in changed.items() if not _is_known(last, is_nothing))
        if self._uevents is not None:
            datagrams, complete = _drain(self._uevents)
            if not complete or any(map(concerns_hardware, datagrams)):
                whole = False
                self._hear_rdma()
        if self._rdma is not None:
            datagrams, complete = _drain(self._rdma)
            whole = whole and complete and not any(map(concerns_rdma, datagrams))
        return told if whole else RESCAN

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        # By number: with sockets asyncio makes the text of an error of each that it catches itself.
        numbers = [sock.fileno() for sock in self._sockets()]
        for number in numbers:
            loop.add_reader(number, wake)
        try:
            await ready
        finally:
            for number in numbers:
                loop.remove_reader(number)


def changed_links(data: bytes) -> Mapping[IfIndex, bytes | None]:
    """What one datagram of link and address messages is about: by ifindex what was told last of the link as a
    whole, for hw.wire.link; None where that is not all there is to know. HwError if it is broken."""
    found: dict[IfIndex, bytes | None] = {}
    for message in wire.messages(data):
        if message.type in _LINK_MESSAGES | _ADDRESS_MESSAGES:
            if len(message.payload) < 8:
                raise HwError("netlink: a link or address message without its header")
            # ifinfomsg and ifaddrmsg both have the index as their second four bytes.
            index = IfIndex(struct.unpack_from("=i", message.payload, 4)[0])
            # Other families than 0 are parts: a bridge's of its ports.
            whole = message.type == wire.RTM_NEWLINK and message.payload[0] == socket.AF_UNSPEC
            found[index] = message.payload if whole else None
    return found


def _is_known(told: bytes | None, is_nothing: Callable[[LinkInfo], bool]) -> bool:
    """Whether what was told of a link says that it is of no interest."""
    if told is None:
        return False
    try:
        return is_nothing(wire.link(told))
    except HwError:
        return False


def concerns_hardware(data: bytes) -> bool:
    """Whether a kernel uevent is about a device appearing, going, or changing its driver."""
    fields = dict(part.partition(b"=")[::2] for part in data.split(b"\0")[1:] if b"=" in part)
    return fields.get(b"SUBSYSTEM") in _HARDWARE and fields.get(b"ACTION") in _ACTIONS


def concerns_rdma(data: bytes) -> bool:
    """Whether a datagram of NETLINK_RDMA is about RDMA devices or their netdevs. A netdev's new name is told
    with the links; what makes no sense may have been about anything."""
    try:
        events = [nldev.event(message) for message in wire.messages(data)]
    except HwError:
        return True
    return any(event and event.kind is not nldev.EventKind.NETDEV_RENAME for event in events)


def _listen(protocol: int, groups: int) -> socket.socket:
    sock = open_netlink(None, protocol, groups)
    try:
        sock.setblocking(False)
        # Over the system's limit needs CAP_NET_ADMIN; without it overruns come sooner and are rescanned.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    except BaseException:
        sock.close()
        raise
    return sock


def _drain(sock: socket.socket) -> tuple[list[bytes], bool]:
    """All that is waiting, from the kernel; False if something was lost."""
    found: list[bytes] = []
    complete = True
    while True:
        try:
            data, _, flags, sender = sock.recvmsg(_DATAGRAM_BYTES)
        except BlockingIOError:
            return found, complete
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            # The kernel dropped what did not fit. What is still queued can only be older than the
            # rescan that follows; reading it to the end also clears the overrun.
            complete = False
            continue
        if sender[0] != 0:
            continue
        complete = complete and not flags & socket.MSG_TRUNC
        found.append(data)
