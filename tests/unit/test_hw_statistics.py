"""What links and PFs counted is read for what they tell, and what they do not tell is not there."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw.errors import HwError
from hw.statistics import link_statistics, vf_statistics
from tests.unit.test_hw_wire import attr, link_payload, u32


def stats64(*values: int) -> bytes:
    return attr(23, struct.pack("=25Q", *values, *[99] * (25 - len(values))))


def vf(number: int, *entries: bytes) -> bytes:
    return attr(0x8000 | 1, attr(1, u32(number) + bytes(32)) + b"".join(entries))


def counted(**values: int) -> bytes:
    numbers = {
        "rx_packets": 0,
        "tx_packets": 1,
        "rx_bytes": 2,
        "tx_bytes": 3,
        "rx_dropped": 7,
        "tx_dropped": 8,
    }
    told = b"".join(attr(numbers[name], struct.pack("=Q", value)) for name, value in values.items())
    # Broadcast, multicast and the padding that aligns 64-bit values are skipped.
    return attr(0x8000 | 8, told + attr(4, bytes(8)) + attr(5, bytes(8)) + attr(6, b""))


def listed(*vfs: bytes) -> bytes:
    return link_payload(attr(3, b"ens1f0\0"), attr(0x8000 | 22, b"".join(vfs)))


def test_an_interface_s_counters_are_its_own_names() -> None:
    assert link_statistics(link_payload(attr(3, b"net0\0"), stats64(1, 2, 3, 4, 5, 6, 7, 8))) == {
        "rx_packets": 1,
        "tx_packets": 2,
        "rx_bytes": 3,
        "tx_bytes": 4,
        "rx_errors": 5,
        "tx_errors": 6,
        "rx_dropped": 7,
        "tx_dropped": 8,
    }


def test_a_message_without_counters_tells_none() -> None:
    assert link_statistics(link_payload(attr(3, b"net0\0"))) == {}
    assert link_statistics(link_payload(attr(23, bytes(40)))) == {}
    assert vf_statistics(link_payload(attr(3, b"ens1f0\0"))) == {}


def test_each_vf_has_its_own_counters() -> None:
    payload = listed(
        vf(0, counted(rx_packets=1, tx_packets=2, rx_bytes=3, tx_bytes=4, rx_dropped=5, tx_dropped=2**63)),
        vf(7, counted(rx_bytes=9)),
        vf(8, attr(4, u32(8) + u32(1))),
    )
    assert vf_statistics(payload) == {
        0: {
            "rx_packets": 1,
            "tx_packets": 2,
            "rx_bytes": 3,
            "tx_bytes": 4,
            "rx_dropped": 5,
            "tx_dropped": 2**63,
        },
        7: {"rx_bytes": 9},
    }


def test_counters_that_are_cut_off_are_left_out() -> None:
    assert vf_statistics(listed(vf(0, attr(0x8000 | 8, attr(0, bytes(4)) + attr(1, bytes(8)))))) == {
        0: {"tx_packets": 0}
    }


@pytest.mark.parametrize("read", [link_statistics, vf_statistics])
def test_what_is_no_link_message_is_an_error(read: object) -> None:
    assert callable(read)
    with pytest.raises(HwError, match="without its header"):
        read(bytes(15))


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (link_statistics, vf_statistics):
        with contextlib.suppress(HwError):
            read(link_payload(data))
        with contextlib.suppress(HwError):
            read(listed(data))
        with contextlib.suppress(HwError):
            read(listed(vf(0, attr(0x8000 | 8, data))))
