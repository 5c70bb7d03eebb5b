"""What a device counts itself is billed to the attachment that has it alone; else it is the device's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpf.layout import Cell, TrafficKind
from driver.execute.meters import INTERFACE, VF, PfCounters, Shown
from driver.execute.target import Target
from driver.journal.ledger import Ledger
from driver.journal.stretches import MeterKey, Reading
from driver.lifecycle.metering import Metering, Missed, missed
from driver.lifecycle.usage import owner_of
from driver.model import Attachment, AttachmentState, Preparation
from driver.rdma import RdmaBinding, RdmaMode
from hw.model import Direction, RdmaIndex, RdmaName
from tests.unit.journal_values import Records, attachment, preparation

RDMA = MeterKey("mlx5_2", "rdma-hw", 1)


class World:
    """Devices whose counters are scripted, the records, and a ledger."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger.open(path)
        self.preparations: dict[Any, Preparation] = {}
        self.attachments: dict[str, Attachment] = {}
        self.counters: dict[MeterKey, dict[str, int]] = {}
        self.unreadable: set[MeterKey] = set()
        self.cells: tuple[Cell, ...] = ()
        self.told: dict[str, tuple[Shown, ...]] = {}
        self.settled: list[Attachment] = []
        self.now = 0.0
        self.metering = self.agent()

    def agent(self) -> Metering:
        book: Any = Records(self.attachments, self.preparations)
        clock: Any = SimpleNamespace(wall=self.tick)
        meters: Any = SimpleNamespace(read=self.read)
        glance: Any = SimpleNamespace(
            look=lambda held, pfs: self.told, find=lambda target: None, settled=self.settled.append
        )
        return Metering(book, self.ledger, clock, meters, glance, lambda slot: self.cells)

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def read(self, target: Target, pfs: PfCounters | None = None) -> tuple[Shown, ...]:
        mine = {target.device, target.preparation.rdma.name if target.preparation.rdma else ""}
        return tuple(
            Shown(meter, None, "no answer", meter.source == VF)
            if meter in self.unreadable
            else Shown(meter, Reading("boot/1", dict(values)), cross_check=meter.source == VF)
            for meter, values in self.counters.items()
            if meter.subject in mine and (pfs is not None or meter.source != VF)
        )

    def target(self, number: int) -> Any:
        held = self.attachments[f"attachment-{number}"]
        known = self.preparations[held.preparation]
        return SimpleNamespace(attachment=held, preparation=known, device=known.key.device)

    def prepare(self, number: int, rdma: RdmaBinding | None) -> None:
        made = replace(preparation(number), rdma=rdma)
        self.preparations[made.key] = made

    def attach(self, number: int) -> None:
        held = attachment(number, state=AttachmentState.ATTACHING)
        self.attachments[held.id] = held
        self.metering.begin(self.target(number))
        self.ledger.begin(owner_of(held, self.preparations[held.preparation], self.tick()))
        self.attachments[held.id] = replace(held, state=AttachmentState.ATTACHED)

    def detach(self, number: int) -> None:
        held = self.attachments[f"attachment-{number}"]
        self.attachments[held.id] = replace(held, state=AttachmentState.DETACHING)
        self.metering.leave(self.target(number))
        self.ledger.fold(held.id, (), source="tcx", class_names=(), ended=self.tick())
        del self.attachments[held.id]

    def settle(self, *, all_known: bool = True) -> None:
        @contextmanager
        def reach(held: Attachment) -> Iterator[Any]:
            yield self.target(int(held.id.removeprefix("attachment-")))

        self.metering.settle(reach, all_known=all_known)

    def billed(self) -> dict[tuple[str, str, str], int]:
        return {
            (row.owner.pod.name if row.owner else "the device", row.meter.source, row.counter): row.total
            for row in self.ledger.counters()
            if row.total
        }


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "state" / "ledger.sqlite")
    binding = RdmaBinding(name=RdmaName("mlx5_2"), mode=RdmaMode.SHARED, index=RdmaIndex(7))
    made.prepare(1, binding)
    made.prepare(2, binding)
    made.prepare(3, None)
    yield made
    made.ledger.close()


def test_two_pods_of_one_device_are_billed_for_what_each_did_alone(world: World) -> None:
    world.counters[RDMA] = {"sent_pkts": 100}
    world.attach(1)
    world.counters[RDMA]["sent_pkts"] = 110
    world.attach(2)
    world.counters[RDMA]["sent_pkts"] = 130
    world.settle()
    world.detach(1)
    world.counters[RDMA]["sent_pkts"] = 137
    world.detach(2)
    world.counters[RDMA]["sent_pkts"] = 999
    assert world.billed() == {
        ("train-1", "rdma-hw", "sent_pkts"): 10,
        ("the device", "rdma-hw", "sent_pkts"): 20,
        ("train-2", "rdma-hw", "sent_pkts"): 7,
    }
    assert world.ledger.gaps() == ()


