"""RDMA counted per pod, on real soft RoCE in a guest whose RDMA devices belong to network namespaces: see
rdma_counts_inside, which is run there once; each of its tests is one here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kndsim.guest import guest
from tests.vm.inside import Outcomes, names_in, run_inside

pytestmark = pytest.mark.timeout(1500)

INSIDE = ("rdma_counts_inside",)
SECONDS = 1200.0


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    with guest(name="rdma-counts", append="ib_core.netns_mode=0") as vm:
        vm.run(["modprobe", "-a", "rdma_rxe", "ib_uverbs", "rdma_ucm"])
        yield run_inside(vm, INSIDE, SECONDS)


@pytest.mark.parametrize("name", names_in(*INSIDE))
def test_in_a_guest(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
