"""`knd devices`: what this node has and would offer, or why not."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from driver.cli import sriov_ports
from driver.cli.output import Row, add_output_argument, print_table, show
from driver.errors import DriverError
from driver.journal.store import Journal
from driver.lifecycle.devices import Devices
from driver.model import DeviceName, Preparation
from driver.paths import Paths
from driver.policy import PolicyFile
from driver.provision.survey import held_devices
from driver.settings import add_place_arguments, paths_from
from hw.sysfs import Sysfs


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("devices", help="what this node offers, and what it withholds and why")
    add_place_arguments(parser)
    add_output_argument(parser)
    parser.add_argument("--policy", type=Path, help="node policy file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    paths = paths_from(arguments)
    policy_file = PolicyFile(arguments.policy)
    if policy_file.problem:
        raise DriverError(policy_file.problem)
    devices = Devices(Sysfs(paths.sysfs), lambda: policy_file.current)
    devices.rescan()
    held, quarantined = _records(paths)
    ports = sriov_ports.rows(paths, policy_file.current, held_devices(held.values(), quarantined))
    rows: list[Row] = []
    for name, device in sorted(devices.current().items()):
        preparation = held.pop(name, None)
        rows.append(
            {
                "device": name,
                "kind": device.kind,
                "interface": device.settings.name if device.settings else None,
                "held_by": _holder(preparation),
                "offered": not device.withheld,
                "why_not": quarantined.get(name) or device.withheld or None,
            }
        )
    for name, preparation in sorted(held.items()):
        rows.append(
            {
                "device": name,
                "kind": preparation.kind,
                "interface": preparation.pod_ifname,
                "held_by": _holder(preparation),
                "offered": True,
                "why_not": quarantined.get(name),
            }
        )
    columns = ["device", "kind", "interface", "held_by", "offered", "why_not"]
    nothing = "this node has no network device that could be offered"
    show(rows, columns, arguments.output, nothing=nothing, more={"ports": ports})
    if ports and arguments.output == "table":
        print()
        print_table(ports, sriov_ports.COLUMNS)
    return 0


def _records(paths: Paths) -> tuple[dict[DeviceName, Preparation], dict[DeviceName, str]]:
    """What the agent's journal says; nothing where none has run here."""
    with contextlib.suppress(DriverError), Journal.open_read_only(paths.journal) as journal:
        state = journal.state()
        return (
            {p.key.device: p for p in state.preparations},
            {q.device: q.reason for q in state.quarantines},
        )
    return {}, {}


def _holder(preparation: Preparation | None) -> str | None:
    return f"{preparation.claim.namespace}/{preparation.claim.name}" if preparation else None
