"""Parts of a device that is given to several claims at once: how much of it, as what interface, and whether
there is so much.

Invariant: pure. The scheduler counts what it gives away; prepare asks here again, so that never more of a
device is given out than the node policy says, and no VLAN of it to two claims.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from driver.errors import ConfigError, FieldProblem, NotNow, Refusal
from driver.inventory import BANDWIDTH, quantity
from driver.model import AllocatedDevice, Device, NicConfig, Preparation
from driver.quantity import parse_quantity
from driver.rdma import NO_WISHES
from driver.traffic import Sharable
from hw.subinterface import Subinterface, SubinterfaceKind

VLAN_FIELD = "subinterface.vlan"
_MBIT = 1_000_000


def amount(allocated: AllocatedDevice, device: Device) -> int | None:
    """Mb/s of the device that a claim was allocated; None for a device that is given whole. Refusal where the
    allocation is not of the kind that the device is offered for."""
    in_part = allocated.share_id is not None or bool(allocated.consumed_capacity)
    if device.sharable is None:
        if in_part:
            raise Refusal(
                "NotSharable",
                f"{device.name} is allocated in part (shareID or consumedCapacity), and the node policy "
                "gives it out whole (section shared): was it another when the claim was allocated, or has "
                "somebody else changed the ResourceSlice?",
            )
        return None
    if allocated.share_id is None:
        raise Refusal(
            "NotInParts",
            f"{device.name} is allocated whole (without a shareID), and the node policy gives it out in "
            "parts (section shared): delete the claim and make it again",
        )
    said = allocated.consumed_capacity.get(BANDWIDTH)
    size = int(parse_quantity(said)) // _MBIT if said is not None else 0
    if size < 1:
        raise Refusal(
            "NoBandwidth",
            f"the claim has {said or 'nothing'} of the bandwidth of {device.name}, and 1M is the least that "
            "can be kept to",
        )
    return size


def interface(sharable: Sharable, config: NicConfig) -> Subinterface:
    """What is made for a claim of this config, which passed check_share."""
    return Subinterface(kind=sharable.kind, mode=sharable.mode, vlan=config.subinterface.vlan)


def check_share(device: Device, config: NicConfig) -> None:
    """ConfigError for what cannot be had of the device, or of a part of it."""
    sharable, vlan = device.sharable, config.subinterface.vlan
    problems = []
    if sharable is None or sharable.kind is not SubinterfaceKind.VLAN:
        if vlan is not None:
            what = f"a {sharable.kind} of it" if sharable is not None else "it"
            problems.append(FieldProblem(VLAN_FIELD, f"{device.name}: {what} has no VLAN id to choose"))
    elif vlan is None or not any(vlan in each for each in sharable.vlans):
        choice = ", ".join(map(str, sharable.vlans))
        told = f"{device.name} is given out by VLAN: choose one of {choice} (node policy, shared)"
        problems.append(FieldProblem(VLAN_FIELD, told))
    if sharable is not None:
        problems += _check_part(device, sharable, config)
    if problems:
        raise ConfigError(problems)


def _check_part(device: Device, sharable: Sharable, config: NicConfig) -> list[FieldProblem]:
    problems = []
    if config.interface.hardware_address is not None and sharable.kind is not SubinterfaceKind.MACVLAN:
        told = f"a {sharable.kind} has the address of {device.name}, on which it is made"
        problems.append(FieldProblem("interface.hardwareAddress", told))
    most, mtu = device.settings.mtu if device.settings is not None else None, config.interface.mtu
    if mtu is not None and most is not None and mtu > most:
        told = f"is made on {device.name}, whose MTU is {most}: at most that, not {mtu}"
        problems.append(FieldProblem("interface.mtu", told))
    if config.rdma != NO_WISHES:
        told = f"{device.name} is given out in parts, and none of them has an RDMA device"
        problems.append(FieldProblem("rdma", told))
    return problems


def check_room(device: Device, held: Iterable[Preparation], coming: Sequence[Preparation]) -> None:
    """Refusal or NotNow if this much more of a device cannot be given out. held: all that is on record of
    this node, coming: what a claim is to have of the device."""
    sharable = device.sharable
    if sharable is None or not coming:
        return
    mine = [each for each in held if each.share is not None and each.key.device == device.name]
    given, wanted = (sum(each.size or 0 for each in group) for group in (mine, coming))
    if given + wanted > sharable.bandwidth:
        raise Refusal(
            "OverBudget",
            f"{device.name} gives out {quantity(sharable.bandwidth)}, claims have {quantity(given)} of that, "
            f"and {quantity(wanted)} more are asked for: delete a pod that has some of it, or ask for less",
        )
    if len(mine) + len(coming) > sharable.shares:
        raise Refusal(
            "OverBudget",
            f"{device.name} is given out in at most {sharable.shares} parts, and claims have {len(mine)}: "
            "delete a pod that has one",
        )
    _check_kinds(device, mine, coming[0])
    _check_vlans(device, mine, coming)


def _check_kinds(device: Device, held: Sequence[Preparation], coming: Preparation) -> None:
    """The node policy may say another kind or mode than before: the kernel has macvlans or ipvlans of a
    device, and sets the mode of all its ipvlans at once (ipvlan_set_port_mode)."""
    new = coming.share.interface if coming.share is not None else None
    for other in held:
        old = other.share.interface if other.share is not None else None
        if new is None or old is None or SubinterfaceKind.VLAN in (new.kind, old.kind):
            continue
        if new.kind is not old.kind or (new.kind is SubinterfaceKind.IPVLAN and new.mode is not old.mode):
            claim = f"{other.claim.namespace}/{other.claim.name}"
            raise NotNow(
                f"{device.name} would have a {new} beside the {old} of claim {claim} (node policy, shared), "
                "and cannot have both: wait until that one's pod is gone"
            )


def _check_vlans(device: Device, held: Sequence[Preparation], coming: Sequence[Preparation]) -> None:
    """The kernel has one interface for each VLAN of a device, wherever that is."""
    whose = {each.share.interface.vlan: each for each in held if each.share is not None}
    whose.pop(None, None)
    for each in coming:
        vlan = each.share.interface.vlan if each.share is not None else None
        other = whose.get(vlan)
        if other is not None:
            claim = f"{other.claim.namespace}/{other.claim.name}"
            raise NotNow(
                f"VLAN {vlan} of {device.name} is that of claim {claim} ({VLAN_FIELD}): choose another, or "
                "wait until its pod is gone"
            )
        if vlan is not None:
            whose[vlan] = each
