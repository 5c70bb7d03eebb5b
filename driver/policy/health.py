"""The policy's section `health`: what a device's trouble means for the scheduler, and how long it must last.

Invariant: what the section leaves out is as in DEFAULTS, trouble by trouble and field by field.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from driver.model import (
    TaintEffect,
)
from driver.strict import Key, choice, integer, record
from driver.troubles import Trouble

MAX_SECONDS = 3600


class Effect(enum.StrEnum):
    """Of the taint on a device. None: it is told everywhere else, and there is no taint."""

    NONE = "None"
    NO_SCHEDULE = "NoSchedule"
    NO_EXECUTE = "NoExecute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What one trouble means. after, until: seconds that it lasts before it counts, and is over before it
    does not count any more. effect None: no taint."""

    effect: TaintEffect | None
    after: float
    until: float


DEFAULTS: Mapping[Trouble, Rule] = {
    Trouble.NO_CARRIER: Rule(effect=TaintEffect.NO_SCHEDULE, after=5.0, until=30.0),
    Trouble.SLOW_LINK: Rule(effect=None, after=5.0, until=30.0),
    Trouble.NO_DRIVER: Rule(effect=TaintEffect.NO_SCHEDULE, after=2.0, until=5.0),
    Trouble.GONE: Rule(effect=TaintEffect.NO_SCHEDULE, after=2.0, until=5.0),
    Trouble.RESET: Rule(effect=TaintEffect.NO_SCHEDULE, after=0.0, until=5.0),
    Trouble.FIRMWARE: Rule(effect=TaintEffect.NO_SCHEDULE, after=0.0, until=30.0),
    Trouble.QUARANTINED: Rule(effect=TaintEffect.NO_SCHEDULE, after=0.0, until=0.0),
}
"""A driver is bound anew within a moment where that is meant, and VFs go one by one: no trouble yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TroubleRule:
    """What the policy says of one trouble. None: the default."""

    effect: Annotated[
        Effect | None, Key("effect", choice(Effect), "Of its taint; None: there is no taint.")
    ] = None
    after: Annotated[
        int | None, Key("afterSeconds", integer(0, MAX_SECONDS), "How long it lasts before it counts.")
    ] = None
    until: Annotated[
        int | None,
        Key("untilSeconds", integer(0, MAX_SECONDS), "How long it is over before the device is well."),
    ] = None

    def __post_init__(self) -> None:
        if self.effect is None and self.after is None and self.until is None:
            raise ValueError("says nothing: needs effect, afterSeconds or untilSeconds")

    def over(self, default: Rule) -> Rule:
        effect = default.effect
        if self.effect is not None:
            effect = None if self.effect is Effect.NONE else TaintEffect(self.effect.value)
        return Rule(
            effect=effect,
            after=default.after if self.after is None else float(self.after),
            until=default.until if self.until is None else float(self.until),
        )


_RULE = record(TroubleRule)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthPolicy:
    """All that the policy says of troubles."""

    no_carrier: Annotated[
        TroubleRule | None, Key("noCarrier", _RULE, "The physical port has no carrier.")
    ] = None
    slow_link: Annotated[
        TroubleRule | None, Key("slowLink", _RULE, "The port is slower than when the claim was prepared.")
    ] = None
    no_driver: Annotated[
        TroubleRule | None, Key("noDriver", _RULE, "Its driver was taken from it, or made no netdev.")
    ] = None
    gone: Annotated[TroubleRule | None, Key("gone", _RULE, "A claim's device is no more.")] = None
    reset: Annotated[
        TroubleRule | None, Key("reset", _RULE, "A pod's device was made anew, and is not in the pod.")
    ] = None
    firmware: Annotated[
        TroubleRule | None, Key("firmware", _RULE, "A devlink health reporter says error.")
    ] = None

    def rule(self, trouble: Trouble) -> Rule:
        asked = {
            Trouble.NO_CARRIER: self.no_carrier,
            Trouble.SLOW_LINK: self.slow_link,
            Trouble.NO_DRIVER: self.no_driver,
            Trouble.GONE: self.gone,
            Trouble.RESET: self.reset,
            Trouble.FIRMWARE: self.firmware,
        }.get(trouble)
        return asked.over(DEFAULTS[trouble]) if asked is not None else DEFAULTS[trouble]


DEFAULT_HEALTH = HealthPolicy()
