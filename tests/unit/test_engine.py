"""The engine: journal before act, act before journal, and no failure that leaves a step neither done nor
undone without saying so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from driver.errors import DriverError, NotNow, OutOfTime
from driver.execute.engine import Engine, Point, Token, UndoFailed
from driver.journal import Journal, JournalWriteFailed
from driver.journal.store import StepPhase
from driver.plan import Act, Plan, Step
from hw.errors import NotFound
from tests.unit.journal_values import BOOT

OWNER = "attachment-0"
TARGET = object()


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


class World:
    """An engine whose acts do nothing but be written down, in one list with what is journalled."""

    def __init__(self, journal: Journal) -> None:
        self.log: list[str] = []
        self.outcomes: list[tuple[str, float, str]] = []
        self.fail: dict[Act, Exception] = {}
        self.during: dict[Act, Callable[[], None]] = {}
        self.full_at: Callable[[str, StepPhase], bool] = lambda act, phase: False
        self.time = Time()
        self.journal = journal
        self._step = journal.step
        journal.step = self.step  # type: ignore[method-assign]
        self.engine: Engine[object] = Engine(
            journal=journal,
            acts={act: self.act(act) for act in Act},
            clock=self.time,
            observer=self,
        )

    def act(self, act: Act) -> Callable[[object], None]:
        def do(target: object) -> None:
            assert target is TARGET
            self.log.append(act)
            self.time.now += 0.001
            if act in self.during:
                self.during[act]()
            if act in self.fail:
                raise self.fail[act]

        return do

    def step(self, owner: str, generation: int, step: str, phase: StepPhase) -> None:
        if self.full_at(step, phase):
            raise JournalWriteFailed("the disk is full")
        self._step(owner, generation, step, phase)
        self.log.append(f"{step} {phase.value}")

    def at(self, point: Point, owner: str, act: str) -> None:
        assert owner == OWNER
        self.log.append(f"{act} {point.value}")

    def step_done(self, step: str, seconds: float, outcome: str) -> None:
        self.outcomes.append((step, round(seconds, 6), outcome))

    @property
    def acts(self) -> list[str]:
        return [line for line in self.log if " " not in line]

    def run(self, plan: Plan, token: Token | None = None) -> None:
        self.engine.run(plan, TARGET, token or Token(self.time))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Journal.open(tmp_path / "j.sqlite", mirror=tmp_path / "mirror", boot_id=BOOT) as journal:
        yield World(journal)


STEPS = (
    Step(act=Act.ZERO_SLOT, undo=(Act.FOLD,)),
    Step(act=Act.MOVE_IN, undo=(Act.STRIP, Act.MOVE_HOME), budget=0.12),
    Step(act=Act.ADDRESS),
    Step(act=Act.UP, undo=(Act.DOWN,)),
)
PLAN = Plan(owner=OWNER, generation=3, steps=STEPS)
HOME = Plan(
    owner=OWNER,
    generation=3,
    homeward=True,
    steps=tuple(Step(act=act) for act in (Act.DOWN, Act.STRIP, Act.MOVE_HOME, Act.VERIFY)),
)
UNDO_OF = {
    Act.ZERO_SLOT: ["fold-counters"],
    Act.MOVE_IN: ["strip-tenant-state", "move-home", "fold-counters"],
    Act.ADDRESS: ["strip-tenant-state", "move-home", "fold-counters"],
    Act.UP: ["link-down", "strip-tenant-state", "move-home", "fold-counters"],
}


def test_an_act_stands_between_its_intent_and_its_record(world: World) -> None:
    world.run(PLAN)
    wanted = []
    for step in STEPS:
        wanted += [
            f"{step.act} before-intent",
            f"{step.act} intent",
            f"{step.act} after-intent",
            str(step.act),
            f"{step.act} after-act",
            f"{step.act} done",
            f"{step.act} after-record",
        ]
    assert world.log == wanted
    assert world.outcomes == [(step.act, 0.001, "ok") for step in STEPS]
    assert [(s.step, s.phase) for s in world.journal.steps(OWNER)] == [
        (step.act, StepPhase.DONE) for step in STEPS
    ]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.act)
@pytest.mark.parametrize("error", [NotFound("gone"), NotNow("busy"), OSError("no"), TimeoutError("late")])
def test_a_failed_step_is_undone_with_all_before_it_in_reverse(
    world: World, step: Step, error: Exception
) -> None:
    world.fail[step.act] = error
    with pytest.raises(type(error)) as raised:
        world.run(PLAN)
    assert raised.value is error
    tried = [each.act for each in STEPS[: STEPS.index(step) + 1]]
    assert world.acts == [*tried, *UNDO_OF[step.act]]
    assert world.outcomes[len(tried) - 1][2] == "error"
    phases = {each.step: each.phase for each in world.journal.steps(OWNER)}
    assert {phases[act] for act in UNDO_OF[step.act]} == {StepPhase.UNDONE}
    assert phases[step.act] is StepPhase.INTENT


def test_a_bug_in_an_act_is_not_swallowed(world: World) -> None:
    world.fail[Act.MOVE_IN] = AssertionError("a bug")
    with pytest.raises(AssertionError):
        world.run(PLAN)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.act)
def test_a_step_that_cannot_be_journalled_is_not_done(world: World, step: Step) -> None:
    world.full_at = lambda act, phase: act == step.act and phase is StepPhase.INTENT
    with pytest.raises(JournalWriteFailed):
        world.run(PLAN)
    assert step.act not in world.acts
    assert world.acts[-len(UNDO_OF[step.act]) :] == UNDO_OF[step.act]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.act)
def test_a_step_whose_end_cannot_be_journalled_is_undone(world: World, step: Step) -> None:
    world.full_at = lambda act, phase: act == step.act and phase is StepPhase.DONE
    with pytest.raises(JournalWriteFailed):
        world.run(PLAN)
    assert world.acts[-len(UNDO_OF[step.act]) :] == UNDO_OF[step.act]


def test_an_undo_goes_on_after_one_that_fails_and_all_failures_are_told(world: World) -> None:
    world.fail[Act.UP] = first = NotNow("cannot go up")
    world.fail[Act.STRIP] = OSError("cannot strip")
    world.fail[Act.FOLD] = NotFound("no slot")
    with pytest.raises(UndoFailed) as raised:
        world.run(PLAN)
    assert world.acts[4:] == UNDO_OF[Act.UP]
    assert str(raised.value) == (
        "cannot go up; and undoing it: strip-tenant-state: cannot strip; fold-counters: no slot"
    )
    assert raised.value.first is first
    assert raised.value.__cause__ is first


def test_an_undo_needs_no_room_on_the_disk(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.fail[Act.UP] = NotNow("cannot go up")
    world.full_at = lambda act, phase: act in UNDO_OF[Act.UP]
    with caplog.at_level(logging.WARNING), pytest.raises(NotNow, match="cannot go up"):
        world.run(PLAN)
    assert world.acts[4:] == UNDO_OF[Act.UP]
    assert "is not journalled" in caplog.text


def test_a_step_that_may_not_finish_in_time_is_not_begun(world: World) -> None:
    deadline = world.time.now + 0.1
    with pytest.raises(OutOfTime, match="too short"):
        world.run(PLAN, Token(world.time, deadline))
    assert world.acts == [Act.ZERO_SLOT, Act.FOLD]


def test_a_plan_that_comes_too_late_begins_nothing(world: World) -> None:
    with pytest.raises(OutOfTime):
        world.run(PLAN, Token(world.time, world.time.now))
    assert world.log == []


def test_a_step_that_wakes_up_late_is_the_last_and_is_undone(world: World) -> None:
    token = Token(world.time)
    world.during[Act.MOVE_IN] = token.revoke
    with pytest.raises(OutOfTime, match="overtaken"):
        world.run(PLAN, token)
    assert world.acts == [Act.ZERO_SLOT, Act.MOVE_IN, *UNDO_OF[Act.MOVE_IN]]


def test_an_undo_knows_no_deadline(world: World) -> None:
    token = Token(world.time, world.time.now + 0.5)

    def stall() -> None:
        world.time.now += 60

    world.during[Act.MOVE_IN] = stall
    with pytest.raises(OutOfTime):
        world.run(PLAN, token)
    assert world.acts[2:] == UNDO_OF[Act.MOVE_IN]


def test_an_older_generation_that_wakes_up_does_no_more(world: World) -> None:
    newer = Plan(owner=OWNER, generation=4, steps=STEPS)

    def overtaken() -> None:
        del world.during[Act.MOVE_IN]
        world.run(newer)
        world.log.clear()

    world.during[Act.MOVE_IN] = overtaken
    with pytest.raises(OutOfTime, match="overtaken by generation 4"):
        world.run(PLAN)
    assert Act.UP not in world.acts
    assert {step.generation for step in world.journal.steps(OWNER)} == {4}


def test_the_way_home_is_gone_to_its_end_whatever_fails(world: World) -> None:
    world.fail[Act.DOWN] = NotFound("no link")
    world.fail[Act.MOVE_HOME] = DriverError("no")
    problems = world.engine.bring_home(HOME, TARGET)
    assert world.acts == [step.act for step in HOME.steps]
    assert [(each.act, str(each)) for each in problems] == [
        (Act.DOWN, "link-down: no link"),
        (Act.MOVE_HOME, "move-home: no"),
    ]


def test_the_way_home_needs_no_room_on_the_disk(world: World) -> None:
    world.full_at = lambda act, phase: True
    assert world.engine.bring_home(HOME, TARGET) == ()
    assert world.acts == [step.act for step in HOME.steps]


def test_a_whole_undo_is_that_of_every_step_wherever_the_plan_had_got_to(world: World) -> None:
    world.engine.undo(PLAN, TARGET)
    assert world.acts == UNDO_OF[Act.UP]
    world.fail[Act.DOWN] = OSError("no")
    with pytest.raises(UndoFailed, match="link-down: no") as raised:
        world.engine.undo(PLAN, TARGET)
    assert raised.value.first is world.fail[Act.DOWN]
    assert world.acts[4:] == UNDO_OF[Act.UP]


def test_a_projection_is_written_between_two_points_and_not_journalled(world: World) -> None:
    world.engine.project(OWNER, "write-cdi-spec", lambda: world.log.append("written"))
    assert world.log == ["write-cdi-spec before-intent", "written", "write-cdi-spec after-act"]
    assert world.journal.steps(OWNER) == ()


def test_a_token_without_deadline_only_knows_that_it_was_revoked() -> None:
    token = Token(Time())
    token.check(1e9)
    token.revoke()
    with pytest.raises(OutOfTime):
        token.check(0.0)
