"""Blocking work off the event loop, one operation at a time per device.

Invariant: an operation's devices stay locked until its thread is done, also when whoever waited for it
gave up; so the next event of a device always finds the one before it finished or undone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import TypeVar

from driver.clock import Clock
from driver.errors import NotNow
from driver.execute.engine import Token
from driver.model import DeviceName

T = TypeVar("T")


class DeviceWorkers:
    """A pool of threads and a lock per device."""

    def __init__(self, clock: Clock, *, threads: int = 8) -> None:
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="knd-device")
        self._locks: dict[DeviceName, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[object]] = set()

    async def run(self, devices: Iterable[DeviceName], work: Callable[[], T]) -> T:
        """Run work in a thread while holding the devices. Cancelling the caller does not stop it."""
        task = asyncio.get_running_loop().create_task(self._locked(sorted(set(devices)), work))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def run_until(
        self,
        devices: Iterable[DeviceName],
        work: Callable[[], T],
        deadline: float,
        token: Token | None = None,
    ) -> T:
        """As run, but NotNow at the deadline: the token is revoked and the work goes on to its undo."""
        remaining = deadline - self._clock.monotonic()
        try:
            return await asyncio.wait_for(self.run(devices, work), max(remaining, 0.0))
        except TimeoutError:
            if token is not None:
                token.revoke()
            raise NotNow(
                "the node did not finish in the time allowed; it goes on or undoes by itself"
            ) from None

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

    async def _locked(self, devices: list[DeviceName], work: Callable[[], T]) -> T:
        async with AsyncExitStack() as stack:
            for device in devices:
                await stack.enter_async_context(self._locks.setdefault(device, asyncio.Lock()))
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Marks an error as seen when the caller has given up; it was logged where it happened.
            task.exception()
