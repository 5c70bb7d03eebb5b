"""Blocking work off the event loop, one operation at a time per device.

Invariant: an operation's devices stay locked until its thread is done, also when whoever waited for it
gave up; so the next event of a device always finds the one before it finished or undone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Generic, TypeVar

from driver.clock import Clock
from driver.errors import NotNow
from driver.execute.engine import EXPECTED, Token
from driver.model import DeviceName

log = logging.getLogger(__name__)

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class KeyedLocks(Generic[K]):
    """A lock per key, there only while someone holds it or waits for it. First come, first served."""

    def __init__(self) -> None:
        self._locks: dict[K, asyncio.Lock] = {}
        self._users: dict[K, int] = {}

    def __len__(self) -> int:
        return len(self._locks)

    def __contains__(self, key: K) -> bool:
        return key in self._locks

    @asynccontextmanager
    async def hold(self, key: K) -> AsyncIterator[None]:
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] = self._users.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]


class DeviceWorkers:
    """A pool of threads and a lock per device."""

    def __init__(self, clock: Clock, *, threads: int = 8) -> None:
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="knd-device")
        self._locks: KeyedLocks[DeviceName] = KeyedLocks()
        self._tasks: set[asyncio.Task[object]] = set()

    def is_busy(self, device: DeviceName) -> bool:
        """Whether something is done to it now, or waits to be."""
        return device in self._locks

    async def run(self, devices: Iterable[DeviceName], work: Callable[[], T]) -> T:
        """Run work in a thread while holding the devices. Cancelling the caller does not stop it."""
        return await asyncio.shield(self._start(devices, work))

    async def run_until(
        self,
        devices: Iterable[DeviceName],
        work: Callable[[], T],
        deadline: float,
        token: Token | None = None,
    ) -> T:
        """As run, but NotNow at the deadline: the token is revoked and the work goes on to its undo.

        Work whose deadline has passed already is started all the same, with its token revoked.
        """
        remaining = deadline - self._clock.monotonic()
        task = self._start(devices, work)
        # Without an await the task has not begun when its token is revoked below.
        if remaining > 0:
            done, _ = await asyncio.wait({task}, timeout=remaining)
            if done:
                return task.result()
        if token is not None:
            token.revoke()
        raise NotNow("the node did not finish in the time allowed; it goes on or undoes by itself")

    async def idle(self, deadline: float) -> bool:
        """Wait until nothing runs; False if something still did at the deadline."""
        while self._tasks:
            remaining = deadline - self._clock.monotonic()
            if remaining <= 0:
                return False
            await asyncio.wait(self._tasks, timeout=remaining)
        return True

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _start(self, devices: Iterable[DeviceName], work: Callable[[], T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(self._locked(sorted(set(devices)), work))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def _locked(self, devices: list[DeviceName], work: Callable[[], T]) -> T:
        async with AsyncExitStack() as stack:
            # In one order for everyone, so that no two wait for each other.
            for device in devices:
                await stack.enter_async_context(self._locks.hold(device))
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        # Looking at it marks it as seen: whoever waited may have given up, and then nobody else does.
        error = task.exception()
        if error is not None and not isinstance(error, EXPECTED):
            log.error("work on a device failed", exc_info=error)
