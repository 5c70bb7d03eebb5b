"""What an RDMA port counted: its port counters (sysfs alone tells them) and its driver's own.

Invariant: reads only. Values are absolute and of known unit: data is in bytes here, whatever the file's unit.
A counter that stands at its end counts no more and is left out, and so is one that cannot be read: what is
there is what was counted. What one counter's file says wrong costs that counter.

The two families count the same traffic in part (packets, above all) and are never to be added up.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from hw.errors import HwError
from hw.model import RdmaName
from hw.rdma.discovery import DEVICES
from hw.sysfs import Sysfs


class Family(enum.StrEnum):
    """The values are the labels under which users see them."""

    PORT = "rdma-port"
    """As InfiniBand's performance management defines them; drivers of RoCE devices give them as well."""
    HARDWARE = "rdma-hw"
    """The driver's own choice, by its names."""


@dataclass(frozen=True, slots=True)
class PortCounters:
    """One family's counters of one port. wraps: of those that begin anew by themselves, how many bits they
    have. left_out: a sentence for each that has no value."""

    values: Mapping[str, int]
    wraps: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


COUNTERS_MAX = 256
"""Of a family. The longest list a driver has is about a hundred; each becomes a series."""

_DATA = {"port_xmit_data": "port_xmit_data_bytes", "port_rcv_data": "port_rcv_data_bytes"}
_WORD_BYTES = 4
"""Port data counters count in words, so that 32 bits last longer."""
_BITS = {
    **dict.fromkeys(("port_xmit_data", "port_rcv_data", "port_xmit_packets", "port_rcv_packets"), 32),
    **dict.fromkeys(("port_xmit_wait",), 32),
    **dict.fromkeys(("symbol_error", "port_rcv_errors", "port_rcv_remote_physical_errors"), 16),
    **dict.fromkeys(("port_rcv_switch_relay_errors", "port_xmit_discards", "VL15_dropped"), 16),
    **dict.fromkeys(("link_error_recovery", "link_downed"), 8),
    **dict.fromkeys(("port_xmit_constraint_errors", "port_rcv_constraint_errors"), 8),
    **dict.fromkeys(("local_link_integrity_errors", "excessive_buffer_overrun_errors"), 4),
}
"""Of the port counters without the 64-bit extension; these stop at their end, they do not wrap (PortCounters,
IBA 16.1.3.5). A device with the extension passes that value once in a lifetime."""

_MLX5_ONLY = "out_of_buffer"
_MLX5_BITS = dict.fromkeys(
    (
        *("rx_write_requests", "rx_read_requests", "rx_atomic_requests", "rx_dct_connect"),
        *("out_of_buffer", "out_of_sequence", "duplicate_request", "rnr_nak_retry_err", "packet_seq_err"),
        *("implied_nak_seq_err", "local_ack_timeout_err"),
    ),
    32,
)
"""mlx5's queue counters are registers of 32 bits that wrap (query_q_counter_out), though the kernel tells
every counter with 64. At 100 million requests a second that takes 43 seconds."""

_NOT_COUNTERS = frozenset({"lifespan"})
"""A setting among hw_counters: for how many milliseconds the kernel answers from memory."""
_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")


def port_counters(sysfs: Sysfs, device: RdmaName, port: int) -> PortCounters | None:
    """ports/P/counters; None where the driver has none (soft RoCE) or the device is not there.

    sysfs must be of a namespace that sees the device.
    """
    values, left_out = _read(sysfs, f"{DEVICES}/{device}/ports/{port}/counters")
    if values is None:
        return None
    counted: dict[str, int] = {}
    for name, value in values.items():
        if name in _BITS and value == (1 << _BITS[name]) - 1:
            left_out.append(f"{name} stands at the end of its {_BITS[name]} bits and counts no more")
        elif name in _DATA:
            counted[_DATA[name]] = value * _WORD_BYTES
        else:
            counted[name] = value
    return PortCounters(counted, left_out=tuple(left_out))


def hardware_counters_from_sysfs(sysfs: Sysfs, device: RdmaName, port: int) -> PortCounters | None:
    """ports/P/hw_counters, for kernels and drivers that netlink does not tell them. None as above."""
    values, left_out = _read(sysfs, f"{DEVICES}/{device}/ports/{port}/hw_counters")
    return None if values is None else hardware_counters(values, left_out)


def hardware_counters(told: Mapping[str, int], left_out: list[str] | None = None) -> PortCounters:
    """From names and values as netlink tells them."""
    usable = {name: value for name, value in told.items() if _NAME.fullmatch(name)}
    counted = dict(sorted(usable.items())[:COUNTERS_MAX])
    wraps = _MLX5_BITS if _MLX5_ONLY in counted else {}
    problems = list(left_out or ())
    if len(counted) < len(told):
        problems.append(f"{len(told) - len(counted)} counters have no usable name or are too many")
    return PortCounters(
        counted, {name: bits for name, bits in wraps.items() if name in counted}, tuple(problems)
    )


def _read(sysfs: Sysfs, folder: str) -> tuple[dict[str, int] | None, list[str]]:
    names = sysfs.names(folder)
    if names is None:
        return None, []
    values: dict[str, int] = {}
    left_out: list[str] = []
    for name in names[:COUNTERS_MAX]:
        if name in _NOT_COUNTERS or not _NAME.fullmatch(name):
            continue
        try:
            value = sysfs.integer(f"{folder}/{name}")
        except HwError as error:
            left_out.append(str(error))
            continue
        if value is not None and value >= 0:
            values[name] = value
        elif value is not None:
            left_out.append(f"{sysfs.root / folder / name} holds {value}, which no counter can")
    return values, left_out
