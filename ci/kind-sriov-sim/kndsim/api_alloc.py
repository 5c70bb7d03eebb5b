"""Choosing devices as the scheduler does, from what is published.

Invariant: an incomplete pool, an older generation or an allocated device is never given out, nor one for
which too little is left of a shared counter, and a tainted one only to whoever tolerates all taints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kndsim.api_parts import Parts, is_shared
from kndsim.api_rules import quantity_value

Json = dict[str, Any]
BLOCKING = ("NoSchedule", "NoExecute")


def allocated(claims: Sequence[Json], driver: str) -> set[tuple[str, str]]:
    """(pool, device) of everything allocated whole."""
    return {
        (result["pool"], result["device"])
        for claim in claims
        for result in (claim.get("status") or {}).get("allocation", {}).get("devices", {}).get("results", [])
        if result["driver"] == driver and not (result.get("adminAccess") or result.get("shareID"))
    }


def usable_devices(slices: Sequence[Json]) -> Iterator[tuple[str, Json]]:
    """Yield (pool, device) of complete pools, in the scheduler's order."""
    for pool, each in current_slices(slices):
        for device in each["spec"].get("devices") or []:
            yield pool, device


def current_slices(slices: Sequence[Json]) -> Iterator[tuple[str, Json]]:
    """Yield (pool, slice) of complete pools of the highest generation."""
    pools: dict[str, list[Json]] = {}
    for each in slices:
        pools.setdefault(each["spec"]["pool"]["name"], []).append(each)
    for pool, members in sorted(pools.items()):
        newest = max(each["spec"]["pool"]["generation"] for each in members)
        current = [each for each in members if each["spec"]["pool"]["generation"] == newest]
        if len(current) != current[0]["spec"]["pool"]["resourceSliceCount"]:
            continue
        for each in sorted(current, key=lambda one: str(one["metadata"]["name"])):
            yield pool, each


class Counters:
    """What is left of the pools' shared counters."""

    def __init__(self, slices: Sequence[Json], in_use: set[tuple[str, str]]) -> None:
        self._left: dict[tuple[str, str, str], Decimal] = {
            (pool, each["name"], counter): quantity_value(amount["value"])
            for pool, member in current_slices(slices)
            for each in member["spec"].get("sharedCounters") or []
            for counter, amount in each["counters"].items()
        }
        for pool, device in usable_devices(slices):
            if (pool, device["name"]) in in_use:
                self.take(pool, device)

    def allow(self, pool: str, device: Json) -> bool:
        """A device that uses a counter which is nowhere is never given out; nor is any that uses counters
        while less than nothing is left of one of its pool, since the scheduler looks at all of them."""
        uses = bool(device.get("consumesCounters"))
        if uses and any(left < 0 for (whose, _, _), left in self._left.items() if whose == pool):
            return False
        return all(self._left.get(key, Decimal(-1)) >= amount for key, amount in self._uses(pool, device))

    def take(self, pool: str, device: Json) -> None:
        for key, amount in self._uses(pool, device):
            self._left[key] = self._left.get(key, Decimal(0)) - amount

    @staticmethod
    def _uses(pool: str, device: Json) -> Iterator[tuple[tuple[str, str, str], Decimal]]:
        for use in device.get("consumesCounters") or []:
            for counter, amount in use["counters"].items():
                yield (pool, use["counterSet"], counter), quantity_value(amount["value"])


@dataclass(frozen=True, slots=True)
class Chosen:
    """A device for a request. consumed: what is given of one that is given out in parts; None: all of it."""

    request: str
    pool: str
    device: str
    consumed: Mapping[str, str] | None = None


def choose(
    slices: Sequence[Json],
    in_use: set[tuple[str, str]],
    parts: Parts,
    requests: Mapping[str, Callable[[Json], bool]],
    *,
    amounts: Mapping[str, Mapping[str, str]],
    tolerate: bool = False,
) -> list[Chosen]:
    """First fit, one device per request. amounts: of capacities, by request. LookupError names the request
    that finds none."""
    taken, counters = set(in_use), Counters(slices, in_use)
    chosen: list[Chosen] = []
    for request, takes in requests.items():
        for pool, device in usable_devices(slices):
            key = (pool, device["name"])
            tainted = any(taint["effect"] in BLOCKING for taint in device.get("taints") or [])
            unfit = tainted and not tolerate
            if key in taken or unfit or not counters.allow(pool, device) or not takes(device):
                continue
            consumed = None
            if is_shared(device):
                consumed = parts.take(pool, device, amounts.get(request, {}))
                if consumed is None:
                    continue
            else:
                taken.add(key)
            counters.take(pool, device)
            chosen.append(Chosen(request, *key, consumed))
            break
        else:
            raise LookupError(f"no free device for request {request!r}")
    return chosen