def test_a_device_of_its_own_is_nobody_else_s(world: World) -> None:
    world.counters = {
        RDMA: {"sent_pkts": 5},
        MeterKey("dev-1", INTERFACE): {"tx_packets": 5},
        MeterKey("dev-3", INTERFACE): {"tx_packets": 50},
    }
    world.attach(1)
    world.attach(3)
    world.counters[RDMA]["sent_pkts"] += 1
    world.counters[MeterKey("dev-1", INTERFACE)]["tx_packets"] += 2
    world.counters[MeterKey("dev-3", INTERFACE)]["tx_packets"] += 3
    world.detach(3)
    world.detach(1)
    assert world.billed() == {
        ("train-1", "rdma-hw", "sent_pkts"): 1,
        ("train-1", INTERFACE, "tx_packets"): 2,
        ("train-3", INTERFACE, "tx_packets"): 3,
    }


def test_a_detach_that_is_done_again_counts_nothing_twice(world: World) -> None:
    world.counters[RDMA] = {"sent_pkts": 100}
    world.attach(1)
    world.counters[RDMA] = {"sent_pkts": 104}
    world.metering.leave(world.target(1))
    world.counters[RDMA] = {"sent_pkts": 200}
    world.detach(1)
    assert world.billed() == {("train-1", "rdma-hw", "sent_pkts"): 4}


def test_a_late_repetition_takes_nothing_from_the_next_holder(world: World) -> None:
    meter = MeterKey("dev-3", INTERFACE)
    world.counters[meter] = {"tx_packets": 1}
    world.attach(3)
    late = world.target(3)
    world.detach(3)
    second = replace(attachment(3), id=attachment(9).id, pod=attachment(9).pod)
    world.attachments[second.id] = second
    world.metering.begin(SimpleNamespace(attachment=second, preparation=late.preparation, device="dev-3"))  # type: ignore[arg-type]
    world.counters[meter] = {"tx_packets": 11}
    world.metering.leave(late)
    assert [(each.meter, each.holder) for each in world.ledger.meters.living()] == [(meter, second.id)]


def test_what_was_not_read_at_the_end_is_a_gap_and_the_rest_goes_on(world: World) -> None:
    world.counters[RDMA] = {"sent_pkts": 0}
    world.attach(1)
    world.counters[RDMA] = {"sent_pkts": 5}
    world.settle()
    world.unreadable.add(RDMA)
    world.settle()
    world.detach(1)
    assert world.billed() == {("train-1", "rdma-hw", "sent_pkts"): 5}
    (gap,) = world.ledger.gaps()
    assert (gap.attachment, gap.reason) == ("attachment-1", "rdma-hw of mlx5_2: no answer")


def test_a_device_that_is_gone_altogether_is_a_gap(world: World) -> None:
    world.counters[RDMA] = {"sent_pkts": 0}
    world.attach(1)
    world.counters.clear()
    world.detach(1)
    (gap,) = world.ledger.gaps()
    assert "was not found" in gap.reason
    assert world.ledger.meters.living() == ()


def test_a_restart_goes_on_where_the_last_agent_stopped(world: World) -> None:
    world.counters[RDMA] = {"sent_pkts": 10}
    world.attach(1)
    world.counters[RDMA] = {"sent_pkts": 30}
    world.metering = world.agent()
    world.settle()
    assert {sample.total for sample in world.metering.samples()} == {20}
    world.detach(1)
    assert world.billed() == {("train-1", "rdma-hw", "sent_pkts"): 20}
    assert world.ledger.gaps() == ()


def test_what_an_agent_without_meters_attached_is_counted_from_now_and_a_gap_says_so(world: World) -> None:
    held = attachment(1)
    world.ledger.begin(owner_of(held, world.preparations[held.preparation], 0.5))
    world.attachments[held.id] = held
    world.counters = {RDMA: {"sent_pkts": 10}, MeterKey("dev-1", VF): {"tx_packets": 4}}
    world.settle()
    world.counters[RDMA] = {"sent_pkts": 12}
    world.detach(1)
    assert world.billed() == {("train-1", "rdma-hw", "sent_pkts"): 2}
    (gap,) = world.ledger.gaps()
    assert (gap.start, gap.source) == (0.5, "rdma-hw")


def test_whoever_left_without_a_last_reading_is_not_counted_on(world: World) -> None:
    world.counters[RDMA] = {"sent_pkts": 10}
    world.attach(1)
    world.attach(2)
    world.attachments.clear()
    world.counters[RDMA] = {"sent_pkts": 1000}
    world.settle()
    assert world.ledger.meters.living() == ()
    assert world.billed() == {}
    assert len(world.ledger.gaps()) == 1


