"""The gate: nothing is prepared that could start without its device; going home is hardly ever refused."""

from __future__ import annotations

import pytest

from driver.errors import NotNow, RecoveryMode
from driver.lifecycle.gate import Gate


def open_gate() -> Gate:
    gate = Gate("")
    gate.settled = gate.runtime = True
    return gate


def test_an_open_gate_lets_everything_through() -> None:
    open_gate().check_prepare()
    open_gate().check_unprepare()


def test_a_new_gate_is_shut_for_prepare_and_open_for_the_way_home() -> None:
    gate = Gate("")
    with pytest.raises(NotNow):
        gate.check_prepare()
    gate.check_unprepare()


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("settled", False, "still finishing what it was doing before it was restarted"),
        ("runtime", False, "not registered with the container runtime"),
        ("policy_problem", "policy.yaml:3: x: is unknown", "not valid: policy.yaml:3: x: is unknown"),
    ],
)
def test_each_reason_stops_prepare_with_its_sentence_and_not_the_way_home(
    field: str, value: object, sentence: str
) -> None:
    gate = open_gate()
    setattr(gate, field, value)
    with pytest.raises(NotNow, match=sentence):
        gate.check_prepare()
    gate.check_unprepare()


def test_with_a_journal_that_is_not_trusted_nothing_is_done_either_way() -> None:
    gate = Gate("the journal is older than its mirror")
    gate.settled = gate.runtime = True
    for check in (gate.check_prepare, gate.check_unprepare):
        with pytest.raises(RecoveryMode, match="older than its mirror"):
            check()
