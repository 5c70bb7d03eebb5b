"""Whose a device's own counters are: stretches in which one holder had it and each counter only grew.

Invariant: pure. What a stretch counts is its last value minus its base, and stretches of one meter never
overlap; so what is billed of a counter, to all its holders together, is never more than it counted. What
cannot be known is left out and told as a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from driver.model import AttachmentId

COUNTER_MAX = 2**63 - 1
"""SQLite's largest integer; a counter above it is garbage."""

Holder = AttachmentId | None
"""Whose a stretch is: an attachment's while it alone has the device; None for the device, with several."""


@dataclass(frozen=True, slots=True, order=True)
class MeterKey:
    """One set of counters of a device that are read together.

    subject: an RDMA device's name, a device of this node, or what is made on one (bpf.attach.child_of).
    source: how they are read, which also says what they count; sources are never added up. port: from 1; 0
    where there are none.
    """

    subject: str
    source: str
    port: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """What a meter showed at a moment: absolute totals by the counter's name.

    instance: another one (a device made anew, another boot) means other counters under the same names. wraps:
    of counters that begin at 0 again by themselves, how many bits they have.
    """

    instance: str
    values: Mapping[str, int]
    wraps: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if not 0 <= value <= COUNTER_MAX:
                raise ValueError(f"counter {name!a} shows {value}, which it cannot have counted")


@dataclass(frozen=True, slots=True)
class Count:
    base: int
    value: int

    @property
    def total(self) -> int:
        return self.value - self.base


@dataclass(frozen=True, slots=True)
class Stretch:
    """started and checked: seconds since the epoch; checked None: not read yet, so it has no base."""

    number: int
    holder: Holder
    instance: str
    started: float
    checked: float | None
    counts: Mapping[str, Count]
    living: bool = True


@dataclass(frozen=True, slots=True)
class Lost:
    """A time of which a holder's part is not known."""

    holder: Holder
    start: float
    end: float
    reason: str


@dataclass(frozen=True, slots=True)
class Course:
    """What is to be written: stretches, the living one last, and what was lost."""

    stretches: tuple[Stretch, ...]
    lost: tuple[Lost, ...] = ()


def begin(number: int, holder: Holder, reading: Reading | None, wall: float) -> Stretch:
    """From now on; what was counted before belongs to nobody here."""
    if reading is None:
        return Stretch(number, holder, "", wall, None, {})
    return Stretch(number, holder, reading.instance, wall, wall, _from_now(reading.values))


def follow(stretch: Stretch, reading: Reading, wall: float) -> Course:
    """A further reading of a living stretch."""
    if stretch.checked is None:
        lost = Lost(stretch.holder, stretch.started, wall, "its counters could be read only from then on")
        first = begin(stretch.number, stretch.holder, reading, wall)
        return Course((replace(first, started=stretch.started),), (lost,))
    if reading.instance != stretch.instance:
        why = "another device has its name: what it counted in between is not known"
        return _anew(stretch, _from_now(reading.values), reading.instance, wall, why)
    less = sorted(name for name, count in stretch.counts.items() if _shows_less(name, count, reading))
    if less:
        return _began_anew(stretch, less, reading, wall)
    counts = dict(stretch.counts)
    for name, value in reading.values.items():
        known = counts.get(name)
        counts[name] = Count(value, value) if known is None else Count(known.base, value)
    return Course((replace(stretch, checked=wall, counts=counts),))


def end(stretch: Stretch, reading: Reading | None, wall: float, reason: str = "") -> Course:
    """The last of a stretch: its holder gives the device back, or is joined by another. reason: why there is
    no reading, a sentence."""
    if reading is None:
        since = stretch.started if stretch.checked is None else stretch.checked
        gap = Lost(stretch.holder, min(since, wall), wall, reason or "its counters could not be read")
        return Course((replace(stretch, living=False),), (gap,))
    course = follow(stretch, reading, wall)
    missing = sorted(stretch.counts.keys() - reading.values.keys())
    lost = course.lost
    if missing and stretch.checked is not None:
        why = f"counters were gone at the end ({', '.join(missing)})"
        # When one of many went is not kept.
        lost = (*lost, Lost(stretch.holder, min(stretch.started, wall), wall, why))
    *before, last = course.stretches
    return Course((*before, replace(last, living=False)), lost)


def _began_anew(stretch: Stretch, less: Sequence[str], reading: Reading, wall: float) -> Course:
    """These show less than before. It was this holder's all the time, so what they counted since they began
    at 0 is its own in any case, and what they counted before that only if they wrapped: whoever resets a
    device resets all of its counters."""
    went_on = any(
        count.value and name not in less for name, count in stretch.counts.items() if name in reading.values
    )
    wrapped = went_on and all(
        name in reading.wraps and stretch.counts[name].value < 1 << reading.wraps[name] for name in less
    )
    counts = _from_now(reading.values)
    for name, count in stretch.counts.items():
        if name not in reading.values:
            continue
        base = count.value
        if name in less:
            base = count.value - (1 << reading.wraps[name]) if wrapped else 0
        counts[name] = Count(base, reading.values[name])
    what, names = "wrapped" if wrapped else "began anew", ", ".join(less)
    lost = "all but one turn of them" if wrapped else "what they counted after the last reading"
    return _anew(stretch, counts, reading.instance, wall, f"counters {what} ({names}): {lost} is lost")


def _anew(stretch: Stretch, counts: Mapping[str, Count], instance: str, wall: float, reason: str) -> Course:
    assert stretch.checked is not None
    next_one = Stretch(stretch.number + 1, stretch.holder, instance, wall, wall, counts)
    lost = Lost(stretch.holder, min(stretch.checked, wall), wall, reason)
    return Course((replace(stretch, living=False), next_one), (lost,))


def _shows_less(name: str, count: Count, reading: Reading) -> bool:
    return reading.values.get(name, count.value) < count.value


def _from_now(values: Mapping[str, int]) -> dict[str, Count]:
    return {name: Count(value, value) for name, value in values.items()}
