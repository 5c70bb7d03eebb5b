"""Test files that are run inside a guest, once, each of whose tests is one of the file outside.

Invariant: a test counts as passed only if it passed with every set of its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kndsim.guest import Guest

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How each test ended, for all sets of its parameters; and all that was said."""

    ended: Mapping[str, frozenset[str]]
    said: str

    def check(self, name: str) -> None:
        assert self.ended.get(name, frozenset({"NOT RUN"})) == {"PASSED"}, self.said


def names_in(*modules: str) -> list[str]:
    """The tests of these modules of tests/vm, in their order."""
    texts = ((_FOLDER / f"{module}.py").read_text() for module in modules)
    return [name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)]


def run_inside(vm: Guest, modules: Sequence[str], seconds: float) -> Outcomes:
    files = " ".join(f"tests/vm/{module}.py" for module in modules)
    # Interrupted, it still tells what failed before.
    command = f"exec timeout --signal=INT {seconds:.0f} python -m pytest -v -rA --tb=long {files}"
    done = vm.run(["sh", "-c", f"cd /srv/knd && {command}"], check=False, timeout=seconds + 60)
    ended: dict[str, frozenset[str]] = {}
    for name, outcome in re.findall(r"::(test_\w+)\S* (PASSED|FAILED|ERROR|SKIPPED)", done.out):
        ended[name] = ended.get(name, frozenset()) | {outcome}
    return Outcomes(ended, done.out + done.err + vm.console[-2000:])
