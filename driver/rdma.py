"""RDMA's words as types: modes, the device that goes with a preparation, what of it is in a pod.

Invariant: frozen values without I/O. An RDMA device is known by the index that the kernel gave it and never
gives again while the node is up, and by its node GUID; a tenant can change its name, as a netdev's.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from hw.ipoib import IpoibMode
from hw.model import Guid, IfName, InterfaceAddress, LinkSettings, RdmaIndex, RdmaName

AT_BOOT = (
    "boot the node with ib_core.netns_mode={} on the kernel's command line (or as ib_core's module option)"
)
"""Where the kernel does not change its mode any more. To be filled in: 1 shares devices, 0 does not."""


class RdmaMode(enum.StrEnum):
    """How RDMA devices and network namespaces go together; one mode for the whole node.

    shared: every namespace sees every device, and device files alone say who may use which. exclusive: a
    device is in one namespace, as a netdev is, and is moved into the pod.
    """

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class SoftRdma(enum.StrEnum):
    """RDMA in software on an ordinary interface; the values are what the kernel calls them."""

    RXE = "rxe"
    SIW = "siw"

    @property
    def module(self) -> str:
        return "rdma_rxe" if self is SoftRdma.RXE else "siw"


class RdmaFile(enum.StrEnum):
    """Device files beyond those that every RDMA program opens. Both reach the fabric's management."""

    UMAD = "umad"
    ISSM = "issm"


CGROUP_FILE = "rdma.max"
"""Of a container's cgroup; Documentation/admin-guide/cgroup-v2.rst, RDMA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaLimits:
    """How much of an RDMA device each container that names the claim may have at a time. None: no limit.

    handles: how often its files are open (hca_handle). objects: what was made through them (hca_object):
    queue pairs, memory regions, completion queues, protection domains and their kin.
    """

    handles: int | None = None
    objects: int | None = None

    def __bool__(self) -> bool:
        return self.handles is not None or self.objects is not None

    def line(self, device: str) -> str:
        """As CGROUP_FILE takes it."""
        words = {"hca_handle": self.handles, "hca_object": self.objects}
        return " ".join([device, *(f"{key}={value}" for key, value in words.items() if value is not None)])


NO_RDMA_LIMITS = RdmaLimits()


IPOIB_MTU: Mapping[IpoibMode, int] = {IpoibMode.DATAGRAM: 4092, IpoibMode.CONNECTED: 65520}
"""The most: InfiniBand's largest packet without IPoIB's header, and IPOIB_CM_MTU of the kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IpoibConfig:
    """An IPoIB interface of a partition of its own, beside the port's. mtu None: what the partition has."""

    name: IfName
    mode: IpoibMode = IpoibMode.DATAGRAM
    mtu: int | None = None
    addresses: tuple[InterfaceAddress, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaConfig:
    """Section `rdma` of a claim's configuration. mode None: whichever the node is in.

    partition: of InfiniBand, 15 bits, with full membership. None: whatever is first in a port's table.
    """

    mode: RdmaMode | None = None
    files: tuple[RdmaFile, ...] = ()
    nccl: bool = False
    ucx: bool = False
    limits: RdmaLimits = NO_RDMA_LIMITS
    partition: int | None = None
    ipoib: IpoibConfig | None = None


NO_WISHES = RdmaConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Infiniband:
    """What the policy gives a VF on InfiniBand while a claim has it: one GUID, for its node and its port.

    active_seconds: how long its port may take to be active then; 0: it is not waited for.
    """

    guid: Guid
    active_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaBinding:
    """The RDMA device that goes with a preparation, and how its pods get it.

    software: it is made on the interface in the pod, and ends with the attachment; so it has no index and no
    GUID here. mode is the node's when the device was prepared, which nobody can change while a pod is there.
    """

    name: RdmaName
    mode: RdmaMode
    software: SoftRdma | None = None
    index: RdmaIndex | None = None
    node_guid: str = ""
    rdma_cm: bool = True
    """Whether the connection manager's file is given too: its module is there, or may be loaded."""

    @property
    def moves(self) -> bool:
        """Whether it goes into the pod's namespace and has to come home from there."""
        return self.mode is RdmaMode.EXCLUSIVE


@dataclass(frozen=True, slots=True)
class DeviceFile:
    """A character device, by the numbers it had when it was given to a pod. name is below /dev/infiniband."""

    name: str
    major: int
    minor: int


@dataclass(frozen=True, slots=True)
class SysfsProof:
    """What /sys must still say, for a device file's numbers to be those of the device that was given. value
    is a file's text or, of a link, the last part of where it points."""

    path: str
    value: str
    link: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaInPod:
    """What was found of an RDMA device once it was attached. gid is the RoCE v2 address of the pod's
    interface; without one, gid_index is None. pkey_index is where the port's table has the partition that the
    claim chose."""

    name: RdmaName
    index: RdmaIndex
    port: int
    files: tuple[DeviceFile, ...]
    gid_index: int | None = None
    gid: str = ""
    pkey_index: int | None = None


NO_NETDEV = LinkSettings(
    name=IfName(""),
    mtu=0,
    mac=None,
    txqlen=0,
    group=0,
    alias="",
    altnames=(),
    gso_max_size=None,
    gro_max_size=None,
    noarp=False,
    promisc=False,
    allmulti=False,
    multicast=False,
)
"""The baseline of what has no netdev."""
