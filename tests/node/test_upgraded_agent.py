"""An agent is replaced by one whose counts are laid out otherwise, and back, while traffic passes: the ledger
says to the byte what was sent; and what an agent cannot read is a gap with a reason."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bpf.record import OURS
from kndsim.demo.devices import Devices
from kndsim.node import SimNode
from kndsim.waiting import wait_until_async
from tests.kernel.other_release import UNREADABLE, Release, make_release
from tests.node.crash_stage import query
from tests.node.node_stage import play
from tests.node.traffic_stage import counted, stations, traffic

pytestmark = pytest.mark.timeout(240)

AGENT = ("-m", "driver", "agent")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(tmp_path_factory.mktemp("other") / "release")


def gaps(sim: SimNode) -> list[str]:
    """Reasons."""
    return [str(row[0]) for row in query(sim.root / "var/lib/knd/ledger.sqlite", "SELECT reason FROM gaps")]


def folders(sim: SimNode) -> set[str]:
    return {path.name for path in (sim.bpffs / "knd").iterdir()} - {"links", "foreign"}


async def next_agent(sim: SimNode, release: Release | None) -> None:
    """In place of the one that runs, which is killed; None: of this release."""
    await sim.kill_agent()
    await sim.start_agent(release.command(*AGENT) if release is not None else None)


@pytest.mark.parametrize("hook", ["tcx", "clsact"])
def test_the_ledger_says_what_was_sent_over_an_upgrade_and_a_way_back(hook: str, other: Release) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        await sim.start_agent(other.command(*AGENT))
        (station,) = await stations(sim, made, 1)
        async with traffic(made, [station]) as flows:
            before = folders(sim)
            for release in (None, None, other, None):
                await next_agent(sim, release)
                assert folders(sim) == before | {OURS.folder}
            sent = await flows.end()
            await sim.delete_pod(station.pod)
        assert counted(sim) == sent
        assert min(sent.values()) > 0
        assert gaps(sim) == []
        await next_agent(sim, None)
        assert folders(sim) == {OURS.folder}, "nobody has counts of the other release any more"

    play(1, story, hook=hook, start=False)


def test_what_an_agent_cannot_read_is_a_gap_of_every_pod_and_its_maps_go(tmp_path: Path) -> None:
    unreadable = make_release(tmp_path / "release", UNREADABLE)

    async def story(sim: SimNode, made: Devices) -> None:
        await sim.start_agent(unreadable.command(*AGENT))
        (station,) = await stations(sim, made, 1)
        async with traffic(made, [station]) as flows:
            await wait_until_async(lambda: folders(sim) != set(), within=5.0, what="it counts")
            await next_agent(sim, None)
            assert folders(sim) == {OURS.folder}
            first = await flows.mark()
            last = await flows.end()
            await sim.delete_pod(station.pod)
        told = gaps(sim)
        assert told
        assert all("format 2, and 1 is known here" in gap for gap in told), told
        since = {key: last[key] - first[key] for key in last}
        found = await asyncio.to_thread(counted, sim)
        assert all(since[key] <= found[key] <= last[key] for key in last), (since, found, last)

    play(1, story, start=False)
