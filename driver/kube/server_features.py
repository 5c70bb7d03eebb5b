"""What the API server can do beyond what every one of its kind can, found by trials that leave nothing.

Invariant: a field of a feature that is off is dropped without a word, so nothing that needs one is offered
before a trial showed that it is kept; and it is offered no more once an answer shows that it was dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from driver.kube.client import ApiClient, Resource
from driver.kube.failures import Invalid
from driver.kube.slice_plan import Content, Pool, counter_trials, sharing_trial
from driver.kube.wire import JsonObject, Malformed, child, children

log = logging.getLogger(__name__)

_OF_SHARES = frozenset({"allowMultipleAllocations", "requestPolicy"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFeatures:
    """None: it was not asked yet."""

    has_counters: bool | None = None
    """Whether it keeps shared counters."""
    has_shares: bool | None = None
    """Whether it lets several claims have parts of one device."""

    def in_doubt(self) -> ServerFeatures:
        """After a new list, since it may be another server, or a newer one: what it lacked is asked again."""
        return ServerFeatures(has_counters=self.has_counters or None, has_shares=self.has_shares or None)


def lost(known: ServerFeatures, dropped: Collection[str], *, sets: bool) -> ServerFeatures:
    """What is known after an answer that lacks these fields of devices, or counter sets: it had them when it
    was asked."""
    counters = sets or "consumesCounters" in dropped
    return ServerFeatures(
        has_counters=False if counters else known.has_counters,
        has_shares=False if _OF_SHARES.intersection(dropped) else known.has_shares,
    )


def ask_for_counters(client: ApiClient, pool: Pool) -> bool:
    try:
        kept = [_tried(client, body) for body in counter_trials(pool)]
    except (Invalid, Malformed) as error:
        log.warning("the API server has no shared counters as they are needed: %s", error)
        return False
    has = bool(kept[0].counters) and bool(kept[1].devices[0].get("consumesCounters"))
    if not has:
        log.warning(
            "the API server keeps no shared counters (DRAPartitionableDevices): PFs that have VFs are "
            "not offered beside them, nor VFs beyond what their PF gives out"
        )
    return has


def ask_for_shares(client: ApiClient, pool: Pool) -> bool:
    try:
        (device,) = _tried(client, sharing_trial(pool)).devices
        capacity = child(child(device, "capacity"), "trial")
    except (Invalid, Malformed) as error:
        log.warning("the API server gives out no devices in shares as it is needed: %s", error)
        return False
    has = bool(device.get("allowMultipleAllocations")) and bool(capacity.get("requestPolicy"))
    if not has:
        log.warning(
            "the API server gives a device to one claim alone (DRAConsumableCapacity): those that the node "
            "policy gives out in shares are not offered"
        )
    return has


def _tried(client: ApiClient, body: JsonObject) -> Content:
    spec = child(client.try_create(Resource.RESOURCE_SLICES, body), "spec")
    return Content(tuple(children(spec, "devices")), tuple(children(spec, "sharedCounters")))
