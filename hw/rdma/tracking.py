"""What applications do with an RDMA device and what it counts, in the messages of NETLINK_RDMA: pure.

Invariant: as hw.rdma.wire. Counters are by the kernel's names, and 64 bits wide as the kernel hands them out;
how many of them the hardware has is not told.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hw import wire
from hw.rdma.wire import Attr, Attributes, Command, known


class ResourceKind(enum.Enum):
    """What applications make on a device; the value is (command, table, entry, attribute of its number)."""

    QP = (Command.RES_QP_GET, Attr.RES_QP, Attr.RES_QP_ENTRY, Attr.RES_LQPN)
    CM_ID = (Command.RES_CM_ID_GET, Attr.RES_CM_ID, Attr.RES_CM_ID_ENTRY, Attr.RES_CM_IDN)
    CQ = (Command.RES_CQ_GET, Attr.RES_CQ, Attr.RES_CQ_ENTRY, Attr.RES_CQN)
    MR = (Command.RES_MR_GET, Attr.RES_MR, Attr.RES_MR_ENTRY, Attr.RES_MRN)
    PD = (Command.RES_PD_GET, Attr.RES_PD, Attr.RES_PD_ENTRY, Attr.RES_PDN)
    CTX = (Command.RES_CTX_GET, Attr.RES_CTX, Attr.RES_CTX_ENTRY, Attr.RES_CTXN)

    @property
    def command(self) -> Command:
        return self.value[0]


class CounterMode(enum.IntEnum):
    """How the QPs of a port get counters of their own."""

    NONE = 0
    AUTO = 1
    MANUAL = 2


class AutoMask(enum.IntFlag, boundary=enum.KEEP):
    """Which QPs share a counter in CounterMode.AUTO: those of one type, one process, or both."""

    OFF = 0
    QP_TYPE = 1
    PID = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A QP, MR, CQ, PD, context or connection id. number is the kernel's, unique per device and kind.

    pid is None for what the kernel made itself (kernel_name says who), and 0 for a process of another pid
    namespace. type and state are the numbers of ib_qp_type and ib_qp_state (of a QP).
    """

    kind: ResourceKind
    number: int
    pid: int | None = None
    kernel_name: str | None = None
    port: int | None = None
    type: int | None = None
    state: int | None = None
    remote_qp: int | None = None
    length: int | None = None
    """Bytes of a memory region."""
    comm: str = ""
    """Name of the process; not in the message."""


@dataclass(frozen=True, slots=True)
class CounterStatus:
    """A hardware counter of a port. optional ones cost the device something and are off until wanted."""

    index: int
    name: str
    optional: bool
    enabled: bool


@dataclass(frozen=True, slots=True)
class StatisticMode:
    mode: CounterMode
    mask: AutoMask = AutoMask.OFF


@dataclass(frozen=True, slots=True, kw_only=True)
class QpCounter:
    """A counter that QPs are bound to, with what they have in common in automatic mode."""

    number: int
    port: int | None = None
    qps: tuple[int, ...] = ()
    qp_type: int | None = None
    pid: int | None = None
    values: Mapping[str, int] = field(default_factory=dict)


def counter_indexes(indexes: Sequence[int]) -> bytes:
    """The value of STAT_HWCOUNTERS in a request: which optional counters are to be on."""
    entries = (wire.attribute(Attr.STAT_HWCOUNTER_INDEX, struct.pack("=I", index)) for index in indexes)
    return b"".join(entries)


def summary(payload: bytes) -> Mapping[str, int]:
    """From the answer to RES_GET: how many there are, by the kernel's word (`qp`, `mr`, `ctx`...)."""
    table = Attributes(payload).raw(Attr.RES_SUMMARY)
    return _values(table, Attr.RES_SUMMARY_ENTRY, Attr.RES_SUMMARY_ENTRY_NAME, Attr.RES_SUMMARY_ENTRY_CURR)


