"""Generic netlink's family look-up and devlink's messages: read, and requests written.

Invariant: pure. What the kernel's message does not tell is None, what it tells that this version does not
know (a flavour, a mode) is None too; a message that does not say which device it is about is an HwError.
Numbers of commands and attributes are those of uapi linux/genetlink.h and linux/devlink.h.
"""

from __future__ import annotations

import enum
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hw.errors import HwError
from hw.model import EswitchMode, IfIndex, MacAddress, PfAddress, bus_of
from hw.transport import header
from hw.wire import attribute, attribute_list, attributes, raw, text

CTRL_FAMILY = 16
"""Message type of the controller, which knows the other families' types."""
_CTRL_GETFAMILY = 3
_GENL = struct.Struct("=BBxx")


class Command(enum.IntEnum):
    """DEVLINK_CMD_*, those that are sent or heard here."""

    GET = 1
    PORT_GET = 5
    PORT_SET = 6
    ESWITCH_GET = 29
    ESWITCH_SET = 30
    PARAM_GET = 38
    INFO_GET = 51
    HEALTH_REPORTER_GET = 52
    HEALTH_REPORTER_RECOVER = 54
    RATE_GET = 74
    RATE_SET = 75
    RATE_NEW = 76
    RATE_DEL = 77


class _Attr(enum.IntEnum):
    BUS_NAME = 1
    DEV_NAME = 2
    PORT_INDEX = 3
    PORT_NETDEV_IFINDEX = 6
    PORT_NETDEV_NAME = 7
    ESWITCH_MODE = 25
    PORT_FLAVOUR = 77
    PORT_NUMBER = 78
    PARAM = 80
    PARAM_NAME = 81
    PARAM_TYPE = 83
    PARAM_VALUES_LIST = 84
    PARAM_VALUE_DATA = 86
    PARAM_VALUE_CMODE = 87
    INFO_DRIVER_NAME = 98
    INFO_SERIAL_NUMBER = 99
    INFO_VERSION_FIXED = 100
    INFO_VERSION_RUNNING = 101
    INFO_VERSION_STORED = 102
    INFO_VERSION_NAME = 103
    INFO_VERSION_VALUE = 104
    HEALTH_REPORTER = 114
    HEALTH_REPORTER_NAME = 115
    HEALTH_REPORTER_STATE = 116
    HEALTH_REPORTER_ERR_COUNT = 117
    HEALTH_REPORTER_RECOVER_COUNT = 118
    PORT_PCI_PF_NUMBER = 127
    PORT_PCI_VF_NUMBER = 128
    PORT_FUNCTION = 145
    INFO_BOARD_SERIAL_NUMBER = 146
    PORT_EXTERNAL = 149
    PORT_CONTROLLER_NUMBER = 150
    PORT_PCI_SF_NUMBER = 164
    RATE_TYPE = 165
    RATE_TX_SHARE = 166
    RATE_TX_MAX = 167
    RATE_NODE_NAME = 168
    RATE_PARENT_NODE_NAME = 169


_FUNCTION_HW_ADDR = 1
_FUNCTION_STATE = 2
_FUNCTION_OPSTATE = 3
_RATE_NODE = 1
_MODES = {0: EswitchMode.LEGACY, 1: EswitchMode.SWITCHDEV, 2: EswitchMode.SWITCHDEV}
"""2 is switchdev_inactive (kernel 6.19): representors are there, the switch does not forward yet."""


class PortFlavour(enum.IntEnum):
    PHYSICAL = 0
    CPU = 1
    DSA = 2
    PCI_PF = 3
    PCI_VF = 4
    VIRTUAL = 5
    UNUSED = 6
    PCI_SF = 7


_FLAVOURS: Mapping[int | None, PortFlavour] = {flavour.value: flavour for flavour in PortFlavour}
REPRESENTING = frozenset({PortFlavour.PCI_PF, PortFlavour.PCI_VF, PortFlavour.PCI_SF})
"""Ports that are the switch's end of a function."""


