"""Sandboxes over a real book, engine and workers; netns and devices are made up."""

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
from driver.errors import NotNow
from driver.execute.engine import Engine
from driver.execute.target import Vanished
from driver.journal import Journal
from driver.lifecycle import sandboxes as sandboxes_module
from driver.lifecycle.book import Book
from driver.lifecycle.gate import Gate
from driver.lifecycle.sandboxes import Sandboxes
from driver.lifecycle.workers import DeviceWorkers
from driver.model import (
    Adjustment,
    Attachment,
    AttachmentState,
    Container,
    DeviceName,
    PodRef,
    PodUid,
    Preparation,
    PreparationState,
    Sandbox,
    SandboxId,
)
from driver.plan import Act
from driver.rdma import DeviceFile, RdmaInPod
from hw.errors import BadNetns, NotFound
from hw.model import RdmaIndex, RdmaName
from tests.unit.journal_values import BOOT, preparation

FAR = 20.0
POD = PodRef("ml", "train", PodUid("pod-1"))
OTHER = PodRef("ml", "eval", PodUid("pod-x"))


@dataclass
class Netns:
    cookie: int = 7

    def __enter__(self) -> Netns:
        return self

    def __exit__(self, *rest: object) -> None: ...


@dataclass
class Home:
    """A Homecoming that always gets there, unless told otherwise."""

    book: Book
    log: list[tuple[str, DeviceName]] = field(default_factory=list)
    alive: set[SandboxId] = field(default_factory=set)
    stuck: dict[DeviceName, Exception] = field(default_factory=dict)
    dirty: set[DeviceName] = field(default_factory=set)
    dead: set[DeviceName] = field(default_factory=set)
    gone: set[DeviceName] = field(default_factory=set)

    def hold(self, made: Attachment, of: Preparation, netns: object) -> None: ...

    def is_alive(self, made: Attachment) -> bool:
        return made.sandbox in self.alive

    def bring_home(self, made: Attachment) -> bool:
        device = made.preparation.device
        self.log.append(("home", device))
        (leaving,) = self.book.advance_attachments([made], AttachmentState.DETACHING)
        if device in self.stuck:
            raise self.stuck[device]
        self.book.close_attachment(leaving)
        return True

    def undo_attach(self, made: Attachment, of: Preparation, netns: object) -> None:
        self.log.append(("undo", made.preparation.device))
        self.book.close_attachment(made)

    def close_attachment(self, made: Attachment) -> None:
        self.book.close_attachment(made)

    def is_ended(self, made: Preparation) -> bool:
        return made.key.device in self.dead | self.gone

    def make_ready(self, made: Preparation) -> tuple[object, ...]:
        self.log.append(("ready", made.key.device))
        if made.key.device in self.gone:
            return (SimpleNamespace(error=Vanished("it did not come home")),)
        self.dead.discard(made.key.device)
        dirty = made.key.device in self.dirty
        return (SimpleNamespace(error=NotNow("it has addresses")),) if dirty else ()


GIVEN = RdmaInPod(
    name=RdmaName("mlx5_2"), index=RdmaIndex(2), port=1, files=(DeviceFile("uverbs2", 231, 194),)
)


