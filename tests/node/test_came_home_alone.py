"""A device that left its living pod while no agent ran: the journal says attached and is not believed."""

from __future__ import annotations

import pytest

from kndsim.demo.devices import Devices, changes, dump
from kndsim.node import SimNode
from tests.node import seen_outside as seen
from tests.node.node_stage import play, running

pytestmark = pytest.mark.timeout(90)


def test_it_is_given_back_to_the_pod_before_another_container_of_it_starts() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await running(sim, "p", name="net1", mtu=1400, addresses=["198.18.0.2/24"])
        assert pod.sandbox is not None
        spec = seen.specs(sim)
        await sim.kill_agent()
        seen.send_home(pod.sandbox, seen.indexes(pod))
        assert {seen.HOME} == seen.where(sim, *seen.indexes(pod))
        assert seen.specs(sim) == spec
        await sim.start_agent()
        await seen.until_attached(sim, pod)
        restarted = await sim.create_container(pod, "again")
        seen.container_has(pod, seen.only([restarted]).containers[-1], "net1", "198.18.0.2/24")
        await sim.delete_pod(pod)
        assert changes(before, dump()) == []

    play(1, story)
