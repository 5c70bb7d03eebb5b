"""A PF or its VFs, VFs by their files without an IOMMU, and the doctor, on real functions in a guest: see
whole_pf_inside, which is run there once; each of its tests is one here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kndsim.guest import guest
from tests.vm.inside import Outcomes, names_in, run_inside

pytestmark = pytest.mark.timeout(1500)

INSIDE = ("whole_pf_inside",)
SECONDS = 1200.0


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    with guest(name="whole-pf", append="intel_iommu=off") as vm:
        yield run_inside(vm, INSIDE, SECONDS)


@pytest.mark.parametrize("name", names_in(*INSIDE))
def test_in_a_guest(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
