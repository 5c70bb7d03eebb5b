"""What libibverbs says of RDMA devices. The only importer of pyverbs.

Invariant: pyverbs is loaded at the first call and not before, and its absence (or that of RDMA in the kernel,
or of the right to open a device) is never an error: sysfs alone is enough. Every context is closed again.
"""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import logging
import socket
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from hw.model import IfName, RdmaName
from hw.rdma.details import DeviceDetails, PortDetails, Source, guid
from hw.rdma.gids import GidEntry
from hw.rdma.nldev import PhysState, PortState
from hw.rdma.wire import known

log = logging.getLogger(__name__)

PACKAGE = "python3-pyverbs"
_GID_TYPES = {0: "IB/RoCE v1", 1: "IB/RoCE v1", 2: "RoCE v2"}
"""enum ibv_gid_type in the words of sysfs, which has one for the first two."""
_LINK_LAYERS = {1: "InfiniBand", 2: "Ethernet"}
_WIDTHS = {1: 1, 2: 4, 4: 8, 8: 12, 16: 2}
_LANE_MBPS = {1: 2500, 2: 5000, 4: 10_000, 8: 10_000, 16: 14_000, 32: 25_000, 64: 50_000, 128: 100_000}
"""enum ib_port_width and ib_port_speed (SDR, DDR, QDR, FDR10, FDR, EDR, HDR, NDR), as the kernel's sysfs
counts them."""


def why_not() -> str:
    """Why libibverbs cannot be asked, in words; "" if it can. Loads nothing."""
    if importlib.util.find_spec("pyverbs") is None:
        return f"pyverbs is not installed (Debian's {PACKAGE})"
    return ""


def devices() -> Mapping[RdmaName, DeviceDetails]:
    """All devices that can be opened here; none without pyverbs or without RDMA in the kernel.

    Opening a device costs a firmware command: not for the path of a pod.
    """
    verbs = _load()
    if verbs is None:
        return {}
    failed: type[Exception] = verbs.PyverbsError
    try:
        names = [_text(entry.name) for entry in verbs.get_device_list()]
    except failed as error:
        log.debug("libibverbs lists no devices: %s", error)
        return {}
    found: dict[RdmaName, DeviceDetails] = {}
    for name in names:
        try:
            found[RdmaName(name)] = _query(verbs, name)
        except failed as error:
            log.debug("RDMA device %a cannot be opened: %s", name, error)
    return found


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("pyverbs.device")
    except ImportError as error:
        log.debug("no pyverbs: %s", error)
        return None


def _query(verbs: ModuleType, name: str) -> DeviceDetails:
    context = verbs.Context(name=name)
    try:
        attributes = context.query_device()
        ports = [(number, context.query_port(number)) for number in range(1, attributes.phys_port_cnt + 1)]
        entries = context.query_gid_table(max(1, sum(port.gid_tbl_len for _, port in ports)))
        gids = [(entry.port_num, _gid(entry)) for entry in entries]
    finally:
        context.close()
    return DeviceDetails(
        name=RdmaName(name),
        node_guid=_guid(attributes.node_guid),
        sys_image_guid=_guid(attributes.sys_image_guid),
        firmware=_firmware(_text(attributes.fw_version)),
        ports=tuple(
            _port(number, port, tuple(gid for owner, gid in gids if owner == number))
            for number, port in ports
        ),
        source=Source.VERBS,
    )


def _port(number: int, port: Any, gids: tuple[GidEntry, ...]) -> PortDetails:
    lane, lanes = _LANE_MBPS.get(port.active_speed), _WIDTHS.get(port.active_width)
    return PortDetails(
        number=number,
        link_layer=_LINK_LAYERS.get(port.link_layer, ""),
        state=known(PortState, int(port.state), PortState.UNKNOWN),
        phys_state=known(PhysState, int(port.phys_state), PhysState.UNKNOWN),
        rate_mbps=lane * lanes if lane and lanes else None,
        lid=int(port.lid),
        sm_lid=int(port.sm_lid),
        gids=gids,
    )


def _guid(value: int) -> str | None:
    """pyverbs hands out the eight bytes as they are in memory, which is network order, as a number."""
    data = value.to_bytes(8, sys.byteorder)
    return guid(data.hex(":", 2))


def _firmware(version: str) -> str | None:
    """Providers of software write a version of zeroes, sysfs none."""
    return version if version.strip("0.") else None


def _gid(entry: Any) -> GidEntry:
    return GidEntry(
        index=int(entry.gid_index),
        address=ipaddress.IPv6Address(str(entry.gid_str())),
        type=_GID_TYPES.get(int(entry.gid_type), ""),
        netdev=_netdev(int(entry.ndev_ifindex)),
    )


def _netdev(ifindex: int) -> IfName | None:
    """None for InfiniBand, and for a netdev that is in another namespace."""
    try:
        return IfName(socket.if_indextoname(ifindex)) if ifindex else None
    except OSError:
        return None


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