@dataclass(frozen=True, slots=True)
class DevlinkHandle:
    """What devlink calls a device: the name of its bus and its own there."""

    bus: str
    device: str

    @classmethod
    def of_card(cls, address: PfAddress) -> DevlinkHandle:
        return cls(bus_of(address), address)

    def __str__(self) -> str:
        return f"{self.bus}/{self.device}"


@dataclass(frozen=True, slots=True)
class GenlFamily:
    """A family's message type, and its multicast groups by name."""

    id: int
    version: int
    groups: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PortFunction:
    """What a switch knows of the function behind one of its ports."""

    hw_addr: MacAddress | None = None
    """Given to the function; None where none was."""
    active: bool | None = None
    attached: bool | None = None
    """Whether a driver has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevlinkPort:
    """ifindex is of its netdev, where that is in the namespace that was asked. pf, vf and sf number the
    function that a port of flavour PCI_PF, PCI_VF or PCI_SF stands for."""

    handle: DevlinkHandle
    index: int
    flavour: PortFlavour | None = None
    number: int | None = None
    ifindex: IfIndex | None = None
    netdev: str | None = None
    controller: int = 0
    pf: int | None = None
    vf: int | None = None
    sf: int | None = None
    external: bool = False
    """The function is on another host, as that of a SmartNIC's ports is."""
    function: PortFunction | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DevlinkRate:
    """Limits of what is sent, bytes per second; 0 is none. A leaf has a port, a node a name."""

    handle: DevlinkHandle
    port: int | None = None
    node: str | None = None
    tx_share: int = 0
    tx_max: int = 0
    parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReporter:
    """One subject that a driver watches (`fw_fatal`, `tx`). port: of one port's only."""

    handle: DevlinkHandle
    name: str
    port: int | None = None
    healthy: bool = True
    errors: int = 0
    recoveries: int = 0


class ParamMode(enum.IntEnum):
    """When a parameter's value takes effect."""

    RUNTIME = 0
    DRIVER_INIT = 1
    PERMANENT = 2


_PARAM_MODES: Mapping[int | None, ParamMode] = {mode.value: mode for mode in ParamMode}
ParamValue = bool | int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class DevlinkParam:
    handle: DevlinkHandle
    name: str
    values: Mapping[ParamMode, ParamValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevlinkInfo:
    """Versions by component (`fw`, `fw.mgmt`, `asic.id`)."""

    handle: DevlinkHandle
    driver: str | None = None
    serial: str | None = None
    board_serial: str | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)
    running: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)


# --- requests -----------------------------------------------------------------------------------------


def family_request(name: str, flags: int, sequence: int) -> bytes:
    payload = _GENL.pack(_CTRL_GETFAMILY, 1) + attribute(2, raw(name) + b"\0")
    return header(CTRL_FAMILY, flags, sequence, payload)


def request(family: GenlFamily, command: Command, attrs: bytes, flags: int, sequence: int) -> bytes:
    return header(family.id, flags, sequence, _GENL.pack(command, family.version) + attrs)


def handle_attrs(handle: DevlinkHandle) -> bytes:
    return _string(_Attr.BUS_NAME, handle.bus) + _string(_Attr.DEV_NAME, handle.device)


def port_attrs(handle: DevlinkHandle, port: int) -> bytes:
    return handle_attrs(handle) + attribute(_Attr.PORT_INDEX, struct.pack("=I", port))


def mode_attr(mode: EswitchMode) -> bytes:
    number = 1 if mode is EswitchMode.SWITCHDEV else 0
    return attribute(_Attr.ESWITCH_MODE, struct.pack("=H", number))


def function_attr(hw_addr: MacAddress | None = None, active: bool | None = None) -> bytes:
    """What is None stays as it is."""
    parts = b""
    if hw_addr is not None:
        parts += attribute(_FUNCTION_HW_ADDR, bytes.fromhex(hw_addr.replace(":", "")))
    if active is not None:
        parts += attribute(_FUNCTION_STATE, struct.pack("=B", active))
    return attribute(_Attr.PORT_FUNCTION | 0x8000, parts)


