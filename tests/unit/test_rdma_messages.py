"""What a real kernel said of RDMA is read for what it says; broken messages are HwErrors and nothing else."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw import wire
from hw.errors import HwError
from hw.model import RdmaIndex
from hw.rdma import nldev, tracking
from hw.rdma.nldev import CharacterDeviceKind, EventKind, NldevEvent, PhysState, PortState
from hw.rdma.tracking import AutoMask, CounterMode, ResourceKind
from hw.rdma.wire import Attr, Command, request
from tests.unit import nldev_vectors as recorded

READERS: list[Callable[[bytes], object]] = [
    nldev.device,
    nldev.port,
    nldev.exclusive,
    lambda data: nldev.character_device(CharacterDeviceKind.UVERBS, data),
    tracking.summary,
    tracking.statistics,
    tracking.counter_status,
    tracking.statistic_mode,
    tracking.qp_counters,
    *[lambda data, kind=kind: tracking.resources(kind, data) for kind in ResourceKind],  # type: ignore[misc]
]


def payloads(datagrams: list[bytes], command: Command) -> list[bytes]:
    every = (message for data in datagrams for message in wire.messages(data))
    return [message.payload for message in every if message.type == command.message]


def only(datagrams: list[bytes], command: Command) -> bytes:
    (payload,) = payloads(datagrams, command)
    return payload


def attr(kind: Attr, data: bytes) -> bytes:
    return wire.attribute(kind, data)


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def test_devices() -> None:
    rxe, siw = map(nldev.device, payloads(recorded.DEVICES, Command.GET))
    assert (rxe.index, rxe.name, rxe.ports, rxe.protocol) == (0, "rxe_a", 1, "roce")
    assert (siw.index, siw.name, siw.ports, siw.protocol) == (1, "siw_b", 1, "iw")
    assert rxe.node_guid == rxe.sys_image_guid
    assert rxe.node_guid == "64a1:9fff:fea4:aee5"
    assert (rxe.firmware, rxe.parent) == (None, None)


def test_a_guid_of_zero_is_none_and_firmware_is_told() -> None:
    device = nldev.device(
        attr(Attr.DEV_INDEX, u32(3))
        + attr(Attr.DEV_NAME, b"mlx5_0\0")
        + attr(Attr.PORT_INDEX, u32(2))
        + attr(Attr.NODE_GUID, bytes(8))
        + attr(Attr.FW_VERSION, b"28.39.3004\0")
        + attr(Attr.PARENT_NAME, b"mlx5_9\0")
    )
    assert (device.node_guid, device.firmware, device.parent) == (None, "28.39.3004", "mlx5_9")


def test_a_port_and_its_netdev() -> None:
    port = nldev.port(only(recorded.RXE_PORTS, Command.PORT_GET))
    assert (port.number, port.state, port.phys_state) == (1, PortState.ACTIVE, PhysState.LINK_UP)
    assert (port.netdev_index, port.netdev_name, port.lid) == (7, "va", None)


def test_a_netdev_of_another_namespace_is_not_told() -> None:
    port = nldev.port(only(recorded.PORTS_FROM_ELSEWHERE, Command.PORT_GET))
    assert (port.state, port.netdev_index, port.netdev_name) == (PortState.ACTIVE, None, None)


def test_an_infiniband_port_has_lids_and_an_unknown_state_is_unknown() -> None:
    port = nldev.port(
        attr(Attr.PORT_INDEX, u32(1))
        + attr(Attr.PORT_STATE, b"\x63")
        + attr(Attr.LID, u32(17))
        + attr(Attr.SM_LID, u32(1))
        + attr(Attr.LMC, b"\0")
        + attr(Attr.SUBNET_PREFIX, struct.pack("=Q", 0xFE80 << 48))
    )
    assert (port.state, port.phys_state) == (PortState.UNKNOWN, PhysState.UNKNOWN)
    assert (port.lid, port.sm_lid, port.lmc, port.subnet_prefix) == (17, 1, 0, 0xFE80 << 48)


def test_the_namespace_mode() -> None:
    assert nldev.exclusive(only(recorded.EXCLUSIVE, Command.SYS_GET)) is True
    assert nldev.exclusive(only(recorded.NOT_EXCLUSIVE, Command.SYS_GET)) is False
    assert nldev.exclusive(b"") is None


@pytest.mark.parametrize(
    ("kind", "datagrams", "name", "number"),
    [
        (CharacterDeviceKind.UVERBS, recorded.UVERBS, "uverbs0", (231, 192)),
        (CharacterDeviceKind.UMAD, recorded.UMAD, "umad0", (231, 0)),
        (CharacterDeviceKind.RDMA_CM, recorded.RDMA_CM, "rdma_cm", (10, 260)),
    ],
)
def test_files_are_known_by_number(
    kind: CharacterDeviceKind, datagrams: list[bytes], name: str, number: tuple[int, int]
) -> None:
    device = nldev.character_device(kind, only(datagrams, Command.GET_CHARDEV))
    assert (device.name, (device.major, device.minor)) == (name, number)
    assert os.makedev(device.major, device.minor) == os.makedev(*number)


def test_resources_have_their_process_or_the_kernels_name() -> None:
    qps = tracking.resources(ResourceKind.QP, only(recorded.QPS, Command.RES_QP_GET))
    first, second, kernels = qps
    assert first.pid
    assert second.pid
    assert first.pid != second.pid
    assert (first.remote_qp, second.remote_qp) == (second.number, first.number)
    assert (first.port, first.type, first.state) == (1, 2, 3)
    assert (kernels.number, kernels.pid, kernels.kernel_name) == (1, None, "ib_core")
    for kind, datagrams in (
        (ResourceKind.CQ, recorded.CQS),
        (ResourceKind.MR, recorded.MRS),
        (ResourceKind.PD, recorded.PDS),
        (ResourceKind.CTX, recorded.CONTEXTS),
    ):
        users = [one for one in tracking.resources(kind, only(datagrams, kind.command)) if one.pid]
        assert {one.pid for one in users} == {first.pid, second.pid}
        assert all(one.length == (4096 if kind is ResourceKind.MR else None) for one in users)
    counts = tracking.summary(only(recorded.SUMMARY, Command.RES_GET))
    assert (counts["qp"], counts["mr"], counts["ctx"], counts["cm_id"]) == (3, 2, 2, 0)


def test_counters_and_which_are_on() -> None:
    values = tracking.statistics(only(recorded.STATISTICS, Command.STAT_GET))
    assert values["sent_bytes"] == values["rcvd_bytes"] > 1_000_000
    status = tracking.counter_status(only(recorded.COUNTER_STATUS, Command.STAT_GET_STATUS))
    assert [one.name for one in status] == list(values)
    assert [one.index for one in status] == list(range(len(values)))
    assert not any(one.optional for one in status)
    assert tracking.statistic_mode(only(recorded.MODE, Command.STAT_GET)).mode is CounterMode.NONE


def test_an_optional_counter_that_is_off() -> None:
    """No soft device has one; as nldev_stat_get_counter_status_doit makes it."""
    entry = (
        attr(Attr.STAT_HWCOUNTER_ENTRY_NAME, b"rdma_tx_bytes\0")
        + attr(Attr.STAT_HWCOUNTER_INDEX, u32(41))
        + attr(Attr.STAT_HWCOUNTER_DYNAMIC, b"\0")
    )
    (one,) = tracking.counter_status(
        attr(Attr.STAT_HWCOUNTERS, wire.attribute(Attr.STAT_HWCOUNTER_ENTRY | 0x8000, entry))
    )
    assert (one.index, one.name, one.optional, one.enabled) == (41, "rdma_tx_bytes", True, False)


def test_counters_of_qps() -> None:
    """No soft device has them; as fill_res_counter_entry makes them."""
    qps = attr(Attr.RES_QP_ENTRY, attr(Attr.RES_LQPN, u32(17))) + attr(
        Attr.RES_QP_ENTRY, attr(Attr.RES_LQPN, u32(18))
    )
    value = attr(Attr.STAT_HWCOUNTER_ENTRY_NAME, b"rx_write_requests\0") + attr(
        Attr.STAT_HWCOUNTER_ENTRY_VALUE, struct.pack("=Q", 1 << 40)
    )
    entry = (
        attr(Attr.PORT_INDEX, u32(1))
        + attr(Attr.STAT_COUNTER_ID, u32(4))
        + attr(Attr.RES_TYPE, b"\x02")
        + attr(Attr.RES_PID, u32(4711))
        + attr(Attr.RES_QP, qps)
        + attr(Attr.STAT_HWCOUNTERS, attr(Attr.STAT_HWCOUNTER_ENTRY, value))
    )
    (counter,) = tracking.qp_counters(attr(Attr.STAT_COUNTER, attr(Attr.STAT_COUNTER_ENTRY, entry)))
    assert (counter.number, counter.port, counter.qps) == (4, 1, (17, 18))
    assert (counter.qp_type, counter.pid, counter.values) == (2, 4711, {"rx_write_requests": 1 << 40})
    mode = tracking.statistic_mode(attr(Attr.STAT_MODE, u32(1)) + attr(Attr.STAT_AUTO_MODE_MASK, u32(3)))
    assert (mode.mode, mode.mask) == (CounterMode.AUTO, AutoMask.QP_TYPE | AutoMask.PID)


@pytest.mark.parametrize(
    ("datagrams", "event"),
    [
        (recorded.REGISTERED, NldevEvent(EventKind.REGISTER, RdmaIndex(0))),
        (recorded.UNREGISTERED, NldevEvent(EventKind.UNREGISTER, RdmaIndex(1))),
        (recorded.ATTACHED_ELSEWHERE, NldevEvent(EventKind.NETDEV_ATTACH)),
    ],
)
def test_events(datagrams: list[bytes], event: NldevEvent) -> None:
    ((message,),) = map(list, map(wire.messages, datagrams))
    assert nldev.event(message) == event


def test_events_about_netdevs() -> None:
    ((message,),) = map(list, map(wire.messages, recorded.NETDEV_ATTACHED))
    attached = nldev.event(message)
    assert attached
    assert (attached.index, attached.port, attached.netdev_index) == (0, 1, 7)
    ((message,),) = map(list, map(wire.messages, recorded.NETDEV_RENAMED))
    renamed = nldev.event(message)
    assert renamed
    assert (renamed.kind, renamed.index, renamed.netdev_index) == (
        EventKind.NETDEV_RENAME,
        None,
        7,
    )


def test_requests_are_as_the_kernel_reads_them() -> None:
    """uapi rdma_netlink.h: client 5, attributes alone; strings are ended (NLA_NUL_STRING)."""
    values = {Attr.DEV_NAME: "rxe0", Attr.LINK_TYPE: "rxe", Attr.NDEV_NAME: "eth\udcff"}
    (message,) = wire.messages(request(Command.NEWLINK, values)(5, 77))
    assert (message.type, message.flags, message.sequence) == (5 << 10 | 3, 5, 77)
    assert wire.attributes(message.payload) == {2: b"rxe0\0", 65: b"rxe\0", 51: b"eth\xff\0"}
    (message,) = wire.messages(request(Command.SET, {Attr.DEV_INDEX: 3, Attr.NET_NS_FD: 9})(5, 1))
    assert wire.attributes(message.payload) == {1: u32(3), 68: u32(9)}
    assert tracking.counter_indexes([41, 42]) == attr(Attr.STAT_HWCOUNTER_INDEX, u32(41)) + attr(
        Attr.STAT_HWCOUNTER_INDEX, u32(42)
    )


@pytest.mark.parametrize("missing", [Attr.DEV_INDEX, Attr.DEV_NAME, Attr.PORT_INDEX])
def test_a_device_without_what_makes_it_one_is_an_error(missing: Attr) -> None:
    parts = {Attr.DEV_INDEX: u32(1), Attr.DEV_NAME: b"a\0", Attr.PORT_INDEX: u32(1)}
    with pytest.raises(HwError, match=missing.name):
        nldev.device(b"".join(attr(kind, data) for kind, data in parts.items() if kind is not missing))


def test_a_value_that_is_too_short_is_an_error() -> None:
    with pytest.raises(HwError, match="NODE_GUID has 4 bytes"):
        nldev.device(attr(Attr.NODE_GUID, bytes(4)) + payloads(recorded.DEVICES, Command.GET)[0][:28])


_RECORDED = [
    message.payload
    for value in vars(recorded).values()
    if isinstance(value, list)
    for data in value
    for message in wire.messages(data)
]


@given(st.data())
def test_no_message_does_more_than_an_hw_error(data: st.DataObject) -> None:
    """Recorded ones with bytes changed and ends cut off, and noise."""
    payload = bytearray(data.draw(st.one_of(st.sampled_from(_RECORDED), st.binary(max_size=80))))
    for _ in range(data.draw(st.integers(0, 4)) if payload else 0):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    for read in READERS:
        with contextlib.suppress(HwError):
            read(cut)
    with contextlib.suppress(HwError):
        nldev.event(wire.Message(Command.MONITOR.message, 0, 0, cut))
