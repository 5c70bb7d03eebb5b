"""What a check of `knd doctor` is made of.

Invariant: looking and judging are apart. `look` reads the node into a frozen value and changes nothing that
outlives it; `judge` is pure, so that every sentence of it can be tested without the node it is about. What
looking raises is a finding too.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from bpf.errors import BpfError
from driver.errors import DriverError
from driver.paths import Paths
from hw.errors import HwError

F = TypeVar("F")

UNREADABLE = (DriverError, HwError, BpfError, OSError, ValueError)
"""What a look may raise when the node is not as it should be."""


class Verdict(enum.StrEnum):
    OK = "ok"
    WARN = "warn"
    """Something is missing that this node may do without."""
    FAIL = "fail"
    """Pods with claims cannot be served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line. said: what is so; todo: what to do about it, an imperative without a full stop."""

    check: str
    verdict: Verdict
    said: str
    todo: str = ""

    def __post_init__(self) -> None:
        if self.verdict is not Verdict.OK and not self.todo:
            raise ValueError(f"{self.check}: what is not ok says what to do")


def ok(check: str, said: str) -> Finding:
    return Finding(check=check, verdict=Verdict.OK, said=said)


def warn(check: str, said: str, todo: str) -> Finding:
    return Finding(check=check, verdict=Verdict.WARN, said=said, todo=todo)


def fail(check: str, said: str, todo: str) -> Finding:
    return Finding(check=check, verdict=Verdict.FAIL, said=said, todo=todo)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The node as the doctor is to look at it."""

    paths: Paths
    policy: Path | None = None
    """As on the command line; None: the one of the agent that runs or ran here."""


@dataclass(frozen=True, slots=True)
class Subject(Generic[F]):
    """Checks that belong together: what is read for them, and what it means."""

    name: str
    look: Callable[[Place], F]
    judge: Callable[[F], Iterable[Finding]]

    def examine(self, place: Place) -> Iterator[Finding]:
        try:
            facts = self.look(place)
        except UNREADABLE as error:
            yield fail(self.name, f"cannot be looked at: {error}", "mend what the sentence names, ask again")
            return
        yield from self.judge(facts)
