"""`python -m kndsim.kind`: exit 0 if it is done, 1 with a sentence if not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kndsim.kind.engine import EngineFailed, NoEngine
from kndsim.kind.ground import CannotGive
from kndsim.kind.keeper import keep
from kndsim.kind.namespaces import CannotMove, NodeAway
from kndsim.kind.netdevsim import NoNetdevsim
from kndsim.kind.plan import BadFile

TOLD = (BadFile, CannotGive, CannotMove, EngineFailed, NodeAway, NoEngine, NoNetdevsim)
"""Failures that are sentences."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kndsim.kind", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep", help="make the devices of a plan and hand them back, until SIGTERM")
    keeping.add_argument("folder", type=Path, help="holds plan.json; gets ground.json when all stands")
    arguments = parser.parse_args()
    try:
        keep(arguments.folder)
    except TOLD as error:
        print(f"{parser.prog} {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
