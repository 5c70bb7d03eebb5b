"""The counting programs of a device on a kernel without tcx: filters, made in the pod's netns.

Invariant: there is one filter a direction, at a place of ours, and a new one takes the place of the one
before between two packets: each is counted by the one or the other.
"""

from __future__ import annotations

from bpf.accounting import Accounting
from driver.errors import NotNow
from driver.execute.target import Target
from hw.model import Direction


def attach(target: Target, *, accounting: Accounting) -> None:
    """The programs' descriptors are ours, the socket is the pod's. NotNow if the device is not there."""
    link = target.find_in_pod()
    if link is None or target.pod is None:
        raise NotNow(f"{target.device} left the pod's network namespace")
    preparation = target.preparation
    target.pod.add_clsact(link.ifindex)
    for direction in Direction:
        with accounting.load(preparation.slot, int(direction), preparation.framing) as program:
            target.pod.add_bpf_filter(link.ifindex, direction, program.fd, "knd")
