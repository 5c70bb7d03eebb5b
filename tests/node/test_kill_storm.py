"""The agent is killed over and over, at any time, while pods come and go and send: no byte is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.node.crash_stage import Stage, devices_that_survive, stage
from tests.node.node_stage import devices
from tests.node.traffic_stage import Station, station, traffic

pytestmark = pytest.mark.timeout(180)

KILLS = 30
LANES = 3
"""Devices that go from pod to pod; one more is in the same pod all the time."""

Bytes = dict[tuple[str, str], int]


class Storm:
    """Pods that come and go until it is over, and what each of them sent."""

    def __init__(self, on: Stage, rng: random.Random) -> None:
        self.on = on
        self.rng = rng
        self.over = asyncio.Event()
        self.sent: Bytes = {}
        self.shared: list[str] = []

    async def kills(self) -> None:
        for _ in range(KILLS):
            await asyncio.sleep(self.rng.uniform(0.05, 1.5))
            await self.on.kill_and_start()
        self.over.set()

    async def lane(self, number: int) -> None:
        turn = 0
        while not self.over.is_set():
            turn += 1
            at = await station(self.on.sim, self.on.made, number, f"lane{number}-{turn}")
            async with self._sending(at):
                await asyncio.sleep(self.rng.uniform(0.1, 0.8))
            await self.on.delete(at.pod)

    async def steady(self, at: Station) -> None:
        async with self._sending(at):
            await self.over.wait()
        await self.on.delete(at.pod)

    @contextlib.asynccontextmanager
    async def _sending(self, at: Station) -> AsyncIterator[None]:
        async with traffic(self.on.made, [at]) as under_way:
            yield
            self.sent.update(await under_way.end())

    async def watch_slots(self) -> None:
        """No two preparations on record have one slot, at any moment."""
        while not self.over.is_set():
            rows = await asyncio.to_thread(
                self.on.journal, "SELECT body FROM records WHERE kind = 'preparation'"
            )
            found = [json.loads(body) for (body,) in rows]
            if len({each["slot"] for each in found}) < len(found):
                self.shared.append(str(found))
            await asyncio.sleep(0.01)


def test_thirty_kills_at_random_lose_no_byte_and_no_device(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")

    async def run() -> None:
        async with stage(made, "tcx", short_tmp) as on:
            storm = Storm(on, random.Random(seed))
            steady = await station(on.sim, made, LANES, "steady")
            lanes = [storm.lane(number) for number in range(LANES)]
            async with asyncio.TaskGroup() as tasks:
                for work in (storm.kills(), storm.steady(steady), storm.watch_slots(), *lanes):
                    tasks.create_task(work)
            await on.wait_ready()
            await on.within(on.leftovers, "after the storm")
            counted = {
                (pod, direction): size
                for pod, directions in on.counted().items()
                for direction, (size, _) in directions.items()
            }
            assert counted == storm.sent
            assert storm.shared == []
            assert on.deaths == KILLS
            pods = {pod for pod, _ in storm.sent}
            assert len(pods) > 2 * LANES, "the pods did not come and go"
            print(f"{len(pods)} pods, {sum(storm.sent.values())} bytes, {KILLS} kills")

    with devices(LANES + 1) as made, devices_that_survive(monkeypatch):
        asyncio.run(run())
