"""Giving out parts of devices as the scheduler does (KEP 5075).

Invariant: an amount is what was asked for, rounded up to what the device's request policy allows, or its
default; of no device more is given out than it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from kndsim.api_rules import quantity_value

Json = dict[str, Any]
Amounts = Mapping[str, Decimal]


def is_shared(device: Json) -> bool:
    return bool(device.get("allowMultipleAllocations"))


class Parts:
    """What claims have of devices that are given out in parts."""

    def __init__(self, claims: Sequence[Json], driver: str) -> None:
        self._given: dict[tuple[str, str], list[Amounts]] = {}
        for claim in claims:
            allocation = (claim.get("status") or {}).get("allocation") or {}
            for result in allocation.get("devices", {}).get("results", []):
                if result["driver"] == driver and result.get("shareID"):
                    consumed = result.get("consumedCapacity") or {}
                    amounts = {name: quantity_value(value) for name, value in consumed.items()}
                    self._given.setdefault((result["pool"], result["device"]), []).append(amounts)

    def take(self, pool: str, device: Json, asked: Mapping[str, str]) -> Mapping[str, str] | None:
        """The amounts that somebody is given who asks for these; None if there is not so much."""
        capacity = device.get("capacity") or {}
        if not asked.keys() <= capacity.keys():
            return None
        amounts: dict[str, Decimal] = {}
        for name, each in capacity.items():
            amount = _rounded(each, asked.get(name))
            given = self._given.get((pool, device["name"]), [])
            before = sum((one.get(name, Decimal(0)) for one in given), Decimal(0))
            if amount is None or before + amount > quantity_value(each["value"]):
                return None
            amounts[name] = amount
        self._given.setdefault((pool, device["name"]), []).append(amounts)
        return {name: f"{amount:f}" for name, amount in amounts.items()}


def _rounded(capacity: Json, asked: str | None) -> Decimal | None:
    """By the request policy; without one all of it. None: more than the policy allows."""
    policy = capacity.get("requestPolicy")
    if policy is None:
        return quantity_value(asked if asked is not None else capacity["value"])
    wanted = quantity_value(asked if asked is not None else policy["default"])
    if "validValues" in policy:
        return min(
            (each for each in map(quantity_value, policy["validValues"]) if each >= wanted), default=None
        )
    valid = policy.get("validRange")
    if valid is None:
        return wanted
    least = quantity_value(valid["min"])
    wanted = max(wanted, least)
    if "step" in valid:
        step = quantity_value(valid["step"])
        steps, rest = divmod(wanted - least, step)
        wanted = least + (steps + bool(rest)) * step
    return None if "max" in valid and wanted > quantity_value(valid["max"]) else wanted
