"""Rows of `knd devices` about devices that are given out in shares, and about the shares.

Invariant: shares that claims have are shown whatever became of the device and the policy since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from driver.cli.output import Row
from driver.inventory import quantity
from driver.model import Device, DeviceName, Preparation

COLUMNS = [
    "shared",
    "subinterface",
    "bandwidth",
    "given",
    "shares",
    "had",
    "default",
    "minimum",
    "maximum",
    "step",
    "vlans",
]
SHARE_COLUMNS = ["share_of", "subinterface", "interface", "bandwidth", "held_by"]


def shares_had(preparations: Iterable[Preparation]) -> Mapping[DeviceName, Sequence[Preparation]]:
    """Those that have a share of a device, by device, in the order of their claims."""
    found: dict[DeviceName, list[Preparation]] = {}
    for each in sorted(preparations, key=lambda each: (each.key.device, each.claim.namespace, each.key.unit)):
        if each.share is not None:
            found.setdefault(each.key.device, []).append(each)
    return found


def rows(devices: Mapping[DeviceName, Device], had: Mapping[DeviceName, Sequence[Preparation]]) -> list[Row]:
    """What each device gives out, what of it claims have, and what one claim can ask for."""
    found: list[Row] = []
    for name, device in devices.items():
        shared = device.sharable
        if shared is None:
            continue
        mine, amounts = had.get(name, ()), shared.amounts
        found.append(
            {
                "shared": name,
                "subinterface": f"{shared.kind} {shared.mode or ''}".rstrip(),
                "bandwidth": quantity(shared.bandwidth),
                "given": quantity(sum(each.size or 0 for each in mine)),
                "shares": shared.shares,
                "had": len(mine),
                "default": quantity(amounts.default),
                "minimum": quantity(amounts.least),
                "maximum": quantity(amounts.most),
                "step": quantity(amounts.step) if amounts.step else None,
                "vlans": ", ".join(map(str, shared.vlans)) or None,
            }
        )
    return found


def share_rows(had: Mapping[DeviceName, Sequence[Preparation]]) -> list[Row]:
    return [
        {
            "share_of": name,
            "subinterface": str(each.share.interface) if each.share is not None else None,
            "interface": each.pod_ifname,
            "bandwidth": quantity(each.size) if each.size else None,
            "held_by": f"{each.claim.namespace}/{each.claim.name}",
        }
        for name, mine in had.items()
        for each in mine
    ]