def test_while_a_lost_journal_is_made_up_for_nobody_is_taken_for_gone(world: World) -> None:
    world.counters[RDMA] = {"sent_pkts": 10}
    world.attach(1)
    held = world.attachments.popitem()[1]
    world.settle(all_known=False)
    world.attachments[held.id] = held
    world.counters[RDMA] = {"sent_pkts": 90}
    world.settle()
    world.detach(1)
    assert world.billed() == {("train-1", "rdma-hw", "sent_pkts"): 80}
    assert world.ledger.gaps() == ()


def test_an_idle_device_costs_the_disk_nothing(world: World) -> None:
    world.counters[RDMA] = {"sent_pkts": 10}
    world.attach(1)
    world.settle()
    before = world.ledger.counters()
    for _ in range(3):
        world.settle()
    assert world.ledger.counters() == before


def test_samples_name_the_pod_and_end_with_its_attachment(world: World) -> None:
    world.counters[RDMA] = {"sent_pkts": 10}
    world.attach(1)
    world.counters[RDMA] = {"sent_pkts": 16}
    world.settle()
    (sample,) = world.metering.samples()
    assert sample[:10] == ("ml", "train-1", "nic-1", "dev-1", "net0", "mlx5_2", 1, "rdma-hw", "sent_pkts", 6)
    world.attach(2)
    world.counters[RDMA] = {"sent_pkts": 20}
    world.settle()
    assert {(s.pod, s.total) for s in world.metering.samples()} == {
        ("train-1", 6),
        ("", 4),
        ("train-2", 0),
    } - {("train-2", 0)}
    world.detach(1)
    assert {(s.pod, s.total) for s in world.metering.samples()} == {("", 4), ("train-2", 0)}


# --- what passed BPF by -------------------------------------------------------------------------------


def cell(direction: Direction, size: int, packets: int) -> Cell:
    return Cell(direction, 0, TrafficKind.IP, size, packets)


def test_what_the_interface_sent_and_bpf_did_not_see_is_missed() -> None:
    totals = {"tx_packets": 10, "tx_bytes": 10000, "rx_packets": 3, "rx_bytes": 300}
    cells = (cell(Direction.EGRESS, 4000, 4), cell(Direction.INGRESS, 300, 3))
    assert missed(totals, cells, Direction.EGRESS, 8) == Missed(10000 - 4000 - 80, 6)
    assert missed(totals, cells, Direction.INGRESS, 8) == Missed(0, 0)


def test_checksums_and_tags_explain_a_difference() -> None:
    totals = {"tx_packets": 10, "tx_bytes": 10080}
    assert missed(totals, (cell(Direction.EGRESS, 10000, 10),), Direction.EGRESS, 8) == Missed(0, 0)


def test_what_was_missed_does_not_become_less(world: World) -> None:
    meter = MeterKey("dev-3", INTERFACE)
    world.counters[meter] = {"tx_packets": 0, "tx_bytes": 0}
    world.attach(3)
    # From the start, or an alert would not see it grow.
    assert {(s.direction, s.packets) for s in world.metering.unaccounted()} == {("egress", 0), ("ingress", 0)}
    world.counters[meter] = {"tx_packets": 9, "tx_bytes": 9000}
    world.settle()
    world.cells = (cell(Direction.EGRESS, 20000, 20),)
    world.settle()
    found = {(s.direction, s.source): (s.bytes, s.packets) for s in world.metering.unaccounted()}
    assert found[("egress", INTERFACE)] == (9000 - 72, 9)
    world.detach(3)
    assert world.metering.unaccounted() == ()


def test_a_scrape_gets_the_same_samples_until_one_is_another(world: World) -> None:
    interface = MeterKey("dev-3", INTERFACE)
    world.counters[interface] = {"tx_bytes": 1}
    world.attach(3)
    first, missed_first = world.metering.samples(), world.metering.unaccounted()
    world.settle()
    assert world.metering.samples() is first
    assert world.metering.unaccounted() == missed_first
    world.counters[interface]["tx_bytes"] = 100
    world.settle()
    assert [each.total for each in world.metering.samples()] == [99]
    assert [each.bytes for each in world.metering.unaccounted() if each.direction == "egress"] == [99]
    held = world.attachments["attachment-3"]
    known = world.preparations[held.preparation]
    renamed = replace(known.claim, name="other")
    world.preparations[held.preparation] = replace(known, claim=renamed)
    assert [each.claim for each in world.metering.samples()] == ["other"]
    assert {each.claim for each in world.metering.unaccounted()} == {"other"}
    world.detach(3)
    assert world.metering.samples() == world.metering.unaccounted() == ()
