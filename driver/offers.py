"""What is said of an offered device beside its name, attributes and capacities.

Invariant: frozen values without I/O. They are part of the model, and are imported from there.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class TaintEffect(enum.StrEnum):
    NONE = "None"
    NO_SCHEDULE = "NoSchedule"
    NO_EXECUTE = "NoExecute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taint:
    key: str
    value: str = ""
    effect: TaintEffect = TaintEffect.NO_SCHEDULE


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterUse:
    """What a device takes of something that it shares with others, so that the scheduler gives no more of it
    away than there is. Amounts are Kubernetes quantities as text, by counter.

    of: all there is, the same for everyone who names the set. instead: this device is the one to be left out
    where the API server has no counters.
    """

    set: str
    """A DNS label."""
    takes: Mapping[str, str]
    of: Mapping[str, str]
    instead: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityRequest:
    """What a claim can ask for of a capacity that is given out in parts; Kubernetes quantities as text.

    Either values, of which it is one, or least, most and step (None: any amount between them).
    """

    default: str
    values: tuple[str, ...] = ()
    least: str | None = None
    most: str | None = None
    step: str | None = None
