"""What a claim asks of a VF, on real VFs of igb in a guest: see vf_settings_inside, which is run there once;
each of its tests is one here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kndsim.guest import guest

pytestmark = pytest.mark.timeout(1500)

INSIDE = Path(__file__).with_name("vf_settings_inside.py")
NAMES = re.findall(r"^def (test_\w+)", INSIDE.read_text(), re.MULTILINE)
SECONDS = 1200.0


@pytest.fixture(scope="module")
def outcomes() -> Iterator[tuple[Mapping[str, list[str]], str]]:
    """Test name to how it ended, once per set of its parameters; and all that was said."""
    with guest(name="vf-settings") as vm:
        vm.run(["modprobe", "-a", "netdevsim", "vfio-pci"])
        argv = ["python", "-m", "pytest", "-v", "-rA", "--tb=long", f"/srv/knd/tests/vm/{INSIDE.name}"]
        done = vm.run(["sh", "-c", f"cd /srv/knd && exec {' '.join(argv)}"], check=False, timeout=SECONDS)
        found: dict[str, list[str]] = {}
        for name, outcome in re.findall(r"::(test_\w+)\S* (PASSED|FAILED|ERROR|SKIPPED)", done.out):
            found.setdefault(name, []).append(outcome)
        yield found, done.out + done.err + vm.console[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_in_a_guest(outcomes: tuple[Mapping[str, list[str]], str], name: str) -> None:
    ended, said = outcomes
    assert set(ended.get(name, ["NOT RUN"])) == {"PASSED"}, said
