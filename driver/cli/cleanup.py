"""`knd cleanup`: bring every device home, for a node that is to be without an agent."""

from __future__ import annotations

import argparse
import os

from driver.cli.output import printable
from driver.settings import add_agent_arguments, settings_from


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("cleanup", help="bring every device home; refused while an agent runs")
    add_agent_arguments(parser)
    parser.add_argument("--force", action="store_true", help="also out of pods that are alive")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from driver.cleanup import clean_up

    problems = clean_up(settings_from(arguments, os.environ), force=arguments.force)
    for problem in problems:
        print(printable(problem))
    if not problems:
        print("every device is home")
    return 1 if problems else 0
