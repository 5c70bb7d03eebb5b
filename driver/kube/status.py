"""status.devices of ResourceClaims, by server-side apply.

Invariant: every apply carries all entries this driver has in the claim and nothing else; what the cluster
has already is not written again; a claim that is gone or replaced ends the matter. Nothing here can hold
up a pod.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from driver.errors import DriverError
from driver.kube.client import ApiClient, Resource
from driver.kube.failures import ApiFailure, Conflict, Forbidden, Invalid, NotFound
from driver.kube.retry import BackOff
from driver.kube.wire import JsonObject, Malformed, child, children, clamp, needed_text, text, timestamp
from driver.kube.work import Worker
from driver.lifecycle.ports import Clock
from driver.model import ClaimRef, ClaimUid, DeviceStatus
from hw.model import InterfaceAddress

log = logging.getLogger(__name__)

API_VERSION = "resource.k8s.io/v1"
READY = "Ready"
HEALTHY = "Healthy"
MESSAGE_MAX = 1024
"""Bytes; the API takes 32 KiB, a reader does not."""
QUEUE_MAX = 4096
"""Claims: far more than a node can hold, so a full queue means a fault of ours."""
REMEMBERED_MAX = 1024
IPS_MAX = 16
"""Of an interface, as the API takes them."""

REASON = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
UID_FIELD = "metadata.uid"
"""What the server calls immutable when an apply is for another object of the name."""
ALLOCATION_FIELD = "status.allocation"
"""What the server calls immutable when it cannot write the claim back as it was: it keeps the parameters of a
config as the bytes they came in, and makes compact JSON with sorted keys of them when a status is changed
(seen on 1.37). Whoever made the claim is the only one who can mend that."""
UNNAMED = "Reported"
"""Instead of a reason the API would not take: one bad word must not cost the whole status."""

Entries = tuple[JsonObject, ...]
"""This driver's entries of status.devices, sorted by key."""


def entries_of(statuses: Sequence[DeviceStatus], driver: str, before: Entries, now: float) -> Entries:
    """The entries to own. A condition that keeps its status keeps its lastTransitionTime from before;
    now is seconds since the epoch."""
    times = {(_key(entry), *state): time for entry in before for state, time in _transitions(entry)}
    entries = [_entry(status, driver, times, now) for status in statuses]
    return tuple(sorted(entries, key=_key))


def _entry(
    status: DeviceStatus, driver: str, times: Mapping[tuple[tuple[str, ...], str, str], str], now: float
) -> JsonObject:
    entry: JsonObject = {"driver": driver, "pool": status.pool, "device": status.device}
    if status.share_id is not None:
        entry["shareID"] = status.share_id
    key = _key(entry)
    entry["conditions"] = [
        {**condition, "lastTransitionTime": times.get((key, *_state(condition))) or timestamp(now)}
        for condition in _conditions(status)
    ]
    network: JsonObject = {}
    if status.interface is not None:
        network["interfaceName"] = status.interface
    if status.mac is not None:
        network["hardwareAddress"] = status.mac
    if status.addresses:
        network["ips"] = _ips(status.addresses)
    if network:
        entry["networkData"] = network
    data = _data(status)
    if data:
        entry["data"] = data
    return entry


def _data(status: DeviceStatus) -> JsonObject:
    """What is this driver's own to shape. An IPoIB interface is here and not in networkData: that is one
    interface, and whoever reads it would take the addresses for those of the device's own. At most some
    1 KiB, of the 10 that the API takes."""
    data: JsonObject = {"accountingHook": status.hook} if status.hook else {}
    if status.ipoib is not None and status.partition is not None:
        child: JsonObject = {
            "interfaceName": status.ipoib.name,
            "partition": f"{status.partition:#06x}",
            "mode": status.ipoib.mode.value,
        }
        if status.ipoib.addresses:
            child["ips"] = _ips(status.ipoib.addresses)
        data["ipoib"] = child
    return data


def _ips(addresses: Sequence[InterfaceAddress]) -> list[str]:
    return list(dict.fromkeys(str(address) for address in addresses))[:IPS_MAX]


def _conditions(status: DeviceStatus) -> list[JsonObject]:
    reason = status.reason if REASON.fullmatch(status.reason) else UNNAMED
    found = [_condition(READY, status.ready, reason, status.message)]
    ill = status.unhealthy
    if ill is not None:
        found.append(_condition(HEALTHY, not ill, "Unhealthy" if ill else "Healthy", ill))
    return found


def _condition(kind: str, holds: bool, reason: str, message: str) -> JsonObject:
    return {
        "type": kind,
        "status": "True" if holds else "False",
        "reason": reason,
        "message": clamp(message, MESSAGE_MAX),
    }


def own_entries(claim: JsonObject, driver: str) -> Entries:
    """What the cluster has of this driver. Malformed if it cannot be read."""
    entries = children(child(claim, "status"), "devices")
    return tuple(sorted((each for each in entries if text(each, "driver") == driver), key=_key))


