"""`knd pods` and `knd usage`: who has what, and who used what; from the records, beside a running agent."""

from __future__ import annotations

import argparse
import re
import time

from driver.cli.output import Row, add_output_argument, printable, show
from driver.journal.ledger import Ledger
from driver.journal.store import Journal
from driver.settings import add_place_arguments, paths_from

_AGE = re.compile(r"([0-9]{1,9})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pods = commands.add_parser("pods", help="which pod has which device now")
    add_place_arguments(pods)
    add_output_argument(pods)
    pods.set_defaults(run=run_pods)
    usage = commands.add_parser("usage", help="what every pod sent and received, also those that are gone")
    add_place_arguments(usage)
    add_output_argument(usage)
    usage.add_argument("--namespace", help="only this namespace")
    usage.add_argument("--pod", help="only pods of this name")
    usage.add_argument("--since", help="only attachments that lived in the last 30m, 12h, 7d...")
    usage.set_defaults(run=run_usage)


def run_pods(arguments: argparse.Namespace) -> int:
    rows: list[Row] = []
    with Journal.open_read_only(paths_from(arguments).journal) as journal:
        state = journal.state()
    attached = {a.preparation: a for a in state.attachments}
    quarantined = {q.device: q.reason for q in state.quarantines}
    for preparation in state.preparations:
        attachment = attached.get(preparation.key)
        rows.append(
            {
                "namespace": preparation.claim.namespace,
                "pod": attachment.pod.name if attachment else None,
                "claim": preparation.claim.name,
                "request": preparation.request,
                "device": preparation.key.device,
                "interface": preparation.pod_ifname if attachment else None,
                "state": attachment.state if attachment else preparation.state,
                "sandbox": attachment.sandbox[:12] if attachment else None,
                "quarantine": quarantined.get(preparation.key.device),
            }
        )
    columns = ["namespace", "pod", "claim", "request", "device", "interface", "state", "quarantine"]
    show(rows, columns, arguments.output, nothing="no claim is prepared on this node")
    return 0


def run_usage(arguments: argparse.Namespace) -> int:
    since = time.time() - parse_age(arguments.since) if arguments.since else None
    with Ledger.open_read_only(paths_from(arguments).ledger) as ledger:
        found = ledger.usage(since=since, namespace=arguments.namespace, pod=arguments.pod)
        gaps = ledger.gaps(since=since, namespace=arguments.namespace, pod=arguments.pod)
    rows: list[Row] = [
        {
            "namespace": row.owner.pod.namespace,
            "pod": row.owner.pod.name,
            "claim": row.owner.claim.name,
            "device": row.owner.device,
            "interface": row.owner.interface,
            "direction": row.direction.name.lower(),
            "class": row.class_name,
            "kind": row.kind.name.lower(),
            "source": row.source,
            "bytes": row.bytes,
            "packets": row.packets,
            "started": row.owner.started,
            "ended": row.ended,
        }
        for row in found
    ]
    columns = [
        *("namespace", "pod", "claim", "device", "interface"),
        *("direction", "class", "kind", "source", "bytes", "packets"),
    ]
    not_counted: list[Row] = [
        {"attachment": gap.attachment, "from": gap.start, "to": gap.end, "reason": gap.reason} for gap in gaps
    ]
    show(rows, columns, arguments.output, nothing="nothing was counted", more={"gaps": not_counted})
    if gaps and arguments.output == "table":
        print(f"\nnot counted: {len(gaps)} gaps")
        for gap in gaps:
            print(f"  {gap.attachment or 'all'}: {printable(gap.reason)}")
    return 0


def parse_age(text: str) -> float:
    """Seconds of `30m`, `12h`, `7d`; ValueError otherwise."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise ValueError(f"--since {text!r} is not an age like 30m, 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]
