"""What an interface counted itself, and what a PF says that its VFs did: from rtnetlink's link messages.

Invariant: pure. Counters are absolute, by the kernel's names (rx_bytes...), as the interface or the VF sees
it: tx is what it sent. What a message does not tell is absent, never 0. A PF whose driver cannot tell of its
VFs answers all the same, with zeros: what stays 0 counts nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from hw.errors import HwError
from hw.wire import attribute_list, attributes

_LINK_HEADER = 16
_IFLA_VFINFO_LIST = 22
_IFLA_STATS64 = 23
_VF_INFO = 1
_VF_MAC = 1
_VF_STATS = 8

_LINK_COUNTERS = (
    *("rx_packets", "tx_packets", "rx_bytes", "tx_bytes"),
    *("rx_errors", "tx_errors", "rx_dropped", "tx_dropped"),
)
"""How struct rtnl_link_stats64 begins; the rest is kinds of errors that are in these already."""
_LINK = struct.Struct(f"={len(_LINK_COUNTERS)}Q")
_VF_COUNTERS = {
    0: "rx_packets",
    1: "tx_packets",
    2: "rx_bytes",
    3: "tx_bytes",
    7: "rx_dropped",
    8: "tx_dropped",
}
"""IFLA_VF_STATS_*; what was broadcast or multicast is in the packets as well."""
_COUNT = struct.Struct("=Q")
_NUMBER = struct.Struct("=I")


def link_statistics(payload: bytes) -> Mapping[str, int]:
    """Of an RTM_NEWLINK; empty where it was not asked for. HwError if it is no such message."""
    told = attributes(_body(payload)).get(_IFLA_STATS64, b"")
    if len(told) < _LINK.size:
        return {}
    return dict(zip(_LINK_COUNTERS, _LINK.unpack_from(told), strict=True))


def vf_statistics(payload: bytes) -> Mapping[int, Mapping[str, int]]:
    """Of a PF's RTM_NEWLINK, by VF index; empty where the list was not asked for. HwError as above."""
    found: dict[int, Mapping[str, int]] = {}
    for kind, entry in attribute_list(attributes(_body(payload)).get(_IFLA_VFINFO_LIST, b"")):
        values = attributes(entry)
        mac, told = values.get(_VF_MAC, b""), values.get(_VF_STATS)
        if kind == _VF_INFO and len(mac) >= _NUMBER.size and told is not None:
            (number,) = _NUMBER.unpack_from(mac)
            found[number] = {
                _VF_COUNTERS[which]: _COUNT.unpack_from(raw)[0]
                for which, raw in attribute_list(told)
                if which in _VF_COUNTERS and len(raw) >= _COUNT.size
            }
    return found


def _body(payload: bytes) -> bytes:
    if len(payload) < _LINK_HEADER:
        raise HwError("netlink: a link message without its header")
    return payload[_LINK_HEADER:]
