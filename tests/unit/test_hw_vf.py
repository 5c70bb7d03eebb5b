"""What a PF says of its VFs is read for what it says; what it does not say is None and not a guess."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw.errors import HwError
from hw.model import VfLinkState, VfSettings, VfVlan, VlanProtocol
from hw.rdma.infiniband import parse_guid
from hw.vf import VfRates, vf_request, vf_settings
from tests.unit.test_hw_wire import attr, link_payload, u32

UNKNOWN = 0xFFFFFFFF


def info(number: int, mac: str, *entries: bytes) -> bytes:
    return attr(0x8000 | 1, attr(1, u32(number) + bytes.fromhex(mac) + bytes(26)) + b"".join(entries))


def listed(*infos: bytes) -> bytes:
    return link_payload(attr(3, b"ens1f0\0"), attr(0x8000 | 22, b"".join(infos)))


def test_every_setting_of_a_vf_is_read() -> None:
    whole = info(
        2,
        "02aa00000001",
        attr(2, u32(2) + u32(100) + u32(3)),
        attr(6, u32(2) + u32(100) + u32(2500)),
        attr(3, u32(2) + u32(2500)),
        attr(4, u32(2) + u32(1)),
        attr(5, u32(2) + u32(1)),
        attr(7, u32(2) + u32(UNKNOWN)),
        attr(9, u32(2) + u32(0)),
        attr(0x8000 | 12, attr(1, u32(2) + u32(100) + u32(3) + b"\x88\xa8\0\0")),
    )
    assert vf_settings(listed(info(0, "02aa00000009"), whole))[2] == VfSettings(
        mac="02:aa:00:00:00:01",
        vlan=VfVlan(id=100, qos=3, protocol=VlanProtocol.SERVICE),
        min_rate=100,
        max_rate=2500,
        spoof_check=True,
        trust=False,
        link_state=VfLinkState.ENABLE,
    )


def test_what_a_driver_does_not_tell_is_not_known() -> None:
    silent = info(0, "000000000000", attr(4, u32(0) + u32(UNKNOWN)), attr(9, u32(0) + u32(UNKNOWN)))
    assert vf_settings(listed(silent)) == {0: VfSettings()}


def test_a_kernel_without_the_vlan_list_tells_the_plain_vlan() -> None:
    old = info(0, "000000000000", attr(2, u32(0) + u32(7) + u32(1)))
    assert vf_settings(listed(old))[0].vlan == VfVlan(id=7, qos=1)


def test_no_vlan_is_told_as_none_whatever_its_protocol_so_that_it_can_be_put_back() -> None:
    nowhere = info(0, "000000000000", attr(12, attr(1, u32(0) + u32(0) + u32(0) + b"\0\0\0\0")))
    assert vf_settings(listed(nowhere)) == {0: VfSettings(vlan=VfVlan())}


def test_a_vlan_protocol_or_link_state_of_the_future_is_not_taken_for_one_of_ours() -> None:
    strange = info(
        0,
        "000000000000",
        attr(12, attr(1, u32(0) + u32(7) + u32(1) + b"\x91\x00\0\0")),
        attr(5, u32(0) + u32(9)),
    )
    assert vf_settings(listed(strange)) == {0: VfSettings()}


def test_a_link_without_vfs_has_none() -> None:
    assert vf_settings(link_payload(attr(3, b"lo\0"))) == {}
    assert vf_settings(listed(attr(0x8000 | 1, attr(1, b"\0\0")))) == {}


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(tail: bytes) -> None:
    with contextlib.suppress(HwError):
        vf_settings(link_payload() + tail)
    with contextlib.suppress(HwError):
        vf_settings(listed(tail))


def test_a_message_without_its_header_is_an_error() -> None:
    with pytest.raises(HwError, match="without its header"):
        vf_settings(b"\0" * 15)


@pytest.mark.parametrize(
    ("setting", "value"), [("mac", True), ("vlan", 5), ("rates", VfVlan()), ("colour", None)]
)
def test_what_is_no_setting_of_a_vf_is_not_sent(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match="no setting"):
        vf_request(0, setting, value)  # type: ignore[arg-type]


def test_a_rate_pair_is_one_request_since_the_kernel_takes_no_single_one() -> None:
    assert vf_request(1, "rates", VfRates(0, 10)) == attr(22, attr(1, attr(6, u32(1) + u32(0) + u32(10))))


# --- InfiniBand: as struct ifla_vf_guid of uapi linux/if_link.h has it ------------------------------------


def guid(kind: int, vf: int, number: int) -> bytes:
    return attr(kind, u32(vf) + bytes(4) + struct.pack("=Q", number))


def test_guids_of_an_infiniband_vf_are_read_and_none_is_none() -> None:
    given_guids = info(0, "000000000000", guid(10, 0, 0x021122FFFE180000), guid(11, 0, 0x021122FFFE180001))
    without = info(1, "000000000000", guid(10, 1, 0), guid(11, 1, (1 << 64) - 1))
    found = vf_settings(listed(given_guids, without))
    assert (found[0].node_guid, found[0].port_guid) == ("0211:22ff:fe18:0000", "0211:22ff:fe18:0001")
    assert found[1] == VfSettings()
    assert vf_settings(listed(info(2, "000000000000", attr(10, bytes(12)))))[2].node_guid is None


@pytest.mark.parametrize(("setting", "kind"), [("node_guid", 10), ("port_guid", 11)])
def test_a_guid_is_written_as_the_kernel_reads_it(setting: str, kind: int) -> None:
    value = parse_guid("02:11:22:ff:fe:18:00:01")
    assert vf_request(3, setting, value) == attr(22, attr(1, guid(kind, 3, 0x021122FFFE180001)))
    assert vf_request(3, setting, None) == attr(22, attr(1, guid(kind, 3, 0)))
