"""What applications have made on an RDMA device: queue pairs, memory regions and their kin, by process.

Invariant: reads only. What the kernel itself made is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from driver.execute.probe import Host
from driver.execute.rdma import find, places_of
from driver.execute.target import Target
from hw.errors import Unsupported
from hw.model import RdmaIndex
from hw.rdma.netlink import RdmaSocket
from hw.rdma.tracking import ResourceKind

KINDS = (ResourceKind.QP, ResourceKind.MR, ResourceKind.CQ, ResourceKind.PD, ResourceKind.CTX)
LISTED_MAX = 4096
"""Of one kind on one device. Jobs register memory by the ten thousand: more are counted and not listed, the
kernel's own few among them."""

Made = Mapping[tuple[ResourceKind, int], int]
"""How many there are, by kind and process; 0 for processes that this one's pid namespace does not show."""


def word(kind: ResourceKind) -> str:
    """The kernel's, as in its summary and in series."""
    return kind.name.lower()


def made_on(socket: RdmaSocket, index: RdmaIndex) -> Made:
    """Unsupported where the kernel tells nothing of it; HwError as RdmaSocket has them."""
    summary = socket.summary(index)
    found: Counter[tuple[ResourceKind, int]] = Counter()
    for kind in KINDS:
        number = summary.get(word(kind), 0)
        if number > LISTED_MAX:
            found[kind, 0] = number
        elif number:
            found.update(_listed(socket, index, kind))
    return found


def _listed(socket: RdmaSocket, index: RdmaIndex, kind: ResourceKind) -> Counter[tuple[ResourceKind, int]]:
    try:
        listed = socket.resources(kind, index)
    except Unsupported:
        # Contexts can be counted for longer than they can be listed.
        return Counter()
    return Counter((kind, one.pid or 0) for one in listed if one.kernel_name is None)


def made_on_target(target: Target, host: Host) -> Made | None:
    """Of the device of an attachment, where it is; None where it is neither in the pod nor at home."""
    for netns in places_of(target):
        with host.rdma(netns) as socket:
            device = find(socket, target)
            if device is not None:
                return made_on(socket, device.index)
    return None
