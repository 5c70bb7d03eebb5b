"""RDMA devices as a real kernel has them, in a guest that is put into exclusive mode at boot: see
rdma_facts_inside, which is run there once; each of its tests is one here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kndsim.guest import guest
from tests.vm.inside import Outcomes, names_in, run_inside

pytestmark = pytest.mark.timeout(900)

INSIDE = ("rdma_facts_inside",)
SECONDS = 600.0


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    with guest(name="rdma-facts") as vm:
        yield run_inside(vm, INSIDE, SECONDS)


@pytest.mark.parametrize("name", names_in(*INSIDE))
def test_in_a_guest(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
