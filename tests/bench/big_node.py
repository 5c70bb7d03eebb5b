"""A node with very many devices: what a look at all of them takes, and what one change of a link costs."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pyroute2 import IPRoute

from driver import inventory
from driver.policy import PolicyFile
from hw.model import IfIndex, IfName, LinkFlags, LinkInfo
from hw.netlink import LinkSocket
from hw.scan import scan, uplinks_of
from hw.sysfs import Sysfs
from kndsim.links import SimNetns
from kndsim.node import SimNode
from kndsim.sysfs_tree import vf_farm, write_tree
from tests.bench import processes
from tests.bench.outcome import Outcome, measured, of_medians
from tests.bench.stage import bench_node, wired_host

PFS, VFS_PER_PF = 16, 64
SCANS = 15
FEW, MANY = 10, PFS * VFS_PER_PF
EVENTS = 60
EVENT_PERIOD = 0.1
"""Longer than the agent gathers events, so that each is one look."""
STRANGER = "cni0"
"""A link that is none of the agent's, like those that a CNI makes for every pod."""


def full_scan() -> list[Outcome]:
    """A look at everything: sysfs with 1,024 VFs as plain files, and the kernel's dump of as many links."""
    count = PFS * VFS_PER_PF
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, wired_host(count):
        sysfs = Sysfs(write_tree(Path(folder) / "sys", vf_farm(PFS, VFS_PER_PF)))
        policy = PolicyFile(None).current
        links = _links()
        milliseconds: list[float] = []
        for _ in range(SCANS + 1):
            begun = time.perf_counter()
            with LinkSocket(None) as kernel:
                dumped, uplinks = kernel.dump(), uplinks_of(kernel)
            found = inventory.build(scan(sysfs, links, uplinks), policy)
            milliseconds.append((time.perf_counter() - begun) * 1e3)
            if len(dumped) < count or sum(not d.withheld for d in found.by_name.values()) < count:
                raise RuntimeError(f"{len(dumped)} links dumped, {len(found.by_name)} devices found")
    note = f"{count} VFs: dump, sysfs, inventory"
    return [measured("scan.full", milliseconds[1:], statistics.median, "ms", budget=300.0, note=note)]


def _links() -> Sequence[LinkInfo]:
    """What the kernel would say of the netdevs of the farm."""
    places = [(f"pf{pf}", f"0000:{0x20 + pf:02x}:02.0") for pf in range(PFS)]
    places += [
        (f"pf{pf}v{vf}", f"0001:{0x20 + pf:02x}:{vf // 8:02x}.{vf % 8}")
        for pf in range(PFS)
        for vf in range(VFS_PER_PF)
    ]
    return [
        LinkInfo(
            ifindex=IfIndex(index),
            name=IfName(name),
            flags=LinkFlags(0),
            link_type=1,
            mtu=1500,
            parent_bus="pci",
            parent_device=address,
        )
        for index, (name, address) in enumerate(places, 10)
    ]


def link_event() -> list[Outcome]:
    """The agent's CPU time for a change of a link that is none of its own, with few and with many devices."""
    costs = {count: _event_costs(count) for count in (FEW, MANY)}
    rows = [
        measured(f"event.cpu-{count}", found, statistics.median, "ms of CPU", budget=1.0)
        for count, found in costs.items()
    ]
    pairs = list(zip(costs[MANY], costs[FEW], strict=True))
    rows.append(
        measured("event.many-to-few", pairs, of_medians, "x", note=f"{MANY} devices beside {FEW}; 1 is ideal")
    )
    return rows


def _event_costs(count: int) -> list[float]:
    with wired_host(count, also=(STRANGER,)) as host:
        return asyncio.run(_watch_events(host))


async def _watch_events(host: SimNetns) -> list[float]:
    async with bench_node() as node:
        await node.start_agent()
        await asyncio.sleep(1.0)
        return await event_costs(node, host)


async def event_costs(node: SimNode, host: SimNetns) -> list[float]:
    """Milliseconds of the agent's CPU time for each of some changes of the stranger."""
    costs = []
    for number in range(EVENTS):
        before = processes.cpu_seconds(node.agent.pid)
        await asyncio.to_thread(_change_mtu, host, 1400 + number)
        await asyncio.sleep(EVENT_PERIOD)
        costs.append((processes.cpu_seconds(node.agent.pid) - before) * 1e3)
    if not statistics.median(costs):
        raise RuntimeError("the agent did not hear of the changes")
    return costs


def _change_mtu(host: SimNetns, mtu: int) -> None:
    def change(ipr: IPRoute) -> None:
        ipr.link("set", index=ipr.link_lookup(ifname=STRANGER)[0], mtu=mtu)

    host.netlink(change)
