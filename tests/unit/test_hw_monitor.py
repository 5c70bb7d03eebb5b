"""What the monitor makes of what it hears, without a kernel."""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from hw import monitor as monitor_module
from hw.monitor import RESCAN, LinkMonitor
from hw.rdma.wire import NETLINK_RDMA
from hw.transport import header
from hw.wire import RTM_NEWLINK
from tests.unit import nldev_vectors as recorded

Heard = tuple[bytes, int, int] | OSError
RDMA = b"add@/devices/x\0ACTION=add\0SUBSYSTEM=infiniband\0"
NET = b"add@/devices/x\0ACTION=add\0SUBSYSTEM=net\0"


class Ear:
    """A socket with datagrams waiting: (data, flags, sender) or an error."""

    def __init__(self, *waiting: Heard) -> None:
        self._waiting = list(waiting)

    def recvmsg(self, size: int) -> tuple[bytes, list[Any], int, tuple[int, int]]:
        if not self._waiting:
            raise BlockingIOError
        item = self._waiting.pop(0)
        if isinstance(item, OSError):
            raise item
        return item[0], [], item[1], (item[2], 0)

    def close(self) -> None:
        pass


def link(index: int) -> bytes:
    return header(RTM_NEWLINK, 0, 0, struct.pack("=BxHiII", 0, 1, index, 0, 0))


def hears(links: Ear, uevents: Ear | None = None, rdma: Ear | None = None) -> frozenset[int] | None:
    with LinkMonitor(uevents=False) as monitor:
        monitor._links.close()
        monitor._links, monitor._uevents, monitor._rdma = links, uevents, rdma  # type: ignore[assignment]
        return monitor.read()


def test_links_are_told_by_index() -> None:
    assert hears(Ear((link(5), 0, 0), (link(6) + link(5), 0, 0)), Ear((NET, 0, 0))) == {5, 6}


@pytest.mark.parametrize(
    ("links", "uevents"),
    [
        (Ear(OSError(errno.ENOBUFS, "lost"), (link(5), 0, 0)), None),
        (Ear((link(5), socket.MSG_TRUNC, 0)), None),
        (Ear((link(5)[:-1], 0, 0)), None),
        (Ear((link(5), 0, 0)), Ear((NET, 0, 0), (RDMA, 0, 0))),
        (Ear(), Ear(OSError(errno.ENOBUFS, "lost"))),
    ],
    ids=["overrun", "cut", "broken", "hardware", "uevents lost"],
)
def test_what_may_have_been_lost_means_look_at_everything(links: Ear, uevents: Ear | None) -> None:
    assert hears(links, uevents) is RESCAN


def test_only_the_kernel_is_listened_to() -> None:
    assert hears(Ear((link(5), 0, 4711)), Ear((RDMA, 0, 4711))) == frozenset()


def test_a_socket_that_fails_is_not_silence() -> None:
    with pytest.raises(OSError, match="no"):
        hears(Ear(OSError(errno.EBADF, "no")))


@pytest.mark.parametrize(
    ("told", "heard"),
    [
        (recorded.REGISTERED, RESCAN),
        (recorded.UNREGISTERED, RESCAN),
        (recorded.NETDEV_ATTACHED, RESCAN),
        (recorded.ATTACHED_ELSEWHERE, RESCAN),
        (recorded.NETDEV_RENAMED, frozenset()),
        (recorded.DEVICES[:1], frozenset()),
        ([recorded.REGISTERED[0][:-1]], RESCAN),
    ],
    ids=["registered", "gone", "attached", "attached elsewhere", "renamed", "an answer", "broken"],
)
def test_rdma_devices_and_their_netdevs_are_heard_of(told: list[bytes], heard: frozenset[int] | None) -> None:
    assert hears(Ear(), rdma=Ear(*((data, 0, 0) for data in told))) == heard


def test_rdma_is_listened_to_from_when_the_kernel_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not before: opening the socket would have the kernel load its RDMA core."""
    opened: list[int] = []

    def listen(protocol: int, groups: int) -> Ear:
        opened.append(protocol)
        return Ear((recorded.NETDEV_ATTACHED[0], 0, 0)) if protocol == NETLINK_RDMA else Ear()

    monkeypatch.setattr(monitor_module, "_listen", listen)
    monkeypatch.setattr(monitor_module, "SUBSYSTEM", tmp_path / "infiniband")
    with LinkMonitor() as monitor:
        assert NETLINK_RDMA not in opened
        (tmp_path / "infiniband").mkdir()
        assert monitor.read() == frozenset()
        monitor._uevents = Ear((RDMA, 0, 0))  # type: ignore[assignment]
        assert monitor.read() is RESCAN
        assert opened.count(NETLINK_RDMA) == 1
