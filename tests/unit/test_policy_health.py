"""The policy's section about health is strict, and what it leaves out is as without it."""

from __future__ import annotations

import pytest

from driver.errors import ConfigError
from driver.model import TaintEffect
from driver.policy import NodePolicy, load_policy
from driver.policy.health import DEFAULTS, Rule
from driver.troubles import Trouble

HEADER = "apiVersion: knd.internal/v1alpha1\nkind: NodePolicy\n"


def load(body: str) -> NodePolicy:
    return load_policy(HEADER + body, "policy.yaml")


def test_without_the_section_every_trouble_is_as_by_default() -> None:
    health = load("reset: none\n").health
    assert {trouble: health.rule(trouble) for trouble in Trouble} == DEFAULTS


def test_a_rule_changes_what_it_names_of_its_trouble_and_nothing_else() -> None:
    health = load(
        "health: {noCarrier: {effect: NoExecute, afterSeconds: 1}, gone: {effect: None}, "
        "slowLink: {effect: NoSchedule, untilSeconds: 0}}\n"
    ).health
    assert health.rule(Trouble.NO_CARRIER) == Rule(effect=TaintEffect.NO_EXECUTE, after=1.0, until=30.0)
    assert health.rule(Trouble.GONE) == Rule(effect=None, after=2.0, until=5.0)
    assert health.rule(Trouble.SLOW_LINK) == Rule(effect=TaintEffect.NO_SCHEDULE, after=5.0, until=0.0)
    assert health.rule(Trouble.NO_DRIVER) == DEFAULTS[Trouble.NO_DRIVER]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{carrier: {effect: None}}", "did you mean noCarrier"),
        ("{noCarrier: {}}", "says nothing"),
        ("{noCarrier: {effect: Evict}}", "must be one of None, NoSchedule, NoExecute"),
        ("{noCarrier: {afterSeconds: -1}}", "must be 0 to 3600"),
        ("{noCarrier: {untilSeconds: 1e9}}", "must be"),
        ("{quarantined: {effect: None}}", "is not a known field"),
    ],
)
def test_what_makes_no_sense_is_refused_at_its_line(section: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"health: {section}\n")
    assert "policy.yaml:3: health" in str(caught.value)
    assert said in str(caught.value)
