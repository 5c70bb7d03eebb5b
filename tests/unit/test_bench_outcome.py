"""What a benchmark says of a budget: kept or broken only where its samples agree."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests.bench.__main__ import GROUPS
from tests.bench.outcome import (
    Outcome,
    as_table,
    counted,
    high,
    measured,
    of_differences,
    of_medians,
)
from tests.bench.report import Machine, Report

HERE = Machine.this()


def median_of(samples: list[float], budget: float | None) -> Outcome:
    return measured("row", samples, statistics.median, "ms", budget=budget)


STEADY = [10.0 + number / 100 for number in range(40)]


def test_a_budget_well_above_or_below_the_samples_is_judged() -> None:
    assert median_of(STEADY, 20.0).within is True
    assert median_of(STEADY, 5.0).within is False


def test_a_budget_inside_the_range_is_not_judged() -> None:
    scattered = [5.0, 15.0] * 20
    assert median_of(scattered, 10.0).within is None


def test_without_a_budget_there_is_no_judgement() -> None:
    outcome = median_of(STEADY, None)
    assert (outcome.within, outcome.ratio) == (None, None)


def test_the_same_samples_say_the_same() -> None:
    irregular = [1.0, 2.5, 3.1, 7.7, 20.3, 41.9]
    assert measured("row", irregular, statistics.fmean, "ms") == measured(
        "row", irregular, statistics.fmean, "ms"
    )


def test_a_pair_is_drawn_as_one_sample() -> None:
    """The machine's moods move both of a pair, and cancel out."""
    pairs = [(mood + 3.0, mood) for mood in (1.0, 100.0, 1000.0, 7.0, 50.0)]
    outcome = measured("row", pairs, of_differences, "ns")
    assert outcome.value == 3.0
    assert outcome.spread == (3.0, 3.0)


def test_a_ratio_is_of_the_medians() -> None:
    assert of_medians([(20.0, 10.0), (30.0, 15.0), (90.0, 12.0)]) == 30.0 / 12.0


def test_p99_of_few_samples_is_the_largest() -> None:
    assert high([1.0, 3.0, 2.0]) == 3.0
    assert high([float(number) for number in range(200)]) == 198.0


def test_nothing_at_all_keeps_a_budget_of_nothing() -> None:
    assert counted("row", 0, "files", budget=0).within is True
    assert counted("row", 1, "files", budget=0).within is False


def test_the_json_has_what_a_program_needs() -> None:
    row = json.loads(Report.of(HERE, [median_of(STEADY, 20.0)]).as_json())["rows"]["row"]
    assert set(row) == {"value", "unit", "budget", "within", "ratio", "samples", "spread", "note"}
    assert row["within"] is True
    assert row["samples"] == 40
    assert row["ratio"] == pytest.approx(row["value"] / 20.0, abs=1e-3)


def test_the_table_says_where_the_samples_do_not_agree() -> None:
    assert "unclear" in as_table([median_of([5.0, 15.0] * 20, 10.0)])
    assert "BROKEN" in as_table([median_of(STEADY, 5.0)])


def test_what_was_written_reads_as_what_was_measured() -> None:
    outcomes = [median_of([10 / 3, 20.0], 20.0), counted("files", 0, "files", budget=0)]
    report = Report.of(HERE, outcomes)
    assert Report.from_json(report.as_json()) == report


def test_the_table_in_the_documents_is_what_the_benchmark_printed() -> None:
    deploy = Path(__file__).parents[2] / "deploy"
    recorded = Report.from_json((deploy / "benchmarks.json").read_text())
    assert (deploy / "BENCHMARKS.md").read_text() == recorded.document()
    families = {outcome.name.partition(".")[0] for outcome in recorded.outcomes}
    assert families == {name for group in GROUPS for name in group}, "a whole run, of what is measured today"
