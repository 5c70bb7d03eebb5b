"""The agent by itself: how soon it serves, and what its start takes."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time

from kndsim.node import REPOSITORY, SimNode
from tests.bench.outcome import Outcome, counted, measured
from tests.bench.stage import bench_node, wired_host

STARTS = 7


def start() -> list[Outcome]:
    """From the start of the process to registered with kubelet, and to ready; what the compiler takes."""
    with wired_host(8):
        times = asyncio.run(_starts())
    registered = [first for first, _ in times]
    return [
        measured(
            "start.registered",
            registered,
            statistics.median,
            "s",
            budget=1.5,
            note="with the programs in the cache, as in every image",
        ),
        measured("start.ready", [second for _, second in times], statistics.median, "s"),
        *_compiler(),
    ]


async def _starts() -> list[tuple[float, float]]:
    async with bench_node() as node:
        await node.start_agent()
        times = []
        for _ in range(STARTS):
            await node.stop_agent()
            await node.kubelet.wait_deregistered(node.driver)
            times.append(await _start(node))
        return times


async def _start(node: SimNode) -> tuple[float, float]:
    """Seconds to registered and to ready."""
    begun = time.monotonic()
    node.agent.start()
    await node.kubelet.wait_registered(node.driver, begun + 30.0)
    registered = time.monotonic() - begun
    await asyncio.to_thread(node.agent.wait_ready)
    return registered, time.monotonic() - begun


def _compiler() -> list[Outcome]:
    """The child that compiles, where nothing was prebuilt."""
    with tempfile.TemporaryFile() as output:
        begun = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", "bpf.compile"], stdout=output, cwd=REPOSITORY)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - begun
        output.seek(0, os.SEEK_END)
        if child.returncode != 0 or output.tell() == 0:
            raise RuntimeError(f"the compiler child ended with status {child.returncode}")
    note = "a process of its own that ends; only where no compiled programs are shipped or cached"
    return [
        counted("start.compiler-peak-rss", usage.ru_maxrss / 1024, "MiB", note=note),
        counted("start.compiler-seconds", seconds, "s"),
    ]
