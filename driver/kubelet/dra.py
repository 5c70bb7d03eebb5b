"""Kubelet's DRA service, both versions from one implementation.

Invariant: a call of kubelet's may end (answered, late, cancelled, connection lost) but what it set
going does not end with it: kubelet repeats the call, and the handler serialises and is idempotent.
Every piece of work is tracked and is over, or cancelled, when `drain` returns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from driver.errors import DriverError
from driver.kubelet.batch import WireClaim, complete, failure, read_batch
from driver.kubelet.observer import CallObserver, Outcome
from driver.kubelet.wire import DIALECTS, PREPARE, UNPREPARE, PrepareAnswers, UnprepareAnswers
from driver.lifecycle.ports import ClaimFailed, ClaimHandler, Clock
from driver.model import ClaimRef, ClaimUid, PreparedDevice

_log = logging.getLogger(__name__)

CALL_SECONDS = 45.0
"""Kubelet's own deadline, taken for callers that set none or a longer one."""
ANSWER_SECONDS = 1.0
"""Kept of it for the answer's way back."""

_T = TypeVar("_T")
# Nothing but the deadline is used of it; requests and responses are already our own values.
_Context = grpc.aio.ServicerContext[Any, Any]
_Call = Callable[[Sequence[ClaimRef], float], Awaitable[Mapping[ClaimUid, _T | ClaimFailed]]]


@dataclass(frozen=True, slots=True)
class Budget:
    """How long the handler may take: seconds from now, and the same on the Clock."""

    seconds: float
    deadline: float

    @classmethod
    def of(cls, remaining: float | None, now: float) -> Budget:
        """remaining is what grpc says of the caller's deadline; None: it set none."""
        whole = CALL_SECONDS if remaining is None else min(remaining, CALL_SECONDS)
        seconds = max(whole - ANSWER_SECONDS, 0.0)
        return cls(seconds, now + seconds)


class DraService:
    """Serves DRAPlugin v1 and v1beta1 by calling a ClaimHandler."""

    def __init__(self, *, handler: ClaimHandler, clock: Clock, observer: CallObserver) -> None:
        self._handler = handler
        self._clock = clock
        self._observer = observer
        self._work: set[asyncio.Task[Any]] = set()

    @property
    def busy(self) -> int:
        """Pieces of work under way, those nobody waits for included."""
        return len(self._work)

    def handlers(self) -> tuple[grpc.GenericRpcHandler[Any, Any], ...]:
        return tuple(
            grpc.method_handlers_generic_handler(
                dialect.service,
                {
                    PREPARE: grpc.unary_unary_rpc_method_handler(
                        self._prepare,
                        request_deserializer=dialect.read_prepare,
                        response_serializer=dialect.write_prepare,
                    ),
                    UNPREPARE: grpc.unary_unary_rpc_method_handler(
                        self._unprepare,
                        request_deserializer=dialect.read_unprepare,
                        response_serializer=dialect.write_unprepare,
                    ),
                },
            )
            for dialect in DIALECTS
        )

    async def drain(self, grace: float) -> None:
        """Wait grace seconds for the work under way, then cancel it and wait as long again."""
        if self._work:
            await asyncio.wait(self._work, timeout=grace)
        for task in self._work:
            task.cancel()
        if self._work:
            _, stuck = await asyncio.wait(self._work, timeout=grace)
            if stuck:
                _log.error("%d calls of kubelet's did not end when cancelled", len(stuck))

    async def _prepare(self, wire: Sequence[WireClaim] | None, context: _Context) -> PrepareAnswers:
        call: _Call[tuple[PreparedDevice, ...]] = self._handler.prepare
        return await self._serve(PREPARE, call, wire, context)

    async def _unprepare(self, wire: Sequence[WireClaim] | None, context: _Context) -> UnprepareAnswers:
        call: _Call[None] = self._handler.unprepare
        return await self._serve(UNPREPARE, call, wire, context)

    async def _serve(
        self, method: str, call: _Call[_T], wire: Sequence[WireClaim] | None, context: _Context
    ) -> dict[ClaimUid, _T | ClaimFailed]:
        started = self._clock.monotonic()
        outcome = Outcome.CANCELLED
        try:
            if wire is None:
                outcome = Outcome.FAILED
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a {method} request")
            batch = read_batch(wire)
            answers: dict[ClaimUid, _T | ClaimFailed] = dict(batch.failed)
            late = False
            if batch.claims:
                budget = Budget.of(context.time_remaining(), started)
                worked, late = await self._work_on(method, call, batch.claims, budget)
                answers.update(worked)
            if late:
                outcome = Outcome.LATE
            elif any(isinstance(answer, ClaimFailed) for answer in answers.values()):
                outcome = Outcome.FAILED
            else:
                outcome = Outcome.OK
            return answers
        finally:
            self._observer.call_done(method, self._clock.monotonic() - started, outcome)

    async def _work_on(
        self, method: str, call: _Call[_T], claims: tuple[ClaimRef, ...], budget: Budget
    ) -> tuple[dict[ClaimUid, _T | ClaimFailed], bool]:
        """The answers, and whether they are only that there is none yet."""
        task = asyncio.create_task(_answer(method, call, claims, budget.deadline), name=method)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        # asyncio.wait leaves the task alone, both at its timeout and when this call is cancelled.
        done, _ = await asyncio.wait({task}, timeout=budget.seconds + ANSWER_SECONDS / 2)
        if not done:
            text = f"not done after {budget.seconds:.0f} s; the work goes on and kubelet will ask again"
            return _all_failed(claims, text), True
        if task.cancelled():
            return _all_failed(claims, "the driver is stopping; kubelet will ask again"), False
        return task.result(), False


async def _answer(
    method: str, call: _Call[_T], claims: tuple[ClaimRef, ...], deadline: float
) -> dict[ClaimUid, _T | ClaimFailed]:
    try:
        return complete(claims, await call(claims, deadline))
    except DriverError as error:
        _log.warning("%s failed for every claim of the request: %s", method, error)
        return _all_failed(claims, str(error))
    except Exception as error:  # noqa: BLE001 - a fault in one call must not cost the others their server
        _log.exception("%s failed for every claim of the request", method)
        return _all_failed(claims, f"internal error in the driver ({type(error).__name__}), see its log")


def _all_failed(claims: tuple[ClaimRef, ...], text: str) -> dict[ClaimUid, _T | ClaimFailed]:
    return {claim.uid: failure(text) for claim in claims}
