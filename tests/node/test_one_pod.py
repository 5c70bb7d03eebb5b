"""The main job, on a simulated node with the real agent: a pod gets its NIC and gives it back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pyroute2 import IPRoute

from kndsim.demo.devices import Devices, changes, dump
from kndsim.demo.play import CLASSES
from kndsim.netns import in_netns, in_thread
from kndsim.node import REPOSITORY, SimNode
from kndsim.runtime import RuntimeMode
from kndsim.waiting import wait_until_async
from tests.node.node_stage import play, running

pytestmark = pytest.mark.timeout(120)


def links_in(sandbox_netns: object) -> dict[str, str]:
    def look() -> dict[str, str]:
        with IPRoute() as ipr:
            return {link.get_attr("IFLA_IFNAME"): link.get_attr("IFLA_ADDRESS") for link in ipr.get_links()}

    return in_netns(sandbox_netns, look)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", list(RuntimeMode))
@pytest.mark.parametrize("hook", ["tcx", "clsact"])
def test_a_pod_gets_its_device_configured_and_gives_it_back_clean(mode: RuntimeMode, hook: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await running(
            sim, "p", name="net1", mtu=1400, hardwareAddress="02:00:5e:10:00:01", addresses=["198.18.0.2/24"]
        )
        assert pod.sandbox is not None
        assert links_in(pod.sandbox.netns_path)["net1"] == "02:00:5e:10:00:01"
        # Written off the critical path: the pod may be running before it is there.
        (status,) = await wait_until_async(
            lambda: sim.api.claim("default", "p-nic")["status"].get("devices"), what="the claim's status"
        )
        assert status["networkData"] == {
            "interfaceName": "net1",
            "hardwareAddress": "02:00:5e:10:00:01",
            "ips": ["198.18.0.2/24"],
        }
        await sim.delete_pod(pod)
        assert changes(before, dump()) == []

    play(1, story, mode=mode, hook=hook)


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kndsim.demo", "-o", "json", "--backend", "veth", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={"PYTHONPATH": str(REPOSITORY / "ci/kind-sriov-sim"), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        cwd=REPOSITORY,
    )


def test_the_demo_counts_every_byte_across_a_kill() -> None:
    done = demo()
    result = json.loads(done.stdout)
    assert done.returncode == 0, result["problems"]
    assert result["devices_home"] is True
    assert result["agent_restarts"] == 1
    assert {row["class"] for row in result["rows"]} == {each.name for each in CLASSES}
    for row in result["rows"]:
        assert row["sent_bytes"] == row["counted_bytes"] > 0
        assert row["sent_while_down"] > 0


@pytest.mark.parametrize("how", ["drop-one", "skip-restore", "fixed-counter"])
def test_the_demo_notices_a_broken_agent(how: str) -> None:
    done = demo("--sabotage", how)
    assert done.returncode == 1
    assert json.loads(done.stdout)["problems"]


def test_the_stage_leaves_the_host_alone() -> None:
    before = in_thread(dump)
    play(2, _nothing)
    assert changes(before, in_thread(dump)) == []


async def _nothing(sim: SimNode, made: Devices) -> None:
    assert sim.agent.ready()
