"""What the kernel refuses about RDMA is told as what it means: gone, not possible, not now."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hw import wire
from hw.errors import Busy, NotFound, Refused, Unsupported
from hw.model import IfName, RdmaIndex, RdmaName
from hw.netns import NetnsHandle
from hw.rdma import netlink
from hw.rdma.netlink import RdmaSocket
from hw.rdma.nldev import CharacterDeviceKind
from hw.rdma.tracking import AutoMask, ResourceKind
from hw.rdma.wire import Attr, Command
from hw.transport import header
from tests.unit import nldev_vectors as recorded

RXE = RdmaIndex(0)
GONE = RdmaIndex(99)
Answer = list[bytes] | int


class Kernel:
    """A socket whose other end has one answer per command: datagrams as recorded, or an errno."""

    def __init__(self) -> None:
        self.answers: dict[Command, Answer] = {Command.GET: recorded.DEVICES}
        self.asked: list[tuple[Command, dict[int, bytes]]] = []
        self._queue: list[bytes] = []
        self.opened = 0

    def settimeout(self, seconds: float) -> None: ...

    def close(self) -> None: ...

    def sendto(self, data: bytes, address: tuple[int, int]) -> None:
        (message,) = wire.messages(data)
        command = Command(message.type & 0x3FF)
        self.asked.append((command, wire.attributes(message.payload)))
        answer = self.answers.get(command, 0)
        if isinstance(answer, int):
            answer = [header(wire.NLMSG_ERROR, 0, 0, struct.pack("=i", -answer) + bytes(16))]
        elif not any(
            one.type in (wire.NLMSG_ERROR, wire.NLMSG_DONE) for d in answer for one in wire.messages(d)
        ):
            answer = [*answer, header(wire.NLMSG_ERROR, 0, 0, bytes(20))]
        self._queue += [_sequenced(datagram, message.sequence) for datagram in answer]

    def recvmsg_into(self, buffers: list[bytearray]) -> tuple[int, list[Any], int, tuple[int, int]]:
        data = self._queue.pop(0)
        buffers[0][: len(data)] = data
        return len(data), [], 0, (0, 0)


def _sequenced(datagram: bytes, sequence: int) -> bytes:
    messages = wire.messages(datagram)
    return b"".join(header(one.type, one.flags, sequence, one.payload) for one in messages)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()

    def opened(netns: NetnsHandle | None, protocol: int) -> Kernel:
        kernel.opened += 1
        return kernel

    monkeypatch.setattr(netlink, "open_netlink", opened)
    return kernel


@pytest.fixture
def rdma(kernel: Kernel, tmp_path: Path) -> Iterator[RdmaSocket]:
    with RdmaSocket(None, proc=tmp_path, subsystem=tmp_path) as opened:
        yield opened


class Target(NetnsHandle):
    def __init__(self) -> None:
        self.path = Path("/run/netns/pod")

    @property
    def fd(self) -> int:
        return 7


ASKING: list[Callable[[RdmaSocket, RdmaIndex], object]] = [
    lambda rdma, index: rdma.ports(index),
    lambda rdma, index: rdma.move(index, Target()),
    lambda rdma, index: rdma.delete_link(index),
    lambda rdma, index: rdma.character_device(index, CharacterDeviceKind.UVERBS),
    lambda rdma, index: rdma.summary(index),
    lambda rdma, index: rdma.resources(ResourceKind.QP, index),
    lambda rdma, index: rdma.statistics(index, 1),
    lambda rdma, index: rdma.counter_status(index, 1),
    lambda rdma, index: rdma.set_auto_mode(index, 1, AutoMask.PID),
]


@pytest.mark.parametrize("ask", ASKING)
def test_a_device_that_is_gone_is_not_found(
    kernel: Kernel, rdma: RdmaSocket, ask: Callable[[RdmaSocket, RdmaIndex], object]
) -> None:
    """The kernel says EINVAL, as for a request that makes no sense."""
    for command in set(Command) - {Command.GET}:
        kernel.answers[command] = errno.EINVAL
    with pytest.raises(NotFound, match=r"RDMA device 99 of the host: the device is not there"):
        ask(rdma, GONE)
    with pytest.raises(Refused, match="EINVAL"):
        ask(rdma, RXE)


def test_a_device_is_looked_up_by_name(rdma: RdmaSocket) -> None:
    found = rdma.by_name(RdmaName("siw_b"))
    assert found
    assert (found.index, found.protocol) == (1, "iw")
    assert rdma.by_name(RdmaName("mlx5_0")) is None


def test_a_kernel_without_rdma_is_unsupported_and_loads_nothing(kernel: Kernel, tmp_path: Path) -> None:
    """Opening such a socket has the kernel load its RDMA core."""
    with pytest.raises(Unsupported, match="ib_core is not loaded"):
        RdmaSocket(None, subsystem=tmp_path / "infiniband")
    assert kernel.opened == 0
    RdmaSocket(None, subsystem=tmp_path)
    assert kernel.opened == 1


def test_a_socket_that_cannot_be_opened_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(netns: NetnsHandle | None, protocol: int) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(netlink, "open_netlink", refuse)
    with pytest.raises(Refused, match="EMFILE"):
        RdmaSocket(None, subsystem=tmp_path)


def test_a_move_names_the_namespace_by_its_fd(kernel: Kernel, rdma: RdmaSocket) -> None:
    rdma.move(RXE, Target())
    assert kernel.asked == [(Command.SET, {Attr.DEV_INDEX: bytes(4), Attr.NET_NS_FD: struct.pack("=I", 7)})]


@pytest.mark.parametrize(
    ("mode", "words"),
    [(recorded.NOT_EXCLUSIVE, "shared by all namespaces"), (recorded.EXCLUSIVE, "driver cannot")],
)
def test_a_move_that_is_not_possible_says_why(
    kernel: Kernel, rdma: RdmaSocket, mode: list[bytes], words: str
) -> None:
    kernel.answers |= {Command.SET: errno.EOPNOTSUPP, Command.SYS_GET: mode}
    with pytest.raises(Unsupported, match=words):
        rdma.move(RXE, Target())


def test_the_kernels_own_words_come_first(kernel: Kernel, rdma: RdmaSocket) -> None:
    kernel.answers |= {Command.SET: recorded.MOVE_REFUSED, Command.SYS_GET: recorded.EXCLUSIVE}
    with pytest.raises(Unsupported, match="no disassociate support"):
        rdma.move(RXE, Target())


def test_the_mode_is_busy_while_namespaces_exist(kernel: Kernel, rdma: RdmaSocket) -> None:
    kernel.answers |= {Command.SYS_GET: recorded.EXCLUSIVE, Command.SYS_SET: errno.EBUSY}
    assert rdma.exclusive()
    with pytest.raises(Busy, match="exclusive to a network namespace"):
        rdma.set_exclusive(True)
    assert kernel.asked[-1] == (Command.SYS_SET, {Attr.NETNS_MODE: b"\0"})


def test_a_file_that_is_not_there_names_the_module(kernel: Kernel, rdma: RdmaSocket) -> None:
    kernel.answers[Command.GET_CHARDEV] = errno.ENOENT
    with pytest.raises(NotFound, match="ib_uverbs"):
        rdma.character_device(RXE, CharacterDeviceKind.UVERBS)
    with pytest.raises(NotFound, match="rdma_ucm"):
        rdma.character_device(RXE, CharacterDeviceKind.RDMA_CM)
    assert Attr.DEV_INDEX not in kernel.asked[-1][1]
    with pytest.raises(NotFound, match="ib_umad"):
        rdma.character_device(RXE, CharacterDeviceKind.UMAD, port=1)
    assert kernel.asked[-1][1][Attr.PORT_INDEX] == struct.pack("=I", 1)


def test_the_kernels_private_error_is_unsupported(kernel: Kernel, rdma: RdmaSocket) -> None:
    kernel.answers[Command.STAT_SET] = 524
    with pytest.raises(Unsupported, match="ENOTSUPP"):
        rdma.set_auto_mode(RXE, 1, AutoMask.PID)


def test_a_software_kind_that_is_not_loaded_is_told(kernel: Kernel, rdma: RdmaSocket) -> None:
    kernel.answers[Command.NEWLINK] = errno.EINVAL
    with pytest.raises(Refused, match="module for rxe is not loaded"):
        rdma.add_link("rxe", RdmaName("rxe0"), IfName("eth0"))
    kernel.answers[Command.NEWLINK] = errno.ENODEV
    with pytest.raises(NotFound, match="on 'eth0' of the host"):
        rdma.add_link("rxe", RdmaName("rxe0"), IfName("eth0"))


def test_an_optional_counter_that_is_not_there_changes_nothing(kernel: Kernel, rdma: RdmaSocket) -> None:
    kernel.answers[Command.STAT_GET_STATUS] = recorded.COUNTER_STATUS
    with pytest.raises(Unsupported, match="it has no rdma_tx_bytes"):
        rdma.set_optional_counters(RXE, 1, ["rdma_tx_bytes"])
    assert [command for command, _ in kernel.asked] == [Command.STAT_GET_STATUS]


def test_a_process_has_its_name_while_it_lives(kernel: Kernel, rdma: RdmaSocket, tmp_path: Path) -> None:
    kernel.answers[Command.RES_QP_GET] = [
        *recorded.QPS,
        header(wire.NLMSG_DONE, 2, 0, bytes(4)),
    ]
    alive, dead, kernels = rdma.resources(ResourceKind.QP, RXE)
    (tmp_path / str(alive.pid)).mkdir()
    (tmp_path / str(alive.pid) / "comm").write_text("trainer\n")
    alive, dead, kernels = rdma.resources(ResourceKind.QP, RXE)
    assert (alive.comm, dead.comm, kernels.comm) == ("trainer", "", "ib_core")