def rate_attrs(
    *, node: str | None = None, share: int | None = None, top: int | None = None, parent: str | None = None
) -> bytes:
    """share and top in bytes per second; parent "" is none. What is None stays as it is."""
    parts = _string(_Attr.RATE_NODE_NAME, node) if node is not None else b""
    if share is not None:
        parts += attribute(_Attr.RATE_TX_SHARE, struct.pack("=Q", share))
    if top is not None:
        parts += attribute(_Attr.RATE_TX_MAX, struct.pack("=Q", top))
    return parts + (_string(_Attr.RATE_PARENT_NODE_NAME, parent) if parent is not None else b"")


def param_attr(name: str) -> bytes:
    return _string(_Attr.PARAM_NAME, name)


def _string(kind: int, value: str) -> bytes:
    return attribute(kind, raw(value) + b"\0")


# --- answers ------------------------------------------------------------------------------------------

Fields = Mapping[int, bytes]


def family(payload: bytes) -> GenlFamily:
    """An answer of the controller."""
    _, found = _opened(payload)
    groups = {}
    for _, entry in attribute_list(found.get(7, b"")):
        values = attributes(entry)
        number = _number(values.get(2))
        if number is not None:
            groups[text(values.get(1, b""))] = number
    number, version = _number(found.get(1)), _number(found.get(3))
    if number is None:
        raise HwError("generic netlink: an answer about a family without its number")
    return GenlFamily(number, (version or 1) & 0xFF, groups)


def handle(payload: bytes) -> DevlinkHandle:
    return _handle(_opened(payload)[1])


def eswitch_mode(payload: bytes) -> EswitchMode | None:
    number = _number(_opened(payload)[1].get(_Attr.ESWITCH_MODE))
    return _MODES.get(number) if number is not None else None


def port(payload: bytes) -> DevlinkPort:
    _, found = _opened(payload)
    ifindex = _number(found.get(_Attr.PORT_NETDEV_IFINDEX))
    index = _number(found.get(_Attr.PORT_INDEX))
    if index is None:
        raise HwError("devlink: a port without its index")
    return DevlinkPort(
        handle=_handle(found),
        index=index,
        flavour=_FLAVOURS.get(_number(found.get(_Attr.PORT_FLAVOUR))),
        number=_number(found.get(_Attr.PORT_NUMBER)),
        ifindex=IfIndex(ifindex) if ifindex else None,
        netdev=_text(found.get(_Attr.PORT_NETDEV_NAME)),
        controller=_number(found.get(_Attr.PORT_CONTROLLER_NUMBER)) or 0,
        pf=_number(found.get(_Attr.PORT_PCI_PF_NUMBER)),
        vf=_number(found.get(_Attr.PORT_PCI_VF_NUMBER)),
        sf=_number(found.get(_Attr.PORT_PCI_SF_NUMBER)),
        external=bool(_number(found.get(_Attr.PORT_EXTERNAL))),
        function=_function(found.get(_Attr.PORT_FUNCTION)),
    )


def _function(nested: bytes | None) -> PortFunction | None:
    if nested is None:
        return None
    found = attributes(nested)
    address = found.get(_FUNCTION_HW_ADDR, b"")
    state, opstate = _number(found.get(_FUNCTION_STATE)), _number(found.get(_FUNCTION_OPSTATE))
    return PortFunction(
        hw_addr=MacAddress(address.hex(":")) if any(address) else None,
        active=bool(state) if state is not None else None,
        attached=bool(opstate) if opstate is not None else None,
    )


def rate(payload: bytes) -> DevlinkRate:
    _, found = _opened(payload)
    is_node = _number(found.get(_Attr.RATE_TYPE)) == _RATE_NODE
    port_index, node = _number(found.get(_Attr.PORT_INDEX)), _text(found.get(_Attr.RATE_NODE_NAME))
    if (node if is_node else port_index) is None:
        raise HwError("devlink: a rate that is neither a port's nor has a name")
    return DevlinkRate(
        handle=_handle(found),
        port=None if is_node else port_index,
        node=node if is_node else None,
        tx_share=_number(found.get(_Attr.RATE_TX_SHARE)) or 0,
        tx_max=_number(found.get(_Attr.RATE_TX_MAX)) or 0,
        parent=_text(found.get(_Attr.RATE_PARENT_NODE_NAME)),
    )