def apply_body(claim: ClaimRef, entries: Entries) -> JsonObject:
    """Only owned fields. The UID makes the apply fail (422, not 409) on a claim that has taken the name."""
    return {
        "apiVersion": API_VERSION,
        "kind": "ResourceClaim",
        "metadata": {"name": claim.name, "namespace": claim.namespace, "uid": claim.uid},
        "status": {"devices": list(entries)},
    }


def _key(entry: JsonObject) -> tuple[str, ...]:
    return tuple(text(entry, field) for field in ("driver", "pool", "device", "shareID"))


def _state(condition: JsonObject) -> tuple[str, str]:
    return text(condition, "type"), text(condition, "status")


def _transitions(entry: JsonObject) -> list[tuple[tuple[str, str], str]]:
    return [
        (_state(condition), text(condition, "lastTransitionTime"))
        for condition in children(entry, "conditions")
    ]


@dataclass(frozen=True, slots=True)
class _Wanted:
    claim: ClaimRef
    statuses: tuple[DeviceStatus, ...]


class KubeStatusWriter:
    """The port StatusWriter."""

    def __init__(
        self, driver: str, client: Callable[[], ApiClient], clock: Clock, back_off: BackOff | None = None
    ) -> None:
        self._driver = driver
        self._client = client
        self._clock = clock
        self._lock = threading.Lock()
        self._have: OrderedDict[ClaimUid, Entries] = OrderedDict()
        self._said: OrderedDict[str, None] = OrderedDict()
        self.worker: Worker[ClaimUid, _Wanted] = Worker(
            "knd-status", self._write, capacity=QUEUE_MAX, back_off=back_off
        )

    def write_status(self, claim: ClaimRef, statuses: Sequence[DeviceStatus]) -> None:
        if not statuses:
            self.worker.forget(claim.uid)
            with self._lock:
                self._have.pop(claim.uid, None)
        elif not self.worker.put(claim.uid, _Wanted(claim, tuple(statuses))):
            log.error(
                "status of claim %s/%s is not written: too many are waiting", claim.namespace, claim.name
            )

    def seen(self, claim: ClaimRef, raw: JsonObject) -> None:
        """A claim was read: what it says of us need not be asked again."""
        try:
            self._remember(claim.uid, own_entries(raw, self._driver))
        except Malformed as error:
            log.warning("status.devices of claim %s/%s: %s", claim.namespace, claim.name, error)

    def _write(self, uid: ClaimUid, wanted: _Wanted) -> None:
        claim = wanted.claim
        shown = f"{claim.namespace}/{claim.name}"
        try:
            have = self._known(claim)
            entries = entries_of(wanted.statuses, self._driver, have, self._clock.wall())
            if entries == have:
                return
            body = apply_body(claim, entries)
            answer = self._client().apply(
                Resource.RESOURCE_CLAIMS,
                claim.name,
                body,
                namespace=claim.namespace,
                subresource="status",
                manager=self._driver,
            )
            if own_entries(answer, self._driver) != entries:
                self._say_once(f"claim {shown}: the API server keeps status.devices otherwise than sent")
            self._remember(uid, entries)
        except (NotFound, _Replaced):
            self._forget(uid)
        except Conflict:
            self._forget(uid)  # read it again: replaced, or only changed meanwhile
            raise
        except (Forbidden, Invalid) as failure:
            if isinstance(failure, Invalid) and UID_FIELD in failure.fields:
                self._forget(uid)  # another claim has the name now
                return
            if isinstance(failure, Invalid) and ALLOCATION_FIELD in failure.fields:
                self._say_once(
                    f"claim {shown} cannot be told its status, the pod is not affected: its config, or its "
                    "class's, has parameters with white space or unsorted keys, which the API server does "
                    "not write back as they were; make such objects with kubectl, which sends them in order"
                )
                return
            self._say_once(f"status of claim {shown} is not taken, the pod is not affected: {failure}")
            raise

    def _known(self, claim: ClaimRef) -> Entries:
        """What the cluster has of ours: remembered, else read."""
        with self._lock:
            if claim.uid in self._have:
                self._have.move_to_end(claim.uid)
                return self._have[claim.uid]
        raw = self._client().get(Resource.RESOURCE_CLAIMS, claim.name, claim.namespace)
        try:
            if needed_text(child(raw, "metadata"), "uid") != claim.uid:
                raise _Replaced("the name belongs to another claim now")
            entries = own_entries(raw, self._driver)
        except Malformed as error:
            raise ApiFailure(f"get resourceclaims {claim.namespace}/{claim.name}", 200, str(error)) from error
        self._remember(claim.uid, entries)
        return entries

    def _remember(self, uid: ClaimUid, entries: Entries) -> None:
        with self._lock:
            self._have[uid] = entries
            self._have.move_to_end(uid)
            while len(self._have) > REMEMBERED_MAX:
                self._have.popitem(last=False)

    def _forget(self, uid: ClaimUid) -> None:
        with self._lock:
            self._have.pop(uid, None)

    def _say_once(self, sentence: str) -> None:
        """Only the worker's thread comes here."""
        if sentence not in self._said:
            log.error("%s", sentence)
            self._said[sentence] = None
            while len(self._said) > REMEMBERED_MAX:
                self._said.popitem(last=False)


class _Replaced(DriverError):
    """The claim this was for is gone."""
