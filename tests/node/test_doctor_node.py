"""`knd doctor` beside a running agent: nothing fails on a node that serves pods, and nothing is disturbed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from kndsim.demo.devices import Devices
from kndsim.node import SimNode
from kndsim.waiting import wait_until_async
from tests.node.node_stage import play, running
from tests.node.traffic_stage import stations, traffic


def rows(out: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["subject"], row["check"]): row for row in json.loads(out)["rows"]}


def test_a_node_that_serves_pods_is_found_able_and_is_not_disturbed() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        del made
        pod = await running(sim, "one")
        await wait_until_async(
            lambda: (sim.root / "run/knd/agent.json").exists(), within=20.0, what="the agent told of itself"
        )
        before = await asyncio.to_thread(sim.knd, "pods", "-o", "json")
        done = await asyncio.to_thread(sim.knd, "doctor", "-o", "json")
        found = rows(done.stdout)
        failed = {check: row["said"] for check, row in found.items() if row["verdict"] == "fail"}
        assert (done.returncode, failed) == (0, {}), done.stderr
        assert "1 devices are prepared" in found["records", "journal"]["said"]
        assert "policy.yaml" in found["policy", "in-force"]["said"]
        assert found["kubelet", "agent"]["verdict"] == found["runtime", "nri"]["verdict"] == "ok"
        assert (await asyncio.to_thread(sim.knd, "pods", "-o", "json")).stdout == before.stdout
        listed = json.loads((await asyncio.to_thread(sim.knd, "devices", "-o", "json")).stdout)["rows"]
        assert [row["held_by"] for row in listed if row["offered"]] == ["default/one-nic"], listed
        await sim.delete_pod(pod)

    play(1, story)


def test_what_a_packet_costs_is_told_of_a_running_pods_traffic_by_direction() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        (station,) = await stations(sim, made, 1)
        async with traffic(made, [station]):
            done = await asyncio.to_thread(sim.knd, "doctor", "--measure", "1", "-o", "json")
        told = json.loads(done.stdout)
        shown = {(row["pod"], row["interface"], row["direction"]) for row in told["rows"]}
        assert shown == {("pod-0", "net1", "egress"), ("pod-0", "net1", "ingress")}
        assert all(row["packets"] > 0 and row["ns_per_packet"] > 0 for row in told["rows"]), told
        assert told["timing_ns"] > 0
        quiet = await asyncio.to_thread(sim.knd, "doctor", "--measure", "1")
        assert quiet.stdout.count("nothing passed") == 2, quiet.stdout
        assert quiet.returncode == 0

    play(1, story)
