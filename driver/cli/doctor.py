"""`knd doctor`: can this node do it, and if not, what to do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from driver.cli.output import add_output_argument, printable
from driver.doctor import Place, Verdict, examine
from driver.settings import add_place_arguments, paths_from

FAILED = 1


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="whether this node can serve pods, and what to do if not")
    add_place_arguments(parser)
    add_output_argument(parser)
    parser.add_argument("--policy", type=Path, help="node policy file; absent: the agent's own")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 if anything failed. Warnings are no failure."""
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
