"""What a run of the benchmarks measured, and where: as JSON, and as the document made of it.

Invariant: the document follows from the JSON alone, so whoever has the one can tell whether the other is of
the same run.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

from tests.bench.outcome import Outcome, as_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and when. memory: MiB; load: of the minute before, beside what was measured."""

    processor: str
    cpus: int
    memory: int
    kernel: str
    python: str
    day: str
    load: float

    @classmethod
    def this(cls) -> Self:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        hypervisor = (
            Path("/sys/hypervisor/type").exists() or "hypervisor" in Path("/proc/cpuinfo").read_text()
        )
        return cls(
            processor=(model[1] if model else platform.machine()) + (", virtual" if hypervisor else ""),
            cpus=os.cpu_count() or 1,
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
            kernel=platform.release(),
            python=platform.python_version(),
            day=datetime.datetime.now(datetime.UTC).date().isoformat(),
            load=round(os.getloadavg()[0], 1),
        )

    def __str__(self) -> str:
        return (
            f"{self.processor}; {self.cpus} CPUs, {self.memory} MiB; Linux {self.kernel}, "
            f"Python {self.python}; {self.day}, load {self.load:g} before"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """One run, its values to four digits."""

    machine: Machine
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, machine: Machine, outcomes: Iterable[Outcome]) -> Self:
        return cls(machine, tuple(_rounded(each) for each in outcomes))

    def as_json(self) -> str:
        """One object: `machine`, and `rows`: name to value, unit, budget, within, ratio, samples, spread,
        note."""
        rows = {each.name: _row(each) for each in self.outcomes}
        return json.dumps({"machine": asdict(self.machine), "rows": rows}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """ValueError, KeyError or TypeError where as_json did not make it."""
        whole = json.loads(text)
        given = {field.name for field in fields(Outcome)}
        outcomes = tuple(
            Outcome(
                name=name,
                **{key: value for key, value in row.items() if key in given - {"spread"}},
                spread=(row["spread"][0], row["spread"][1]),
            )
            for name, row in whole["rows"].items()
        )
        return cls(Machine(**whole["machine"]), outcomes)

    def document(self) -> str:
        return (
            "# What it costs\n\n"
            "One run of `make bench BENCH_ARGS=--record`, as it was printed; `benchmarks.json` beside this\n"
            "file has the same numbers. Run it on your own nodes: what one machine costs says little of\n"
            "another; ratios say more.\n\n"
            f"Measured on: {self.machine}.\n\n"
            f"```text\n{as_table(self.outcomes)}\n```\n"
        )


def _row(outcome: Outcome) -> dict[str, object]:
    return {
        "value": outcome.value,
        "unit": outcome.unit,
        "budget": outcome.budget,
        "within": outcome.within,
        "ratio": None if outcome.ratio is None else _to_four(outcome.ratio),
        "samples": outcome.samples,
        "spread": list(outcome.spread),
        "note": outcome.note,
    }


def _rounded(outcome: Outcome) -> Outcome:
    low, high = outcome.spread
    return replace(outcome, value=_to_four(outcome.value), spread=(_to_four(low), _to_four(high)))


def _to_four(value: float) -> float:
    return float(f"{value:.4g}")