def reporter(payload: bytes) -> HealthReporter | None:
    """Of a dump or a notification; None where it is about something else."""
    command, found = _opened(payload)
    if command not in (Command.HEALTH_REPORTER_GET, Command.HEALTH_REPORTER_RECOVER):
        return None
    told = attributes(found.get(_Attr.HEALTH_REPORTER, b""))
    name = _text(told.get(_Attr.HEALTH_REPORTER_NAME))
    if name is None:
        raise HwError("devlink: a health reporter without its name")
    return HealthReporter(
        handle=_handle(found),
        name=name,
        port=_number(found.get(_Attr.PORT_INDEX)),
        healthy=not _number(told.get(_Attr.HEALTH_REPORTER_STATE)),
        errors=_number(told.get(_Attr.HEALTH_REPORTER_ERR_COUNT)) or 0,
        recoveries=_number(told.get(_Attr.HEALTH_REPORTER_RECOVER_COUNT)) or 0,
    )


def param(payload: bytes) -> DevlinkParam:
    _, found = _opened(payload)
    told = attributes(found.get(_Attr.PARAM, b""))
    kind = _number(told.get(_Attr.PARAM_TYPE))
    values: dict[ParamMode, ParamValue] = {}
    for _, entry in attribute_list(told.get(_Attr.PARAM_VALUES_LIST, b"")):
        each = attributes(entry)
        mode = _PARAM_MODES.get(_number(each.get(_Attr.PARAM_VALUE_CMODE)))
        if mode is not None:
            values[mode] = _param_value(kind, each.get(_Attr.PARAM_VALUE_DATA))
    return DevlinkParam(handle=_handle(found), name=_text(told.get(_Attr.PARAM_NAME)) or "", values=values)


_PARAM_STRING = 5
_PARAM_FLAG = 6


def _param_value(kind: int | None, data: bytes | None) -> ParamValue:
    """A flag is told by being there at all."""
    if kind == _PARAM_FLAG:
        return data is not None
    if kind == _PARAM_STRING:
        return text(data or b"")
    return _number(data) or 0


def info(payload: bytes) -> DevlinkInfo:
    _, found = _opened(payload)
    listed = attribute_list(payload, _GENL.size)
    return DevlinkInfo(
        handle=_handle(found),
        driver=_text(found.get(_Attr.INFO_DRIVER_NAME)),
        serial=_text(found.get(_Attr.INFO_SERIAL_NUMBER)),
        board_serial=_text(found.get(_Attr.INFO_BOARD_SERIAL_NUMBER)),
        fixed=_versions(listed, _Attr.INFO_VERSION_FIXED),
        running=_versions(listed, _Attr.INFO_VERSION_RUNNING),
        stored=_versions(listed, _Attr.INFO_VERSION_STORED),
    )


def _versions(listed: Iterable[tuple[int, bytes]], kind: _Attr) -> Mapping[str, str]:
    found = {}
    for number, entry in listed:
        if number == kind:
            values = attributes(entry)
            found[text(values.get(_Attr.INFO_VERSION_NAME, b""))] = text(
                values.get(_Attr.INFO_VERSION_VALUE, b"")
            )
    return found


def _opened(payload: bytes) -> tuple[int, Fields]:
    if len(payload) < _GENL.size:
        raise HwError("generic netlink: a message without its header")
    return payload[0], attributes(payload, _GENL.size)


def _handle(found: Fields) -> DevlinkHandle:
    bus, device = _text(found.get(_Attr.BUS_NAME)), _text(found.get(_Attr.DEV_NAME))
    if bus is None or device is None:
        raise HwError("devlink: a message that does not say which device it is about")
    return DevlinkHandle(bus, device)


def _number(data: bytes | None) -> int | None:
    """The kernel sends each number in as many bytes as it has."""
    return int.from_bytes(data[:8], sys.byteorder) if data else None


def _text(data: bytes | None) -> str | None:
    return text(data) if data else None
