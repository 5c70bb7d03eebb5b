"""A request gets its own answer, in time, or an error; never another's, and never silence."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from hw.errors import Busy, HwError, NotFound, Refused, Unsupported
from hw.transport import Transport, header
from hw.wire import NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, RTM_NEWLINK, messages

KERNEL, STRANGER = 0, 4711
Datagram = tuple[bytes, int] | OSError


def ack(sequence: int, code: int = 0) -> bytes:
    return header(NLMSG_ERROR, 0, sequence, struct.pack("=i", -code) + bytes(16))


def done(sequence: int, flags: int = 2) -> bytes:
    return header(NLMSG_DONE, flags, sequence, bytes(4))


def link(sequence: int, payload: bytes = b"link", flags: int = 2) -> bytes:
    return header(RTM_NEWLINK, flags, sequence, payload)


class Kernel:
    """A socket whose other end answers as told: a function of the request's sequence number per request."""

    def __init__(self, *answers: Callable[[int], list[Datagram]]) -> None:
        self._answers = list(answers)
        self._queue: list[Datagram] = []
        self.requests: list[bytes] = []
        self.truncate = False

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0

    def sendto(self, data: bytes, address: tuple[int, int]) -> None:
        assert address == (0, 0)
        self.requests.append(data)
        if self._answers:
            self._queue += self._answers.pop(0)(struct.unpack_from("=I", data, 8)[0])

    def recvmsg_into(self, buffers: list[bytearray]) -> tuple[int, list[Any], int, tuple[int, int]]:
        if not self._queue:
            raise TimeoutError("timed out")
        item = self._queue.pop(0)
        if isinstance(item, OSError):
            raise item
        data, sender = item
        buffers[0][: len(data)] = data
        return len(data), [], socket.MSG_TRUNC if self.truncate else 0, (sender, 0)

    def close(self) -> None:
        pass


def transport(kernel: Kernel) -> Transport:
    return Transport(kernel, timeout=0.2)  # type: ignore[arg-type]


def encode(flags: int, sequence: int) -> bytes:
    return header(18, flags, sequence, b"")


def test_a_dump_is_all_its_messages_over_several_datagrams() -> None:
    kernel = Kernel(
        lambda n: [
            (link(n, b"a") + bytes(3) + link(n, b"b"), KERNEL),
            (link(n, b"c"), KERNEL),
            (done(n), KERNEL),
        ]
    )
    assert transport(kernel).dump("read", encode, RTM_NEWLINK) == [b"a", b"b", b"c"]


def test_answers_to_others_and_from_others_are_not_taken() -> None:
    """A pod with NET_ADMIN can send to any port of its namespace, with any sequence number."""
    kernel = Kernel(
        lambda n: [
            (link(n, b"forged"), STRANGER),
            (ack(n), STRANGER),
            (link(n - 1, b"late"), KERNEL),
            (done(n - 1), KERNEL),
            (link(n, b"mine"), KERNEL),
            (done(n), KERNEL),
        ]
    )
    assert transport(kernel).dump("read", encode, RTM_NEWLINK) == [b"mine"]


def test_silence_ends_at_the_deadline_and_the_next_request_is_unharmed() -> None:
    kernel = Kernel(lambda n: [], lambda n: [(ack(n - 1, errno.EPERM), KERNEL), (ack(n), KERNEL)])
    talk = transport(kernel)
    with pytest.raises(Refused) as caught:
        talk.change("set", encode)
    assert caught.value.errno == errno.ETIMEDOUT
    talk.change("set", encode)


def test_strangers_cannot_keep_a_request_beyond_its_deadline() -> None:
    class Flood(Kernel):
        def recvmsg_into(self, buffers: list[bytearray]) -> tuple[int, list[Any], int, tuple[int, int]]:
            return 0, [], 0, (STRANGER, 0)

    with pytest.raises(Refused) as caught:
        Transport(Flood(), timeout=0.02).change("set", encode)  # type: ignore[arg-type]
    assert caught.value.errno == errno.ETIMEDOUT


