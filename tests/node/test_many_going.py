"""Promise 2 and 3 in a crowd: a hundred pods are deleted at once, and no device and no packet is lost."""

from __future__ import annotations

import asyncio

import pytest

from kndsim.demo.devices import Devices, changes, dump
from kndsim.node import SimNode, SimPod
from kndsim.runtime import HookOutcome, RuntimeMode
from kndsim.waiting import wait_until_async
from tests.node import seen_outside as seen
from tests.node.crash_stage import FRAME_BYTES, FRAMES, query, send
from tests.node.node_stage import claim, play

PODS = 100

pytestmark = pytest.mark.timeout(180)

SENT = (
    "SELECT a.pod_name, sum(u.packets - u.base_packets), sum(u.bytes - u.base_bytes) FROM usage u"
    " JOIN attachments a ON a.id = u.attachment WHERE u.direction = 0 GROUP BY 1"
)


async def started(sim: SimNode, number: int) -> SimPod:
    nic = claim(f"p{number}-nic", name="net1", addresses=["198.18.0.2/24"])
    return await sim.start_pod(sim.schedule(f"p{number}", [nic]))


def far_ends_up(made: Devices) -> None:
    for wire in made.wires:
        index = made.far.link_index(wire.peer)
        made.far.netlink(lambda ipr, index=index: ipr.link("set", index=index, state="up"))


@pytest.mark.parametrize("mode", [RuntimeMode.POD_RPC, RuntimeMode.CRIO], ids=str)
def test_each_is_answered_in_time_and_all_devices_come_home_clean_and_counted(mode: RuntimeMode) -> None:
    """CRI-O's netns are gone before it says so: what would die with them is held until it is home."""

    async def story(sim: SimNode, made: Devices) -> None:
        far_ends_up(made)
        before = dump()
        pods = [await started(sim, number) for number in range(PODS)]
        for pod in pods:
            await asyncio.to_thread(send, pod)
        first = len(sim.runtime.log)
        await asyncio.gather(*(sim.delete_pod(pod) for pod in pods))
        assert {each.outcome for each in sim.runtime.log[first:]} == {HookOutcome.OK}
        await wait_until_async(lambda: not changes(before, dump()), 20.0, "all at home as before")
        state = sim.root / "var/lib/knd"
        assert query(state / "journal.sqlite", "SELECT * FROM records") == []
        assert query(state / "ledger.sqlite", "SELECT id FROM attachments WHERE ended IS NULL") == []
        assert query(state / "ledger.sqlite", "SELECT * FROM gaps") == []
        wanted = (FRAMES, FRAMES * FRAME_BYTES)
        rows = query(state / "ledger.sqlite", SENT)
        assert {pod: counted for pod, *counted in rows} == {f"p{n}": list(wanted) for n in range(PODS)}
        assert (seen.specs(sim), seen.live_files(sim)) == ({}, {})

    play(PODS, story, mode=mode)
