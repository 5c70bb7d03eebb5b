"""Choosing devices as the scheduler does, from what is published.

Invariant: an incomplete pool, an older generation, a tainted or an allocated device is never given out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Json = dict[str, Any]
BLOCKING = ("NoSchedule", "NoExecute")


def allocated(claims: Sequence[Json], driver: str) -> set[tuple[str, str]]:
    """(pool, device) of everything allocated exclusively."""
    return {
        (result["pool"], result["device"])
        for claim in claims
        for result in (claim.get("status") or {}).get("allocation", {}).get("devices", {}).get("results", [])
        if result["driver"] == driver and not result.get("adminAccess")
    }


def usable_devices(slices: Sequence[Json]) -> Iterator[tuple[str, Json]]:
    """Yield (pool, device) of complete pools, in the scheduler's order."""
    pools: dict[str, list[Json]] = {}
    for each in slices:
        pools.setdefault(each["spec"]["pool"]["name"], []).append(each)
    for pool, members in sorted(pools.items()):
        newest = max(each["spec"]["pool"]["generation"] for each in members)
        current = [each for each in members if each["spec"]["pool"]["generation"] == newest]
        if len(current) != current[0]["spec"]["pool"]["resourceSliceCount"]:
            continue
        for each in sorted(current, key=lambda one: str(one["metadata"]["name"])):
            for device in each["spec"].get("devices") or []:
                yield pool, device


def choose(
    slices: Sequence[Json], in_use: set[tuple[str, str]], requests: Mapping[str, Callable[[Json], bool]]
) -> list[tuple[str, str, str, str | None]]:
    """First fit, one device per request. LookupError names the request that finds none."""
    taken = set(in_use)
    chosen: list[tuple[str, str, str, str | None]] = []
    for request, takes in requests.items():
        for pool, device in usable_devices(slices):
            key = (pool, device["name"])
            tainted = any(taint["effect"] in BLOCKING for taint in device.get("taints") or [])
            if key in taken or tainted or not takes(device):
                continue
            taken.add(key)
            chosen.append((request, *key, None))
            break
        else:
            raise LookupError(f"no free device for request {request!r}")
    return chosen
