"""`knd devices`: what this node has and would offer, or why not."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from driver import running
from driver.cli import rdma_ports, rdma_processes, shared_devices, sriov_ports
from driver.cli.output import Row, add_output_argument, print_table, show
from driver.errors import DriverError
from driver.health import View, seen_now
from driver.inventory import quantity
from driver.journal.store import Journal
from driver.lifecycle.devices import Devices
from driver.lifecycle.reporters import Sick, of_device, of_port, sick_reporters
from driver.model import Attachment, DeviceName, Preparation, PreparationState
from driver.paths import Paths
from driver.provision.survey import held_devices
from driver.settings import add_place_arguments, paths_from
from driver.sharing import Node, Sharing, is_whole
from hw.model import DeviceKind
from hw.sysfs import Sysfs


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("devices", help="what this node offers, and what it withholds and why")
    add_place_arguments(parser)
    add_output_argument(parser)
    parser.add_argument("--policy", type=Path, help="node policy file; absent: the agent's own")
    parser.add_argument("--rdma", action="store_true", help="and what processes have made on RDMA devices")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    paths = paths_from(arguments)
    policy = running.policy_in_force(paths, arguments.policy)
    devices = Devices(Sysfs(paths.sysfs), lambda: policy)
    devices.rescan()
    preparations, quarantined, attached = _records(paths)
    held = {p.key.device: p for p in preparations if p.share is None}
    had = shared_devices.shares_had(preparations)
    node = Node(
        devices=devices.current(), held={p.key.unit: p for p in preparations}, quarantined=quarantined
    )
    ports = sriov_ports.rows(paths, policy, held_devices(preparations, quarantined), Sharing(node).budgets())
    why = _reasons(node, running.read(paths))
    sick = sick_reporters()
    rows: list[Row] = []
    kinds = {name: device.kind for name, device in node.devices.items()}
    kinds |= {name: preparation.kind for name, preparation in held.items()}
    for name, kind in sorted(kinds.items()):
        settings = node.devices[name].settings if name in node.devices else None
        interface = held[name].pod_ifname if settings is None and name in held else None
        rows.append(
            {
                "device": name,
                "kind": kind,
                "interface": settings.name if settings else interface,
                "held_by": _holders(name, node, had) if name in had else _holder(held.get(name)),
                "offered": name in held or not why[name],
                "why_not": quarantined.get(name) or why[name] or None,
                "size": _size(name, node),
                "health": _health(name, node, sick) if name in held or not why[name] else None,
            }
        )
    columns = ["device", "kind", "interface", "size", "held_by", "offered", "why_not", "health"]
    nothing = "this node has no network device that could be offered"
    sysfs = Sysfs(paths.sysfs)
    rdma, problems = rdma_ports.read(sysfs)
    rdma_rows = rdma_ports.port_rows(rdma, sysfs)
    shared, shares = shared_devices.rows(node.devices, had), shared_devices.share_rows(had)
    more = {"ports": ports, "shared": shared, "shares": shares}
    more |= {"rdma": rdma_rows, "gids": rdma_ports.gid_rows(rdma)}
    tables: list[tuple[Sequence[Row], Sequence[str]]] = [
        (ports, sriov_ports.COLUMNS),
        (shared, shared_devices.COLUMNS),
        (shares, shared_devices.SHARE_COLUMNS),
        (rdma_rows, rdma_ports.COLUMNS),
    ]
    if arguments.rdma:
        processes, unread = rdma_processes.read(paths.proc, attached)
        more["rdma_processes"], problems = processes, (*problems, *unread)
        tables.append((processes, rdma_processes.COLUMNS))
    show(rows, columns, arguments.output, nothing=nothing, more=more)
    if arguments.output == "table":
        _print_more(*tables)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 0


def _print_more(*tables: tuple[Sequence[Row], Sequence[str]]) -> None:
    for rows, columns in tables:
        if rows:
            print()
            print_table(rows, columns)


def _size(name: DeviceName, node: Node) -> str | None:
    """Of its PF's bandwidth, as it was given or would be; of all its shares, where it is given out so."""
    device = node.devices.get(name)
    if name in node.held:
        size = node.held[name].size
    elif device is not None and device.sharable is not None:
        size = device.sharable.bandwidth
    else:
        vf = device is not None and device.kind is DeviceKind.VF
        size = device.portion.size if device is not None and device.portion and vf else None
    return quantity(size) if size else None


def _health(name: DeviceName, node: Node, sick: Sick) -> str:
    """As it is at this moment: what the agent holds against it counts only when it has lasted."""
    held = node.held.get(name)
    prepared = held is not None and held.state is PreparationState.PREPARED
    device = node.devices.get(name)
    view = View(
        name=name,
        device=device,
        held=held,
        in_hand=held is not None and not prepared,
        reporters=of_device(device, sick),
        port_reporters=of_port(device, sick),
    )
    return (
        "; ".join(text for troubles in seen_now([view]).values() for text in troubles.values()) or "healthy"
    )


def _reasons(node: Node, agent: running.Running | None) -> Mapping[DeviceName, str]:
    """Why each device is not to be had, or "". What is held is offered all the same: the scheduler knows."""
    relations = Sharing(node)
    reasons = {name: device.withheld for name, device in node.devices.items()}
    for name, preparation in node.held.items():
        if preparation.share is None:
            reasons[name] = ""
    offered = [name for name, reason in reasons.items() if not reason]
    uses = relations.uses(offered)
    without = agent is not None and agent.has_counters is False
    unshared = agent is not None and agent.has_shares is False
    for name in offered:
        if name in node.held:
            continue
        against = relations.against(name)
        if against is not None:
            reasons[name] = against.sentence
        elif unshared and node.devices[name].sharable is not None:
            reasons[name] = "the API server gives a device to one claim alone (DRAConsumableCapacity is off)"
        elif without and any(use.instead for use in uses.get(name, ())):
            whole = is_whole(node.devices[name])
            what = (
                "its VFs are offered instead" if whole else "the VFs before it are all that its PF gives out"
            )
            reasons[name] = f"the API server has no shared counters: {what}"
    return reasons


def _records(
    paths: Paths,
) -> tuple[tuple[Preparation, ...], dict[DeviceName, str], tuple[Attachment, ...]]:
    """What the agent's journal says; nothing where none has run here."""
    with contextlib.suppress(DriverError), Journal.open_read_only(paths.journal) as journal:
        state = journal.state()
        return (
            tuple(state.preparations),
            {q.device: q.reason for q in state.quarantines},
            tuple(state.attachments),
        )
    return (), {}, ()


def _holder(preparation: Preparation | None) -> str | None:
    return f"{preparation.claim.namespace}/{preparation.claim.name}" if preparation else None


def _holders(name: DeviceName, node: Node, had: Mapping[DeviceName, Sequence[Preparation]]) -> str:
    device, count = node.devices.get(name), len(had[name])
    of = f" of {device.sharable.shares}" if device is not None and device.sharable is not None else ""
    return f"{count}{of} shares"
