"""The Kubernetes side of the agent as one object: threads, queues and the ports they serve.

Invariant: the event loop never waits for the API server: what may block runs in threads, what comes back is
marshalled to the loop. Everything may be called before the API server was ever reached, and nothing that
others do waits for it. Leaving the context ends every thread within a bound.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol

from driver.kube.claims import KubeClaimReader
from driver.kube.client import ApiClient, Limits, Resource, connect
from driver.kube.events import KubeEventSink
from driver.kube.failures import ApiFailure
from driver.kube.pods import KubePodDirectory, parse_pod
from driver.kube.retry import BackOff
from driver.kube.server_features import ServerFeatures
from driver.kube.slice_plan import parse_slice
from driver.kube.slices import KubeSlicePublisher, Pace
from driver.kube.status import KubeStatusWriter
from driver.kube.watch import ListWatch
from driver.lifecycle.ports import ClaimReader, Clock, EventSink, PodDirectory, SlicePublisher, StatusWriter
from driver.model import NodeName

log = logging.getLogger(__name__)

READERS = 4
"""Claims and pods read at the same time."""
STOP_SECONDS = 15.0
"""A thread may be inside a request: its connect and read time-outs, and some."""


class Stoppable(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None: ...

    def join(self, seconds: float) -> bool: ...


class Connector:
    """Makes the client when it is first needed, in the thread that needs it."""

    def __init__(self, kubeconfig: Path | None, limits: Limits) -> None:
        self._kubeconfig = kubeconfig
        self._limits = limits
        self._lock = threading.Lock()
        self._client: ApiClient | None = None
        self._error = ""

    def client(self) -> ApiClient:
        """Blocks while the client package is imported; Unavailable while there is no usable config."""
        with self._lock:
            if self._client is None:
                try:
                    self._client = connect(self._kubeconfig, self._limits)
                except ApiFailure as failure:
                    self._error = str(failure)
                    raise
                self._error = ""
            return self._client

    @property
    def error(self) -> str:
        client = self._client
        return self._error if client is None else client.last_error

    @property
    def requests(self) -> Mapping[str, int]:
        client = self._client
        return {} if client is None else client.requests

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


class KubeHub:
    """Use with `async with`. kubeconfig None: the pod's service account."""

    claims: ClaimReader
    pods: PodDirectory
    statuses: StatusWriter
    events: EventSink
    slices: SlicePublisher

    def __init__(
        self,
        *,
        driver: str,
        node: NodeName,
        kubeconfig: Path | None,
        clock: Clock,
        on_pods_changed: Callable[[], None],
        limits: Limits | None = None,
        back_off: BackOff | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._connector = Connector(kubeconfig, limits or Limits())
        self._on_pods_changed = on_pods_changed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = threading.Event()
        self._readers = ThreadPoolExecutor(READERS, "knd-kube-read")
        client = self._connector.client
        self._statuses = KubeStatusWriter(driver, client, clock, back_off)
        self._events = KubeEventSink(driver, node, client, clock, back_off=back_off)
        self._slices = KubeSlicePublisher(driver, node, client, pace=pace, back_off=back_off)
        self._pods = KubePodDirectory(client, self._readers, clock, self._pods_changed)
        self._pod_watch = ListWatch(
            client, Resource.PODS, f"spec.nodeName={node}", parse_pod, self._pods, back_off=back_off
        )
        self._slice_watch = ListWatch(
            client,
            Resource.RESOURCE_SLICES,
            self._slices.field_selector,
            parse_slice,
            self._slices,
            back_off=back_off,
        )
        self.claims = KubeClaimReader(driver, client, self._readers, self._statuses.seen)
        self.pods = self._pods
        self.statuses = self._statuses
        self.events = self._events
        self.slices = self._slices

    async def __aenter__(self) -> KubeHub:
        self._loop = asyncio.get_running_loop()
        for part in self._parts():
            part.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop = None
        for part in self._parts():
            part.stop()
        self._readers.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._join)
        self._connector.close()

    @property
    def slices_published(self) -> bool:
        """The last offer is what the cluster has. False before the first offer."""
        return self._slices.published

    @property
    def server(self) -> ServerFeatures:
        """What the API server can do of what offers need."""
        return self._slices.server

    @property
    def slice_problems(self) -> tuple[str, ...]:
        """What of the last offer had to be left out or cut, and what the server does not keep."""
        dropped = self._slices.dropped
        return self._slices.problems + (
            (f"the API server does not keep {', '.join(dropped)}",) if dropped else ()
        )

    @property
    def api_error(self) -> str:
        """Why the API server cannot be used as needed, "" while it can."""
        watches = self._pod_watch.error or self._slice_watch.error
        return self._connector.error or watches or self._slices.worker.error

    @property
    def requests(self) -> Mapping[str, int]:
        """Requests made since start by `verb resource`."""
        return self._connector.requests

    @property
    def events_dropped(self) -> int:
        return self._events.dropped + self._events.worker.dropped

    def _parts(self) -> Sequence[Stoppable]:
        workers = (self._statuses.worker, self._events.worker, self._slices.worker)
        return (self._pod_watch, self._slice_watch, *workers)

    def _join(self) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        for part in self._parts():
            if not part.join(max(0.1, deadline - time.monotonic())):
                log.error("a thread of the Kubernetes client does not end, leaving it behind")

    def _pods_changed(self) -> None:
        """From any thread. Many changes that the loop has not yet been told of are told once."""
        loop = self._loop
        if loop is None or self._told.is_set():
            return
        self._told.set()
        try:
            loop.call_soon_threadsafe(self._tell)
        except RuntimeError:  # the loop is closed
            self._told.clear()

    def _tell(self) -> None:
        self._told.clear()
        if self._loop is not None:
            self._on_pods_changed()
