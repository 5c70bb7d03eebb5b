"""A pod's device that is counted, wired to a peer in a netns of its own: what was sent is held against it.

Invariant: what is compared with the counters comes from sockets and from the kernel's own statistics.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from bpf.accounting import Accounting
from bpf.attach import TcxPrograms, probe_tcx
from bpf.layout import Cell, Hook, Slot, TrafficKind
from bpf.program import CompiledPrograms
from kndsim.links import SimNetns, netns, private_host, veth_pair
from kndsim.waiting import wait_until
from tests.bpf.bpffs import mounted_bpffs

SLOT = Slot(2)
BLAST = Path(__file__).resolve().parent.parent / "bench/blast.py"
POD, PEER, NOBODY = "10.77.0.1", "10.77.0.2", "10.77.0.99"
POD6, PEER6, NOBODY6 = "fd77::1", "fd77::2", "fd77::99"
UDP_SEGMENT = 103
_NOBODYS_MAC = "02:00:00:00:00:99"
_MTU = 9000

Cells = dict[tuple[int, int, TrafficKind], tuple[int, int]]
"""(bytes, packets) by (direction, class, kind)."""


@dataclass(slots=True)
class Wire:
    """The pod's device here, its peer in a netns of its own, both with addresses of both kinds."""

    pod: SimNetns
    peer: SimNetns
    device: int
    peer_device: int
    accounting: Accounting

    def cells(self) -> Cells:
        return {
            (cell.direction, cell.traffic_class, cell.kind): (cell.bytes, cell.packets)
            for cell in self.accounting.read(SLOT)
        }

    def settled(self, *, direction: int, packets: int, traffic_class: int, kind: TrafficKind) -> Cell:
        """Wait until so many have arrived, then give the cell, which may hold more."""
        deadline = time.monotonic() + 10
        while True:
            size, count = self.cells().get((direction, traffic_class, kind), (0, 0))
            if count >= packets or time.monotonic() > deadline:
                return Cell(direction, traffic_class, kind, size, count)
            time.sleep(0.01)


def set_up(where: SimNetns, ifindex: int, address: str, address6: str) -> None:
    def work(ipr: IPRoute) -> None:
        ipr.link("set", index=ifindex, mtu=_MTU, state="up")
        ipr.addr("add", index=ifindex, address=address, prefixlen=24)
        ipr.addr("add", index=ifindex, address=address6, prefixlen=64, flags=0x02)
        for nobody in (NOBODY, NOBODY6):
            ipr.neigh("add", dst=nobody, lladdr=_NOBODYS_MAC, ifindex=ifindex, state=0x80)

    where.netlink(work)


def attach_filters(where: SimNetns, accounting: Accounting, ifindex: int, slot: Slot) -> None:
    """Both programs at the hooks that kernels without tcx have."""

    def attach(ipr: IPRoute) -> None:
        ipr.tc("add", "clsact", index=ifindex)
        for direction, parent in enumerate((0xFFFFFFF3, 0xFFFFFFF2)):
            with accounting.load(slot, direction) as program:
                ipr.tc(
                    "add-filter",
                    "bpf",
                    index=ifindex,
                    fd=program.fd,
                    name="knd",
                    parent=parent,
                    classid=0x10001,
                    direct_action=True,
                    handle=1,
                )

    where.netlink(attach)


@contextlib.contextmanager
def counted_wire(programs: CompiledPrograms) -> Iterator[Wire]:
    with (
        private_host() as host,
        netns() as peer,
        mounted_bpffs() as bpffs,
        veth_pair("kdev", "kwire", peer_where=peer) as (device, peer_device),
        Accounting.open(bpffs / "knd/v1", programs, slots=4) as accounting,
    ):
        if probe_tcx() is Hook.TCX:
            TcxPrograms(bpffs / "knd/v1", accounting).attach("dev", device, SLOT)
        else:
            attach_filters(host, accounting, device, SLOT)
        set_up(host, device, POD, POD6)
        set_up(peer, peer_device, PEER, PEER6)
        # What is sent before that is counted, and dropped behind the count.
        wait_until(
            lambda: has_queue(host, device) and has_queue(peer, peer_device),
            within=20.0,
            what="both ends to see the other's carrier",
        )
        yield Wire(host, peer, device, peer_device, accounting)


def has_queue(where: SimNetns, ifindex: int) -> bool:
    """Whether the kernel hands packets to the device by now."""

    def look(ipr: IPRoute) -> bool:
        (link,) = ipr.get_links(ifindex)
        return str(link.get_attr("IFLA_QDISC")) != "noop"

    return where.netlink(look)


def udp_socket(address: str, port: int, dscp: int) -> socket.socket:
    six = ":" in address
    made = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
    if six:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, dscp << 2)
    else:
        made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)
    made.connect((address, port))
    return made


def statistics(where: SimNetns, ifindex: int) -> dict[str, int]:
    def read(ipr: IPRoute) -> dict[str, int]:
        (link,) = ipr.get_links(ifindex)
        return dict(link.get_attr("IFLA_STATS64"))

    return where.netlink(read)


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def standing_still(wire: Wire) -> tuple[dict[str, int], Cells]:
    """The interface's statistics and ours, read while no packet came between."""
    time_limit = time.monotonic() + 10
    while True:
        before, cells = statistics(wire.pod, wire.device), wire.cells()
        if before == statistics(wire.pod, wire.device) or time.monotonic() > time_limit:
            return before, cells
