"""Kubernetes events about claims, pods and the node: folded and rate limited.

Invariant: whatever the lifecycle says however often, the requests made are bounded: equal events are one
object with a count, written again at most once a fold interval; all together stay below the bucket's
rate, and what is over is dropped and counted.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from driver.kube.client import ApiClient, Resource
from driver.kube.failures import ApiFailure, Conflict, Forbidden, Invalid, NotFound
from driver.kube.retry import BackOff
from driver.kube.wire import JsonObject, child, clamp, text, timestamp
from driver.kube.work import Worker
from driver.lifecycle.ports import Clock
from driver.model import ClaimRef, DriverEvent, NodeName, NodeRef, PodRef

log = logging.getLogger(__name__)

QUEUE_MAX = 256
FOLDED_MAX = 512
"""Distinct events remembered for folding; the least recent is forgotten."""
FOLD_SECONDS = 60.0
FORGET_SECONDS = 3600.0
"""The API server drops events after about an hour: then a new object is made."""
BURST = 20.0
PER_SECOND = 0.5
MESSAGE_MAX = 1024
NAME_MAX = 57
"""Bytes of the subject's name kept in the event's: the server cuts the base of generated names at 58."""

FoldKey = tuple[str, str, str, str]
"""Subject UID, kind, reason, message."""


@dataclass(slots=True)
class _Folded:
    event: DriverEvent
    first: float
    last: float
    count: int = 1
    written: int = 0
    """The count the cluster has; 0: no object yet."""
    name: str = ""


class TokenBucket:
    """Pure but for its own state; now is monotonic seconds."""

    def __init__(self, burst: float, per_second: float) -> None:
        self._burst = burst
        self._rate = per_second
        self._tokens = burst
        self._at: float | None = None

    def take(self, now: float) -> bool:
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self._tokens = min(self._burst, self._tokens + elapsed * self._rate)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class KubeEventSink:
    """The port EventSink."""

    def __init__(
        self,
        driver: str,
        node: NodeName,
        client: Callable[[], ApiClient],
        clock: Clock,
        *,
        fold_seconds: float = FOLD_SECONDS,
        back_off: BackOff | None = None,
    ) -> None:
        self._driver = driver
        self._node = node
        self._client = client
        self._clock = clock
        self._fold_seconds = fold_seconds
        self._lock = threading.Lock()
        self._folded: OrderedDict[FoldKey, _Folded] = OrderedDict()
        self._bucket = TokenBucket(BURST, PER_SECOND)
        self.dropped = 0
        """Events that were not even counted in an object: over the rate or the queue."""
        self.worker: Worker[FoldKey, None] = Worker(
            "knd-events", self._write, capacity=QUEUE_MAX, back_off=back_off
        )

    def emit(self, event: DriverEvent) -> None:
        key = (event.subject.uid, event.kind, event.reason, event.message)
        now, wall = self._clock.monotonic(), self._clock.wall()
        with self._lock:
            folded = self._folded.get(key)
            if folded is not None and wall - folded.first < FORGET_SECONDS:
                folded.count += 1
                folded.last = wall
                self._folded.move_to_end(key)
                delay = self._fold_seconds
            elif self._bucket.take(now):
                self._folded[key] = _Folded(event, wall, wall)
                self._folded.move_to_end(key)
                while len(self._folded) > FOLDED_MAX:
                    self._folded.popitem(last=False)
                delay = 0.0
            else:
                self.dropped += 1
                return
        self.worker.nudge(key, None, delay)

    def _write(self, key: FoldKey, _: None) -> None:
        with self._lock:
            folded = self._folded.get(key)
            if folded is None or folded.count == folded.written:
                return
            count, last = folded.count, folded.last
        subject = folded.event.subject
        try:
            if folded.written:
                patch = {"count": count, "lastTimestamp": timestamp(last)}
                self._client().merge(Resource.EVENTS, folded.name, patch, subject.namespace)
            else:
                answer = self._client().create(Resource.EVENTS, self._body(folded, count), subject.namespace)
                folded.name = text(child(answer, "metadata"), "name")
            folded.written = count
        except NotFound:  # the event has expired, or its namespace is going
            with self._lock:
                self._folded.pop(key, None)
        except (Forbidden, Invalid, Conflict) as failure:
            self._give_up(key, failure)

    def _give_up(self, key: FoldKey, failure: ApiFailure) -> None:
        """Events are a courtesy: what the server does not take is not insisted on."""
        log.warning("event %s is not written: %s", key[2], failure)
        with self._lock:
            folded = self._folded.get(key)
            if folded is not None:
                folded.written = folded.count

    def _body(self, folded: _Folded, count: int) -> JsonObject:
        event = folded.event
        subject = event.subject
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "generateName": f"{clamp(subject.name, NAME_MAX)}.",
                "namespace": subject.namespace,
            },
            "involvedObject": _involved(subject),
            "type": event.kind.value,
            "reason": clamp(event.reason, 128),
            "message": clamp(event.message, MESSAGE_MAX),
            "count": count,
            "firstTimestamp": timestamp(folded.first),
            "lastTimestamp": timestamp(folded.last),
            "source": {"component": self._driver, "host": self._node},
            "reportingComponent": self._driver,
            "reportingInstance": self._node,
        }


def _involved(subject: ClaimRef | PodRef | NodeRef) -> JsonObject:
    named: JsonObject = {"name": subject.name, "uid": subject.uid}
    match subject:
        case NodeRef():
            return {"apiVersion": "v1", "kind": "Node", **named}
        case ClaimRef():
            return {
                "apiVersion": "resource.k8s.io/v1",
                "kind": "ResourceClaim",
                "namespace": subject.namespace,
                **named,
            }
        case PodRef():
            return {"apiVersion": "v1", "kind": "Pod", "namespace": subject.namespace, **named}
