"""The frame of NETLINK_RDMA's device interface: its commands and attributes, written and read.

Invariant: pure, and total over what a kernel can send. An absent attribute is None; one that is too short for
its type, or broken framing, is an HwError. Strings are decoded as hw.wire does, since names come from whoever
held the device.

Numbers are those of uapi rdma/rdma_netlink.h. The messages have no header of their own.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from typing import TypeVar

from hw import wire
from hw.errors import HwError
from hw.transport import Encode, header

NETLINK_RDMA = 20
NOTIFY_GROUP = 1 << 3
"""As a mask: RDMA_NL_GROUP_NOTIFY, which kernels before 6.13 do not send to."""

_NLDEV = 5 << 10


class Command(enum.IntEnum):
    """RDMA_NLDEV_CMD_*."""

    GET = 1
    SET = 2
    NEWLINK = 3
    DELLINK = 4
    PORT_GET = 5
    SYS_GET = 6
    SYS_SET = 7
    RES_GET = 9
    RES_QP_GET = 10
    RES_CM_ID_GET = 11
    RES_CQ_GET = 12
    RES_MR_GET = 13
    RES_PD_GET = 14
    GET_CHARDEV = 15
    STAT_SET = 16
    STAT_GET = 17
    RES_CTX_GET = 22
    STAT_GET_STATUS = 24
    MONITOR = 28

    @property
    def message(self) -> int:
        """The type of its netlink messages."""
        return _NLDEV + self


class Attr(enum.IntEnum):
    """RDMA_NLDEV_ATTR_* (and _SYS_ATTR_*, and NET_NS_FD)."""

    DEV_INDEX = 1
    DEV_NAME = 2
    PORT_INDEX = 3
    FW_VERSION = 5
    NODE_GUID = 6
    SYS_IMAGE_GUID = 7
    SUBNET_PREFIX = 8
    LID = 9
    SM_LID = 10
    LMC = 11
    PORT_STATE = 12
    PORT_PHYS_STATE = 13
    RES_SUMMARY = 15
    RES_SUMMARY_ENTRY = 16
    RES_SUMMARY_ENTRY_NAME = 17
    RES_SUMMARY_ENTRY_CURR = 18
    RES_QP = 19
    RES_QP_ENTRY = 20
    RES_LQPN = 21
    RES_RQPN = 22
    RES_TYPE = 26
    RES_STATE = 27
    RES_PID = 28
    RES_KERN_NAME = 29
    RES_CM_ID = 30
    RES_CM_ID_ENTRY = 31
    RES_CQ = 35
    RES_CQ_ENTRY = 36
    RES_MR = 40
    RES_MR_ENTRY = 41
    RES_MRLEN = 45
    RES_PD = 46
    RES_PD_ENTRY = 47
    NDEV_INDEX = 50
    NDEV_NAME = 51
    RES_PDN = 60
    RES_CQN = 61
    RES_MRN = 62
    RES_CM_IDN = 63
    RES_CTXN = 64
    LINK_TYPE = 65
    NETNS_MODE = 66
    DEV_PROTOCOL = 67
    NET_NS_FD = 68
    CHARDEV_TYPE = 69
    CHARDEV_NAME = 70
    CHARDEV_ABI = 71
    CHARDEV = 72
    STAT_MODE = 74
    STAT_RES = 75
    STAT_AUTO_MODE_MASK = 76
    STAT_COUNTER = 77
    STAT_COUNTER_ENTRY = 78
    STAT_COUNTER_ID = 79
    STAT_HWCOUNTERS = 80
    STAT_HWCOUNTER_ENTRY = 81
    STAT_HWCOUNTER_ENTRY_NAME = 82
    STAT_HWCOUNTER_ENTRY_VALUE = 83
    RES_CTX = 86
    RES_CTX_ENTRY = 87
    STAT_HWCOUNTER_INDEX = 94
    STAT_HWCOUNTER_DYNAMIC = 95
    PARENT_NAME = 100
    EVENT_TYPE = 102


Value = int | str | bytes
"""An int is four bytes, a str is ended with a zero byte, bytes are as they are."""


def request(command: Command, values: Mapping[Attr, Value] | None = None) -> Encode:
    """A message of these attributes, to be given flags and a sequence number."""
    payload = b"".join(_attribute(kind, value) for kind, value in (values or {}).items())
    return lambda flags, sequence: header(command.message, flags, sequence, payload)


def _attribute(kind: Attr, value: Value) -> bytes:
    if isinstance(value, int):
        value = struct.pack("=I", value)
    elif isinstance(value, str):
        value = wire.raw(value) + b"\0"
    return wire.attribute(kind, value)


class Attributes:
    """A message's attributes by number, with their types checked where they are read."""

    def __init__(self, payload: bytes) -> None:
        self._found = wire.attributes(payload)

    def __contains__(self, kind: Attr) -> bool:
        return kind in self._found

    def raw(self, kind: Attr) -> bytes:
        return self._found.get(kind, b"")

    def u8(self, kind: Attr) -> int | None:
        return self._number(kind, "=B")

    def u32(self, kind: Attr) -> int | None:
        return self._number(kind, "=I")

    def u64(self, kind: Attr) -> int | None:
        return self._number(kind, "=Q")

    def text(self, kind: Attr) -> str | None:
        return wire.text(self.raw(kind)) or None

    def required(self, kind: Attr) -> int:
        value = self.u32(kind)
        if value is None:
            raise HwError(f"netlink: an RDMA message without its {kind.name}")
        return value

    def required_text(self, kind: Attr) -> str:
        value = self.text(kind)
        if value is None:
            raise HwError(f"netlink: an RDMA message without its {kind.name}")
        return value

    def _number(self, kind: Attr, form: str) -> int | None:
        data = self._found.get(kind)
        if data is None:
            return None
        if len(data) < struct.calcsize(form):
            raise HwError(f"netlink: an RDMA message's {kind.name} has {len(data)} bytes")
        value: int = struct.unpack_from(form, data)[0]
        return value


E = TypeVar("E", bound=enum.IntEnum)
D = TypeVar("D")


def known(kind: type[E], value: int | None, otherwise: D) -> E | D:
    try:
        return kind(value) if value is not None else otherwise
    except ValueError:
        return otherwise
