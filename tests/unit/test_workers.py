"""Device workers: one operation at a time per device, whoever waits for it; nothing is left of a lock."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable

import pytest

from driver.clock import SystemClock
from driver.errors import NotNow, OutOfTime
from driver.execute.engine import Token
from driver.lifecycle.workers import DeviceWorkers, KeyedLocks
from driver.model import DeviceName
from tests.conftest import WaitUntilAsync

A, B, C = DeviceName("dev-a"), DeviceName("dev-b"), DeviceName("dev-c")
FAR = 30.0


class Gated:
    """Work that reports when it is in a thread and goes on when told."""

    def __init__(self, answer: str = "", error: BaseException | None = None) -> None:
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.ended = threading.Event()
        self._answer = answer
        self._error = error

    def __call__(self) -> str:
        self.started.set()
        assert self.go_on.wait(FAR)
        self.ended.set()
        if self._error is not None:
            raise self._error
        return self._answer


def play(story: Callable[[DeviceWorkers], Awaitable[None]], *, threads: int = 8) -> None:
    async def run() -> None:
        workers = DeviceWorkers(SystemClock(), threads=threads)
        try:
            await story(workers)
            assert await workers.idle(SystemClock().monotonic() + FAR)
            assert len(workers._locks) == 0, "a lock outlived its last user"
        finally:
            workers.close()

    asyncio.run(run())


def test_two_operations_of_one_device_never_overlap(wait_until_async: WaitUntilAsync) -> None:
    async def story(workers: DeviceWorkers) -> None:
        first, second = Gated("first"), Gated("second")
        running = asyncio.create_task(workers.run([A, B], first))
        await wait_until_async(first.started.is_set)
        waiting = asyncio.create_task(workers.run([B, C], second))
        # C is free and B is not: holding on to C must not let the work begin.
        unrelated = Gated("else")
        unrelated.go_on.set()
        assert await workers.run([DeviceName("dev-d")], unrelated) == "else"
        assert not second.started.is_set()
        first.go_on.set()
        second.go_on.set()
        assert await running == "first"
        assert await waiting == "second"

    play(story)


def test_crossed_sets_of_devices_do_not_wait_for_each_other_for_ever() -> None:
    async def story(workers: DeviceWorkers) -> None:
        done = await asyncio.wait_for(
            asyncio.gather(*(workers.run([A, B] if n % 2 else [B, A], lambda n=n: n) for n in range(40))),
            FAR,
        )
        assert done == list(range(40))

    play(story)


def test_waiting_for_a_device_takes_no_thread_from_the_others(wait_until_async: WaitUntilAsync) -> None:
    async def story(workers: DeviceWorkers) -> None:
        stuck = Gated()
        tasks = [asyncio.create_task(workers.run([A], stuck))]
        await wait_until_async(stuck.started.is_set)
        tasks += [asyncio.create_task(workers.run([A], lambda: "later")) for _ in range(20)]
        assert await asyncio.wait_for(workers.run([B], lambda: "now"), FAR) == "now"
        stuck.go_on.set()
        await asyncio.gather(*tasks)

    play(story, threads=2)


def test_a_caller_that_gives_up_leaves_the_device_locked_until_the_work_is_done(
    wait_until_async: WaitUntilAsync,
) -> None:
    async def story(workers: DeviceWorkers) -> None:
        work, after = Gated(), Gated("after")
        after.go_on.set()
        token = Token(SystemClock())
        with pytest.raises(NotNow, match="did not finish in the time allowed"):
            await workers.run_until([A], work, SystemClock().monotonic() + 0.05, token)
        with pytest.raises(OutOfTime, match="overtaken"):
            token.check(0.0)
        second = asyncio.create_task(workers.run([A], after))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(second), 0.05)
        assert not after.started.is_set()
        work.go_on.set()
        assert await second == "after"
        assert work.ended.is_set()

    play(story)


def test_a_cancelled_caller_does_not_stop_the_work(wait_until_async: WaitUntilAsync) -> None:
    async def story(workers: DeviceWorkers) -> None:
        for start in (
            lambda work: workers.run([A], work),
            lambda work: workers.run_until([A], work, SystemClock().monotonic() + FAR),
        ):
            work = Gated()
            caller = asyncio.create_task(start(work))
            await wait_until_async(work.started.is_set)
            caller.cancel()
            with pytest.raises(asyncio.CancelledError):
                await caller
            after = asyncio.create_task(workers.run([A], work.ended.is_set))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(after), 0.05)
            work.go_on.set()
            assert await after

    play(story)


def test_work_whose_deadline_is_over_finds_its_token_revoked_before_it_begins() -> None:
    async def story(workers: DeviceWorkers) -> None:
        token = Token(SystemClock())
        seen: list[str] = []

        def work() -> None:
            try:
                token.check(0.0)
            except OutOfTime as error:
                seen.append(str(error))

        with pytest.raises(NotNow):
            await workers.run_until([A], work, SystemClock().monotonic() - 1.0, token)
        await workers.run([A], lambda: None)
        assert seen == ["the operation was overtaken by a newer one"]

    play(story)


def test_the_works_own_error_reaches_the_caller_as_it_is() -> None:
    async def story(workers: DeviceWorkers) -> None:
        def times_out() -> None:
            raise TimeoutError("the kernel did not answer")

        token = Token(SystemClock())
        with pytest.raises(TimeoutError, match="the kernel did not answer"):
            await workers.run_until([A], times_out, SystemClock().monotonic() + FAR, token)
        token.check(0.0)

    play(story)


def test_a_bug_in_work_that_nobody_waits_for_any_more_is_logged(
    wait_until_async: WaitUntilAsync, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(workers: DeviceWorkers) -> None:
        bug, refusal = Gated(error=AssertionError("a bug")), Gated(error=NotNow("an ordinary refusal"))
        for work in (bug, refusal):
            with pytest.raises(NotNow):
                await workers.run_until([A], work, SystemClock().monotonic() + 0.02)
            work.go_on.set()
            await workers.run([A], lambda: None)

    with caplog.at_level(logging.ERROR):
        play(story)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "a bug"


def test_idle_says_whether_something_still_ran_at_the_deadline(wait_until_async: WaitUntilAsync) -> None:
    async def story(workers: DeviceWorkers) -> None:
        assert await workers.idle(SystemClock().monotonic())
        work = Gated()
        running = asyncio.create_task(workers.run([A], work))
        await wait_until_async(work.started.is_set)
        assert not await workers.idle(SystemClock().monotonic() + 0.02)
        work.go_on.set()
        assert await workers.idle(SystemClock().monotonic() + FAR)
        await running

    play(story)


def test_a_keyed_lock_is_one_lock_for_all_who_come_before_it_is_free() -> None:
    """The last user takes the entry away, and nobody earlier: a new one beside it would be a second lock."""

    async def run() -> None:
        locks: KeyedLocks[str] = KeyedLocks()
        inside = 0
        most = 0

        async def use(pauses: int) -> None:
            nonlocal inside, most
            async with locks.hold("k"):
                inside += 1
                most = max(most, inside)
                for _ in range(pauses):
                    await asyncio.sleep(0)
                inside -= 1

        tasks = [asyncio.create_task(use(n % 3)) for n in range(30)]
        tasks[7].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 1
        assert len(locks) == 0

    asyncio.run(run())
