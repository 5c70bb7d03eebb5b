"""A pod whose limit is to be kept by times of departure, through the whole agent, from start to end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from pyroute2 import IPRoute

from kndsim.demo.devices import Devices, changes, dump
from kndsim.netns import in_netns
from kndsim.node import ClaimSpec, SimNode, interface
from kndsim.waiting import wait_until_async
from tests.node import seen_outside as seen

RATE = 100
"""Mb/s, of the claim."""
_ROOT = 0xFFFFFFFF


def asking(made: Devices) -> Devices:
    return replace(made, policy=made.policy + "shaper: fq\n")


def kinds(netns: Path) -> set[str]:
    """Of the qdiscs at the roots of the namespace's links, but the kernel's own."""

    def look() -> set[str]:
        with IPRoute() as ipr:
            roots = [each for each in ipr.get_qdiscs() if each["parent"] == _ROOT]
            return {each.get_attr("TCA_KIND") for each in roots} - {"noqueue", "clsact", "ingress"}

    return in_netns(netns, look)


async def kept_by(sim: SimNode, made: Devices, seconds: float) -> str:
    """What the kernel has for it: told in status and metrics, the same after a restart with another policy,
    and gone with the pod."""
    before = dump()
    qos = {"qos": {"egress": {"rate": f"{RATE}M"}}}
    parameters = interface(name="net1", addresses=["198.18.0.2/24"]) | qos
    claim = ClaimSpec(name="p-nic", parameters={"": parameters})
    pod = await sim.start_pod(sim.schedule("p", [claim]), seconds=seconds)
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    netns = pod.sandbox.netns_path
    (kind,) = await asyncio.to_thread(kinds, netns)
    (status,) = await wait_until_async(
        lambda: sim.api.claim("default", "p-nic")["status"].get("devices"), within=seconds, what="a status"
    )
    assert f"egress at most {RATE} Mb/s ({kind}, cooperative)" in str(status["conditions"][0]["message"])
    assert (
        await asyncio.to_thread(seen.metric, sim, "knd_pod_network_limit_bits_per_second", by=kind)
        == RATE * 1e6
    )
    await sim.kill_agent()
    sim.policy_file.write_text(made.policy.replace("shaper: fq", f"podLimits: {{egress: {RATE // 2}M}}"))
    await sim.start_agent(seconds=seconds)
    await wait_until_async(
        lambda: seen.metric(sim, "knd_pod_network_limit_bits_per_second", by=kind) == RATE / 2 * 1e6,
        within=seconds,
        what="the same by the same, lower",
    )
    assert await asyncio.to_thread(kinds, netns) == {kind}
    delays = "knd_pod_network_queue_delay_seconds{" in sim.agent.get("/metrics")[1]
    assert delays == (kind == "fq")
    await sim.delete_pod(pod)
    assert changes(before, dump()) == []
    return kind
