"""Reading netlink's answer about XDP, also one that makes no sense."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf import xdp
from bpf.xdp import XdpMode


def attribute(kind: int, value: bytes) -> bytes:
    return xdp._pack(kind, value)


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def answer(*inner: bytes, ifname: bytes = b"eth0\0") -> bytes:
    """The payload of an RTM_NEWLINK."""
    return bytes(16) + attribute(3, ifname) + attribute(43 | 1 << 15, b"".join(inner)) + attribute(13, u32(0))


@pytest.fixture
def reply(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    replies: list[bytes] = []
    monkeypatch.setattr(xdp, "_request", lambda *_args: replies.pop())
    return replies


@pytest.mark.parametrize(
    ("inner", "found"),
    [
        ([attribute(2, b"\0")], {}),
        ([attribute(2, b"\2"), attribute(4, u32(9)), attribute(6, u32(9))], {XdpMode.GENERIC: 9}),
        ([attribute(2, b"\1"), attribute(4, u32(9)), attribute(5, u32(9))], {XdpMode.DRIVER: 9}),
        (
            [attribute(2, b"\4"), attribute(5, u32(7)), attribute(7, u32(8))],
            {XdpMode.DRIVER: 7, XdpMode.HARDWARE: 8},
        ),
        ([], {}),
    ],
)
def test_programs_are_read_by_mode(reply: list[bytes], inner: list[bytes], found: dict[XdpMode, int]) -> None:
    reply.append(answer(*inner, ifname=b"a-long-name\0"))
    assert xdp.attached_programs(4) == found


def test_an_answer_without_xdp_means_none(reply: list[bytes]) -> None:
    reply.append(bytes(16))
    assert xdp.attached_programs(4) == {}


@pytest.mark.parametrize(
    "inner",
    [
        [attribute(2, b"\x09"), attribute(4, u32(1))],
        [attribute(2, b"\2")],
        [attribute(2, b"\2"), attribute(4, b"\1")],
        [attribute(2, b"\4"), attribute(5, b"")],
        [struct.pack("=HH", 3, 2)],
        [struct.pack("=HH", 60, 2)],
    ],
)
def test_an_answer_that_makes_no_sense_says_so(reply: list[bytes], inner: list[bytes]) -> None:
    reply.append(answer(*inner))
    with pytest.raises(OSError, match="netlink answer"):
        xdp.attached_programs(4)


@given(payload=st.binary(max_size=200), inner=st.binary(max_size=60))
def test_no_answer_at_all_is_anything_but_an_oserror(payload: bytes, inner: bytes) -> None:
    for reply in (bytes(16) + payload, answer(inner)):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OSError):
            patch.setattr(xdp, "_request", lambda *_args, given=reply: given)
            assert isinstance(xdp.attached_programs(4), dict)
