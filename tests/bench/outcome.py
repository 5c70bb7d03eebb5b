"""What a measurement says: a value, how sure it is, and what it means for a budget.

Invariant: a budget is called kept or broken only where the samples agree. The range given with a value is the
95 % interval of the same statistic over samples drawn again from those taken (seeded, so the same samples
say the same); if the budget lies inside it, `within` is None: this run cannot tell.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

S = TypeVar("S")

LEGEND = (
    "range: where the value lies with 95 % certainty, from samples drawn again; ratio: of the value to its "
    "budget; unclear: the budget lies inside the range"
)
DRAWS = 1000
_TAIL = 0.025


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One row. spread: the range of value, (value, value) where it is a count; budget: the most it may be."""

    name: str
    value: float
    unit: str
    spread: tuple[float, float]
    samples: int
    budget: float | None = None
    note: str = ""

    @property
    def within(self) -> bool | None:
        if self.budget is None:
            return None
        low, high = self.spread
        if low <= self.budget < high:
            return None
        return high <= self.budget

    @property
    def ratio(self) -> float | None:
        """Of the value to its budget."""
        return self.value / self.budget if self.budget else None


def measured(
    name: str,
    samples: Sequence[S],
    statistic: Callable[[Sequence[S]], float],
    unit: str,
    *,
    budget: float | None = None,
    note: str = "",
) -> Outcome:
    """A statistic of the samples; what belongs together (a pair of one round) is one sample."""
    chance = random.Random(1)
    draws = sorted(statistic(chance.choices(samples, k=len(samples))) for _ in range(DRAWS))
    return Outcome(
        name=name,
        value=statistic(samples),
        unit=unit,
        spread=(draws[int(DRAWS * _TAIL)], draws[int(DRAWS * (1 - _TAIL)) - 1]),
        samples=len(samples),
        budget=budget,
        note=note,
    )


def counted(
    name: str, value: float, unit: str, *, budget: float | None = None, samples: int = 1, note: str = ""
) -> Outcome:
    """Something that has no spread: bytes, requests, files."""
    return Outcome(
        name=name, value=value, unit=unit, spread=(value, value), samples=samples, budget=budget, note=note
    )


def high(samples: Sequence[float]) -> float:
    """p99, or the largest where there are fewer than a hundred."""
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * 0.99))]


def of_medians(pairs: Sequence[tuple[float, float]]) -> float:
    """p50 of the first over p50 of the second of each pair."""
    return statistics.median(one for one, _ in pairs) / statistics.median(other for _, other in pairs)


def of_differences(pairs: Sequence[tuple[float, float]]) -> float:
    """Median of the differences within each pair."""
    return statistics.median(one - other for one, other in pairs)


def as_table(outcomes: Iterable[Outcome]) -> str:
    lines = [f"{'':30} {'value':>9} {'range':>19}  {'unit':11} {'budget':>7} {'ratio':>6}  {'':8} note"]
    for each in outcomes:
        low, top = each.spread
        spread = "" if low == top else f"{_short(low)} .. {_short(top)}"
        budget = "" if each.budget is None else _short(each.budget)
        ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
        lines.append(
            f"{each.name:30} {_short(each.value):>9} {spread:>19}  {each.unit:11} {budget:>7} {ratio:>6}  "
            f"{_word(each):8} {each.note}".rstrip()
        )
    return "\n".join([*lines, LEGEND])


def _word(outcome: Outcome) -> str:
    if outcome.budget is None:
        return ""
    return {True: "kept", False: "BROKEN", None: "unclear"}[outcome.within]


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
