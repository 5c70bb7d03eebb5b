"""`knd pods`: who has what; from the records, beside a running agent."""

from __future__ import annotations

import argparse

from driver.cli.output import Row, add_output_argument, show
from driver.journal.store import Journal
from driver.settings import add_place_arguments, paths_from


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pods = commands.add_parser("pods", help="which pod has which device now")
    add_place_arguments(pods)
    add_output_argument(pods)
    pods.set_defaults(run=run_pods)


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
                "quarantine": quarantined.get(preparation.key.unit),
            }
        )
    columns = ["namespace", "pod", "claim", "request", "device", "interface", "state", "quarantine"]
    show(rows, columns, arguments.output, nothing="no claim is prepared on this node")
    return 0
