"""A device is home when its RDMA device is: until then it is withheld, and gone on with while it can come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpf.layout import Hook
from driver.errors import NotNow
from driver.execute.engine import Engine
from driver.execute.target import NotClean, Vanished
from driver.journal import Journal
from driver.lifecycle import homecoming as module
from driver.lifecycle.book import Book
from driver.lifecycle.homecoming import Homecoming
from driver.model import Attachment, AttachmentState, Preparation, PreparationState
from driver.plan import Act
from driver.rdma import RdmaBinding, RdmaMode
from hw.model import DeviceKind, RdmaIndex, RdmaName
from tests.unit.journal_values import BOOT, attachment, preparation
from tests.unit.no_foreign import NO_FOREIGN

BINDING = RdmaBinding(name=RdmaName("mlx5_2"), mode=RdmaMode.EXCLUSIVE, index=RdmaIndex(2))


class World:
    def __init__(self, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
        self.book = Book(journal, slots=4)
        self.acts: list[Act] = []
        self.errors: dict[Act, Exception] = {}
        self.told: list[str] = []
        self.rdma_at_home = True
        engine: Engine[Any] = Engine(
            journal=journal,
            acts={act: self._act(act) for act in Act},
            clock=SimpleNamespace(monotonic=lambda: 0.0),  # type: ignore[arg-type]
            observer=SimpleNamespace(at=lambda *a: None, step_done=lambda *a: None),  # type: ignore[arg-type]
        )
        context: Any = SimpleNamespace(
            book=self.book,
            engine=engine,
            boot_id=BOOT,
            hook=Hook.TCX,
            host_netns=None,
            clock=SimpleNamespace(wall=lambda: 1.0),
            devices=SimpleNamespace(hint=lambda made: None),
            rdma=SimpleNamespace(is_home=lambda target: self.rdma_at_home),
            foreign=NO_FOREIGN,
        )
        projections: Any = SimpleNamespace(
            publish_claim=lambda uid: None, tell_pod=lambda pod, reason, text: self.told.append(text)
        )
        monkeypatch.setattr(module, "open_target", _no_kernel)
        self.homecoming = Homecoming(context, projections)

    def _act(self, act: Act) -> Callable[[Any], None]:
        def do(target: object) -> None:
            self.acts.append(act)
            if act in self.errors:
                raise self.errors[act]

        return do

    def attached(self, **fields: Any) -> tuple[Attachment, Preparation]:
        new = replace(preparation(0, state=PreparationState.PREPARING), rdma=BINDING, **fields)
        (opened,) = self.book.open_preparations([new])
        (made,) = self.book.advance_preparations([opened], PreparationState.PREPARED)
        begun = self.book.open_attachment(attachment(0, state=AttachmentState.ATTACHING))
        (done,) = self.book.advance_attachments([begun], AttachmentState.ATTACHED)
        return done, made


@contextlib.contextmanager
def _no_kernel(*args: object) -> Iterator[object]:
    yield SimpleNamespace(find_at_home=lambda: None)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with Journal.open(tmp_path / "j.sqlite", mirror=tmp_path / "m", boot_id=BOOT) as journal:
        yield World(journal, monkeypatch)


def test_both_home_closes_the_record(world: World) -> None:
    attached, _ = world.attached()
    assert world.homecoming.bring_home(attached)
    assert world.acts[-2:] == [Act.RDMA_RESTORE, Act.RDMA_VERIFY]
    assert not world.book.attachments()
    assert not world.book.quarantines()


def test_an_rdma_device_that_did_not_come_home_withholds_the_netdev_too(world: World) -> None:
    attached, made = world.attached()
    world.errors[Act.RDMA_VERIFY] = NotClean("dev-0", ("its RDMA device mlx5_2 did not come home",))
    assert not world.homecoming.bring_home(attached)
    assert "did not come home" in world.book.quarantines()[made.key.device].reason
    assert "did not come home" in world.told[0]
    assert world.homecoming.check_clean(made)
    del world.errors[Act.RDMA_VERIFY]
    assert not world.homecoming.check_clean(made)


def test_one_that_is_still_in_the_pod_stays_on_its_way(world: World) -> None:
    attached, _ = world.attached()
    world.errors[Act.RDMA_VERIFY] = NotNow("still in the pod's network namespace")
    assert not world.homecoming.bring_home(attached)
    assert [a.state for a in world.book.attachments()] == [AttachmentState.DETACHING]
    del world.errors[Act.RDMA_VERIFY]
    assert world.homecoming.bring_home(attached)
    assert not world.book.attachments()


def test_an_rdma_device_alone_that_was_pulled_is_gone_and_its_record_closed(world: World) -> None:
    attached, _ = world.attached(kind=DeviceKind.RDMA)
    world.errors[Act.RDMA_VERIFY] = Vanished("there is no PCI function (any more)")
    assert world.homecoming.bring_home(attached)
    assert not world.book.attachments()


def test_only_an_rdma_device_alone_that_had_moved_is_looked_for_without_an_event(world: World) -> None:
    attached, made = world.attached(kind=DeviceKind.RDMA)
    assert world.homecoming.is_home(attached)
    world.rdma_at_home = False
    assert not world.homecoming.is_home(attached)
    world.rdma_at_home = True
    shared = replace(made, rdma=replace(BINDING, mode=RdmaMode.SHARED))
    world.book.advance_preparations([shared], PreparationState.PREPARED)
    assert not world.homecoming.is_home(attached)
