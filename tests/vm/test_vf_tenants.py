"""Tenants of VFs, one after and beside the other, on real VFs of igb in a guest: see vf_tenants_inside and
vf_crowd_inside, which are run there once; each of their tests is one here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from kndsim.guest import Image, guest
from kndsim.progress import Progress

pytestmark = pytest.mark.timeout(1800)

INSIDE = [Path(__file__).with_name(f"{name}.py") for name in ("vf_tenants_inside", "vf_crowd_inside")]
NAMES = [name for path in INSIDE for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)]
SECONDS = 1500.0


@pytest.fixture(scope="module")
def outcomes(made: Image, progress: Progress) -> Iterator[tuple[Mapping[str, list[str]], str]]:
    """Test name to how it ended, once per set of its parameters; and all that was said."""
    with (
        progress.phase("tenants of VFs in a guest"),
        guest(name="vf-tenants", memory=3072, made=made) as vm,
    ):
        argv = [
            "python",
            "-m",
            "pytest",
            "-v",
            "-rA",
            "--tb=long",
            *(f"tests/vm/{path.name}" for path in INSIDE),
        ]
        done = vm.run(["sh", "-c", f"cd /srv/knd && exec {' '.join(argv)}"], check=False, timeout=SECONDS)
        found: dict[str, list[str]] = {}
        for name, outcome in re.findall(r"::(test_\w+)\S* (PASSED|FAILED|ERROR|SKIPPED)", done.out):
            found.setdefault(name, []).append(outcome)
        yield found, done.out + done.err + vm.console[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_in_a_guest(outcomes: tuple[Mapping[str, list[str]], str], name: str) -> None:
    ended, said = outcomes
    assert set(ended.get(name, ["NOT RUN"])) == {"PASSED"}, said
