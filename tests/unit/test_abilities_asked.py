"""Drivers are asked about a VF that nobody has, once for what they can answer, also over agents."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.lifecycle.abilities import VfAbilities
from driver.model import Device, DeviceName
from driver.paths import Paths
from hw.errors import Refused
from hw.model import DeviceKind, PciAddress
from hw.sriov.abilities import Abilities, Ability, Asked
from tests.unit.test_sharing import PORT, port_and_vfs

ANSWER = Abilities(frozenset({Ability.TRUST}), frozenset({Ability.MIN_RATE}))


class Devices:
    def __init__(self) -> None:
        self.present = port_and_vfs(3)
        self.abilities: dict[PciAddress, Asked] = {}
        self.asked: list[DeviceName] = []
        self.scans = 0
        self.fails = False
        self.carrier = True

    def current(self) -> dict[DeviceName, Device]:
        return self.present

    def get(self, name: DeviceName) -> Device | None:
        return self.present.get(name)

    def rescan(self) -> None:
        self.scans += 1

    def ask_abilities(self, device: Device, *, own: bool) -> bool:
        self.asked.append(device.name)
        if self.fails:
            raise Refused("set trust", 5)
        known = self.abilities.get(PORT)
        if known is not None and known.is_enough("igb", own=own, carrier=self.carrier):
            return False
        answer = Asked(driver="igb", own=own, carrier=self.carrier, abilities=ANSWER)
        self.abilities = {**self.abilities, PORT: answer}
        return True


class World:
    def __init__(self, root: Path) -> None:
        self.devices = Devices()
        self.held: set[str] = set()
        self.dirty: set[str] = set()
        self.locked: list[str] = []
        self.paths = Paths(root=root)
        self.paths.run.mkdir(parents=True, exist_ok=True)
        book = SimpleNamespace(
            of_device=lambda name: [name] if name in self.held else [],
            quarantines=lambda: {name: SimpleNamespace(reason="dirty") for name in self.dirty},
            preparations=tuple,
        )
        self.context: Any = SimpleNamespace(
            paths=self.paths,
            devices=self.devices,
            book=book,
            policy=lambda: None,
            provision=SimpleNamespace(survey=lambda policy, held: SimpleNamespace(plans={})),
            workers=SimpleNamespace(run=self.run),
        )

    async def run(self, names: list[str], work: Any) -> Any:
        self.locked += names
        return work()

    def ask(self) -> bool:
        return asyncio.run(VfAbilities(self.context).run())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_one_free_vf_of_a_pf_is_asked_about_with_its_lock_and_the_picture_is_taken_anew(world: World) -> None:
    world.held, world.dirty = {"vf-0"}, {"vf-1"}
    assert world.ask()
    assert world.devices.asked == world.locked == ["vf-2"]
    assert world.devices.scans == 1


@pytest.mark.parametrize("why", ["held", "dirty", "withheld"])
def test_nothing_is_asked_where_no_vf_is_free(world: World, why: str) -> None:
    names = {"vf-0", "vf-1", "vf-2"}
    if why == "withheld":
        for name in map(DeviceName, names):
            world.devices.present[name] = replace(world.devices.present[name], withheld="in use")
    else:
        setattr(world, why, names)
    assert not world.ask()
    assert not world.devices.asked


def test_a_pf_has_no_pf_to_be_asked(world: World) -> None:
    world.devices.present = {
        name: each for name, each in world.devices.present.items() if each.kind is DeviceKind.PF
    }
    assert not world.ask()


def test_the_next_agent_of_this_boot_knows_the_answer_and_asks_only_for_a_better_one(tmp_path: Path) -> None:
    first = World(tmp_path)
    first.devices.carrier = False
    assert first.ask()
    second = World(tmp_path)
    second.devices.carrier = False
    assert not second.ask()
    assert second.devices.abilities[PORT].abilities == ANSWER
    second.devices.carrier = True
    assert second.ask()


@pytest.mark.parametrize(
    "kept",
    [b"", b"[]", b'{"0000:21:00.0": {}}', b'{"0000:21:00.0": {"can": ["fly"]}}', b"{", b"\xff\xfe\xd8"],
)
def test_an_answer_that_cannot_be_read_is_asked_for_again_by_the_next_agent(
    tmp_path: Path, kept: bytes
) -> None:
    before = World(tmp_path)
    (before.paths.run / "abilities.json").write_bytes(kept)
    assert World(tmp_path).ask()


def test_a_driver_that_fails_is_asked_another_time(world: World) -> None:
    world.devices.fails = True
    assert not world.ask()
    world.devices.fails = False
    assert world.ask()
