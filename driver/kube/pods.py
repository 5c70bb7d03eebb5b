"""The pods of this node and the claims they name: one watch, kept small.

Invariant: claims_of answers only with all of a pod's claims or not at all; of a pod nothing is kept but
what the lifecycle asks for. Reading never blocks; the watch's thread and the look-ups write.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from driver.kube.client import ApiClient, Resource
from driver.kube.failures import ApiFailure, NotFound
from driver.kube.watch import Change
from driver.kube.wire import JsonObject, Malformed, child, children, needed_text, text
from driver.lifecycle.ports import Clock
from driver.model import PodRef, PodUid

log = logging.getLogger(__name__)

LOOKED_UP_MAX = 64
"""Pods known by look-up alone, until the watch has them: more than start at once on a node."""
STATIC_POD_UID = "kubernetes.io/config.hash"
"""On a mirror pod: the UID that the runtime knows its static pod by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPod:
    """claims None: a claim it names has not been made yet. runtime_uid is the sandbox's pod UID."""

    ref: PodRef
    runtime_uid: PodUid
    claims: frozenset[str] | None
    labels: Mapping[str, str]


def parse_pod(raw: JsonObject) -> KnownPod:
    """Malformed for an object that is no pod."""
    metadata = child(raw, "metadata")
    spec = child(raw, "spec")
    uid = PodUid(needed_text(metadata, "uid"))
    static = text(child(metadata, "annotations"), STATIC_POD_UID)
    return KnownPod(
        ref=PodRef(needed_text(metadata, "namespace"), needed_text(metadata, "name"), uid),
        runtime_uid=PodUid(static) if static else uid,
        claims=_claims(spec, child(raw, "status")),
        labels={name: value for name, value in child(metadata, "labels").items() if isinstance(value, str)},
    )


def _claims(spec: JsonObject, status: JsonObject) -> frozenset[str] | None:
    """Names of the claims, by reference, made from templates, or made for extended resources."""
    made = {
        text(entry, "name"): text(entry, "resourceClaimName")
        for entry in children(status, "resourceClaimStatuses")
    }
    names: set[str] = set()
    for entry in children(spec, "resourceClaims"):
        direct = text(entry, "resourceClaimName")
        if direct:
            names.add(direct)
            continue
        name = needed_text(entry, "name")
        if name not in made:
            return None
        if made[name]:  # an entry without a name: no claim was needed
            names.add(made[name])
    extended = text(child(status, "extendedResourceClaimStatus"), "resourceClaimName")
    if extended:
        names.add(extended)
    return frozenset(names)


class KubePodDirectory:
    """The port PodDirectory, and the handler of the pod watch. on_change is called from any thread,
    after what claims_of answers has changed."""

    def __init__(
        self,
        client: Callable[[], ApiClient],
        executor: Executor,
        clock: Clock,
        on_change: Callable[[], None],
    ) -> None:
        self._client = client
        self._executor = executor
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._watched: dict[PodUid, KnownPod] = {}
        self._looked_up: OrderedDict[PodUid, KnownPod] = OrderedDict()
        self._asking: dict[PodUid, asyncio.Future[None]] = {}
        """Look-ups that are under way; touched by the event loop alone."""

    def claims_of(self, uid: PodUid) -> frozenset[str] | None:
        pod = self._find(uid)
        return None if pod is None else pod.claims

    def labels_of(self, uid: PodUid) -> Mapping[str, str]:
        pod = self._find(uid)
        return {} if pod is None else pod.labels

    async def look_up(self, pod: PodRef, deadline: float) -> None:
        left = deadline - self._clock.monotonic()
        if left <= 0:
            return
        work = self._asking.get(pod.uid)
        if work is None:
            try:
                work = asyncio.get_running_loop().run_in_executor(self._executor, self._ask, pod)
            except RuntimeError:  # the executor is shut: the agent is stopping
                return
            self._asking[pod.uid] = work
            work.add_done_callback(lambda _: self._asking.pop(pod.uid, None))
        # The request is not cancelled with us: its answer is still of use to the runtime's retry, which
        # waits for this one rather than make another while the server is slow.
        await asyncio.wait([work], timeout=left)

    def __len__(self) -> int:
        with self._lock:
            return len(self._watched)

    # --- the watch's side ---------------------------------------------------------------------------

    def replaced(self, items: Sequence[KnownPod], version: str) -> None:
        with self._lock:
            before = self._watched
            self._watched = {pod.runtime_uid: pod for pod in items}
            for uid in self._watched:
                self._looked_up.pop(uid, None)
            same = before == self._watched
        if not same:
            self._on_change()

    def changed(self, change: Change, item: KnownPod) -> None:
        with self._lock:
            before = self._watched.get(item.runtime_uid)
            self._looked_up.pop(item.runtime_uid, None)
            if change is Change.DELETED:
                self._watched.pop(item.runtime_uid, None)
                same = before is None
            else:
                self._watched[item.runtime_uid] = item
                same = before == item
        if not same:
            self._on_change()

    # --- look-up ------------------------------------------------------------------------------------

    def _find(self, uid: PodUid) -> KnownPod | None:
        with self._lock:
            watched = self._watched.get(uid)
            looked_up = self._looked_up.get(uid)
        if watched is not None and (watched.claims is not None or looked_up is None):
            return watched
        return looked_up

    def _ask(self, pod: PodRef) -> None:
        try:
            known = parse_pod(self._client().get(Resource.PODS, pod.name, pod.namespace))
        except NotFound:
            return
        except (ApiFailure, Malformed) as failure:
            log.warning("pod %s/%s was not looked up: %s", pod.namespace, pod.name, failure)
            return
        if known.runtime_uid != pod.uid:
            return  # a newer pod of the same name
        with self._lock:
            self._looked_up[pod.uid] = known
            self._looked_up.move_to_end(pod.uid)
            while len(self._looked_up) > LOOKED_UP_MAX:
                self._looked_up.popitem(last=False)
        self._on_change()
