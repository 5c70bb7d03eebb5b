"""Time as the driver sees it: deadlines are monotonic, wall time only informs people."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float: ...

    def wall(self) -> float:
        """Seconds since the epoch."""


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


async def beat(seconds: float) -> None:
    """Wait for the next whole multiple of seconds by the loop's clock: jobs whose periods are multiples of
    each other wake the processor together, which costs more than most of them do."""
    await asyncio.sleep(until_beat(asyncio.get_running_loop().time(), seconds))


def until_beat(now: float, seconds: float) -> float:
    """A timer may be early by the clock's grain: a beat that is this near is over."""
    left = seconds - now % seconds
    return left if left > seconds / 100 else left + seconds