class World:
    def __init__(self, journal: Journal) -> None:
        self.book = Book(journal, slots=8)
        self.home = Home(self.book)
        self.acts: list[tuple[Act, DeviceName]] = []
        self.fail: dict[tuple[Act, DeviceName], Exception] = {}
        self.stall: dict[tuple[Act, DeviceName], threading.Event] = {}
        self.published: list[str] = []
        self.told: list[tuple[PodRef, str]] = []
        self.names: dict[PodUid, frozenset[str]] = {}
        self.looked_up: list[PodUid] = []
        self.disproved = ""
        self.clock = SystemClock()
        self.workers = DeviceWorkers(self.clock)
        self.gate = Gate("")
        engine: Engine[Any] = Engine(
            journal=journal,
            acts={act: self.act(act) for act in Act},
            clock=self.clock,
            observer=SimpleNamespace(at=lambda *a: None, step_done=lambda *a: None),
        )
        context = SimpleNamespace(
            boot_id=BOOT,
            clock=self.clock,
            hook=Hook.TCX,
            host_netns=None,
            book=self.book,
            engine=engine,
            workers=self.workers,
            devices=SimpleNamespace(hint=lambda made: None),
            rdma=SimpleNamespace(
                proofs=lambda made, of: (),
                disproved=lambda proofs: self.disproved,
                names_now=lambda given: tuple(each.rdma.name for each in given),
            ),
            pods=SimpleNamespace(claims_of=self.names.get, look_up=self.look_up),
            telemetry=SimpleNamespace(refused=lambda reason: None),
        )
        projections = SimpleNamespace(
            publish_claim=self.published.append,
            report_claim=lambda uid: None,
            offer=lambda: None,
            tell_pod=lambda pod, reason, text: self.told.append((pod, reason)),
        )
        usage = SimpleNamespace(begin=lambda made, of: None)
        health = SimpleNamespace(holders_changed=lambda: None)
        parts = [cast(Any, part) for part in (context, projections, self.home, self.gate, usage, health)]
        self.sandboxes = Sandboxes(*parts)

    def act(self, act: Act) -> Callable[[Any], None]:
        def do(target: Any) -> None:
            device = target.preparation.key.device
            self.acts.append((act, device))
            if (act, device) in self.stall:
                assert self.stall[act, device].wait(FAR)
            if (act, device) in self.fail:
                raise self.fail[act, device]
            if act is Act.RDMA_FILES:
                target.given.append(GIVEN)

        return do

    async def look_up(self, pod: PodRef, deadline: float) -> None:
        self.looked_up.append(pod.uid)

    def prepare(
        self, *numbers: int, pods: tuple[PodUid, ...] = (POD.uid,), **fields: Any
    ) -> list[Preparation]:
        fields |= {"reserved_for": frozenset(pods)}
        made = [
            replace(preparation(number, state=PreparationState.PREPARING), **fields) for number in numbers
        ]
        opened = self.book.open_preparations(made)
        return list(self.book.advance_preparations(opened, PreparationState.PREPARED))

    async def run(self, sandbox: Sandbox, seconds: float = FAR) -> None:
        await self.sandboxes.run_sandbox(sandbox, self.clock.monotonic() + seconds)

    async def stop(self, sandbox: Sandbox) -> None:
        await self.sandboxes.stop_sandbox(sandbox, self.clock.monotonic() + FAR)

    async def container(self, sandbox: Sandbox, **env: str) -> Adjustment:
        container = Container(name="main", env=env)
        return await self.sandboxes.create_container(sandbox, container, self.clock.monotonic() + FAR)

    def states(self) -> dict[tuple[SandboxId, DeviceName], AttachmentState]:
        return {(a.sandbox, a.preparation.device): a.state for a in self.book.attachments()}


def sandbox(name: str, pod: PodRef = POD, netns: str | None = "/run/netns/x") -> Sandbox:
    return Sandbox(id=SandboxId(name), pod=pod, netns_path=Path(netns) if netns else None)


def play_sandboxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Callable[[World], Awaitable[None]]
) -> None:
    """Run a story, and make sure that nothing is left in hand."""
    monkeypatch.setattr(sandboxes_module, "open_target", _no_kernel)
    monkeypatch.setattr(sandboxes_module, "open_netns", _no_netns)

    async def inside() -> None:
        with Journal.open(tmp_path / "j.sqlite", mirror=tmp_path / "m", boot_id=BOOT) as journal:
            world = World(journal)
            try:
                await story(world)
                assert await world.workers.idle(world.clock.monotonic() + FAR)
                assert world.sandboxes._under_way == {}
            finally:
                await world.sandboxes.close()
                world.workers.close()

    asyncio.run(inside())


@contextlib.contextmanager
def _no_kernel(made: Preparation, *rest: object) -> Iterator[object]:
    del rest
    yield SimpleNamespace(preparation=made, given=[])


def _no_netns(path: Path, **options: object) -> Netns:
    del options
    if path.name == "gone":
        raise NotFound("it is gone")
    if path.name == "host":
        raise BadNetns("it is the host's")
    return Netns()
