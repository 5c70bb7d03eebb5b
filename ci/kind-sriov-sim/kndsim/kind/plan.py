"""What the keeper is told, and what it tells: two JSON files in the folder of one kind cluster.

Invariant: a file is there whole or not at all, and one that is not as written here is refused with its name.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kndsim.kind.model import DeviceId, Home


class BadFile(Exception):
    """A sentence that names the file."""


@dataclass(frozen=True, slots=True)
class Lent:
    """A device that this machine has and a node gets for a while, such as a VF of a real NIC."""

    id: DeviceId
    home: Home


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Nodes and what each of them gets.

    nodes maps a node's name to where its network namespace is found: `container:NAME` of the engine, or
    the path of a namespace.
    """

    nodes: Mapping[str, str]
    engine: str = ""
    ports: int = 0
    """netdevsim ports of each node, linked by the kernel with those of the node after it."""
    vfs: int = 0
    """netdevsim VFs of each node. They carry no traffic."""
    veths: int = 0
    """veths of each node, whose far ends are joined by one bridge; with them one more to put macvlans on."""
    lent: Sequence[Lent] = ()
    rdma: bool = False
    """A soft RoCE device on each device that is at home in its node."""


@dataclass(frozen=True, slots=True)
class Given:
    """A device that a node has.

    kind: "netdevsim-port", "netdevsim-pf" (which has the VFs), "netdevsim-vf", "veth",
    "uplink" (a veth that is up) or "lent".
    """

    home: Home
    kind: str
    id: DeviceId | None
    """None for a veth: it has no hardware, and does not outlive its namespace."""


@dataclass(frozen=True, slots=True)
class Ground:
    """All that stands: the keeper writes it when every node has what it gets."""

    devices: tuple[Given, ...]
    notes: tuple[str, ...] = ()
    """What this machine cannot do, for the reader."""

    def homes(self) -> dict[DeviceId, Home]:
        return {given.id: given.home for given in self.devices if given.id is not None}


def write_plan(path: Path, plan: Plan) -> None:
    _write(path, dataclasses.asdict(plan))


def read_plan(path: Path) -> Plan:
    fields = _read(path)
    try:
        lent = tuple(Lent(DeviceId(**each["id"]), Home(**each["home"])) for each in fields.pop("lent"))
        return Plan(**fields, lent=lent)
    except (TypeError, KeyError) as error:
        raise BadFile(f"{path} is not a plan: {error}") from error


def write_ground(path: Path, ground: Ground) -> None:
    _write(path, dataclasses.asdict(ground))


def read_ground(path: Path) -> Ground:
    fields = _read(path)
    try:
        devices = tuple(
            Given(Home(**each["home"]), each["kind"], DeviceId(**each["id"]) if each["id"] else None)
            for each in fields["devices"]
        )
        return Ground(devices, tuple(fields["notes"]))
    except (TypeError, KeyError) as error:
        raise BadFile(f"{path} does not say what stands: {error}") from error


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1))


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing, for whoever looks."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadFile(f"{path} is not there") from None
    except ValueError as error:
        raise BadFile(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadFile(f"{path} holds no object")
    return fields
