"""What the driver refuses, split by who must act.

DriverError
├── ConfigError     the user or admin mends the config; carries every problem with its field path
├── Refusal         lasting: asking again changes nothing until someone else acts
├── NotNow          a retry can mend it; the only thing a RunPodSandbox hook may fail with
│   └── OutOfTime   the deadline is too near, or the operation was overtaken by a newer one
└── RecoveryMode    the journal cannot be trusted; nothing is offered, swept or restored
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class DriverError(Exception):
    """Base of everything the driver raises on purpose. The text is for the reader."""


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One thing wrong with a config. path is like `interface.addresses[1]`."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(DriverError):
    """A config that cannot be used; all its problems at once."""

    def __init__(self, problems: Sequence[FieldProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(problem) for problem in problems))


class Refusal(DriverError):
    """Lasting. reason is a CamelCase word for events and metrics."""

    def __init__(self, reason: str, text: str) -> None:
        self.reason = reason
        super().__init__(text)


class NotNow(DriverError):
    """A retry can mend it."""


class OutOfTime(NotNow):
    """No step is started that may not finish before the caller gives up."""


class RecoveryMode(DriverError):
    """Journal lost, old or corrupt, and not yet compared with the node."""
