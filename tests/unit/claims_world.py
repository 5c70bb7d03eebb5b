"""Claims over a real book, engine and workers; devices and the kernel are made up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bpf.layout import Hook
from driver.clock import SystemClock
from driver.execute.engine import Engine
from driver.journal import Journal
from driver.lifecycle import claims as claims_module
from driver.lifecycle.book import Book
from driver.lifecycle.claims import Claims
from driver.lifecycle.context import Context
from driver.lifecycle.gate import Gate
from driver.lifecycle.ports import ClaimFailed
from driver.lifecycle.projections import Projections
from driver.lifecycle.workers import DeviceWorkers
from driver.model import (
    AllocatedDevice,
    Claim,
    ClaimRef,
    ClaimUid,
    ConfigSource,
    Device,
    DeviceName,
    DriverEvent,
    OfferedDevice,
    OpaqueConfig,
    PodUid,
    PoolName,
    Preparation,
    PreparationState,
)
from driver.plan import Act
from driver.policy import NodePolicy
from driver.rdma import RdmaBinding
from hw.model import DeviceKind, Guid, IfIndex, IfName, LinkSettings, MacAddress, SoftwareIdentity
from tests.unit.journal_values import BOOT, preparation

POOL = PoolName("node-a")
A, B, C = (DeviceName(f"dev-{letter}") for letter in "abc")
FAR = 20.0


@dataclass
class Node:
    """The devices there are, and what the kernel is made to say."""

    present: dict[DeviceName, Device] = field(default_factory=dict)
    unseen: dict[DeviceName, Device] = field(default_factory=dict)
    """There, but only a new scan tells."""
    acts: list[tuple[Act, DeviceName]] = field(default_factory=list)
    fail: dict[tuple[Act, DeviceName], Exception] = field(default_factory=dict)
    stall: dict[tuple[Act, DeviceName], threading.Event] = field(default_factory=dict)
    scans: int = 0
    guids: frozenset[Guid] = frozenset()
    """Those that others have."""

    def guids_of_others(self, device: Device) -> frozenset[Guid]:
        del device
        return self.guids

    def current(self) -> dict[DeviceName, Device]:
        return self.present

    def get(self, name: DeviceName) -> Device | None:
        return self.present.get(name)

    def rescan(self) -> None:
        self.scans += 1
        self.present |= self.unseen

    def as_it_is(self, device: Device) -> Device:
        return device

    def who_else_has(self, mac: MacAddress, device: Device) -> str:
        return next(
            (
                f"{other.name} has it"
                for other in self.present.values()
                if other.name != device.name and other.settings is not None and other.settings.mac == mac
            ),
            "",
        )

    def hint(self, made: Preparation) -> None:
        del made

    def see_home(self, made: Preparation) -> None:
        del made

    def act(self, act: Act) -> Callable[[Any], None]:
        def do(target: Any) -> None:
            device = target.preparation.key.device
            self.acts.append((act, device))
            if (act, device) in self.stall:
                assert self.stall[act, device].wait(FAR)
            if (act, device) in self.fail:
                raise self.fail[act, device]

        return do


def device(name: DeviceName, index: int, **fields: Any) -> Device:
    mac = MacAddress(f"02:00:00:00:01:{index:02x}")
    settings: LinkSettings = replace(preparation(0).baseline, name=IfName(f"host{index}"), mac=mac)
    made = Device(
        name=name,
        kind=DeviceKind.NETDEV,
        identity=SoftwareIdentity("veth", IfIndex(index), None, None),
        ifindex=IfIndex(index),
        settings=settings,
        attributes={},
        min_mtu=68,
        max_mtu=9000,
    )
    return replace(made, **fields)


class World:
    def __init__(self, journal: Journal) -> None:
        self.node = Node({name: device(name, number) for number, name in enumerate((A, B, C), 20)})
        self.book = Book(journal, slots=8)
        self.policy = NodePolicy()
        self.claims: dict[ClaimUid, Claim | Exception] = {}
        self.reads = 0
        self.events: list[DriverEvent] = []
        self.offers: list[tuple[OfferedDevice, ...]] = []
        self.statuses: list[tuple[ClaimRef, object]] = []
        self.hidden: set[DeviceName] = set()
        self.foreign: dict[DeviceName, str] = {}
        """What is told of programs of others."""
        self.swept: list[DeviceName] = []
        self.bindings: dict[DeviceName, RdmaBinding] = {}
        self.clock = SystemClock()
        self.workers = DeviceWorkers(self.clock)
        self.gate = Gate("")
        self.gate.runtime = self.gate.settled = True
        engine: Engine[Any] = Engine(
            journal=journal,
            acts={act: self.node.act(act) for act in Act},
            clock=self.clock,
            observer=SimpleNamespace(at=lambda *a: None, step_done=lambda *a: None),
        )
        context = SimpleNamespace(
            driver="knd.internal",
            pool=POOL,
            clock=self.clock,
            hook=Hook.TCX,
            policy=lambda: self.policy,
            host_netns=None,
            book=self.book,
            engine=engine,
            workers=self.workers,
            devices=self.node,
            rdma=SimpleNamespace(
                binding=lambda *asked: self.bindings.get(asked[0].name),
                binding_now=lambda target: target.preparation.rdma,
            ),
            claims=SimpleNamespace(read_claim=self.read_claim),
            statuses=SimpleNamespace(write_status=lambda ref, rows: self.statuses.append((ref, rows))),
            events=SimpleNamespace(emit=self.events.append),
            slices=SimpleNamespace(offer=self.offers.append),
            foreign=SimpleNamespace(
                told=lambda target: self.foreign.get(target.preparation.key.device, ""),
                sweep=lambda device, ifindex: self.swept.append(device),
            ),
        )
        homecoming = SimpleNamespace(
            is_hidden=lambda made: made.key.device in self.hidden,
            bring_home=lambda attachment: self.book.close_attachment(attachment),
        )
        orphans = SimpleNamespace(end=lambda uid: None)
        given = cast(Any, context)
        self.handler = Claims(
            given, Projections(cast(Context, context)), cast(Any, homecoming), self.gate, cast(Any, orphans)
        )

    async def read_claim(self, ref: ClaimRef) -> Claim:
        self.reads += 1
        found = self.claims[ref.uid]
        if isinstance(found, Exception):
            raise found
        return found

    def claim(
        self, name: str, *devices: DeviceName, pods: tuple[str, ...] = ("pod",), parameters: str = ""
    ) -> ClaimRef:
        ref = ClaimRef("ns", name, ClaimUid(f"uid-{name}"))
        config = OpaqueConfig(source=ConfigSource.CLAIM, requests=(), parameters=parameters)
        self.claims[ref.uid] = Claim(
            ref=ref,
            allocated=True,
            devices=tuple(
                AllocatedDevice(request=f"r{number}", pool=POOL, device=each)
                for number, each in enumerate(devices)
            ),
            configs=(config,) if parameters else (),
            reserved_for=frozenset(PodUid(pod) for pod in pods),
        )
        return ref

    async def prepare(self, ref: ClaimRef, seconds: float = FAR) -> list[DeviceName] | str:
        """The devices, or why not."""
        answer = (await self.handler.prepare([ref], self.clock.monotonic() + seconds))[ref.uid]
        return answer.message if isinstance(answer, ClaimFailed) else [each.device for each in answer]

    async def unprepare(self, ref: ClaimRef, seconds: float = FAR) -> str:
        answer = (await self.handler.unprepare([ref], self.clock.monotonic() + seconds))[ref.uid]
        return answer.message if answer is not None else ""

    def states(self) -> dict[DeviceName, PreparationState]:
        return {each.key.device: each.state for each in self.book.preparations()}


VFIO = '{"apiVersion": "knd.internal/v1alpha1", "kind": "NetworkDeviceConfig", "vf": {"driver": "vfio-pci"}}'


def interface(**fields: object) -> str:
    pairs = ", ".join(
        f'"{name}": {value}' if isinstance(value, int) else f'"{name}": "{value}"'
        for name, value in fields.items()
    )
    return (
        f'{{"apiVersion": "knd.internal/v1alpha1", "kind": "NetworkDeviceConfig", "interface": {{{pairs}}}}}'
    )


def play_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Callable[[World], Awaitable[None]]
) -> None:
    """Run a story, and make sure that nothing is left in hand and the journal says what the book says."""
    monkeypatch.setattr(claims_module, "open_target", _no_kernel)

    async def inside() -> None:
        with Journal.open(tmp_path / "j.sqlite", mirror=tmp_path / "m", boot_id=BOOT) as journal:
            world = World(journal)
            try:
                await story(world)
                assert await world.workers.idle(world.clock.monotonic() + FAR)
                state = journal.state()
                assert {p.key for p in state.preparations} == {p.key for p in world.book.preparations()}
                assert len(world.handler._locks) == 0
                assert world.handler._coming == {}
            finally:
                world.workers.close()

    asyncio.run(inside())


@contextlib.contextmanager
def _no_kernel(made: Preparation, *rest: object) -> Iterator[object]:
    del rest
    yield SimpleNamespace(preparation=made, find_at_home=lambda: None)
