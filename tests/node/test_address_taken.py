"""A MAC address that something of the node has is given to no other device of it."""

from __future__ import annotations

import pytest

from kndsim.demo.devices import Devices, changes, dump
from kndsim.kubelet import PrepareFailed
from kndsim.node import SimNode
from tests.node.node_stage import claim, play

pytestmark = pytest.mark.timeout(90)


async def refused(sim: SimNode, pod: str, mac: str) -> str:
    scheduled = sim.schedule(pod, [claim(f"{pod}-nic", hardwareAddress=mac)])
    with pytest.raises(PrepareFailed) as caught:
        await sim.prepare(scheduled)
    await sim.delete_pod(scheduled)
    return str(caught.value)


def test_neither_one_at_home_nor_one_in_a_pod_nor_what_a_pods_device_comes_home_with() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        own = {str(link["IFLA_IFNAME"]): str(link["IFLA_ADDRESS"]) for link in before.values()}
        for_first = claim("first-nic", hardwareAddress="02:00:5e:00:00:01")
        first = await sim.start_pod(sim.schedule("first", [for_first]))
        (taken,) = set(own) - {str(link["IFLA_IFNAME"]) for link in dump().values()}
        at_home = next(name for name in own if name.startswith("port") and name not in (taken, "port1"))
        assert f"'{at_home}' has it" in await refused(sim, "second", own[at_home])
        assert "of claim default/first-nic has it" in await refused(sim, "third", "02:00:5e:00:00:01")
        assert "of claim default/first-nic's own" in await refused(sim, "fourth", own[taken])
        await sim.delete_pod(first)
        assert changes(before, dump()) == []

    play(3, story)
