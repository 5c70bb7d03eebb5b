"""Which XDP programs a device has, and taking off one that is no link's: both are netlink's to know.

Invariant: one request, one answer, on a socket made and closed in the calling thread, so it always means that
thread's netns. Only the few attributes needed are read; a frame that makes no sense is an OSError.
"""

from __future__ import annotations

import enum
import errno
import os
import socket
import struct
from collections.abc import Iterator

from bpf.sys import ProgramId

_RTM_SETLINK = 19
_RTM_GETLINK = 18
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_NLMSG_ERROR = 2
_IFLA_XDP = 43
_NLA_F_NESTED = 1 << 15
_NLA_TYPE_MASK = 0x3FFF
_IFLA_XDP_FD = 1
_IFLA_XDP_ATTACHED = 2
_IFLA_XDP_FLAGS = 3
_IFLA_XDP_PROG_ID = 4
_IFLA_XDP_EXPECTED_FD = 8
_XDP_FLAGS_UPDATE_IF_NOEXIST = 1 << 0
_XDP_FLAGS_REPLACE = 1 << 4
_ATTACHED_MULTI = 4
_ANSWER_BYTES = 1 << 18
_SECONDS = 5.0

_HEADER = struct.Struct("=IHHII")
_LINK_MESSAGE = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")


class XdpMode(enum.IntEnum):
    """Where a program runs. The values are those of IFLA_XDP_ATTACHED."""

    DRIVER = 1
    GENERIC = 2
    HARDWARE = 3


_MODE_ATTRIBUTES = {5: XdpMode.DRIVER, 6: XdpMode.GENERIC, 7: XdpMode.HARDWARE}
_MODE_FLAGS = {XdpMode.GENERIC: 1 << 1, XdpMode.DRIVER: 1 << 2, XdpMode.HARDWARE: 1 << 3}


def attached_programs(ifindex: int) -> dict[XdpMode, ProgramId]:
    """By mode, for a device of this thread's netns. OSError (ENODEV: no such device)."""
    payload = _request(_RTM_GETLINK, _LINK_MESSAGE.pack(0, 0, ifindex, 0, 0))
    for kind, value in _attributes(payload[_LINK_MESSAGE.size :]):
        if kind == _IFLA_XDP:
            return _modes(dict(_attributes(value)))
    return {}


def detach(ifindex: int, mode: XdpMode) -> None:
    """Take off the program that was attached by netlink in this mode. OSError (EBUSY: it is a link's)."""
    inner = _pack(_IFLA_XDP_FD, struct.pack("=i", -1)) + _pack(
        _IFLA_XDP_FLAGS, struct.pack("=I", _MODE_FLAGS[mode])
    )
    message = _LINK_MESSAGE.pack(0, 0, ifindex, 0, 0) + _pack(_IFLA_XDP | _NLA_F_NESTED, inner)
    _request(_RTM_SETLINK, message, _NLM_F_ACK)


def replace(ifindex: int, mode: XdpMode, old_fd: int | None, new_fd: int) -> None:
    """Put a program in the place of another, or of none. OSError (EEXIST: that is not what is there; EBUSY: a
    link's is)."""
    flags = _MODE_FLAGS[mode] | (_XDP_FLAGS_UPDATE_IF_NOEXIST if old_fd is None else _XDP_FLAGS_REPLACE)
    inner = _pack(_IFLA_XDP_FD, struct.pack("=i", new_fd)) + _pack(_IFLA_XDP_FLAGS, struct.pack("=I", flags))
    if old_fd is not None:
        inner += _pack(_IFLA_XDP_EXPECTED_FD, struct.pack("=i", old_fd))
    message = _LINK_MESSAGE.pack(0, 0, ifindex, 0, 0) + _pack(_IFLA_XDP | _NLA_F_NESTED, inner)
    _request(_RTM_SETLINK, message, _NLM_F_ACK)


def _modes(attributes: dict[int, bytes]) -> dict[XdpMode, ProgramId]:
    attached = int.from_bytes(attributes.get(_IFLA_XDP_ATTACHED, b""), "little")
    if attached == _ATTACHED_MULTI:
        return {
            mode: _program(attributes[kind]) for kind, mode in _MODE_ATTRIBUTES.items() if kind in attributes
        }
    if attached == 0:
        return {}
    if attached not in _MODE_FLAGS or _IFLA_XDP_PROG_ID not in attributes:
        raise OSError(errno.EPROTO, f"a netlink answer has an XDP program in an unknown mode, {attached}")
    return {XdpMode(attached): _program(attributes[_IFLA_XDP_PROG_ID])}


def _program(value: bytes) -> ProgramId:
    if len(value) != 4:
        raise OSError(errno.EPROTO, "a netlink answer names an XDP program in an unknown form")
    return ProgramId(struct.unpack("=I", value)[0])


def _pack(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            raise OSError(errno.EPROTO, "a netlink answer has an attribute of impossible length")
        yield kind & _NLA_TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def _request(kind: int, message: bytes, flags: int = 0) -> bytes:
    """Send and give the answer's payload; an acknowledgement's is empty."""
    header = _HEADER.pack(_HEADER.size + len(message), kind, _NLM_F_REQUEST | flags, 1, 0)
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as link:
        link.settimeout(_SECONDS)
        link.bind((0, 0))
        link.send(header + message)
        answer = link.recv(_ANSWER_BYTES)
    if len(answer) < _HEADER.size + 4:
        raise OSError(errno.EPROTO, "a netlink answer is too short")
    length, got, *_ = _HEADER.unpack_from(answer)
    payload = answer[_HEADER.size : length]
    if got == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", payload)[0]
        if code:
            raise OSError(code, f"asking for the XDP programs of a device: {os.strerror(code)}")
        return b""
    return payload
