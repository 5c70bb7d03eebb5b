"""Section `rdma` of a NetworkDeviceConfig.

Invariant: as driver.claimconfig.sections.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from driver.claimconfig.values import ADDRESS, IFNAME, MAX_ADDRESSES, MTU_MIN
from driver.rdma import IPOIB_MTU, IpoibConfig, RdmaFile, RdmaMode
from driver.strict import Key, Kind, boolean, choice, converted, integer, listing, record, shown, text
from hw.ipoib import IpoibMode
from hw.model import IfName, InterfaceAddress

CGROUP_NUMBER: Kind[int] = integer(1, 2**31 - 1)
"""What the kernel takes (S32_MAX), without 0: a device that cannot be opened need not be given."""


_FULL_MEMBER = 0x8000


def _partition(value: str) -> int:
    """The key's 15 bits. Written with the bit of full membership or without, it is the same partition."""
    if not re.fullmatch("0x[0-9A-Fa-f]{1,4}", value):
        raise ValueError(f"{shown(value)} is not a partition key like 0x8001")
    key = int(value, 16) & ~_FULL_MEMBER
    if not key:
        raise ValueError(f"{value!r} is no partition: 0x0001 to 0x7fff, or the same with 0x8000")
    return key


PARTITION: Kind[int] = text(_partition, {"pattern": "^0x(?!0+$)(?!8000$)[0-9A-Fa-f]{1,4}$"})


@dataclass(frozen=True, slots=True, kw_only=True)
class IpoibSection:
    """Taken whole: a name with another document's addresses would be nobody's wish."""

    name: Annotated[IfName, Key("name", IFNAME, "Its name in the pod.")]
    mode: Annotated[
        IpoibMode,
        Key("mode", choice(IpoibMode), "connected: larger packets, where the device's driver has that."),
    ] = IpoibMode.DATAGRAM
    mtu: Annotated[
        int | None,
        Key(
            "mtu",
            integer(MTU_MIN, IPOIB_MTU[IpoibMode.CONNECTED]),
            "In bytes, in datagram mode up to 4092, and up to what the partition has; absent: that.",
        ),
    ] = None
    addresses: Annotated[
        tuple[InterfaceAddress, ...],
        Key("addresses", listing(ADDRESS, maximum=MAX_ADDRESSES), "Addresses with prefix length."),
    ] = ()

    def __post_init__(self) -> None:
        most = IPOIB_MTU[self.mode]
        if self.mtu is not None and self.mtu > most:
            raise ValueError(f"has mtu {self.mtu}, and mode {self.mode} goes up to {most}")

    def value(self) -> IpoibConfig:
        return IpoibConfig(name=self.name, mode=self.mode, mtu=self.mtu, addresses=self.addresses)


IPOIB: Kind[IpoibConfig] = converted(record(IpoibSection), IpoibSection.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaLimitsSection:
    handles: Annotated[
        int | None,
        Key("handles", CGROUP_NUMBER, "How often its files may be open (hca_handle of rdma.max)."),
    ] = None
    objects: Annotated[
        int | None,
        Key(
            "objects",
            CGROUP_NUMBER,
            "How many queue pairs, memory regions, completion queues, protection domains and their kin there "
            "may be together (hca_object of rdma.max).",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaSection:
    mode: Annotated[
        RdmaMode | None,
        Key(
            "mode",
            choice(RdmaMode),
            "The mode that the node must be in: exclusive, the RDMA device is in the pod alone; shared, the "
            "pod gets its device files. Absent: either.",
        ),
    ] = None
    files: Annotated[
        tuple[RdmaFile, ...] | None,
        Key(
            "deviceFiles",
            listing(choice(RdmaFile), maximum=len(RdmaFile)),
            "Device files beyond uverbs and rdma_cm. From a claim only where the node policy allows it: they "
            "reach the management of the whole fabric.",
            guarded=True,
            harmless=((),),
        ),
    ] = None
    nccl: Annotated[
        bool | None,
        Key(
            "nccl",
            boolean(),
            "true: NCCL_IB_HCA, NCCL_IB_GID_INDEX and NCCL_SOCKET_IFNAME name the claim's devices, in place "
            "of what the container's own environment says.",
        ),
    ] = None
    ucx: Annotated[
        bool | None,
        Key("ucx", boolean(), "true: UCX_NET_DEVICES names the claim's RDMA devices, in the same way."),
    ] = None
    partition: Annotated[
        int | None,
        Key(
            "partition",
            PARTITION,
            "Of InfiniBand: the key of the partition that the pod is to use, like 0x8001, one that its port "
            "is a full member of. The pod is told its index. From a claim only where the node policy allows "
            "it: whoever chooses a partition chooses whom to reach.",
            guarded=True,
        ),
    ] = None
    ipoib: Annotated[
        IpoibConfig | None,
        Key(
            "ipoib",
            IPOIB,
            "An IPoIB interface of the partition in the pod, beside the port's own one; what passes through "
            "it is counted with the device. Needs partition.",
        ),
    ] = None
    limits: Annotated[
        RdmaLimitsSection | None,
        Key(
            "limits",
            record(RdmaLimitsSection),
            "How much of the RDMA device each container that names the claim may have at a time, kept by the "
            "cgroup controller rdma.",
        ),
    ] = None
