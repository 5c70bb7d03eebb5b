"""Limits by times of departure, on a kernel that has fq: see fq_inside, which is run in a guest once; each of
its tests is one here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kndsim.guest import Kernel, guest
from tests.vm.inside import Outcomes, names_in, run_inside

pytestmark = pytest.mark.timeout(2100)

INSIDE = ("fq_inside",)
SECONDS = 1800.0
"""A guest with a clock of its own takes what time it gets: some eight minutes, on a busy machine twenty."""


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    with guest(name="fq", kernel=Kernel.STABLE, own_time=True) as vm:
        found = run_inside(vm, INSIDE, SECONDS)
        print(found.said)
        yield found


@pytest.mark.parametrize("name", names_in(*INSIDE))
def test_in_a_guest(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
