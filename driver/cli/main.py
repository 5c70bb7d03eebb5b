"""Parse the command line, run one command, turn errors into sentences and exit codes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from driver.cli import agent, cleanup, devices, doctor, records, top, usage, validate
from driver.cli.output import printable

FAILED = 1
WRONG_USAGE = 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="knd", description="Gives network devices to pods, counts their traffic, takes them back clean."
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (agent, devices, doctor, records, top, usage, validate, cleanup):
        module.add_parsers(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 fine, 1 failed, 2 wrong usage (also argparse's own)."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        return _fail(error, WRONG_USAGE, debug=arguments.debug)
    except KeyboardInterrupt:
        return FAILED
    except Exception as error:  # noqa: BLE001 - the one place where an error becomes a sentence
        return _fail(error, FAILED, debug=arguments.debug)


def _fail(error: Exception, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    # One line, and nothing in it that a terminal would obey: it may name what a tenant named.
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(f"knd: {printable(text)}", file=sys.stderr)
    return code
