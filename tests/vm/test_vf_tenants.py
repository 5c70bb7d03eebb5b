"""Tenants of VFs, one after and beside the other, on real VFs of igb in a guest: see vf_tenants_inside and
vf_crowd_inside, each run once in a guest of its own; each of their tests is one here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kndsim.guest import Image, guest
from kndsim.progress import Progress
from tests.vm.inside import Outcomes, names_in, run_inside

pytestmark = pytest.mark.timeout(1800)

INSIDE = ("vf_tenants_inside", "vf_crowd_inside")
SECONDS = 1500.0


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, made: Image, progress: Progress) -> Iterator[Outcomes]:
    """Of one file, in a guest of its own."""
    with (
        progress.phase(f"{request.param} in a guest"),
        guest(name=request.param.replace("_", "-"), memory=3072, made=made) as vm,
    ):
        yield run_inside(vm, (request.param,), SECONDS)


@pytest.mark.parametrize(
    ("outcomes", "name"),
    [(module, name) for module in INSIDE for name in names_in(module)],
    indirect=["outcomes"],
    scope="module",
)
def test_in_a_guest(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
