"""What is told of devices in pods from afar is of those devices, and the same as what is read there."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bpf.errors import CallRefused
from bpf.limits import Dropped
from driver.execute import glance
from driver.execute.glance import AS_IT_WAS, Glance
from driver.execute.meters import INTERFACE, VF, NodeMeters, PfCounters
from driver.journal.stretches import MeterKey
from driver.model import BootId, VfConfig, VfDriver
from driver.rdma import RdmaBinding, RdmaMode
from hw.elsewhere import Nsid, Place
from hw.errors import HwError
from hw.model import IfIndex, PciIdentity, RdmaIndex, RdmaName, parse_pci_address
from hw.wire import attribute
from tests.unit.journal_values import attachment, preparation

ADDRESS = "0000:3b:00.2"
INDEX, NUMBER = IfIndex(57), Nsid(4)


def message(
    packets: int, *, address: str = ADDRESS, number: int | None = NUMBER, index: int = INDEX
) -> bytes:
    """An RTM_NEWLINK of a PCI function in another namespace."""
    target = attribute(46, struct.pack("=i", number)) if number is not None else b""
    return (
        struct.pack("=BxHiII", 0, 1, index, 0, 0)
        + attribute(3, b"net1\0")
        + attribute(23, struct.pack("=24Q", 0, packets, *[0] * 22))
        + attribute(57, b"pci\0")
        + attribute(56, address.encode() + b"\0")
        + target
    )


class World:
    """One VF in a pod, what the kernel says of its place, and whoever reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        identity = PciIdentity(parse_pci_address(ADDRESS), parse_pci_address("0000:3b:00.0"), 0)
        self.held = attachment(1)
        self.of = replace(preparation(1), identity=identity, rdma=None)
        self.message: bytes | HwError | None = message(0)
        self.dropped: dict[int, Dropped] = {self.of.slot: Dropped((0, 0), (0, 0))}
        self.index: IfIndex | None = INDEX
        self.number: Nsid | None = NUMBER
        self.vf: Any = None
        self.asked: list[Place] = []
        meters: Any = NodeMeters(SimpleNamespace(), BootId("boot"), lambda target: {}, lambda target: None)  # type: ignore[arg-type]
        limits: Any = SimpleNamespace(dropped_without_queues=self.without_queues)
        self.glance = Glance(limits, meters)
        monkeypatch.setattr(glance, "Elsewhere", self.elsewhere)
        monkeypatch.setattr(glance, "LinkSocket", self.elsewhere)

    @contextmanager
    def elsewhere(self, netns: object = None) -> Iterator[Any]:
        yield SimpleNamespace(number_of=lambda netns: self.number, links=self.links)

    def links(self, places: Sequence[Place]) -> list[bytes | None]:
        self.asked += places
        if isinstance(self.message, HwError):
            raise self.message
        return [self.message for _ in places]

    def without_queues(self, slots: Sequence[int]) -> dict[int, Dropped]:
        return self.dropped

    def find(self) -> None:
        link = SimpleNamespace(ifindex=self.index) if self.index is not None else None
        target: Any = SimpleNamespace(
            attachment=self.held,
            preparation=self.of,
            pod_netns=SimpleNamespace(),
            find_in_pod=lambda: link,
        )
        self.glance.find(target)

    def look(self) -> Any:
        pfs: Any = SimpleNamespace(of=lambda identity, home: self.vf)
        return self.glance.look([(self.held, self.of)], pfs).get(self.held.id)

    def settle(self) -> Any:
        found = self.look()
        self.glance.settled(self.held)
        return found


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(monkeypatch)
    made.find()
    return made


def test_a_device_is_told_of_with_everything_that_it_counts(world: World) -> None:
    world.message, world.vf = message(7), (IfIndex(2), {"tx_packets": 7})
    world.dropped = {world.of.slot: Dropped((0, 0), (3, 4))}
    shown = {each.meter: each for each in world.look()}
    device = world.of.key.device
    interface = shown[MeterKey(device, INTERFACE)].reading
    assert interface is not None
    assert (interface.instance, interface.values["tx_packets"]) == (f"boot/{INDEX}", 7)
    limits = shown[MeterKey(device, "limits")]
    assert limits.reading is not None
    assert sorted(limits.reading.values.values()) == [0, 0, 3, 4]
    assert limits.cross_check
    assert shown[MeterKey(device, VF)].cross_check
    assert world.asked == [(NUMBER, INDEX)]


def test_it_is_as_it_was_only_once_that_was_settled_and_until_anything_is_another(world: World) -> None:
    assert world.look() is not AS_IT_WAS
    assert world.settle() is not AS_IT_WAS
    assert world.settle() is AS_IT_WAS
    assert world.settle() is AS_IT_WAS
    world.message = message(1)
    assert world.look() is not AS_IT_WAS
    assert world.settle() is not AS_IT_WAS, "what was not settled was taken for settled"
    assert world.settle() is AS_IT_WAS
    world.dropped = {world.of.slot: Dropped((0, 60), (0, 1))}
    assert world.settle() is not AS_IT_WAS
    world.vf = (IfIndex(2), {"tx_packets": 7})
    assert world.settle() is not AS_IT_WAS
    assert world.settle() is AS_IT_WAS


@pytest.mark.parametrize(
    "answer",
    [
        None,
        message(0, address="0000:3b:00.3"),
        message(0, number=None),
        message(0, number=NUMBER + 1),
        HwError("no answer"),
    ],
    ids=["nothing there", "another device", "a kernel's own link", "another namespace", "nobody was asked"],
)
def test_what_is_not_of_the_device_for_sure_is_told_of_nobody(world: World, answer: Any) -> None:
    world.message = answer
    assert world.settle() is None
    assert world.settle() is None


def test_a_device_with_a_queue_that_drops_is_read_where_it_is(world: World) -> None:
    world.settle()
    world.dropped = {}
    assert world.settle() is None


def test_maps_that_cannot_be_read_are_no_end_of_reading(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(slots: object) -> dict[int, Dropped]:
        raise CallRefused("reading a BPF map in a batch", 1)

    monkeypatch.setattr(world.glance._limits, "dropped_without_queues", refuse)
    assert world.look() is None


@pytest.mark.parametrize("why", ["no number", "not in the pod", "RDMA", "by its files"])
def test_what_cannot_be_told_from_here_is_not_asked_for(world: World, why: str) -> None:
    if why == "no number":
        world.number = None
    elif why == "not in the pod":
        world.index = None
    elif why == "RDMA":
        world.of = replace(
            world.of, rdma=RdmaBinding(name=RdmaName("mlx5_2"), mode=RdmaMode.SHARED, index=RdmaIndex(7))
        )
    else:
        by_file = replace(world.of.config, vf=VfConfig(driver=VfDriver.VFIO))
        world.of = replace(world.of, config=by_file)
    world.find()
    assert world.look() is None
    assert world.asked == []


def test_of_attachments_that_are_over_nothing_is_remembered(world: World) -> None:
    world.settle()
    assert world.glance.look([], PfCounters()) == {}
    assert world.settle() is None
    assert len(world.asked) == 1
