"""A node with 256 devices in 256 pods: what the agent weighs, asks of the API server, and costs at rest."""

from __future__ import annotations

import asyncio
import collections
import statistics
import struct
import time
from collections.abc import Sequence

from bpf import layout, sys
from bpf.layout import TrafficKind
from bpf.record import OURS
from kndsim.agent import wait_until
from kndsim.links import SimNetns
from kndsim.node import ClaimSpec, SimNode, SimPod, any_device
from tests.bench import processes
from tests.bench.big_node import STRANGER, event_costs
from tests.bench.outcome import Outcome, counted, high, measured
from tests.bench.stage import bench_node, wired_host

PODS = 256
CYCLING = 8
"""Devices that come and go beside those of the pods."""
SANDBOXES = 4
"""A pod of those gets so many sandboxes, one after the other, on one preparation."""
CYCLES = 1000
CYCLE_SECONDS = 30.0
"""They end when either is reached; a quiet machine does about half of the cycles in that time."""
SETTLING_SECONDS = 35.0
"""Until everything was read once by what is done every half minute."""
REST_SECONDS = 60.0
SCRAPES = 40
PSS_BUDGET = 100.0
CLASSES_USED, KIND = (0, 3, 5), TrafficKind.ROCE
_KEY = struct.Struct("=I")


def full_node(cycle_seconds: float = CYCLE_SECONDS) -> list[Outcome]:
    """256 pods with a device each: memory, API requests, scrapes, a rest, then devices that come and go."""
    with wired_host(PODS + CYCLING, also=(STRANGER,)) as host:
        return asyncio.run(_full_node(host, cycle_seconds))


async def _full_node(host: SimNetns, cycle_seconds: float) -> list[Outcome]:
    async with bench_node() as node:
        await node.start_agent()
        pid = node.agent.pid
        empty = processes.memory(pid)
        node.api.clear_log()
        pods = [await _attached(node, f"pod-{number}") for number in range(PODS)]
        await asyncio.to_thread(wait_until, lambda: _reported(node) >= PODS, "statuses written", 60.0)
        outcomes = _api_outcomes(node)
        full = processes.memory(pid)
        _count_something(node, pods)
        outcomes += [
            counted("memory.pss-empty", empty.pss, "MiB", note="just started, nothing attached"),
            counted(
                "memory.pss-256",
                full.pss,
                "MiB",
                budget=PSS_BUDGET,
                note=f"{PODS} veths attached; {full.anonymous:.0f} MiB of it anonymous",
            ),
            counted(
                "memory.compiler-mapped",
                len(processes.mapped_compiler(pid)),
                "files",
                budget=0,
                note="of libbcc, LLVM or clang in the agent",
            ),
            _maps(pid),
            *await _scrapes(node),
            *await _at_rest(node),
            measured(
                "idle.link-event",
                await event_costs(node, host),
                statistics.median,
                "ms of CPU",
                budget=1.0,
                note=f"a change of a link that is none of the agent's, {PODS} devices in pods",
            ),
            *await _cycles(node, cycle_seconds),
        ]
        return outcomes


async def _attached(node: SimNode, name: str, devices: int = 1) -> SimPod:
    requests = {f"r{number}": any_device for number in range(devices)}
    pod = node.schedule(name, [ClaimSpec(name=f"{name}-nic", requests=requests)])
    ran = await node.run_sandbox(await node.prepare(pod))
    record = node.runtime.log[-1]
    if record.outcome != "ok":
        raise RuntimeError(f"{name} was not attached: {record.outcome} {record.detail}\n{node.agent.tail()}")
    return ran


def _reported(node: SimNode) -> int:
    return len(node.api.requests("patch", "resourceclaims/status"))


def _api_outcomes(node: SimNode) -> list[Outcome]:
    kinds = collections.Counter(f"{each.verb} {each.resource}" for each in node.api.requests())
    return [
        counted(
            "api.per-pod",
            sum(kinds.values()) / PODS,
            "requests",
            budget=2.0,
            samples=PODS,
            note=", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()),
        )
    ]


