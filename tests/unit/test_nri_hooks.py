"""Every hook is answered by its deadline, in words that the runtime can read.

Invariant: deadlines are checked as values; only the tests of lateness itself let time pass, in small budgets.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from driver.errors import ConfigError, FieldProblem, NotNow, OutOfTime, RecoveryMode, Refusal
from driver.nri.hooks import HookRunner, answer_by
from driver.nri.transport import Reply
from driver.nri.ttrpc import Code
from tests.unit.nri_support import RecordingObserver, SystemClock, run, until


@pytest.mark.parametrize(
    ("timeout_nano", "request_timeout", "seconds"),
    [
        (2_000_000_000, 2.0, 1.7),
        (0, 2.0, 1.7),
        (0, 10.0, 9.7),
        (60_000_000_000, 2.0, 1.7),
        (1_000_000_000, 2.0, 0.8),
        (50_000_000, 2.0, 0.04),
        (-1_000_000, 2.0, -0.001),
    ],
)
def test_the_deadline_is_the_smaller_budget_less_a_margin(
    timeout_nano: int, request_timeout: float, seconds: float
) -> None:
    assert answer_by(100.0, timeout_nano, request_timeout) == pytest.approx(100.0 + seconds)


class Harness:
    """Runs one hook with a budget of its own."""

    def __init__(self) -> None:
        self.observer = RecordingObserver()
        self.runner = HookRunner(SystemClock(), self.observer)
        self.began = time.monotonic()

    async def hook(self, work: object, seconds: float = 5.0, *, may_fail: bool = True) -> Reply:
        assert callable(work)
        self.began = time.monotonic()
        reply = await self.runner.run(
            "RunPodSandbox",
            "ns/p",
            work,
            received=self.began,
            deadline=self.began + seconds,
            may_fail=may_fail,
        )
        assert reply.after_write is not None
        reply.after_write()
        return reply


async def fine(deadline: float) -> None:
    return None


def raising(error: BaseException) -> object:
    async def work(deadline: float) -> None:
        raise error

    return work


def test_the_handler_gets_the_deadline_by_which_the_answer_goes_out() -> None:
    seen = []

    async def work(deadline: float) -> None:
        seen.append(deadline)

    async def test() -> None:
        harness = Harness()
        await harness.hook(work, 1.25)
        assert seen == [harness.began + 1.25]

    run(test())


@pytest.mark.parametrize(
    ("error", "code", "text", "outcome"),
    [
        (None, Code.OK, "", "ok"),
        (NotNow("the device is on its way home"), Code.UNKNOWN, "the device is on its way home", "refused"),
        (OutOfTime("too late to begin"), Code.UNKNOWN, "too late to begin", "refused"),
        (Refusal("Held", "held by another pod"), Code.UNKNOWN, "held by another pod", "refused"),
        (RecoveryMode("comparing"), Code.UNKNOWN, "comparing", "refused"),
        (ConfigError([FieldProblem("a.b", "no")]), Code.UNKNOWN, "a.b: no", "refused"),
        (OSError(5, "io"), Code.UNKNOWN, "RunPodSandbox: internal error (OSError: [Errno 5] io)", "error"),
        (asyncio.CancelledError(), Code.UNKNOWN, "RunPodSandbox: interrupted", "error"),
    ],
)
def test_what_the_handler_says_is_what_the_runtime_hears(
    error: BaseException | None, code: Code, text: str, outcome: str
) -> None:
    async def test() -> None:
        harness = Harness()
        reply = await harness.hook(fine if error is None else raising(error))
        assert reply.response.code == code
        assert reply.response.text.startswith(text)
        ((event, seconds, seen),) = harness.observer.done
        assert (event, seen) == ("RunPodSandbox", outcome)
        assert 0 <= seconds < 5

    run(test())


def test_an_unforeseen_error_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        await Harness().hook(raising(KeyError("x")))

    run(test())
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert "ns/p" in record.getMessage()


def test_a_refusal_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        await Harness().hook(raising(NotNow("later")))

    run(test())
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("error", [NotNow("later"), OSError(5, "io"), asyncio.CancelledError()])
def test_a_hook_that_may_not_fail_answers_ok(error: BaseException) -> None:
    async def test() -> None:
        harness = Harness()
        reply = await harness.hook(raising(error), may_fail=False)
        assert reply.response.code == Code.OK
        assert harness.observer.done[0][2] in ("refused", "error")

    run(test())


def test_a_handler_stuck_in_a_thread_is_answered_for_at_the_deadline_and_goes_on() -> None:
    go = threading.Event()
    ended = []

    async def work(deadline: float) -> None:
        await asyncio.to_thread(go.wait, 5)
        ended.append(True)

    async def test() -> None:
        harness = Harness()
        reply = await harness.hook(work, 0.05)
        took = time.monotonic() - harness.began
        assert reply.response.code == Code.DEADLINE_EXCEEDED
        assert 0.05 <= took < 1
        assert harness.observer.done[0][2] == "late"
        assert not ended
        go.set()
        await until(lambda: ended)
        await harness.runner.settle(5)

    run(test())


def test_a_late_hook_that_may_not_fail_answers_ok_at_the_deadline() -> None:
    go = asyncio.Event()

    async def work(deadline: float) -> None:
        await go.wait()

    async def test() -> None:
        harness = Harness()
        reply = await harness.hook(work, 0.02, may_fail=False)
        assert reply.response.code == Code.OK
        assert harness.observer.done[0][2] == "late"
        go.set()
        await harness.runner.settle(5)

    run(test())


@pytest.mark.parametrize(
    ("error", "level"), [(None, logging.WARNING), (NotNow("x"), logging.WARNING), (OSError(5), logging.ERROR)]
)
def test_how_a_late_handler_ended_is_logged(
    error: Exception | None, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    go = asyncio.Event()

    async def work(deadline: float) -> None:
        await go.wait()
        if error is not None:
            raise error

    async def test() -> None:
        harness = Harness()
        await harness.hook(work, 0.01)
        caplog.clear()
        go.set()
        await harness.runner.settle(5)

    run(test())
    (record,) = caplog.records
    assert record.levelno == level
    assert "after its deadline" in record.getMessage()


@pytest.mark.parametrize(("may_fail", "started"), [(True, False), (False, True)])
def test_a_call_already_over_starts_only_what_must_be_done_anyway(may_fail: bool, started: bool) -> None:
    began = []

    async def work(deadline: float) -> None:
        began.append(deadline)

    async def test() -> None:
        harness = Harness()
        reply = await harness.hook(work, -0.5, may_fail=may_fail)
        await harness.runner.settle(5)
        assert bool(began) == started
        assert reply.response.code == (Code.DEADLINE_EXCEEDED if may_fail else Code.OK)

    run(test())


def test_cancelling_the_one_who_waits_does_not_cancel_the_handler() -> None:
    go = asyncio.Event()
    ended = []

    async def work(deadline: float) -> None:
        await go.wait()
        ended.append(True)

    async def test() -> None:
        harness = Harness()
        waiting = asyncio.create_task(harness.hook(work))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        go.set()
        await harness.runner.settle(5)
        assert ended

    run(test())


def test_settling_gives_up_what_never_ends() -> None:
    async def work(deadline: float) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        harness = Harness()
        await harness.hook(work, 0.01)
        await harness.runner.settle(0.01)

    run(test())


def test_background_work_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise OSError(5, "io")

    async def test() -> None:
        runner = HookRunner(SystemClock(), None)
        runner.background(broken(), "Synchronize")
        await runner.settle(5)

    run(test())
    assert "Synchronize failed" in caplog.text
