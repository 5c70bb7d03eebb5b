"""What libibverbs says of RDMA devices. The only importer of pyverbs.

Invariant: pyverbs is loaded at the first call and not before, and its absence (or that of RDMA in the
kernel) is None, never an error: sysfs alone is enough to offer a device. Every context is closed again.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hw.model import IfIndex, RdmaName

log = logging.getLogger(__name__)

_PORT_ACTIVE = 4
_GID_TYPES = {0: "IB", 1: "RoCE v1", 2: "RoCE v2"}
_LINK_LAYERS = {1: "InfiniBand", 2: "Ethernet"}


@dataclass(frozen=True, slots=True)
class Gid:
    """An entry of a port's GID table. ifindex is None for InfiniBand."""

    index: int
    address: str
    type: str
    """`IB`, `RoCE v1` or `RoCE v2`."""
    ifindex: IfIndex | None


@dataclass(frozen=True, slots=True)
class Port:
    number: int
    active: bool
    link_layer: str
    """`InfiniBand`, `Ethernet`, or "" if unknown."""
    gids: tuple[Gid, ...]


@dataclass(frozen=True, slots=True)
class VerbsDevice:
    """An RDMA device as an application of this namespace sees it."""

    name: RdmaName
    firmware: str
    ports: tuple[Port, ...]


def devices() -> tuple[VerbsDevice, ...] | None:
    """All devices that can be opened here. None without pyverbs or without RDMA in the kernel.

    Opening a device costs a firmware command: not for the path of a pod.
    """
    verbs = _load()
    if verbs is None:
        return None
    failed: type[Exception] = verbs.PyverbsError
    try:
        names = [_text(entry.name) for entry in verbs.get_device_list()]
    except failed as error:
        log.debug("libibverbs lists no devices: %s", error)
        return None
    found: list[VerbsDevice] = []
    for name in names:
        try:
            found.append(_query(verbs, name))
        except failed as error:
            log.warning("RDMA device %a cannot be asked: %s", name, error)
    return tuple(found)


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("pyverbs.device")
    except ImportError as error:
        log.debug("no pyverbs: %s", error)
        return None


def _query(verbs: ModuleType, name: str) -> VerbsDevice:
    context = verbs.Context(name=name)
    try:
        attributes = context.query_device()
        ports = [(number, context.query_port(number)) for number in range(1, attributes.phys_port_cnt + 1)]
        entries = context.query_gid_table(max(1, sum(port.gid_tbl_len for _, port in ports)))
        gids = [(entry.port_num, _gid(entry)) for entry in entries]
    finally:
        context.close()
    return VerbsDevice(
        name=RdmaName(name),
        firmware=_text(attributes.fw_version),
        ports=tuple(
            Port(
                number=number,
                active=port.state == _PORT_ACTIVE,
                link_layer=_LINK_LAYERS.get(port.link_layer, ""),
                gids=tuple(gid for owner, gid in gids if owner == number),
            )
            for number, port in ports
        ),
    )


def _gid(entry: Any) -> Gid:
    index = int(entry.ndev_ifindex)
    return Gid(
        index=int(entry.gid_index),
        address=str(entry.gid_str()),
        type=_GID_TYPES.get(int(entry.gid_type), ""),
        ifindex=IfIndex(index) if index else None,
    )


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