def resources(kind: ResourceKind, payload: bytes) -> list[Resource]:
    """One message of a dump of that kind; entries without a number are passed over."""
    _, table, entry, number = kind.value
    found = (Attributes(data) for data in _entries(Attributes(payload).raw(table), entry))
    return [_resource(kind, one, one.required(number)) for one in found if number in one]


def statistics(payload: bytes) -> Mapping[str, int]:
    """From the answer to STAT_GET: a port's hardware counters, those that are on."""
    return _counters(Attributes(payload))


def counter_status(payload: bytes) -> list[CounterStatus]:
    """From the answer to STAT_GET_STATUS."""
    table = Attributes(payload).raw(Attr.STAT_HWCOUNTERS)
    found = (Attributes(data) for data in _entries(table, Attr.STAT_HWCOUNTER_ENTRY))
    return [
        CounterStatus(
            index=one.required(Attr.STAT_HWCOUNTER_INDEX),
            name=one.required_text(Attr.STAT_HWCOUNTER_ENTRY_NAME),
            optional=Attr.STAT_HWCOUNTER_DYNAMIC in one,
            enabled=one.u8(Attr.STAT_HWCOUNTER_DYNAMIC) != 0,
        )
        for one in found
    ]


def statistic_mode(payload: bytes) -> StatisticMode:
    """From the answer to STAT_GET of QPs with STAT_MODE."""
    found = Attributes(payload)
    mode = known(CounterMode, found.u32(Attr.STAT_MODE), CounterMode.NONE)
    return StatisticMode(mode, AutoMask(found.u32(Attr.STAT_AUTO_MODE_MASK) or 0))


def qp_counters(payload: bytes) -> list[QpCounter]:
    """One message of a dump of STAT_GET for QPs."""
    table = Attributes(payload).raw(Attr.STAT_COUNTER)
    found = (Attributes(data) for data in _entries(table, Attr.STAT_COUNTER_ENTRY))
    return [
        QpCounter(
            number=one.required(Attr.STAT_COUNTER_ID),
            port=one.u32(Attr.PORT_INDEX),
            qps=tuple(_qps(one.raw(Attr.RES_QP))),
            qp_type=one.u8(Attr.RES_TYPE),
            pid=one.u32(Attr.RES_PID),
            values=_counters(one),
        )
        for one in found
        if Attr.STAT_COUNTER_ID in one
    ]


def _entries(table: bytes, kind: Attr) -> list[bytes]:
    return [data for found, data in wire.attribute_list(table) if found == kind]


def _qps(table: bytes) -> list[int]:
    found = (Attributes(data) for data in _entries(table, Attr.RES_QP_ENTRY))
    return [one.required(Attr.RES_LQPN) for one in found if Attr.RES_LQPN in one]


def _values(table: bytes, entry: Attr, name: Attr, value: Attr) -> dict[str, int]:
    found = (Attributes(data) for data in _entries(table, entry))
    return {one.required_text(name): one.u64(value) or 0 for one in found}


def _counters(found: Attributes) -> dict[str, int]:
    return _values(
        found.raw(Attr.STAT_HWCOUNTERS),
        Attr.STAT_HWCOUNTER_ENTRY,
        Attr.STAT_HWCOUNTER_ENTRY_NAME,
        Attr.STAT_HWCOUNTER_ENTRY_VALUE,
    )


def _resource(kind: ResourceKind, found: Attributes, number: int) -> Resource:
    return Resource(
        kind=kind,
        number=number,
        pid=found.u32(Attr.RES_PID),
        kernel_name=found.text(Attr.RES_KERN_NAME),
        port=found.u32(Attr.PORT_INDEX),
        type=found.u8(Attr.RES_TYPE),
        state=found.u8(Attr.RES_STATE),
        remote_qp=found.u32(Attr.RES_RQPN),
        length=found.u64(Attr.RES_MRLEN),
    )
