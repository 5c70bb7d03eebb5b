"""Waiting for what is needed, instead of sleeping for as long as it usually takes.

Invariant: every wait ends, with what was waited for or with a sentence that names it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PAUSE = 0.01
"""Seconds between two looks."""


class TooLate(AssertionError):
    """What was waited for did not come in time."""

    def __init__(self, condition: Callable[[], object], within: float, what: str) -> None:
        name = what or getattr(condition, "__qualname__", repr(condition))
        super().__init__(f"not within {within:g} s: {name}")


def wait_until(condition: Callable[[], T], within: float = 5.0, what: str = "") -> T:
    """Call condition until it gives something true, and return that; TooLate after `within` seconds."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TooLate(condition, within, what)
        time.sleep(_PAUSE)
    return value


async def wait_until_async(condition: Callable[[], T], within: float = 5.0, what: str = "") -> T:
    """The same for coroutines: the loop goes on meanwhile."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TooLate(condition, within, what)
        await asyncio.sleep(_PAUSE)
    return value
