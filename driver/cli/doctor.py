"""`knd doctor`: can this node do it, and if not, what to do."""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

from driver.cli.output import Row, add_output_argument, print_table, printable
from driver.doctor import Place, Verdict, examine
from driver.doctor.measure import SECONDS_AT_MOST, measure
from driver.settings import add_place_arguments, paths_from

FAILED = 1
MEASURED_SECONDS = 10
_COLUMNS = ("namespace", "pod", "device", "interface", "direction", "packets", "ns_per_packet")


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="whether this node can serve pods, and what to do if not")
    add_place_arguments(parser)
    add_output_argument(parser)
    parser.add_argument("--policy", type=Path, help="node policy file; absent: the agent's own")
    parser.add_argument(
        "--measure",
        nargs="?",
        const=MEASURED_SECONDS,
        type=_seconds,
        metavar="SECONDS",
        help=(
            "instead, have the kernel time the programs on pods' interfaces for so long "
            f"({MEASURED_SECONDS} without a number), and tell what a packet cost"
        ),
    )
    parser.set_defaults(run=run)


def _seconds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= SECONDS_AT_MOST:
        raise argparse.ArgumentTypeError(f"{text!a} is not a number of seconds from 1 to {SECONDS_AT_MOST}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 if anything failed. Warnings are no failure."""
    if arguments.measure is not None:
        return _measure(arguments)
    place = Place(paths=paths_from(arguments), policy=arguments.policy)
    failed = False
    rows = []
    for subject, finding in examine(place):
        failed = failed or finding.verdict is Verdict.FAIL
        if arguments.output == "table":
            todo = f": {finding.todo}" if finding.todo else ""
            print(f"{finding.verdict:<4}  {subject} {finding.check}: {printable(finding.said + todo)}")
        rows.append(
            {
                "subject": subject,
                "check": finding.check,
                "verdict": finding.verdict,
                "said": finding.said,
                "todo": finding.todo or None,
            }
        )
    if arguments.output == "json":
        print(json.dumps({"rows": rows}))
    return FAILED if failed else 0


def _measure(arguments: argparse.Namespace) -> int:
    if arguments.output == "table":
        print(f"timing the programs for {arguments.measure} s", file=sys.stderr)
    costs = measure(paths_from(arguments), partial(time.sleep, arguments.measure))
    rows: list[Row] = [
        {
            "namespace": each.namespace,
            "pod": each.pod,
            "device": each.device,
            "interface": each.interface,
            "direction": each.direction.name.lower(),
            "packets": each.runs,
            "ns_per_packet": None if each.nanoseconds is None else round(each.nanoseconds, 1),
        }
        for each in costs.rows
    ]
    if arguments.output == "json":
        print(json.dumps({"rows": rows, "seconds": arguments.measure, "timing_ns": round(costs.timing, 1)}))
        return 0
    print_table(
        [{**row, "ns_per_packet": row["ns_per_packet"] or "nothing passed"} for row in rows], _COLUMNS
    )
    print(
        f"\n{costs.timing:.0f} ns of each are the timing's own, which is off again. A packet is counted here "
        "as the kernel hands it over: one that stands for many segments is one."
    )
    return 0
