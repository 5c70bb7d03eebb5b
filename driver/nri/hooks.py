"""One event of the runtime, answered before the runtime gives up, whatever the handler does.

Invariant: a hook is answered by its deadline. A runtime that gets no answer in time lets the pod start as
if there were no plugin, so lateness is an explicit error; the handler's own task is never cancelled for
it, because half-done kernel work must be finished or undone by whoever began it.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from driver.errors import DriverError
from driver.lifecycle.ports import Clock
from driver.nri.transport import Reply
from driver.nri.ttrpc import Code, Response

log = logging.getLogger(__name__)

DEFAULT_REQUEST_TIMEOUT = 2.0
"""Seconds; what runtimes use when they do not say."""
MARGIN_SECONDS = 0.3
MARGIN_SHARE = 0.2


class Outcome(enum.StrEnum):
    OK = "ok"
    REFUSED = "refused"
    """The handler said no, for a reason of its own."""
    ERROR = "error"
    """Something unforeseen, or an event that makes no sense."""
    LATE = "late"
    """Answered by the deadline, not by the handler."""


class HookObserver(Protocol):
    def hook_done(self, event: str, seconds: float, outcome: str) -> None:
        """seconds from reading the request to writing the answer; outcome is one of Outcome."""


def answer_by(received: float, timeout_nano: int, request_timeout: float) -> float:
    """When the answer must be written, on the clock of received.

    timeout_nano as on the wire (0: none, negative: already over), request_timeout in seconds. The margin
    is what the answer's way and a busy event loop may cost.
    """
    budget = request_timeout
    if timeout_nano != 0:
        budget = min(budget, timeout_nano / 1e9)
    return received + budget - min(MARGIN_SECONDS, MARGIN_SHARE * max(budget, 0.0))


class HookRunner:
    """Runs handlers under their deadlines and owns their tasks, also past a connection's end."""

    def __init__(self, clock: Clock, observer: HookObserver | None) -> None:
        self._clock = clock
        self._observer = observer
        self._tasks: set[asyncio.Task[bytes | None]] = set()

    async def run(
        self,
        event: str,
        about: str,
        work: Callable[[float], Awaitable[bytes | None]],
        *,
        received: float,
        deadline: float,
        may_fail: bool,
    ) -> Reply:
        """Await work(deadline), but answer by deadline; with what work returns, if it does so in time.
        may_fail False: the answer is OK in any case, and empty.

        about says which sandbox, for logs.
        """
        what = f"{event} of {about}"
        remaining = deadline - self._clock.monotonic()
        if remaining <= 0 and may_fail:
            return self.reply(event, received, Outcome.LATE, _late(event))
        task = self._start(_awaited(work, deadline), what)
        await asyncio.wait({task}, timeout=max(remaining, 0.0))
        if not task.done():
            log.warning("%s was not done by its deadline; it goes on", what)
            task.add_done_callback(_log_late_end)
            outcome, response = Outcome.LATE, _late(event)
        else:
            outcome, response = _judge(event, what, task)
        return self.reply(event, received, outcome, response if may_fail else Response())

    def reply(self, event: str, received: float, outcome: Outcome, response: Response) -> Reply:
        """An answer that is reported to the observer once it is on its way."""
        observer = self._observer
        if observer is None:
            return Reply(response)

        def report() -> None:
            observer.hook_done(event, self._clock.monotonic() - received, outcome.value)

        return Reply(response, report)

    def background(self, work: Awaitable[None], name: str) -> None:
        """Run work in a task of its own; a failure is logged."""

        async def guarded() -> bytes | None:
            try:
                await work
            except Exception:
                log.exception("%s failed", name)
            return None

        self._start(guarded(), name)

    async def settle(self, seconds: float) -> None:
        """Wait at most so long for what still runs, then cancel it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        left = list(self._tasks)
        for task in left:
            log.error("%s did not end within %g s and is given up", task.get_name(), seconds)
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, bytes | None], name: str) -> asyncio.Task[bytes | None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _awaited(work: Callable[[float], Awaitable[bytes | None]], deadline: float) -> bytes | None:
    return await work(deadline)


def _late(event: str) -> Response:
    text = f"{event}: not done in the time that the runtime allows; asking again may find it done"
    return Response(b"", Code.DEADLINE_EXCEEDED, text)


def _judge(event: str, what: str, task: asyncio.Task[bytes | None]) -> tuple[Outcome, Response]:
    if task.cancelled():
        return Outcome.ERROR, Response(b"", Code.UNKNOWN, f"{event}: interrupted")
    error = task.exception()
    if error is None:
        return Outcome.OK, Response(task.result() or b"")
    if isinstance(error, DriverError):
        log.warning("%s refused: %s", what, error)
        return Outcome.REFUSED, Response(b"", Code.UNKNOWN, str(error))
    log.error("%s failed", what, exc_info=error)
    text = f"{event}: internal error ({type(error).__name__}: {error}); the agent's log says more"
    return Outcome.ERROR, Response(b"", Code.UNKNOWN, text)


def _log_late_end(task: asyncio.Task[bytes | None]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        log.warning("%s ended after its deadline", task.get_name())
    elif isinstance(error, DriverError):
        log.warning("%s ended after its deadline: %s", task.get_name(), error)
    else:
        log.error("%s failed after its deadline", task.get_name(), exc_info=error)
