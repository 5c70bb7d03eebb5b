"""A private host with one device to count on, as a context for the tests of links and programs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bpf.accounting import Accounting
from bpf.attach import TcxPrograms
from bpf.cache import ProgramCache
from bpf.layout import Slot, TrafficKind
from kndsim.links import SimNetns, private_host, veth_pair
from tests.bpf.bpffs import mounted_bpffs
from tests.kernel.bpf_traffic import send_frames

NAME = "pci-0000-3b-00-2"
SLOT, OTHER_SLOT = Slot(3), Slot(4)


@dataclass(slots=True)
class Node:
    """A private host with one device, whose peer plays the wire."""

    host: SimNetns
    pins: Path
    accounting: Accounting
    tcx: TcxPrograms
    device: int
    wire: int

    def packets(self, slot: Slot = SLOT) -> tuple[int, int]:
        """(egress, ingress) frames that are no IP: the kernel's own IPv6 chatter is left out."""
        cells = [cell for cell in self.accounting.read(slot) if cell.kind is TrafficKind.OTHER]
        egress, ingress = (
            sum(cell.packets for cell in cells if cell.direction == direction) for direction in (0, 1)
        )
        return egress, ingress

    def assert_counted(self, egress: int, ingress: int, slot: Slot = SLOT, other: int = 0) -> None:
        """The receiving side of a veth may run a little after the sender has returned. other: packets in
        the other slot, each way."""
        deadline = time.monotonic() + 5
        while self.packets(slot) < (egress, ingress) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.packets(slot) == (egress, ingress)
        assert self.packets(OTHER_SLOT if slot == SLOT else SLOT) == (other, other)


@contextlib.contextmanager
def counting_node(cache: ProgramCache) -> Iterator[Node]:
    programs = cache.ensure()
    with (
        private_host() as host,
        mounted_bpffs() as bpffs,
        veth_pair("kdev", "kwire") as (device, wire),
        Accounting.open(bpffs / "knd/v1", programs, slots=8) as accounting,
    ):
        tcx = TcxPrograms(bpffs / "knd/v1", accounting)
        made = Node(host, bpffs / "knd/v1", accounting, tcx, device, wire)
        link_up(host, device)
        link_up(host, wire)
        yield made


def link_up(where: SimNetns, ifindex: int) -> None:
    where.netlink(lambda ipr: ipr.link("set", index=ifindex, state="up"))


def both_ways(node: Node, count: int, where: SimNetns | None = None, name: str = "kdev") -> None:
    """count frames out of the device and count into it; where: the netns that the device is in."""
    send_frames(where or node.host, name, count)
    send_frames(node.host, "kwire", count)
