"""Rows for people or for programs.

Invariant: what came from the kernel or a tenant is escaped before it reaches a terminal.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

Value = str | int | float | bool | None
Row = Mapping[str, Value]


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")


def show(
    rows: Sequence[Row],
    columns: Sequence[str],
    output: str,
    *,
    nothing: str,
    more: Mapping[str, Sequence[Row]] | None = None,
) -> None:
    """Print {"rows": [...]} or a table of the named columns; `nothing` is said in place of an empty one.

    more: further lists of the JSON object, beside rows.
    """
    if output == "json":
        print(json.dumps({"rows": list(rows), **(more or {})}))
        return
    if not rows:
        print(nothing)
        return
    print_table(rows, columns)


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    lines = [[column.upper().replace("_", " ") for column in columns]]
    lines += [[printable(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def printable(value: Value) -> str:
    """One cell: no control character, no line break, `-` for nothing."""
    if value is None or value == "":
        return "-"
    text = str(value)
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
