"""`knd doctor` beside a running agent: nothing fails on a node that serves pods, and nothing is disturbed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from kndsim.demo.devices import Devices
from kndsim.node import SimNode
from kndsim.waiting import wait_until_async
from tests.node.node_stage import play, running


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