def _count_something(node: SimNode, pods: Sequence[SimPod]) -> None:
    """Six cells of each slot, as if every pod had sent and received in three classes."""
    lanes = [0] * (layout.VALUE_BYTES // 8)
    for direction in range(layout.DIRECTIONS):
        for traffic_class in CLASSES_USED:
            cell = (direction * layout.CLASSES + traffic_class) * layout.KINDS + KIND
            lanes[2 * cell : 2 * cell + 2] = [10**12, 10**9]
    value = struct.pack(f"={len(lanes)}Q", *lanes) * sys.possible_cpus()
    with sys.obj_get_map(node.bpffs / "knd" / OURS.folder / "acct") as counters:
        for slot in range(len(pods)):
            sys.map_update_elem(counters, _KEY.pack(slot), value)


def _maps(pid: int) -> Outcome:
    size, cpus = processes.bpf_map_bytes(pid), processes.possible_cpus()
    return counted(
        "memory.kernel-maps",
        size / 1024,
        "KiB",
        note=f"{size / 1024 / cpus:.0f} KiB per possible CPU: {size / cpus * 256 / 2**20:.0f} MiB "
        f"on a node with 256; this machine has {cpus}",
    )


async def _scrapes(node: SimNode) -> list[Outcome]:
    milliseconds = []
    lines = 0
    for _ in range(SCRAPES + 1):
        begun = time.perf_counter()
        status, text = await asyncio.to_thread(node.agent.get, "/metrics")
        milliseconds.append((time.perf_counter() - begun) * 1e3)
        lines = sum(line.startswith("knd_pod_network_bytes") for line in text.splitlines())
        if status != 200 or lines < PODS:
            raise RuntimeError(f"a scrape showed {lines} series of bytes, with status {status}")
        await asyncio.sleep(0.05)
    note = f"over HTTP; {PODS} pods, {lines} series of bytes and as many of packets"
    return [
        measured("scrape.p50", milliseconds[1:], statistics.median, "ms", budget=20.0, note=note),
        measured("scrape.p99", milliseconds[1:], high, "ms"),
    ]


async def _at_rest(node: SimNode) -> list[Outcome]:
    await asyncio.sleep(SETTLING_SECONDS)
    node.api.clear_log()
    shares = []
    for _ in range(int(REST_SECONDS / 10)):
        begun, before = time.monotonic(), processes.cpu_seconds(node.agent.pid)
        await asyncio.sleep(10.0)
        used = processes.cpu_seconds(node.agent.pid) - before
        shares.append(used / (time.monotonic() - begun) * 100)
    others = [each for each in node.api.requests() if each.verb != "watch"]
    kinds = ", ".join(sorted({f"{each.verb} {each.resource}" for each in others}))
    return [
        measured(
            "idle.cpu",
            shares,
            statistics.fmean,
            "% of a core",
            budget=0.1,
            note=f"{PODS} devices attached, {REST_SECONDS:g} s, with what is done each half minute or minute",
        ),
        counted("api.at-rest", len(others), "requests", budget=0, note=kinds or f"in {REST_SECONDS:g} s"),
    ]


async def _cycles(node: SimNode, seconds: float) -> list[Outcome]:
    """Pods with eight devices, one after the other, each with several sandboxes."""
    pid = node.agent.pid
    await _life(node, 0)
    before, lives, begun = processes.memory(pid), 0, time.monotonic()
    while lives * CYCLING * SANDBOXES < CYCLES and time.monotonic() - begun < seconds:
        lives += 1
        await _life(node, lives)
    after = processes.memory(pid)
    cycles = lives * CYCLING * SANDBOXES
    return [
        counted(
            "memory.pss-cycles",
            after.pss,
            "MiB",
            budget=PSS_BUDGET,
            samples=cycles,
            note=f"after {cycles} more attaches and detaches, in {time.monotonic() - begun:.0f} s",
        ),
        counted(
            "memory.growth",
            (after.anonymous - before.anonymous) * 1024 / cycles,
            "KiB/cycle",
            samples=cycles,
            note="of anonymous memory",
        ),
    ]


async def _life(node: SimNode, number: int) -> None:
    pod = await _attached(node, f"cycle-{number}", CYCLING)
    for _ in range(SANDBOXES - 1):
        assert pod.sandbox is not None
        await node.runtime.stop_pod(pod.sandbox)
        await node.runtime.remove_pod(pod.sandbox)
        pod = await node.run_sandbox(pod)
    await node.delete_pod(pod)
