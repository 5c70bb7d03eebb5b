"""What the kernel counted of an IPoIB interface is in the pod's bill and in the comparison with BPF, as what
its port's own interface counted is; and what was not read in time is a gap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpf.errors import CallRefused
from bpf.layout import Hook
from driver import plan
from driver.clock import SystemClock
from driver.execute import ipoib
from driver.execute.engine import Token
from driver.execute.meters import INTERFACE, NodeMeters
from driver.execute.target import Target
from driver.journal.ledger import Ledger, LedgerWriteFailed
from driver.lifecycle.metering import Metering
from driver.lifecycle.usage import owner_of
from driver.metrics.meters import MeterExposition
from driver.model import Attachment, BootId
from driver.plan import Act
from hw.model import Direction, IfIndex
from tests.unit.ipoib_world import World
from tests.unit.journal_values import Records, attachment

SIZE = 1000
HELD = attachment(0)
DEVICE = HELD.preparation.device
CHILD = f"{DEVICE}_child"


class Node(World):
    """One VF with an IPoIB interface in its pod, read by the meters of a real node into a real ledger."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder / "sys", monkeypatch)
        self.of = self.preparation()
        self.ledger = Ledger.open(folder / "state" / "ledger.sqlite")
        self.held: dict[str, Attachment] = {}
        book: Any = Records(self.held, {self.of.key: self.of})
        find: Any = partial(ipoib.find_child, self.programs)
        meters = NodeMeters(self.card.host, BootId("boot"), lambda target: {}, find)
        clock: Any = SimpleNamespace(wall=iter(range(1, 10_000)).__next__)
        glance: Any = SimpleNamespace(look=lambda held, pfs: {}, find=lambda target: None)
        self.meters = Metering(
            book, self.ledger, clock, meters, glance, lambda slot: tuple(self.programs.cells)
        )

    def attach(self) -> None:
        self.held[HELD.id] = HELD
        way = plan.attach(HELD, self.of, Hook.TCX)
        self.engine().run(way, self.target(self.of), Token(SystemClock()))
        self.ledger.begin(owner_of(HELD, self.of, 0.5))

    def detach(self) -> list[str]:
        way, target = plan.detach(HELD, self.of), self.target(self.of)
        return [str(problem) for problem in self.engine().bring_home(way, target)]

    def settle(self) -> None:
        @contextmanager
        def reach(held: Attachment) -> Iterator[Target]:
            yield self.target(self.of)

        self.meters.settle(reach, all_known=True)

    @property
    def child(self) -> IfIndex:
        return self.children()[0].ifindex

    def missed(self) -> dict[str, tuple[int, int]]:
        return {each.direction: (each.bytes, each.packets) for each in self.meters.unaccounted()}

    def sent(self) -> dict[str, int]:
        """Packets in the pod's bill, by what counted them."""
        rows = [row for row in self.ledger.counters() if row.counter == "tx_packets" and row.total]
        assert all(row.owner is not None and row.meter.source == INTERFACE for row in rows)
        return {row.meter.subject: row.total for row in rows}

    def gaps(self) -> list[str]:
        return [gap.reason for gap in self.ledger.gaps()]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    made = Node(tmp_path, monkeypatch)
    yield made
    made.ledger.close()


def test_what_passes_it_is_not_missed_and_hides_nothing_of_what_passed_bpf_by(node: Node) -> None:
    node.attach()
    node.passes(node.child, Direction.EGRESS, 500, SIZE)
    node.passes(node.child, Direction.INGRESS, 300, SIZE)
    node.passes(node.vf.ifindex, Direction.INGRESS, 50, SIZE)
    node.settle()
    assert node.missed() == {"egress": (0, 0), "ingress": (0, 0)}
    node.passes(node.vf.ifindex, Direction.EGRESS, 60, SIZE, seen=False)
    node.settle()
    # Less 40 bytes a packet, for a header that some count.
    assert node.missed()["egress"] == (60 * SIZE - 560 * 40, 60)


def test_what_passes_its_own_hooks_by_is_missed(node: Node) -> None:
    node.attach()
    node.passes(node.child, Direction.EGRESS, 60, SIZE, seen=False)
    node.passes(node.child, Direction.INGRESS, 70, SIZE, seen=False)
    node.settle()
    assert node.missed() == {"egress": (60 * SIZE - 60 * 40, 60), "ingress": (70 * SIZE, 70)}


