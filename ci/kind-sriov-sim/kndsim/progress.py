"""Telling whoever waits what is being done and how long each part took.

Invariant: everything goes to stderr, so that a command's stdout stays its own.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

BEAT = 30.0
"""Seconds between two signs of life of a phase that takes long."""


class Progress:
    """Phases with their times; table() prints them all at the end."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.phases: list[tuple[str, float, str]] = []
        """Name, seconds, "ok" or how it ended."""

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.title}: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announces, shows life every BEAT seconds, records time and outcome."""
        started = time.monotonic()
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT):
                self.say(f"{name}: still at it after {time.monotonic() - started:.0f} s")

        self.say(f"{name} ...")
        heart = threading.Thread(target=beat, name="progress", daemon=True)
        heart.start()
        outcome = "ok"
        try:
            yield
        except BaseException as error:
            outcome = f"{type(error).__name__}"
            raise
        finally:
            ended.set()
            heart.join()
            seconds = time.monotonic() - started
            self.phases.append((name, seconds, outcome))
            self.say(f"{name}: {outcome} after {seconds:.1f} s")

    def table(self) -> str:
        return "\n".join(f"{name:<44} {seconds:7.1f} s  {outcome}" for name, seconds, outcome in self.phases)
