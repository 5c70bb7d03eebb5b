"""A device moved out of its living pod: kubelet, claim and pod learn of it, and it is given away again only
after the pod."""

from __future__ import annotations

import pytest

from kndsim.demo.devices import Devices, changes, dump
from kndsim.kubelet_health import Health
from kndsim.node import SimNode
from kndsim.waiting import wait_until_async as until
from tests.node import seen_outside as seen
from tests.node.node_stage import play, running

pytestmark = pytest.mark.timeout(120)


def taints(sim: SimNode) -> list[str]:
    slices = sim.api.slices(SimNode.driver, sim.name)
    devices = [device for each in slices for device in each["spec"].get("devices", ())]
    return [taint["key"] for device in devices for taint in device.get("taints", ())]


def healthy(sim: SimNode) -> list[str]:
    devices = sim.api.claim("default", "p-nic").get("status", {}).get("devices", [])
    return [c["status"] for each in devices for c in each["conditions"] if c["type"] == "Healthy"]


def test_it_is_told_to_all_whom_it_concerns_until_the_pod_is_gone() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await running(sim, "p", name="net1")
        ((key, first),) = sim.kubelet.health(SimNode.driver).items()
        assert first == Health(status="Healthy")
        await until(lambda: healthy(sim) == ["True"], 10.0, "the claim says that it is well")
        assert pod.sandbox is not None
        seen.send_home(pod.sandbox, seen.indexes(pod))
        await until(
            lambda: sim.kubelet.health(SimNode.driver)[key].status == "Unhealthy", 10.0, "kubelet knows"
        )
        assert "was moved out of pod p" in sim.kubelet.health(SimNode.driver)[key].message
        await until(lambda: taints(sim) == ["knd.internal/reset"], 10.0, "a taint")
        await until(
            lambda: "DeviceUnhealthy" in {each["reason"] for each in sim.api.events()}, 10.0, "an event"
        )
        assert "knd_unhealthy_devices" in sim.agent.get("/metrics")[1]
        await sim.delete_pod(pod)
        await until(lambda: taints(sim) == [], 20.0, "no taint any more")
        await until(
            lambda: sim.kubelet.health(SimNode.driver)[key].status == "Healthy", 10.0, "kubelet knows"
        )
        assert changes(before, dump()) == []

    play(1, story)
