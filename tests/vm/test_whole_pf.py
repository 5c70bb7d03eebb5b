"""A PF or its VFs, VFs by their files without an IOMMU, and the doctor, on real functions in a guest: see
whole_pf_inside, which is run there once; each of its tests is one here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kndsim.guest import guest

pytestmark = pytest.mark.timeout(1500)

INSIDE = Path(__file__).with_name("whole_pf_inside.py")
NAMES = re.findall(r"^def (test_\w+)", INSIDE.read_text(), re.MULTILINE)
SECONDS = 1200.0


@pytest.fixture(scope="module")
def outcomes() -> Iterator[tuple[Mapping[str, str], str]]:
    """Test name to how it ended, and all that was said."""
    with guest(name="whole-pf", append="intel_iommu=off") as vm:
        argv = ["python", "-m", "pytest", "-v", "-rA", "--tb=long", f"/srv/knd/tests/vm/{INSIDE.name}"]
        done = vm.run(["sh", "-c", f"cd /srv/knd && exec {' '.join(argv)}"], check=False, timeout=SECONDS)
        found = dict(re.findall(r"::(test_\w+) (PASSED|FAILED|ERROR|SKIPPED)", done.out))
        yield found, done.out + done.err + vm.console[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_in_a_guest(outcomes: tuple[Mapping[str, str], str], name: str) -> None:
    ended, said = outcomes
    assert ended.get(name, "NOT RUN") == "PASSED", said
