"""What a claim asks of a VF, on real VFs of igb in a guest: see vf_settings_inside, which is run there once;
each of its tests is one here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kndsim.guest import guest
from tests.vm.inside import Outcomes, names_in, run_inside

pytestmark = pytest.mark.timeout(1500)

INSIDE = ("vf_settings_inside",)
SECONDS = 1200.0


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    with guest(name="vf-settings") as vm:
        vm.run(["modprobe", "-a", "netdevsim", "vfio-pci"])
        yield run_inside(vm, INSIDE, SECONDS)


@pytest.mark.parametrize("name", names_in(*INSIDE))
def test_in_a_guest(outcomes: Outcomes, name: str) -> None:
    outcomes.check(name)
