"""RDMA devices, their ports and their files, as NETLINK_RDMA's device interface tells of them: pure.

Invariant: as hw.rdma.wire. A number that is not known here is UNKNOWN or None, never an error.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass

from hw import wire
from hw.errors import HwError
from hw.model import IfIndex, IfName, RdmaIndex, RdmaName
from hw.rdma.wire import Attr, Attributes, Command, known


class PortState(enum.IntEnum):
    """enum ib_port_state. A RoCE port is ACTIVE or DOWN as its netdev has a carrier."""

    UNKNOWN = 0
    DOWN = 1
    INIT = 2
    ARMED = 3
    ACTIVE = 4
    ACTIVE_DEFER = 5


class PhysState(enum.IntEnum):
    """enum ib_port_phys_state."""

    UNKNOWN = 0
    SLEEP = 1
    POLLING = 2
    DISABLED = 3
    TRAINING = 4
    LINK_UP = 5
    ERROR_RECOVERY = 6
    PHY_TEST = 7


class CharacterDeviceKind(enum.StrEnum):
    """The kernel's names for its interfaces to user space, of which each device (port) has a file."""

    UVERBS = "uverbs"
    UMAD = "umad"
    ISSM = "issm"
    RDMA_CM = "rdma_cm"
    """One file for all devices."""


class EventKind(enum.IntEnum):
    """enum rdma_nl_notify_event_type."""

    REGISTER = 0
    UNREGISTER = 1
    NETDEV_ATTACH = 2
    NETDEV_DETACH = 3
    RENAME = 4
    NETDEV_RENAME = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class NldevDevice:
    """An RDMA device that the socket's namespace sees."""

    index: RdmaIndex
    name: RdmaName
    ports: int
    """How many it has; they are numbered from 1."""
    protocol: str | None = None
    """Of its first port: `roce`, `ib`, `iw`, `opa`, `usnic`."""
    node_guid: str | None = None
    """`b83f:d203:0071:7e80` as sysfs spells it; None where it has none."""
    sys_image_guid: str | None = None
    firmware: str | None = None
    parent: RdmaName | None = None
    """The RDMA device that this one is a part of (kernel 6.11)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NldevPort:
    """netdev_* is the port's netdev, and only where that is in the socket's own namespace."""

    number: int
    state: PortState
    phys_state: PhysState
    netdev_index: IfIndex | None = None
    netdev_name: IfName | None = None
    lid: int | None = None
    """With sm_lid, lmc and subnet_prefix: InfiniBand alone. 0 until a subnet manager gave one."""
    sm_lid: int | None = None
    lmc: int | None = None
    subnet_prefix: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CharacterDevice:
    """A file below /dev/infiniband. The numbers are the device; the name is what the kernel would call it."""

    kind: CharacterDeviceKind
    name: str
    major: int
    minor: int
    abi: int | None = None


@dataclass(frozen=True, slots=True)
class NldevEvent:
    """Told by kernels that have the monitor; of moves between namespaces nothing is told.

    index is None where the event is about a netdev alone (a rename), or one in another namespace.
    """

    kind: EventKind | None
    """None: of a kind that is not known here."""
    index: RdmaIndex | None = None
    port: int | None = None
    netdev_index: IfIndex | None = None


# --- reading ------------------------------------------------------------------------------------------


def device(payload: bytes) -> NldevDevice:
    """The answer to GET."""
    found = Attributes(payload)
    return NldevDevice(
        index=RdmaIndex(found.required(Attr.DEV_INDEX)),
        name=RdmaName(found.required_text(Attr.DEV_NAME)),
        ports=found.required(Attr.PORT_INDEX),
        protocol=found.text(Attr.DEV_PROTOCOL),
        node_guid=_guid(found.u64(Attr.NODE_GUID)),
        sys_image_guid=_guid(found.u64(Attr.SYS_IMAGE_GUID)),
        firmware=found.text(Attr.FW_VERSION),
        parent=_name(found.text(Attr.PARENT_NAME)),
    )


def port(payload: bytes) -> NldevPort:
    """The answer to PORT_GET."""
    found = Attributes(payload)
    index, netdev = found.u32(Attr.NDEV_INDEX), found.text(Attr.NDEV_NAME)
    return NldevPort(
        number=found.required(Attr.PORT_INDEX),
        state=known(PortState, found.u8(Attr.PORT_STATE), PortState.UNKNOWN),
        phys_state=known(PhysState, found.u8(Attr.PORT_PHYS_STATE), PhysState.UNKNOWN),
        netdev_index=IfIndex(index) if index else None,
        netdev_name=IfName(netdev) if netdev else None,
        lid=found.u32(Attr.LID),
        sm_lid=found.u32(Attr.SM_LID),
        lmc=found.u8(Attr.LMC),
        subnet_prefix=found.u64(Attr.SUBNET_PREFIX),
    )


def exclusive(payload: bytes) -> bool | None:
    """From the answer to SYS_GET: whether each device belongs to one namespace. None: an old kernel."""
    shared = Attributes(payload).u8(Attr.NETNS_MODE)
    return None if shared is None else not shared


def character_device(kind: CharacterDeviceKind, payload: bytes) -> CharacterDevice:
    """The answer to GET_CHARDEV."""
    found = Attributes(payload)
    number = found.u64(Attr.CHARDEV)
    if number is None:
        raise HwError(f"netlink: the answer about {kind} holds no device number")
    return CharacterDevice(
        kind=kind,
        name=found.required_text(Attr.CHARDEV_NAME),
        # huge_encode_dev() of the kernel, which is glibc's form for numbers of this size.
        major=os.major(number),
        minor=os.minor(number),
        abi=found.u64(Attr.CHARDEV_ABI),
    )


def event(message: wire.Message) -> NldevEvent | None:
    """What a message to NOTIFY_GROUP tells; None if it is about something else."""
    if message.type != Command.MONITOR.message:
        return None
    found = Attributes(message.payload)
    index, netdev = found.u32(Attr.DEV_INDEX), found.u32(Attr.NDEV_INDEX)
    return NldevEvent(
        kind=known(EventKind, found.u8(Attr.EVENT_TYPE), None),
        index=None if index is None else RdmaIndex(index),
        port=found.u32(Attr.PORT_INDEX),
        netdev_index=IfIndex(netdev) if netdev else None,
    )


def _name(value: str | None) -> RdmaName | None:
    return RdmaName(value) if value else None


def _guid(value: int | None) -> str | None:
    if not value:
        return None
    digits = f"{value:016x}"
    return ":".join(digits[at : at + 4] for at in range(0, 16, 4))
