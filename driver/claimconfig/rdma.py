"""Section `rdma` of a NetworkDeviceConfig.

Invariant: as driver.claimconfig.sections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from driver.rdma import RdmaFile, RdmaMode
from driver.strict import Key, Kind, boolean, choice, integer, listing, record

CGROUP_NUMBER: Kind[int] = integer(1, 2**31 - 1)
"""What the kernel takes (S32_MAX), without 0: a device that cannot be opened need not be given."""


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
    limits: Annotated[
        RdmaLimitsSection | None,
        Key(
            "limits",
            record(RdmaLimitsSection),
            "How much of the RDMA device each container that names the claim may have at a time, kept by the "
            "cgroup controller rdma.",
        ),
    ] = None
