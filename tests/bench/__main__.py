"""`python -m tests.bench`: measure the budgets and print a table, or with `-o json` one object, and keep the
object in build/bench.json; with --record as the document of the product too.

Judges nothing by its exit code: it is 0 unless something could not be measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kndsim.node import private_mounts
from tests.bench import agent_life, big_node, full_node, hook_latency, limits, per_packet
from tests.bench.outcome import Outcome, as_table
from tests.bench.report import Machine, Report

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build/bench.json"
RECORDED = ROOT / "deploy/benchmarks.json"
DOCUMENT = ROOT / "deploy/BENCHMARKS.md"
FULL_NODE = ("memory", "api", "scrape", "idle")
Work = Callable[[], list[Outcome]]

GROUPS: dict[tuple[str, ...], Work] = {
    ("attach",): hook_latency.one_device,
    ("eight",): hook_latency.eight_devices,
    ("start",): agent_life.start,
    FULL_NODE: full_node.full_node,
    ("scan",): big_node.full_scan,
    ("event",): big_node.link_event,
    ("bpf",): per_packet.per_packet,
    ("limits",): limits.limits,
}
"""Which families of rows (the part of a name before its dot) each measurement makes."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.add_argument("--only", metavar="NAME", help="one row, or a family of rows: attach.p99, attach")
    parser.add_argument(
        "--thorough", action="store_true", help="1,000 attaches and detaches, however long they take"
    )
    parser.add_argument(
        "--record", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)} of a whole run"
    )
    arguments = parser.parse_args()
    if arguments.record and arguments.only:
        parser.error("--record is of a whole run: not with --only")
    if os.geteuid() != 0:
        parser.error("moving network devices needs root")
    groups = dict(GROUPS)
    if arguments.thorough:
        groups[FULL_NODE] = _thorough
    chosen = [work for families, work in groups.items() if _wanted(families, arguments.only)]
    if not chosen:
        families = ", ".join(name for group in GROUPS for name in group)
        parser.error(f"--only {arguments.only}: the families of rows are {families}")
    private_mounts()
    machine = Machine.this()
    report = Report.of(machine, (each for each in _run(chosen) if _matches(each.name, arguments.only)))
    _keep(report, record=arguments.record)
    print(report.as_json() if arguments.output == "json" else as_table(report.outcomes), flush=True)
    return 0


def _keep(report: Report, *, record: bool) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(report.as_json())
    if record:
        RECORDED.write_text(report.as_json())
        DOCUMENT.write_text(report.document())


def _thorough() -> list[Outcome]:
    """256 pods with a device each, as always, then 1,000 attaches and detaches."""
    return full_node.full_node(cycle_seconds=3600.0)


def _wanted(families: Sequence[str], only: str | None) -> bool:
    return only is None or only.partition(".")[0] in families


def _matches(name: str, only: str | None) -> bool:
    return only is None or name == only or name.partition(".")[0] == only


def _run(chosen: Sequence[Work]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    started = time.monotonic()
    for work in chosen:
        purpose = (work.__doc__ or work.__name__).partition("\n")[0]
        print(f"[{time.monotonic() - started:5.1f} s] {purpose}", file=sys.stderr, flush=True)
        outcomes += work()
    print(f"[{time.monotonic() - started:5.1f} s] done", file=sys.stderr, flush=True)
    return outcomes


if __name__ == "__main__":
    raise SystemExit(main())
