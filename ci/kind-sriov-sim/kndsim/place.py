"""Where a node's programs run: namespaces on this machine, a guest, a kind node container.

Invariant: whoever drives a node (cluster, tests) does it through a Place alone, so the same code serves all.
A Place ends everything that it started when it is closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A command that ended. seconds: how long it took, seen from inside the place."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float


class CommandFailed(Exception):
    """The command, how it ended, and the end of what it said."""

    def __init__(self, done: Done, where: str) -> None:
        said = (done.err.strip() or done.out.strip())[-2000:]
        super().__init__(f"{' '.join(done.argv)} on {where} ended with {done.code}: {said}")
        self.done = done


class Place(Protocol):
    """Root in the node's own namespaces. Paths are as the place sees them."""

    @property
    def name(self) -> str: ...

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 60.0,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> Done:
        """Run to its end. CommandFailed unless check is false; TimeoutError after timeout seconds, with the
        command killed."""
        ...

    def start(self, service: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        """Start a lasting program under a name of its own; its output is appended to its log."""
        ...

    def signal(self, service: str, number: int) -> None:
        """Send a signal to a service that was started; nothing happens if it has ended."""
        ...

    def alive(self, service: str) -> bool: ...

    def log(self, service: str) -> str:
        """All it has said so far, of all its lives."""
        ...

    def write(self, path: PurePosixPath, data: bytes, mode: int = 0o644) -> None:
        """A whole file, parents made."""
        ...

    def read(self, path: PurePosixPath) -> bytes:
        """FileNotFoundError if there is none."""
        ...
