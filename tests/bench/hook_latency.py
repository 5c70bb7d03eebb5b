"""How long a pod's start waits for the agent, beside the kernel's own part of it."""

from __future__ import annotations

import asyncio
import statistics

from kndsim.links import SimNetns
from kndsim.node import ClaimSpec, SimNode, SimPod, any_device, interface
from tests.bench import floor
from tests.bench.floor import Floor
from tests.bench.outcome import Outcome, high, measured, of_medians
from tests.bench.stage import bench_node, wired_host

ROUNDS = 50
EIGHT_ROUNDS = 15
REST = 0.12
"""Seconds between rounds: what follows an attach (status, link events) is not to fall into the next one."""
FLOOR_DEVICE = "floor0"


def one_device() -> list[Outcome]:
    """Attaches of one device, alternating with the floor."""
    with wired_host(1, also=(FLOOR_DEVICE,)) as host:
        pairs = asyncio.run(_one_device(host))
    ours, least = [one for one, _ in pairs], [other for _, other in pairs]
    p50, floor_p50 = statistics.median(ours) * 1e3, statistics.median(least) * 1e3
    return [
        measured(
            "attach.of-floor",
            pairs,
            of_medians,
            "x floor",
            budget=1.3,
            note=f"p50 {p50:.1f} ms; the same netlink messages alone: {floor_p50:.1f} ms",
        ),
        measured("attach.p50", [s * 1e3 for s in ours], statistics.median, "ms"),
        measured("attach.p99", [s * 1e3 for s in ours], high, "ms", budget=100.0),
        measured(
            "attach.more-than-floor",
            [(one * 1e3, other * 1e3) for one, other in pairs],
            lambda these: statistics.median(a for a, _ in these) - statistics.median(b for _, b in these),
            "ms",
            note="p50 less the floor's p50",
        ),
    ]


def eight_devices() -> list[Outcome]:
    """Attaches of eight devices to one pod."""
    with wired_host(8):
        seconds = asyncio.run(_eight_devices())
    milliseconds = [s * 1e3 for s in seconds]
    return [
        measured("eight.p50", milliseconds, statistics.median, "ms"),
        measured("eight.p99", milliseconds, high, "ms", budget=400.0),
    ]


async def _one_device(host: SimNetns) -> list[tuple[float, float]]:
    async with bench_node() as node:
        await node.start_agent()
        pod = await node.prepare(node.schedule("one", [spec(1)]))
        least = Floor(host, FLOOR_DEVICE, node.root / "var/run/netns")
        pairs = []
        for number in range(ROUNDS + 2):
            other = 0.0
            if number % 2:
                other = await floor_once(least)
            one = await attach_once(node, pod)
            if not number % 2:
                other = await floor_once(least)
            pairs.append((one, other))
        # The first ones warm the agent's imports and the kernel's caches.
        return pairs[2:]


async def _eight_devices() -> list[float]:
    async with bench_node() as node:
        await node.start_agent()
        pod = await node.prepare(node.schedule("eight", [spec(8)]))
        found = [await attach_once(node, pod) for _ in range(EIGHT_ROUNDS + 1)]
        return found[1:]


def spec(count: int) -> ClaimSpec:
    """A claim of that many devices, each configured as the floor's."""
    return ClaimSpec(
        name=f"nics-{count}",
        requests={f"r{number}": any_device for number in range(count)},
        parameters={f"r{number}": _parameters(number, count) for number in range(count)},
    )


def _parameters(number: int, count: int) -> dict[str, object]:
    mac = f"{floor.MAC[:-2]}{number + 1:02x}"
    name = floor.NAME if count == 1 else f"net{number + 1}"
    address = floor.ADDRESS if count == 1 else f"198.18.{number}.2/24"
    return interface(name=name, mtu=floor.MTU, hardwareAddress=mac, addresses=[address])


async def floor_once(least: Floor) -> float:
    seconds = await asyncio.to_thread(least.attach)
    await asyncio.sleep(REST)
    return seconds


async def attach_once(node: SimNode, pod: SimPod) -> float:
    """A sandbox of the prepared pod comes and goes; seconds of its RunPodSandbox as the runtime saw it."""
    ran = await node.run_sandbox(pod)
    assert ran.sandbox is not None
    record = next(
        each
        for each in reversed(node.runtime.log)
        if each.sandbox == ran.sandbox.id and each.event == "RunPodSandbox"
    )
    await asyncio.sleep(REST)
    await node.runtime.stop_pod(ran.sandbox)
    await node.runtime.remove_pod(ran.sandbox)
    await asyncio.sleep(REST)
    if record.outcome != "ok":
        raise RuntimeError(f"an attach failed: {record.outcome} {record.detail}\n{node.agent.tail()}")
    return record.seconds