def test_an_interrupted_dump_is_asked_for_again() -> None:
    kernel = Kernel(
        lambda n: [(link(n, b"half", NLM_F_DUMP_INTR), KERNEL), (done(n), KERNEL)],
        lambda n: [(link(n, b"half"), KERNEL), (done(n, NLM_F_DUMP_INTR), KERNEL)],
        lambda n: [OSError(errno.ENOBUFS, "lost")],
        lambda n: [(link(n, b"whole"), KERNEL), (done(n), KERNEL)],
    )
    assert transport(kernel).dump("read", encode, RTM_NEWLINK) == [b"whole"]
    assert len(kernel.requests) == 4


def test_a_dump_that_is_always_interrupted_is_given_up() -> None:
    kernel = Kernel(*[lambda n: [(done(n, NLM_F_DUMP_INTR), KERNEL)]] * 50)
    with pytest.raises(Busy, match="changed while being read"):
        transport(kernel).dump("read", encode, RTM_NEWLINK)
    assert len(kernel.requests) < 20


def test_a_lost_answer_to_a_change_is_said_and_not_repeated() -> None:
    kernel = Kernel(lambda n: [OSError(errno.ENOBUFS, "lost")], lambda n: [(ack(n), KERNEL)])
    with pytest.raises(Busy):
        transport(kernel).change("set", encode)
    assert len(kernel.requests) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENODEV, NotFound),
        (errno.EOPNOTSUPP, Unsupported),
        (errno.EBUSY, Busy),
        (errno.EPERM, Refused),
        (errno.EEXIST, Refused),
        (99999, Refused),
    ],
)
def test_an_errno_becomes_the_error_of_who_must_act(code: int, kind: type[HwError]) -> None:
    with pytest.raises(kind, match="set it") as caught:
        transport(Kernel(lambda n: [(ack(n, code), KERNEL)])).change("set it", encode)
    assert type(caught.value) is kind


def test_an_answer_that_was_cut_is_an_error() -> None:
    kernel = Kernel(lambda n: [(link(n), KERNEL)])
    kernel.truncate = True
    with pytest.raises(Refused) as caught:
        transport(kernel).dump("read", encode, RTM_NEWLINK)
    assert caught.value.errno == errno.EMSGSIZE


def test_an_answer_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(HwError, match="netlink"):
        transport(Kernel(lambda n: [(b"\xff" * 20, KERNEL)])).change("set", encode)


def test_a_socket_that_fails_is_an_error_with_its_errno() -> None:
    with pytest.raises(Refused) as caught:
        transport(Kernel(lambda n: [OSError(errno.EPERM, "no")])).change("set", encode)
    assert caught.value.errno == errno.EPERM


def in_each(data: bytes) -> list[int]:
    """The sequence numbers of the requests in one datagram."""
    return [each.sequence for each in messages(data)]


def test_each_of_many_requests_has_its_own_answer_in_any_order_and_a_refusal_is_none() -> None:
    kernel = Kernel(
        lambda n: [
            (link(n + 2, b"third"), KERNEL),
            (link(n - 1, b"of an earlier one"), KERNEL),
            (link(n, b"not from the kernel"), STRANGER),
            (link(n, b"first") + bytes(3) + ack(n + 1, errno.ENODEV), KERNEL),
        ]
    )
    found = transport(kernel).get_each("ask", [encode, encode, encode])
    assert found == [b"first", None, b"third"]
    assert len(in_each(kernel.requests[0])) == 3


@pytest.mark.parametrize("end", [TimeoutError("timed out"), OSError(errno.ENOBUFS, "overrun")])
def test_an_answer_that_is_lost_is_none_and_never_taken_for_a_later_one(end: OSError) -> None:
    kernel = Kernel(
        lambda n: [(link(n, b"first"), KERNEL), end],
        lambda n: [(link(n - 1, b"late"), KERNEL), (link(n, b"own"), KERNEL), (ack(n), KERNEL)],
    )
    asker = transport(kernel)
    assert asker.get_each("ask", [encode, encode]) == [b"first", None]
    assert asker.get("ask", encode) == [b"own"]


def test_where_none_can_be_asked_that_is_an_error() -> None:
    kernel = Kernel(lambda n: [OSError(errno.EPERM, "no")])
    with pytest.raises(HwError, match="ask"):
        transport(kernel).get_each("ask", [encode])