def test_its_numbers_are_series_of_its_own_under_the_name_it_has_in_the_pod(node: Node) -> None:
    node.passes(node.vf.ifindex, Direction.EGRESS, 9, SIZE)
    node.attach()
    node.passes(node.vf.ifindex, Direction.EGRESS, 2, SIZE)
    node.passes(node.child, Direction.EGRESS, 3, SIZE)
    node.settle()
    shown = MeterExposition().meters(node.meters.samples()).decode()
    found = {
        line.split('interface="')[1].split('"')[0]: int(line.rsplit(" ")[-1])
        for line in shown.splitlines()
        if line.startswith("knd_pod_link_packets_total{") and 'direction="egress"' in line
    }
    assert found == {node.of.pod_ifname: 2, "ib1": 3}


def test_it_is_read_once_more_when_it_is_down_and_before_it_is_removed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.attach()
    node.settle()
    child, down = node.child, []
    statistics = type(node.pod).statistics

    def watched(netns: Any, ifindex: IfIndex) -> dict[str, int]:
        if ifindex == child:
            down.append(not netns.links[ifindex].up)
        return statistics(netns, ifindex)

    monkeypatch.setattr(type(node.pod), "statistics", watched)
    node.passes(child, Direction.EGRESS, 4, SIZE)
    node.passes(node.vf.ifindex, Direction.EGRESS, 5, SIZE)
    assert node.detach() == []
    assert down == [True]
    assert node.sent() == {CHILD: 4, DEVICE: 5}
    assert node.gaps() == []
    assert node.ledger.meters.living() == ()


def test_what_is_done_again_counts_nothing_twice_and_makes_no_gap(node: Node) -> None:
    node.attach()
    node.passes(node.child, Direction.EGRESS, 4, SIZE)
    assert node.detach() == []
    assert node.detach() == []
    assert node.sent() == {CHILD: 4}
    assert node.gaps() == []


def test_a_late_repetition_takes_nothing_from_the_next_holder(node: Node) -> None:
    node.attach()
    late = node.target(node.of)
    assert node.detach() == []
    second = replace(HELD, id=attachment(9).id)
    node.held = {second.id: second}
    way, target = plan.attach(second, node.of, Hook.TCX), replace(late, attachment=second)
    node.engine().run(way, target, Token(SystemClock()))
    node.meters.leave_child(late)
    assert {each.holder for each in node.ledger.meters.living()} == {second.id}
    assert len(node.ledger.meters.living()) == 2


def test_one_that_its_netns_left_at_home_is_read_there(node: Node) -> None:
    node.attach()
    node.passes(node.child, Direction.EGRESS, 4, SIZE)
    node.netns_ends(refund=True)
    assert node.detach() == []
    assert (node.sent(), node.gaps()) == ({CHILD: 4}, [])


def test_what_its_pod_deleted_keeps_what_was_read_and_is_a_gap(node: Node) -> None:
    node.attach()
    node.passes(node.child, Direction.EGRESS, 4, SIZE)
    node.settle()
    node.pod.delete(node.child)
    node.passes(node.vf.ifindex, Direction.EGRESS, 70, SIZE, seen=False)
    node.settle()
    assert node.missed()["egress"][1] == 70
    assert node.detach() == []
    assert node.sent() == {CHILD: 4, DEVICE: 70}
    (gap,) = node.gaps()
    assert gap == f"interface of {CHILD}: the IPoIB interface is neither at home nor in its pod"


def test_where_the_ledger_does_not_take_it_it_is_removed_all_the_same_and_is_a_gap(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.attach()
    node.passes(node.child, Direction.EGRESS, 4, SIZE)
    release = node.ledger.meters.release
    failures = [LedgerWriteFailed("the disk is full")] * 2

    def full(*args: Any) -> None:
        if failures:
            raise failures.pop()
        release(*args)

    monkeypatch.setattr(node.ledger.meters, "release", full)
    problems = node.detach()
    assert [problem.split(":")[0] for problem in problems] == [Act.IPOIB_FOLD, Act.FOLD]
    assert node.children() == []
    assert node.detach() == []
    (gap,) = node.gaps()
    assert CHILD in gap


def test_an_attach_that_is_undone_after_its_meters_began_makes_no_gap(node: Node) -> None:
    node.attach()
    node.engine().undo(plan.attach(HELD, node.of, Hook.TCX), node.target(node.of))
    assert node.children() == []
    assert node.gaps() == []


def test_what_cannot_be_asked_of_it_is_told_and_the_rest_is_read(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.attach()

    def refused(name: str, ifindex: int) -> bool:
        raise CallRefused("BPF_OBJ_GET", 1)

    monkeypatch.setattr(node.programs, "is_on", refused)
    node.passes(node.vf.ifindex, Direction.EGRESS, 5, SIZE)
    node.settle()
    assert node.sent() == {DEVICE: 5}
