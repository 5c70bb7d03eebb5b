"""The one place that decides whether and when a failed request is made again.

Invariant: the rate of requests is bounded whatever the server answers: delays grow, have a cap, are
jittered so that nodes do not march in step, and Retry-After is a lower bound.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from driver.kube.failures import Forbidden, Invalid, NotFound, Throttled, Unavailable

Jitter = Callable[[], float]
"""Returns a number in [0, 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOff:
    """Seconds. slow is the least delay where only a human can mend it."""

    first: float = 0.5
    factor: float = 2.0
    cap: float = 60.0
    slow: float = 30.0
    slow_cap: float = 300.0

    def delay(self, attempt: int, jitter: Jitter = random.random) -> float:
        """Before the next try after attempt (1, 2, ...) failures in a row: half fixed, half random."""
        return self._jittered(self.first, self.cap, attempt, jitter)

    def slow_delay(self, attempt: int, jitter: Jitter = random.random) -> float:
        return self._jittered(self.slow, self.slow_cap, attempt, jitter)

    def _jittered(self, first: float, cap: float, attempt: int, jitter: Jitter) -> float:
        full = min(cap, first * self.factor ** min(max(attempt, 1) - 1, 30))
        return full / 2 + full / 2 * jitter()


def wait_after(
    failure: Exception, attempt: int, back_off: BackOff, jitter: Jitter = random.random
) -> float | None:
    """Seconds until the request is made again; None: never, what it was about is gone."""
    if isinstance(failure, NotFound):
        return None
    if isinstance(failure, Throttled):
        return max(failure.retry_after * (1 + jitter() / 10), back_off.delay(attempt, jitter))
    if isinstance(failure, (Forbidden, Invalid)):
        return back_off.slow_delay(attempt, jitter)
    return back_off.delay(attempt, jitter)


def worth_an_immediate_repeat(failure: Unavailable, *, safe: bool) -> bool:
    """Whether a request may be sent again at once, once. safe: repeating it changes nothing (reads)."""
    return safe and failure.dropped
