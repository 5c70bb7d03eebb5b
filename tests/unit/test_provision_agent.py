"""The agent's part in making VFs: nobody is given what is not finished, nobody loses a device he holds, and
what could not be done is done when it can be."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from driver.clock import SystemClock
from driver.lifecycle import provisioning as module
from driver.lifecycle.context import Context
from driver.lifecycle.gate import Gate
from driver.lifecycle.projections import Projections
from driver.lifecycle.provisioning import Provisioning
from driver.lifecycle.workers import DeviceWorkers
from driver.model import BootId, DeviceName
from driver.paths import Paths
from driver.policy import NodePolicy
from driver.policy.sriov import PfRule
from driver.provision import carry_out
from driver.provision.carry_out import Provision
from hw.errors import Refused
from hw.model import PciAddress
from hw.sriov import provision as doing
from kndsim.waiting import wait_until_async
from tests.unit.sriov_core import PF, SECOND, Kernel

FOUR = PfRule(vfs=4)
TWO = PfRule(vfs=2)
VF = DeviceName("pci-0000-21-10-1")


def told(story: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, in a loop of its own."""

    @functools.wraps(story)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(story(*args, **kwargs))

    return run


class World:
    """Provisioning over a played kernel, with a book that says who holds what."""

    def __init__(self, root: Path) -> None:
        self.kernel = Kernel(root / "sys")
        self.policy = NodePolicy(sriov=(FOUR,))
        self.quarantined: dict[DeviceName, Any] = {}
        self.gate = Gate("")
        self.seen: list[Mapping[PciAddress, str]] = []
        self.rescans = 0
        self.now = 100.0
        self.changed = 0
        self.workers = DeviceWorkers(SystemClock())
        self.context = SimpleNamespace(
            workers=self.workers,
            clock=SimpleNamespace(monotonic=lambda: self.now),
            policy=lambda: self.policy,
            provision=Provision(self.kernel, Paths(root=root / "root"), BootId("boot")),
            devices=SimpleNamespace(current=dict, hold_back=self.seen.append, rescan=self._rescan),
            book=SimpleNamespace(preparations=lambda: (), quarantines=lambda: dict(self.quarantined)),
        )
        self.events: list[str] = []
        projections = SimpleNamespace(tell_node=lambda kind, reason, text: self.events.append(text))
        self.provisioning = Provisioning(
            cast(Context, self.context), cast(Projections, projections), self.gate, self._on_change
        )

    def _rescan(self) -> None:
        self.rescans += 1

    async def _on_change(self) -> None:
        self.changed += 1

    @property
    def held_back(self) -> Mapping[PciAddress, str]:
        return self.seen[-1]

    @property
    def numbers(self) -> list[int]:
        return [len(self.kernel.vfs(pf)) for pf in (PF, SECOND)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(carry_out, "LinkSocket", lambda netns: made.kernel)
    monkeypatch.setattr(doing, "VF_SECONDS", 0.2)
    return made


@told
async def test_vfs_are_offered_only_when_they_are_finished(world: World) -> None:
    await world.provisioning.run()
    assert world.numbers == [4, 4]
    assert set(world.seen[0]) == {PF, SECOND}
    assert world.held_back == {}
    assert world.rescans >= 2
    assert world.changed == 1
    await world.provisioning.run()
    assert world.changed == 1


@told
async def test_a_node_without_such_a_policy_is_not_looked_at(world: World) -> None:
    world.policy = NodePolicy()
    await world.provisioning.run()
    assert world.seen == []
    assert world.rescans == 0


@told
async def test_a_port_that_got_no_vfs_is_offered_again_when_none_are_wanted(world: World) -> None:
    world.kernel.refuse = {"up": Refused("set the PF up", 5)}
    await world.provisioning.run()
    assert set(world.held_back) == {PF, SECOND}
    changed, rescans = world.changed, world.rescans
    world.policy = NodePolicy()
    await world.provisioning.run()
    assert world.held_back == {}
    assert (world.changed, world.rescans) == (changed + 1, rescans + 1)
    await world.provisioning.run()
    assert world.changed == changed + 1


@told
async def test_what_is_to_be_worked_on_is_seen_to_be_withheld_before_it_is(world: World) -> None:
    seen_at: list[tuple[int, int]] = []
    make = world.context.provision.carry_out
    world.context.provision.carry_out = lambda *args: (
        seen_at.append((len(world.held_back), world.rescans)),
        make(*args),
    )
    await world.provisioning.run()
    assert seen_at[0] == (2, 1)


@pytest.mark.parametrize("why", ["recovery", "policy_problem"])
@told
async def test_while_it_is_not_known_who_has_what_nothing_is_changed(world: World, why: str) -> None:
    setattr(world.gate, why, "not now")
    await world.provisioning.run()
    assert world.numbers == [0, 0]
    assert set(world.held_back) == {PF, SECOND}
    setattr(world.gate, why, "")
    await world.provisioning.again()
    assert world.numbers == [4, 4]


@told
async def test_a_change_waits_for_the_holder_and_is_told_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.provisioning.run()
    world.policy = NodePolicy(sriov=(TWO,))
    world.quarantined[VF] = SimpleNamespace(reason="it is not clean")
    for _ in range(3):
        await world.provisioning.run()
    assert world.numbers == [4, 2]
    told = [record for record in caplog.records if str(VF) in record.getMessage()]
    assert len(told) == 1
    assert "it is not clean" in told[0].getMessage()
    assert PF not in world.held_back
    world.quarantined.clear()
    await world.provisioning.again()
    assert world.numbers == [2, 2]
    await world.provisioning.again()
    assert world.changed == 3


@told
async def test_a_device_that_is_prepared_meanwhile_stops_the_change(world: World) -> None:
    await world.provisioning.run()
    world.policy = NodePolicy(sriov=(TWO,))
    world.quarantined[DeviceName("pci-0000-22-00-0")] = SimpleNamespace(reason="held")
    release = asyncio.Event()

    async def prepare() -> None:
        async def hold(work: Callable[[], None]) -> None:
            await world.workers.run([DeviceName("pci-0000-21-00-0")], work)

        def take() -> None:
            world.quarantined[VF] = SimpleNamespace(reason="prepared just now")

        loop = asyncio.get_running_loop()

        def wait_and_take() -> None:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
            take()

        await hold(wait_and_take)

    preparing = asyncio.create_task(prepare())
    await asyncio.sleep(0)
    running = asyncio.create_task(world.provisioning.run())
    await wait_until_async(lambda: set(world.held_back) == {PF})
    release.set()
    await asyncio.gather(preparing, running)
    assert world.numbers == [4, 4]


@told
async def test_what_fails_is_tried_again_later_and_keeps_nobody_waiting(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    world.kernel.refuse = {"up 5": Refused("set the PF up", 5)}
    await world.provisioning.run()
    assert world.numbers == [0, 4]
    assert "could not be made" in world.held_back[PF]
    changes = len(world.kernel.changes)
    await world.provisioning.run()
    assert len(world.kernel.changes) == changes
    world.now += module.FIRST_RETRY + 1
    await world.provisioning.again()
    assert len(world.kernel.changes) > changes
    changes = len(world.kernel.changes)
    world.now += module.FIRST_RETRY + 1
    await world.provisioning.again()
    assert len(world.kernel.changes) == changes
    world.kernel.refuse = {}
    world.provisioning.policy_changed()
    await world.provisioning.run()
    assert world.numbers == [4, 4]
    assert world.held_back == {}
    assert len([record for record in caplog.records if "tried again" in record.getMessage()]) == 1
    assert len([text for text in world.events if "tried again" in text]) == 1


@told
async def test_what_others_unmake_is_made_again(world: World) -> None:
    await world.provisioning.run()
    world.kernel.write(f"bus/pci/devices/{PF}/sriov_numvfs", "0")
    await world.provisioning.run()
    assert world.numbers == [4, 4]


@told
async def test_a_record_of_vfs_that_cannot_be_made_now_is_no_claim_on_those_of_others(world: World) -> None:
    await world.provisioning.run()
    world.kernel.write(f"bus/pci/devices/{PF}/sriov_numvfs", "0")
    world.quarantined[DeviceName("pci-0000-21-00-0")] = SimpleNamespace(reason="held")
    await world.provisioning.run()
    world.kernel.set_up(world.kernel.dump()[0].ifindex)
    world.kernel.write(f"bus/pci/devices/{PF}/sriov_numvfs", "4")
    world.quarantined.clear()
    world.policy = NodePolicy(sriov=(TWO,))
    await world.provisioning.run()
    assert world.numbers == [4, 2]


@told
async def test_a_node_that_is_left_has_what_it_had(world: World) -> None:
    before = world.kernel.picture()
    await world.provisioning.run()
    world.quarantined[VF] = SimpleNamespace(reason="it is not clean")
    left = await world.provisioning.remove_all()
    assert world.numbers == [4, 0]
    assert "it is not clean" in " ".join(left)
    world.quarantined.clear()
    assert await world.provisioning.remove_all() == ()
    assert world.kernel.picture() == before
    assert not world.context.provision.has_records


@told
async def test_the_first_offer_does_not_wait_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "START_PATIENCE", 0.05)
    never = asyncio.Event()

    async def run() -> None:
        await never.wait()

    first = asyncio.create_task(run())
    await world.provisioning.at_start(first)
    assert not first.done()
    assert "still being made" in caplog.text
    never.set()
    await first


@told
async def test_asking_many_times_at_once_is_one_more_look(world: World) -> None:
    await asyncio.gather(*(world.provisioning.run() for _ in range(20)))
    assert world.numbers == [4, 4]
    assert world.changed == 1
    assert len(world.seen) <= 6
