"""`knd usage`: who used what, and when; from the ledger, beside a running agent or without one.

Invariant: what different sources counted is never added up, nor what went out to what came in: a group that
does not name them has a row for each.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from driver.cli.output import Row, Value, print_table, printable, show
from driver.journal.ledger import Bill, CounterRow, Ledger, UsageGap, UsageRow
from driver.model import device_of
from driver.settings import add_place_arguments, paths_from

_AGE = re.compile(r"([0-9]{1,9})([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_LABEL = "label:"

_GROUPS: Mapping[str, Callable[[UsageRow], Value]] = {
    "namespace": lambda row: row.owner.pod.namespace,
    "pod": lambda row: row.owner.pod.name,
    "claim": lambda row: row.owner.claim.name,
    "device": lambda row: device_of(row.owner.device),
    "interface": lambda row: row.owner.interface,
    "attachment": lambda row: row.owner.attachment,
    "started": lambda row: row.owner.started,
    "ended": lambda row: row.ended,
    "direction": lambda row: row.direction.name.lower(),
    "class": lambda row: row.class_name,
    "kind": lambda row: row.kind.name.lower(),
    "source": lambda row: row.source,
}
_DEFAULT = ("namespace", "pod", "claim", "device", "interface", "direction", "class", "kind", "source")
_ALWAYS = ("direction", "source")
_COUNTER_COLUMNS = (
    *("namespace", "pod", "claim", "device", "counted", "port", "source", "counter", "total"),
    *("from", "to"),
)


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    usage = commands.add_parser(
        "usage",
        help="what every pod sent and received, also those that are gone",
        description="Traffic by its owner. A range of time is widened to whole hours (days, where it lies "
        "longer back than two months), and what was used by those who lived on after it is cut at its ends.",
    )
    add_place_arguments(usage)
    usage.add_argument("-o", "--output", choices=["table", "csv", "json"], default="table")
    usage.add_argument("--namespace", help="only this namespace")
    usage.add_argument("--pod", help="only pods of this name")
    usage.add_argument("--since", help="only what was used in the last 30m, 12h, 7d...")
    usage.add_argument(
        "--from", dest="begin", help="or: from this time on, like 2026-11-01 or 2026-11-01T08:00Z"
    )
    usage.add_argument("--to", dest="end", help="and until this time")
    usage.add_argument(
        "--by",
        help="one row for each of these, comma-separated: " + ", ".join(_GROUPS) + ", label:NAME; direction "
        "and source stay apart in any case",
    )
    usage.add_argument(
        "--counters",
        action="store_true",
        help="instead, what devices counted themselves (RDMA, interface, VF on its PF) and what "
        "limits dropped, counter by counter, "
        "over the whole lives of those who lived in the time; without a pod, what several had together",
    )
    usage.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    since, until = _range(arguments)
    groups = parse_groups(arguments.by)
    if arguments.counters:
        if arguments.by:
            raise ValueError("--counters goes without --by: counters of different names have no sum")
        return _run_counters(arguments, since, until)
    with Ledger.open_read_only(paths_from(arguments).ledger) as ledger:
        bill = ledger.bill(since=since, until=until, namespace=arguments.namespace, pod=arguments.pod)
    rows = grouped(bill.rows, groups)
    columns = [*groups, "bytes", "packets"]
    if arguments.output == "csv":
        _write_csv(rows, columns)
        return 0
    if arguments.output == "table":
        _show_table(bill, rows, columns)
        return 0
    more = {**_uncertain(bill), "totals": totals(rows)}
    show(rows, columns, arguments.output, nothing="nothing was counted", more=more)
    return 0


def _run_counters(arguments: argparse.Namespace, since: float | None, until: float | None) -> int:
    chosen = {"since": since, "until": until, "namespace": arguments.namespace, "pod": arguments.pod}
    with Ledger.open_read_only(paths_from(arguments).ledger) as ledger:
        counters = ledger.counters(**chosen)
        gaps = [gap for gap in ledger.gaps(**chosen) if gap.source]
    rows = [counter_row(row) for row in counters if row.total]
    if arguments.output == "csv":
        _write_csv(rows, _COUNTER_COLUMNS)
        return 0
    show(
        rows,
        [column for column in _COUNTER_COLUMNS if column not in ("from", "to")],
        arguments.output,
        nothing="no device counted anything",
        more={"gaps": _gap_rows(gaps)},
    )
    if arguments.output == "table":
        _show_gaps(gaps)
    return 0


def counter_row(row: CounterRow) -> Row:
    """What is not zero of one counter; device is None for what several attachments had together."""
    owner = row.owner
    return {
        "namespace": owner.pod.namespace if owner else None,
        "pod": owner.pod.name if owner else None,
        "claim": owner.claim.name if owner else None,
        "device": device_of(owner.device) if owner else None,
        "counted": row.meter.subject,
        "port": row.meter.port or None,
        "source": row.meter.source,
        "counter": row.counter,
        "total": row.total,
        "from": row.started,
        "to": row.checked,
    }


def _write_csv(rows: Sequence[Row], columns: Sequence[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(
        ["" if row[column] is None else printable(row[column]) for column in columns] for row in rows
    )


def parse_groups(text: str | None) -> tuple[str, ...]:
    """What --by names, with what is never added up at the end; ValueError for what cannot be named."""
    if text is None:
        return _DEFAULT
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in _GROUPS and not (name.startswith(_LABEL) and len(name) > len(_LABEL)):
            raise ValueError(f"--by {name!r} is none of {', '.join(_GROUPS)} and label:NAME")
    if not named:
        raise ValueError("--by needs a name, like pod or namespace,class")
    return tuple(dict.fromkeys([*named, *_ALWAYS]))


def grouped(rows: Sequence[UsageRow], groups: Sequence[str]) -> list[Row]:
    """One row for each different group, sorted, with what it has of bytes and packets."""
    sums: dict[tuple[Value, ...], list[int]] = {}
    for row in rows:
        total = sums.setdefault(tuple(_value(row, name) for name in groups), [0, 0])
        total[0] += row.bytes
        total[1] += row.packets
    return [
        {**dict(zip(groups, key, strict=True)), "bytes": total[0], "packets": total[1]}
        for key, total in sorted(sums.items(), key=lambda item: [str(value) for value in item[0]])
    ]


def _value(row: UsageRow, name: str) -> Value:
    if name.startswith(_LABEL):
        return dict(row.owner.labels).get(name.removeprefix(_LABEL))
    return _GROUPS[name](row)


def totals(rows: Sequence[Row]) -> list[Row]:
    """Of the whole answer, by source and direction."""
    sums: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        total = sums.setdefault((str(row["source"]), str(row["direction"])), [0, 0])
        total[0] += int(row["bytes"] or 0)
        total[1] += int(row["packets"] or 0)
    return [
        {"source": source, "direction": direction, "bytes": total[0], "packets": total[1]}
        for (source, direction), total in sorted(sums.items())
    ]


# --- times ------------------------------------------------------------------------------------------


def _range(arguments: argparse.Namespace) -> tuple[float | None, float | None]:
    if arguments.since and (arguments.begin or arguments.end):
        raise ValueError("--since goes without --from and --to")
    if arguments.since:
        return time.time() - parse_age(arguments.since), None
    begin = parse_time("--from", arguments.begin) if arguments.begin else None
    end = parse_time("--to", arguments.end) if arguments.end else None
    if begin is not None and end is not None and begin >= end:
        raise ValueError("--from is not before --to")
    return begin, end


def parse_age(text: str) -> float:
    """Seconds of `30m`, `12h`, `7d`; ValueError otherwise."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise ValueError(f"--since {text!r} is not an age like 30m, 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def parse_time(option: str, text: str) -> float:
    """Seconds since the epoch; local time where no zone is given, as `date` shows it."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{option} {text!r} is not a time like 2026-11-01 or 2026-11-01T08:00Z") from error


def _shown_time(at: float | None) -> str:
    if at is None:
        return "?"
    return datetime.fromtimestamp(at).astimezone().isoformat(sep=" ", timespec="seconds")


# --- what makes it less than certain ----------------------------------------------------------------


def _uncertain(bill: Bill) -> dict[str, Sequence[Row]]:
    return {
        "period": [{"from": bill.period.start, "to": bill.period.end}],
        "gaps": _gap_rows(bill.gaps),
        "late": [
            {"attachment": late.attachment, "source": late.source, "from": late.start, "to": late.end}
            for late in bill.late
        ],
        "clock_steps": [{"at": step.at, "seconds": step.seconds} for step in bill.clock_steps],
        "agent_starts": [{"at": at} for at in bill.restarts],
    }


def _gap_rows(gaps: Sequence[UsageGap]) -> list[Row]:
    return [
        {"attachment": gap.attachment, "from": gap.start, "to": gap.end, "reason": gap.reason} for gap in gaps
    ]


def _show_gaps(gaps: Sequence[UsageGap]) -> None:
    if not gaps:
        return
    print(f"\nnot counted: {len(gaps)} gaps")
    for gap in gaps:
        between = f"{_shown_time(gap.start)} to {_shown_time(gap.end)}"
        print(f"  {gap.attachment or gap.subject or 'all'}, {between}: {printable(gap.reason)}")


def _show_table(bill: Bill, rows: Sequence[Row], columns: Sequence[str]) -> None:
    if bill.period.start is not None or bill.period.end is not None:
        end = "now" if bill.period.end is None else _shown_time(bill.period.end)
        start = "the beginning" if bill.period.start is None else _shown_time(bill.period.start)
        print(f"from {start} to {end}\n")
    if not rows:
        print("nothing was counted")
    else:
        print_table(rows, columns)
        print("\ntotal")
        print_table(totals(rows), ["source", "direction", "bytes", "packets"])
    _show_gaps(bill.gaps)
    for late in bill.late:
        print(
            f"\n{late.attachment} was not read from {_shown_time(late.start)} to {_shown_time(late.end)}: "
            "what it used then counts at the end of it"
        )
    for step in bill.clock_steps:
        print(f"\nthe clock was set by {step.seconds:+.0f} s at {_shown_time(step.at)}")
