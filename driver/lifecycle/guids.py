"""Which VFs are given GUIDs, and which GUIDs others have.

Invariant: a GUID is chosen and put on record under one lock, the caller's, so that it is given once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace

from driver.errors import Refusal
from driver.lifecycle.context import Context
from driver.lifecycle.rdma import INFINIBAND
from driver.model import Device, Preparation
from driver.policy.infiniband import GuidRange
from driver.rdma import Infiniband
from hw.model import DeviceKind, Guid, PciIdentity, VfSettings
from hw.rdma.infiniband import guid_number, guid_of, guid_of_number, parse_guid


def choose(pool: GuidRange, identity: PciIdentity, taken: Collection[Guid]) -> Guid:
    """From a place of its own onwards, the first that nobody has, so that a VF gets the same each time.
    Refusal where all are taken."""
    text = f"{identity.pf} {identity.vf_index}"
    place = int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8]) % pool.size
    first = guid_number(pool.start)
    # Of one more than are taken, one is free.
    for step in range(min(pool.size, len(taken) + 1)):
        guid = guid_of_number(first + (place + step) % pool.size)
        if guid not in taken:
            return guid
    raise Refusal(
        "NoGuid",
        f"all {pool.size} GUIDs of the node policy (rdma.infiniband.guids) are taken: make the range larger",
    )


def give(context: Context, made: Sequence[Preparation], devices: Sequence[Device]) -> list[Preparation]:
    """made, each of the device at the same place. Refusal where no GUID is left."""
    rules = context.policy().rdma.infiniband
    if rules is None:
        return list(made)
    given = {p.infiniband.guid for p in context.book.preparations() if p.infiniband is not None}
    found: list[Preparation] = []
    for preparation, device in zip(made, devices, strict=True):
        identity, vf = device.identity, device.vf
        if vf is not None and isinstance(identity, PciIdentity) and _is_on_infiniband(device):
            guid = choose(rules.guids, identity, given | context.devices.guids_of_others(device))
            given.add(guid)
            wish = Infiniband(guid=guid, active_seconds=rules.active_seconds)
            preparation = replace(preparation, infiniband=wish, vf_baseline=_own_guids(vf, device))
        found.append(preparation)
    return found


def _is_on_infiniband(device: Device) -> bool:
    on_infiniband = device.rdma is not None and device.rdma.link_layer == INFINIBAND
    return device.kind is DeviceKind.VF and on_infiniband


def _own_guids(vf: VfSettings, device: Device) -> VfSettings:
    """What the VF goes back to. Where its PF does not tell it, that is what the VF came up with."""
    node = _guid_or_none(device.rdma.node_guid if device.rdma is not None else None)
    mac = device.settings.mac if device.settings is not None else None
    port = guid_of(mac) if mac is not None else None
    return replace(vf, node_guid=vf.node_guid or node, port_guid=vf.port_guid or port)


def _guid_or_none(text: str | None) -> Guid | None:
    try:
        return parse_guid(text) if text else None
    except ValueError:
        return None
