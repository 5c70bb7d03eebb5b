"""Keeps the cluster's ResourceSlices equal to what this node offers.

Invariant: nothing is written before the first offer and before the cluster's slices are known, nothing when
they say what is offered, and nothing at stop: the last good slices outlive a restart. What others do to
them is put right, ever more slowly if they keep doing it.
"""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from driver.kube.client import ApiClient, Resource
from driver.kube.failures import Conflict, Invalid, NotFound, Unavailable
from driver.kube.retry import BackOff
from driver.kube.server_features import ServerFeatures, ask_for_counters, ask_for_shares, lost
from driver.kube.slice_cache import SliceCache
from driver.kube.slice_device import counter_sets, describe_all, without_counters, without_shared
from driver.kube.slice_plan import (
    Content,
    Existing,
    Pool,
    SlicePlan,
    Write,
    dropped_fields,
    fingerprint,
    parse_slice,
    plan_slices,
)
from driver.kube.watch import Change
from driver.kube.wire import JsonObject, Malformed, child, needed_text
from driver.kube.work import Worker
from driver.model import NodeName, OfferedDevice

log = logging.getLogger(__name__)

REMEMBERED_MAX = 256
_DEVICE_FIELD = re.compile(r"spec\.devices\[(\d+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds. heal: how long after somebody else's change, at least and at most; it doubles up to
    2 ** heal_doublings times while changes come closer together than calm."""

    heal: tuple[float, float] = (1.0, 5.0)
    heal_doublings: int = 5
    calm: float = 300.0
    between_offers: float = 1.0


class KubeSlicePublisher:
    """The port SlicePublisher, and the handler of the slice watch."""

    def __init__(
        self,
        driver: str,
        node: NodeName,
        client: Callable[[], ApiClient],
        *,
        pace: Pace | None = None,
        back_off: BackOff | None = None,
    ) -> None:
        self._pool = Pool(driver=driver, node=node)
        self._client = client
        self._pace = pace or Pace()
        self._cache = SliceCache()
        self._offered: tuple[OfferedDevice, ...] | None = None
        self._described: tuple[tuple[OfferedDevice, ...], ServerFeatures, Content] | None = None
        self._adopted: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._node_uid = ""
        self._heals = 0
        self._healed_at = -math.inf
        self._tried_at = -math.inf
        self._published: tuple[OfferedDevice, ...] | None = None
        self.problems: tuple[str, ...] = ()
        """What of the last offer had to be left out or cut, a sentence each."""
        self.dropped: tuple[str, ...] = ()
        """Device fields that the API server does not keep."""
        self.server = ServerFeatures()
        self.worker: Worker[str, None] = Worker("knd-slices", self._work, capacity=1, back_off=back_off)

    @property
    def field_selector(self) -> str:
        return f"spec.driver={self._pool.driver},spec.nodeName={self._pool.node}"

    @property
    def published(self) -> bool:
        """The last offer is what the cluster has."""
        return self._offered is not None and self._published is self._offered

    def offer(self, devices: Sequence[OfferedDevice]) -> None:
        offered = tuple(devices)
        if offered != self._offered:
            self._offered = offered
            self._soon()

    # --- the watch's side ---------------------------------------------------------------------------

    def replaced(self, items: Sequence[Existing], version: str) -> None:
        first = not self._cache.synced
        if self._cache.replaced(items, version):
            if first:
                self._soon()
            else:
                self._heal()
        if not first and self.server != self.server.in_doubt():
            self.server = self.server.in_doubt()
            self._soon()

    def changed(self, change: Change, item: Existing) -> None:
        if self._cache.changed(change, item):
            if change is Change.DELETED:
                self._node_uid = ""  # perhaps collected with its Node, whose successor has another UID
            self._heal()

    def _soon(self) -> None:
        wait = self._tried_at + self._pace.between_offers - time.monotonic()
        self.worker.put(self._pool.name, None, max(0.0, wait))

    def _heal(self) -> None:
        if self._offered is None:
            return
        self._published = None
        now = time.monotonic()
        self._heals = 0 if now - self._healed_at > self._pace.calm else self._heals
        low, high = self._pace.heal
        factor = 2 ** min(self._heals, self._pace.heal_doublings)
        self.worker.nudge(self._pool.name, None, random.uniform(low, high) * factor)  # noqa: S311 - spreads nodes

    # --- the worker's side --------------------------------------------------------------------------

    def _work(self, _key: str, _value: None) -> float | None:
        offered = self._offered
        if offered is None or not self._cache.synced:
            return None  # the first offer or the first list comes back here
        self._ask(offered)
        wanted = self._wanted(offered)
        plan = plan_slices(self._pool, self._cache.snapshot(), wanted.devices, self._adopted, wanted.counters)
        if plan:
            self._tried_at = time.monotonic()
            try:
                self._carry_out(plan)
            except Conflict:
                self._list_again()
                raise
            except Invalid as failure:
                if not self._refuse(failure):
                    log.error("ResourceSlices of %s are not taken: %s", self._pool.name, failure)
                    raise
                return 0.0
        self._published = offered
        return None

    def _ask(self, offered: tuple[OfferedDevice, ...]) -> None:
        """Before anything depends on it: what the server does not know it drops without a word."""
        if self.server.has_counters is None and any(each.uses for each in offered):
            self.server = replace(self.server, has_counters=ask_for_counters(self._client(), self._pool))
        if self.server.has_shares is None and any(each.requests for each in offered):
            self.server = replace(self.server, has_shares=ask_for_shares(self._client(), self._pool))

    def _wanted(self, offered: tuple[OfferedDevice, ...]) -> Content:
        """Devices and the counter sets that they use."""
        known = self._described
        if known is None or known[0] is not offered or known[1] != self.server:
            shown = offered if self.server.has_shares else without_shared(offered)
            shown = shown if self.server.has_counters else without_counters(shown)
            devices, problems = describe_all(shown)
            for problem in problems:
                if problem not in self.problems:
                    log.warning("%s", problem)
            self.problems = problems
            known = self._described = (offered, self.server, Content(devices, counter_sets(shown)))
        content = known[2]
        if not self._refused:
            return content
        kept = tuple(
            each for each in content.devices if self._refused.get(each["name"]) != fingerprint([each])
        )
        return Content(kept, content.counters)

    def _carry_out(self, plan: SlicePlan) -> None:
        self._count_heal()
        client = self._client()
        for existing in plan.deletes:
            try:
                client.delete(
                    Resource.RESOURCE_SLICES,
                    existing.name,
                    uid=existing.uid,
                    resource_version=existing.version,
                )
            except NotFound:
                log.debug("slice %s was gone already", existing.name)
            self._cache.removed(existing)
        for write in plan.updates:
            assert write.existing is not None
            try:
                answer = client.replace(Resource.RESOURCE_SLICES, write.existing.name, write.body)
            except NotFound as failure:
                self._cache.removed(write.existing)
                raise Conflict(failure.what, failure.status, failure.message) from failure
            except Invalid as failure:
                raise _RefusedWrite(failure, write) from failure
            self._take(write, answer)
        for write in plan.creates:
            try:
                answer = client.create(Resource.RESOURCE_SLICES, self._owned(write.body))
            except Invalid as failure:
                raise _RefusedWrite(failure, write) from failure
            self._take(write, answer)

    def _count_heal(self) -> None:
        """Writes that follow each other closely make the next healing slower."""
        now = time.monotonic()
        self._heals = self._heals + 1 if now - self._healed_at < self._pace.calm else 0
        self._healed_at = now

    def _owned(self, body: JsonObject) -> JsonObject:
        """With this node as owner: the slice goes when the Node object goes."""
        if not self._node_uid:
            try:
                node = self._client().get(Resource.NODES, self._pool.node)
                self._node_uid = needed_text(child(node, "metadata"), "uid")
            except NotFound as failure:
                raise Unavailable(
                    failure.what, 404, f"there is no Node {self._pool.node}: is the node name right?"
                ) from failure
        owner = {
            "apiVersion": "v1",
            "kind": "Node",
            "name": self._pool.node,
            "uid": self._node_uid,
            "controller": True,
        }
        return {**body, "metadata": {**body["metadata"], "ownerReferences": [owner]}}

    def _take(self, write: Write, answer: JsonObject) -> None:
        """Remember what the server made of a write; adopt it where it is not what was sent."""
        try:
            stored = parse_slice(answer)
        except Malformed as error:
            raise Unavailable(
                "write resourceslices", 200, f"the answer is no ResourceSlice: {error}"
            ) from error
        self._cache.wrote(stored)
        if write.content.says(stored.content):
            return
        if len(self._adopted) >= REMEMBERED_MAX:
            self._adopted.clear()
        self._adopted[write.content.fingerprint] = stored.content.fingerprint
        fields = dropped_fields(write.content.devices, stored.devices)
        known = self.server
        self.server = lost(known, fields, sets=bool(write.content.counters and not stored.content.counters))
        if self.server != known:
            self._soon()
        if fields != self.dropped:
            self.dropped = fields
            what = ", ".join(fields) or "parts"
            log.error(
                "the API server drops %s of devices, as for a feature that is off: left as stored", what
            )

    def _refuse(self, failure: Invalid) -> bool:
        """Leave out the devices the server names. False: it names none, or none anew."""
        if not isinstance(failure, _RefusedWrite):
            return False
        if len(self._refused) >= REMEMBERED_MAX:
            self._refused.clear()
        found = False
        for index in {int(match[1]) for field in failure.fields if (match := _DEVICE_FIELD.match(field))}:
            if index < len(failure.write.content.devices):
                device = failure.write.content.devices[index]
                log.error("device %s is not offered: the API server refuses it: %s", device["name"], failure)
                self._refused[device["name"]] = fingerprint([device])
                found = True
        return found

    def _list_again(self) -> None:
        """What is known is stale: read all of it."""
        items: list[Existing] = []
        version = ""
        for page, page_version in self._client().list_pages(Resource.RESOURCE_SLICES, self.field_selector):
            items += [parse_slice(raw) for raw in page]
            version = page_version
        self._cache.replaced(items, version)


class _RefusedWrite(Invalid):
    """An Invalid with the write it was about."""

    def __init__(self, failure: Invalid, write: Write) -> None:
        super().__init__(failure.what, failure.status, failure.message, failure.fields)
        self.write = write
