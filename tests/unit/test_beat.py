"""Periodic work comes by one clock's beat, so that what is due together wakes the processor once."""

from __future__ import annotations

import pytest

from driver.clock import until_beat


@pytest.mark.parametrize("begun", [1000.0, 1000.3, 1059.999])
def test_jobs_of_any_age_are_due_together(begun: float) -> None:
    assert (begun + until_beat(begun, 60.0)) % 60.0 == pytest.approx(0.0, abs=1e-6)
    assert (begun + until_beat(begun, 5.0)) % 5.0 == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("late", [-1e-9, 0.0, 1e-9, 0.004])
def test_a_job_comes_once_a_beat_however_exact_its_timer_is(late: float) -> None:
    woken = 1020.0 + late
    assert woken + until_beat(woken, 1.0) == pytest.approx(1021.0, abs=1e-6)
