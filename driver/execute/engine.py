"""The engine: runs a plan's steps in order, each journalled before and after, and undoes on failure.

Invariant: no step is started that may not finish before the deadline, and none once the operation has
been overtaken; what was begun is undone in reverse before the error goes up. Undo knows no deadline.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from bpf.errors import BpfError
from driver.clock import Clock
from driver.errors import DriverError, OutOfTime
from driver.journal.store import Journal, StepPhase
from driver.plan import Act, Plan, Step
from hw.errors import HwError

log = logging.getLogger(__name__)

T = TypeVar("T")

EXPECTED = (HwError, BpfError, DriverError, OSError)
"""What an act may raise; anything else is a bug and is not caught here."""


class Point(enum.StrEnum):
    """Where an observer is called: a crash at any of them must converge."""

    BEFORE_INTENT = "before-intent"
    AFTER_INTENT = "after-intent"
    AFTER_ACT = "after-act"
    AFTER_RECORD = "after-record"


class Observer(Protocol):
    """Metrics, and the tests that kill the process between two points."""

    def at(self, point: Point, owner: str, act: str) -> None: ...

    def step_done(self, step: str, seconds: float, outcome: str) -> None: ...


class Token:
    """Permission to go on. Revoked when the caller has given up; a step that wakes up late sees it."""

    def __init__(self, clock: Clock, deadline: float | None = None) -> None:
        self._clock = clock
        self._deadline = deadline
        self._revoked = threading.Event()

    def revoke(self) -> None:
        self._revoked.set()

    def check(self, budget: float) -> None:
        """OutOfTime if revoked, or if less than budget seconds are left."""
        if self._revoked.is_set():
            raise OutOfTime("the operation was overtaken by a newer one")
        if self._deadline is not None and self._clock.monotonic() + budget > self._deadline:
            raise OutOfTime("the time the caller allows is too short for the next step")


@dataclass(frozen=True, slots=True)
class Problem:
    """An act on the way home that did not work."""

    act: Act
    error: Exception

    def __str__(self) -> str:
        return f"{self.act}: {self.error}"


class UndoFailed(DriverError):
    """A step failed and so did bringing back what was done; the device needs reconciling. first is why
    there was something to undo."""

    def __init__(self, text: str, first: Exception) -> None:
        self.first = first
        super().__init__(text)


class Engine(Generic[T]):
    """acts maps each Act to the function that does it on a target of type T."""

    def __init__(
        self,
        *,
        journal: Journal,
        acts: dict[Act, Callable[[T], None]],
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._journal = journal
        self._acts = acts
        self._clock = clock
        self._observer = observer

    def run(self, plan: Plan, target: T, token: Token) -> None:
        """Do every step, or none: on failure what was done is undone and the error is raised again.

        UndoFailed, from the first error, if that did not work either.
        """
        assert not plan.homeward
        begun: list[Step] = []
        try:
            for step in plan.steps:
                token.check(step.budget)
                begun.append(step)
                self._do(plan, step.act, target, StepPhase.DONE, insist=True)
        except EXPECTED as error:
            problems = self._undo(plan, begun, target)
            if problems:
                raise UndoFailed(
                    f"{error}; and undoing it: {'; '.join(map(str, problems))}", error
                ) from error
            raise

    def bring_home(self, plan: Plan, target: T) -> tuple[Problem, ...]:
        """Try every step of a homeward plan, whatever the others did: each brings it nearer to clean.

        Returns what did not work; empty means home and clean.
        """
        assert plan.homeward
        problems = []
        for step in plan.steps:
            try:
                self._do(plan, step.act, target, StepPhase.DONE, insist=False)
            except EXPECTED as error:
                log.warning("%s of %s: %s", step.act, plan.owner, error)
                problems.append(Problem(step.act, error))
        return tuple(problems)

    def undo(self, plan: Plan, target: T) -> None:
        """Undo the whole of a plan, wherever it had got to. UndoFailed with every problem."""
        problems = self._undo(plan, list(plan.steps), target)
        if problems:
            raise UndoFailed("; ".join(map(str, problems)), problems[0].error)

    def project(self, owner: str, name: str, write: Callable[[], None]) -> None:
        """Write a projection between observed points. It is not journalled: it is made from the truth."""
        self._observer.at(Point.BEFORE_INTENT, owner, name)
        write()
        self._observer.at(Point.AFTER_ACT, owner, name)

    def _undo(self, plan: Plan, begun: list[Step], target: T) -> list[Problem]:
        problems = []
        for step in reversed(begun):
            for act in step.undo:
                try:
                    self._do(plan, act, target, StepPhase.UNDONE, insist=False)
                except EXPECTED as error:
                    log.warning("undo of %s, %s: %s", plan.owner, act, error)
                    problems.append(Problem(act, error))
        return problems

    def _do(self, plan: Plan, act: Act, target: T, done: StepPhase, *, insist: bool) -> None:
        observer = self._observer
        observer.at(Point.BEFORE_INTENT, plan.owner, act)
        self._record(plan, act, StepPhase.INTENT, insist=insist)
        observer.at(Point.AFTER_INTENT, plan.owner, act)
        started = self._clock.monotonic()
        try:
            self._acts[act](target)
        except EXPECTED:
            observer.step_done(act, self._clock.monotonic() - started, "error")
            raise
        observer.step_done(act, self._clock.monotonic() - started, "ok")
        observer.at(Point.AFTER_ACT, plan.owner, act)
        self._record(plan, act, done, insist=insist)
        observer.at(Point.AFTER_RECORD, plan.owner, act)

    def _record(self, plan: Plan, act: Act, phase: StepPhase, *, insist: bool) -> None:
        """Going out without a journal is refused; going home must not be stopped by a full disk."""
        try:
            self._journal.step(plan.owner, plan.generation, act, phase)
        except DriverError as error:
            if insist:
                raise
            log.warning("%s of %s is not journalled: %s", act, plan.owner, error)
