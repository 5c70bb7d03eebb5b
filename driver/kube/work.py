"""A thread that works on keyed tasks, each at its own time, retried until done.

Invariant: at most one task per key, newest wins; a failing key never keeps others waiting longer than one
request; the queue is bounded; stop() ends the thread within one request's time-out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from driver.errors import DriverError
from driver.kube.failures import Throttled
from driver.kube.retry import BackOff, wait_after

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    due: float
    attempt: int = 0
    nudged: float | None = None
    """Delay asked for while the key was being worked on."""


class Worker(Generic[K, V]):
    """Calls do(key, value) in its thread for every put.

    do returns None when the key is done, or seconds after which it is to be called again. What it raises
    is retried as retry.wait_after says. Times are of time.monotonic.
    """

    def __init__(
        self,
        name: str,
        do: Callable[[K, V], float | None],
        *,
        capacity: int,
        back_off: BackOff | None = None,
    ) -> None:
        self._do = do
        self._capacity = capacity
        self._back_off = back_off or BackOff()
        self._entries: dict[K, _Entry[V]] = {}
        self._condition = threading.Condition(threading.RLock())
        self._running: _Entry[V] | None = None
        self._stopping = False
        self._hold_until = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)
        self.error = ""
        """Why the last call failed; "" after one that did not."""
        self.dropped = 0
        """Keys refused because the queue was full."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end after the call it is in. Queued keys are forgotten."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended, after at most so many seconds."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def put(self, key: K, value: V, delay: float = 0.0) -> bool:
        """Queue, replacing what is queued for the key. False: full, not taken."""
        with self._condition:
            known = key in self._entries
            if not known and len(self._entries) >= self._capacity:
                self.dropped += 1
                return False
            self._entries[key] = _Entry(value, time.monotonic() + delay)
            self._condition.notify_all()
            return True

    def nudge(self, key: K, value: V, delay: float) -> None:
        """Queue for later, unless the key is queued already: that call will do."""
        with self._condition:
            entry = self._entries.get(key)
            if entry is None:
                self.put(key, value, delay)
            elif entry is self._running:
                entry.nudged = delay

    def forget(self, key: K) -> None:
        with self._condition:
            self._entries.pop(key, None)

    def __len__(self) -> int:
        with self._condition:
            return len(self._entries)

    def _run(self) -> None:
        while (task := self._next()) is not None:
            key, entry = task
            try:
                again = self._do(key, entry.value)
                entry.attempt = 0
                self.error = ""
            except DriverError as failure:
                entry.attempt += 1
                self.error = str(failure)
                again = wait_after(failure, entry.attempt, self._back_off)
                if isinstance(failure, Throttled) and again is not None:
                    self._hold_until = time.monotonic() + again  # the server means all of us, not this key
            except Exception as failure:  # one odd object must not end the thread that serves all
                log.exception("%s: unexpected failure", self._thread.name)
                entry.attempt += 1
                self.error = repr(failure)
                again = self._back_off.slow_delay(entry.attempt)
            self._finish(key, entry, again)

    def _next(self) -> tuple[K, _Entry[V]] | None:
        """The key that is due first, once it is due; None when stopping."""
        with self._condition:
            while not self._stopping:
                if not self._entries:
                    self._condition.wait()
                    continue
                key = min(self._entries, key=lambda each: self._entries[each].due)
                entry = self._entries[key]
                left = max(entry.due, self._hold_until) - time.monotonic()
                if left <= 0:
                    self._running = entry
                    return key, entry
                self._condition.wait(left)
            return None

    def _finish(self, key: K, entry: _Entry[V], again: float | None) -> None:
        with self._condition:
            self._running = None
            if self._entries.get(key) is not entry:
                return  # forgotten or replaced meanwhile
            if again is None:
                again, entry.nudged = entry.nudged, None
            if again is None:
                del self._entries[key]
            else:
                entry.due = time.monotonic() + again
