"""List and watch one kind of object in a thread, for ever.

Invariant: the handler sees a whole list first and then every change in order; after anything that could
have lost a change (410, malformed events, a change of resourceVersion out of reach) it sees a whole list
again. However the server misbehaves, the rate of requests is bounded by the back-off.
"""

from __future__ import annotations

import enum
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from driver.errors import DriverError
from driver.kube.client import ApiClient, Resource, WatchStream
from driver.kube.failures import Gone, NotFound, Throttled, Unavailable
from driver.kube.retry import BackOff, wait_after
from driver.kube.wire import JsonObject, Malformed, child, needed_text, number, text

log = logging.getLogger(__name__)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

HEALTHY_SECONDS = 5.0
"""A watch that lived so long clears the back-off."""


UNSERVED = " (resource.k8s.io/v1 needs Kubernetes 1.34 or later)"


class Change(enum.StrEnum):
    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"


class Handler(Protocol[T_contra]):
    """Called in the watch's thread."""

    def replaced(self, items: Sequence[T_contra], version: str) -> None:
        """This is all there was at that resourceVersion."""

    def changed(self, change: Change, item: T_contra) -> None: ...


class ListWatch(Generic[T]):
    """keep turns a raw object into what the handler gets; a Malformed one is skipped and logged.

    seconds is the least duration asked of one watch; up to twice that is asked, so that nodes spread.
    """

    def __init__(
        self,
        client: Callable[[], ApiClient],
        resource: Resource,
        field_selector: str,
        keep: Callable[[JsonObject], T],
        handler: Handler[T],
        *,
        back_off: BackOff | None = None,
        seconds: int = 300,
    ) -> None:
        self._client = client
        self._resource = resource
        self._selector = field_selector
        self._keep = keep
        self._handler = handler
        self._back_off = back_off or BackOff()
        self._seconds = seconds
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._stream: WatchStream | None = None
        self._version = ""
        """Where the next watch goes on; "" where a list is needed."""
        self._thread = threading.Thread(target=self._run, name=f"knd-watch-{resource.plural}", daemon=False)
        self.error = ""
        """Why the watch does not run now; "" while it does."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        with self._lock:
            if self._stream is not None:
                self._stream.stop()

    def join(self, seconds: float) -> bool:
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self._once()
                attempt = 0 if time.monotonic() - started > HEALTHY_SECONDS else attempt + 1
                pause = self._back_off.delay(attempt) if attempt else random.random()  # noqa: S311 - spreads nodes
            except DriverError as failure:
                attempt = 1 if time.monotonic() - started > HEALTHY_SECONDS else attempt + 1
                pause = self._pause_after(failure, attempt)
            except Exception as failure:
                log.exception("watch of %s: unexpected failure, listing again", self._resource.plural)
                attempt += 1
                self.error, self._version = repr(failure), ""
                pause = self._back_off.slow_delay(attempt)
            self._stopping.wait(pause)

    def _once(self) -> None:
        """One watch, after a list where one is needed."""
        if not self._version:
            self._version = self._list()
        self._watch()

    def _list(self) -> str:
        client = self._client()
        items: list[T] = []
        version = ""
        for page, page_version in client.list_pages(self._resource, self._selector):
            for obj in page:
                try:
                    items.append(self._keep(obj))
                except Malformed as error:
                    log.warning("list of %s: object skipped: %s", self._resource.plural, error)
            version = page_version
        if not version:
            raise Unavailable(f"list {self._resource.plural}", 200, "the list has no resourceVersion")
        self._handler.replaced(items, version)
        return version

    def _watch(self) -> None:
        """Follow changes from self._version on until the stream ends."""
        seconds = self._seconds + random.randrange(self._seconds)  # noqa: S311 - spreads nodes
        stream = self._client().watch(
            self._resource, field_selector=self._selector, resource_version=self._version, seconds=seconds
        )
        with stream:
            with self._lock:
                self._stream = stream
            try:
                if self._stopping.is_set():
                    return
                self.error = ""
                for kind, obj in stream:
                    self._take(kind, obj)
            finally:
                with self._lock:
                    self._stream = None

    def _take(self, kind: str, obj: JsonObject) -> None:
        """Hand one event on and remember its resourceVersion."""
        what = f"watch {self._resource.plural}"
        if kind == "ERROR":
            code, message = number(obj, "code", 500), text(obj, "message") or "no message"
            raise Throttled(what, code, message) if code == 429 else Gone(what, code, message)
        try:
            version = needed_text(child(obj, "metadata"), "resourceVersion")
            if kind != "BOOKMARK":
                self._handler.changed(Change(kind), self._keep(obj))
        except (ValueError, Malformed) as error:
            raise Gone(what, 200, f"an event could not be read, listing again: {error}") from error
        self._version = version

    def _pause_after(self, failure: DriverError, attempt: int) -> float:
        """Seconds. A broken connection goes on from the last event, an expired one from a new list."""
        sentence = f"{failure}{UNSERVED if isinstance(failure, NotFound) else ''}"
        if sentence != self.error:
            log.warning("%s", sentence)
        self.error = sentence
        if isinstance(failure, (Gone, Malformed)):
            self._version = ""
            if attempt == 1:
                return 0.0
        pause = wait_after(failure, attempt, self._back_off)
        return self._back_off.slow_delay(attempt) if pause is None else pause
