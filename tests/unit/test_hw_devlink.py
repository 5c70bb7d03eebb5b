"""Devlink's messages as kernel 7.3 sent them of netdevsim, and what must never be read into others."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw import devlink_codec as codec
from hw.devlink import reporters_in
from hw.devlink_codec import (
    Command,
    DevlinkHandle,
    DevlinkPort,
    DevlinkRate,
    GenlFamily,
    ParamMode,
    PortFlavour,
    PortFunction,
)
from hw.errors import Busy, HwError
from hw.limited import in_time
from hw.model import EswitchMode, IfIndex, MacAddress, NsimName, PciAddress
from hw.transport import header

DEVICE = DevlinkHandle("netdevsim", "netdevsim10")
FAMILY = GenlFamily(24, 1)
_NAMED = "0e0001006e657464657673696d000000100002006e657464657673696d313000"
_ABOUT = f"{_NAMED}0800b80000000000"


def answer(command: int, attrs: str) -> bytes:
    return bytes((command, 1, 0, 0)) + bytes.fromhex(_ABOUT + attrs)


def attr(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


# --- answers ------------------------------------------------------------------------------------------


def test_the_family_is_found_with_its_group() -> None:
    payload = bytes.fromhex(
        "010200000c0002006465766c696e6b00060001001800000008000300010000000800040000000000"
        "1c0007001800010008000200090000000b000100636f6e6669670000"
    )
    assert codec.family(payload) == GenlFamily(24, 1, {"config": 9})


@pytest.mark.parametrize(
    ("mode", "read"),
    [("0000", EswitchMode.LEGACY), ("0100", EswitchMode.SWITCHDEV), ("0200", EswitchMode.SWITCHDEV)],
)
def test_the_eswitch_mode_is_read(mode: str, read: EswitchMode) -> None:
    assert codec.eswitch_mode(answer(29, f"06001900{mode}0000")) is read
    assert codec.eswitch_mode(answer(29, "06001900ffff0000")) is None


def test_a_physical_port_and_a_vfs_are_told_apart() -> None:
    physical = "08000300000000000600040002000000080006000600000009000700657468330000000005009400"
    physical += "0000000006004d000000000008004e0001000000"
    assert codec.port(answer(7, physical)) == DevlinkPort(
        handle=DEVICE,
        index=0,
        flavour=PortFlavour.PHYSICAL,
        number=1,
        ifindex=IfIndex(6),
        netdev="eth3",
    )
    of_vf = "08000300810000000600040002000000080006000900000009000700657468300000000005009400"
    of_vf += "0000000006004d0004000000080096000000000006007f000000000006008000010000000500950000000000"
    assert codec.port(answer(7, of_vf)) == DevlinkPort(
        handle=DEVICE,
        index=129,
        flavour=PortFlavour.PCI_VF,
        ifindex=IfIndex(9),
        netdev="eth0",
        pf=0,
        vf=1,
    )


def test_the_function_behind_a_port_is_read_with_its_address() -> None:
    function = attr(1, bytes.fromhex("020000000001")) + attr(2, b"\x01") + attr(3, b"\x00")
    payload = answer(7, "") + attr(3, struct.pack("=I", 7)) + attr(0x8000 | 145, function)
    assert codec.port(payload).function == PortFunction(
        hw_addr=MacAddress("02:00:00:00:00:01"), active=True, attached=False
    )
    none_given = answer(7, "") + attr(3, struct.pack("=I", 7)) + attr(145, attr(1, bytes(6)))
    assert codec.port(none_given).function == PortFunction()


def test_a_flavour_of_a_later_kernel_is_no_flavour() -> None:
    payload = answer(7, "") + attr(3, struct.pack("=I", 7)) + attr(77, struct.pack("=H", 99))
    assert codec.port(payload).flavour is None


def test_leaves_and_nodes_are_read_in_bytes_per_second() -> None:
    leaf = "0600a5000000000008000300800000000c00a600d0121300000000000c00a70020bcbe00000000000900a90067727031"
    assert codec.rate(answer(76, leaf + "00000000")) == DevlinkRate(
        handle=DEVICE, port=128, tx_share=1_250_000, tx_max=12_500_000, parent="grp1"
    )
    node = "0600a500010000000900a80067727031000000000c00a60000000000000000000c00a7004059730700000000"
    assert codec.rate(answer(76, node)) == DevlinkRate(handle=DEVICE, node="grp1", tx_max=125_000_000)


def test_a_reporter_in_trouble_is_heard_of_and_again_when_it_is_well() -> None:
    def told(state: str, errors: str) -> bytes:
        inner = f"0a00730064756d6d7900000005007400{state}0000000c007500{errors}"
        return answer(54, f"{(len(inner) // 2 + 4).to_bytes(2, 'little').hex()}7200{inner}")

    sick, well = told("01", "0100000000000000"), told("00", "0100000000000000")
    data = header(24, 0, 0, sick) + header(24, 0, 0, answer(52 + 1, "")) + header(24, 0, 0, well)
    heard = reporters_in(data + header(25, 0, 0, b""), FAMILY)
    assert [(each.name, each.healthy, each.errors) for each in heard] == [
        ("dummy", False, 1),
        ("dummy", True, 1),
    ]


def test_a_parameter_tells_its_value_by_when_it_takes_effect() -> None:
    number = "400050000d0051006d61785f6d61637300000000040052000500530003000000200054001c0055000500570001"
    number += "00000008005600200000000800b60020000000"
    told = codec.param(answer(38, number))
    assert (told.name, told.values) == ("max_macs", {ParamMode.DRIVER_INIT: 32})
    flag = "340050000a005100746573743100000005005300060000001c0054001800550005005700010000000400560005"
    flag += "00b60001000000"
    assert codec.param(answer(38, flag)).values == {ParamMode.DRIVER_INIT: True}


def test_driver_and_versions_are_told() -> None:
    attrs = "200066000c00670066772e6d676d74000d00680031302e32302e333000000000200065000c00670066772e6d676d74"
    attrs += "000d00680031302e32302e3330000000000e0062006e657464657673696d000000"
    told = codec.info(answer(51, attrs))
    assert (told.handle, told.driver, told.serial) == (DEVICE, "netdevsim", None)
    assert told.running == told.stored == {"fw.mgmt": "10.20.30"}


# --- requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "attrs", "sent"),
    [
        (
            Command.ESWITCH_SET,
            codec.handle_attrs(DEVICE) + codec.mode_attr(EswitchMode.SWITCHDEV),
            f"3c000000180005001b000000000000001e010000{_NAMED}0600190001000000",
        ),
        (
            Command.RATE_SET,
            codec.port_attrs(DEVICE, 128) + codec.rate_attrs(share=1_250_000, top=12_500_000),
            f"540000001800050024000000000000004b010000{_NAMED}08000300800000000c00a600d0121300000000000c00a7"
            "0020bcbe0000000000",
        ),
        (
            Command.RATE_SET,
            codec.port_attrs(DEVICE, 128) + codec.rate_attrs(parent=""),
            f"440000001800050024000000000000004b010000{_NAMED}08000300800000000500a90000000000",
        ),
        (
            Command.RATE_DEL,
            codec.handle_attrs(DEVICE) + codec.rate_attrs(node="grp1"),
            f"400000001800050024000000000000004d010000{_NAMED}0900a8006772703100000000",
        ),
        (
            Command.PORT_SET,
            codec.port_attrs(DEVICE, 128) + codec.function_attr(hw_addr=MacAddress("02:00:00:00:00:01")),
            f"4c00000018000500240000000000000006010000{_NAMED}0800030080000000100091800a000100020000000001"
            "0000",
        ),
    ],
    ids=["mode", "rate", "no-parent", "node-gone", "function"],
)
def test_a_request_is_what_the_kernel_took(command: Command, attrs: bytes, sent: str) -> None:
    expected = bytes.fromhex(sent)
    (sequence,) = struct.unpack_from("=I", expected, 8)
    assert codec.request(FAMILY, command, attrs, 5, sequence) == expected


def test_a_card_is_called_by_its_address_on_its_bus() -> None:
    assert str(DevlinkHandle.of_card(PciAddress("0000:3b:00.0"))) == "pci/0000:3b:00.0"
    assert DevlinkHandle.of_card(NsimName("netdevsim10")) == DEVICE


# --- what makes no sense ------------------------------------------------------------------------------

READERS: Mapping[str, Callable[[bytes], Any]] = {
    name: getattr(codec, name)
    for name in ("family", "handle", "eswitch_mode", "port", "rate", "reporter", "param", "info")
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
@given(data=st.binary(max_size=200), command=st.sampled_from([7, 52, 54, 76]))
def test_what_no_kernel_sends_is_an_error_and_nothing_else(
    read: Callable[[bytes], Any], data: bytes, command: int
) -> None:
    with contextlib.suppress(HwError):
        read(data)
    with contextlib.suppress(HwError):
        read(answer(command, "") + data)


@given(
    kinds=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, 77, 114, 115, 145, 165, 168, 80, 84, 101]), st.binary(max_size=40)
        ),
        max_size=8,
    )
)
def test_attributes_of_any_length_are_read_or_refused(kinds: list[tuple[int, bytes]]) -> None:
    payload = answer(52, "") + b"".join(attr(kind, data) for kind, data in kinds)
    for read in READERS.values():
        with contextlib.suppress(HwError):
            read(payload)


@pytest.mark.parametrize("read", [codec.port, codec.rate, codec.reporter], ids=["port", "rate", "reporter"])
def test_a_message_without_its_subject_is_refused(read: Callable[[bytes], Any]) -> None:
    with pytest.raises(HwError):
        read(answer(52, ""))


def test_a_message_about_no_device_is_refused() -> None:
    with pytest.raises(HwError, match="which device"):
        codec.handle(bytes((1, 1, 0, 0)))


# --- a call that hangs --------------------------------------------------------------------------------


def test_a_call_that_hangs_does_not_hang_its_caller() -> None:
    released = threading.Event()
    with pytest.raises(Busy, match="set it did not end in"):
        in_time("set it", lambda: released.wait(30) and None, 0.01)
    released.set()


def test_an_error_of_a_limited_call_is_its_callers() -> None:
    def fail() -> None:
        raise HwError("no")

    with pytest.raises(HwError, match="no"):
        in_time("set it", fail, 10.0)
