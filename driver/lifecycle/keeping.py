"""Limits of attached devices over time: a new policy, a restart, and pods that take them off.

Invariant: what is in force follows from record and policy; nothing is remembered here but what the counters
were a moment ago. A device is worked on under its lock, in its own pod, or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from driver.execute.engine import EXPECTED
from driver.execute.target import Target, open_target
from driver.lifecycle.context import Context
from driver.lifecycle.homecoming import Homecoming
from driver.lifecycle.projections import Projections
from driver.limits import Kept, KeptBy
from driver.limits import kept as kept_limits
from driver.model import Attachment, AttachmentId, AttachmentState, Preparation
from driver.plan import Act
from hw.model import Direction

log = logging.getLogger(__name__)

LIMIT_REMOVED = "LimitRemoved"
_MBIT = 125_000
_ABOVE = 1.02
"""What a pod hands over in a second is at most its limit, but for what waits in its queue."""
_WAITING_SECONDS = 0.02

Labels = tuple[str, ...]
"""namespace, pod, claim, device, interface, direction, and for a limit by what it is kept."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """Of one attachment: monotonic time, and what the pod had sent and lost by then."""

    at: float
    sent: int
    dropped: int


class Keeping:
    """Every method but watch and apply_all may be called by any thread."""

    def __init__(self, context: Context, projections: Projections, homecoming: Homecoming) -> None:
        self._context = context
        self._projections = projections
        self._homecoming = homecoming
        self._before: dict[AttachmentId, _Moment] = {}

    async def apply_all(self, *, report: bool) -> None:
        """Make every attached device's limits what they are to be by now, and say so in the statuses."""
        for attachment, _ in self._attached():
            device = attachment.preparation.device
            try:
                await self._context.workers.run([device], partial(self._apply, attachment.id))
            except EXPECTED as error:
                log.error("the limits of %s are as they were: %s", device, error)
        if report:
            for uid in {attachment.preparation.claim_uid for attachment, _ in self._attached()}:
                self._projections.report_claim(uid)

    async def watch(self) -> None:
        """Look at the queues of the pods that send more than their queue would let through."""
        for id in await self._context.workers.run([], self._suspects):
            attachment = self._context.book.attachment(id)
            if attachment is not None:
                await self._context.workers.run([attachment.preparation.device], partial(self._look, id))

    def limits(self) -> Mapping[Labels, float]:
        """Bits per second of every limit that is in force."""
        return {
            (*_labels(attachment, preparation, kept.direction), kept.by.value): kept.rate * 1e6
            for attachment, preparation in self._attached()
            for kept in self._projections.limits_of(preparation)
        }

    def dropped(self) -> Mapping[Labels, float]:
        """Packets that the programs dropped, of every device that has a limit."""
        limited = [each for each in self._attached() if self._projections.limits_of(each[1])]
        found = self._context.accounting.limits.dropped([preparation.slot for _, preparation in limited])
        return {
            _labels(attachment, preparation, direction): found[preparation.slot].packets[direction]
            for attachment, preparation in limited
            if preparation.slot in found
            for direction in Direction
        }

    # --- in a worker ----------------------------------------------------------------------------------

    def _suspects(self) -> tuple[AttachmentId, ...]:
        """Who has sent more since the last time than a queue in place lets through, or was dropped of."""
        limited = [
            (attachment, preparation, kept)
            for attachment, preparation in self._attached()
            if (kept := self._queued(preparation)) is not None
        ]
        slots = [preparation.slot for _, preparation, _ in limited]
        sent = self._context.accounting.read_slots(slots) if slots else {}
        dropped = self._context.accounting.limits.dropped(slots)
        now = self._context.clock.monotonic()
        before, self._before = self._before, {}
        suspects = []
        for attachment, preparation, kept in limited:
            cells = sent[preparation.slot]
            total = sum(cell.bytes for cell in cells if cell.direction == Direction.EGRESS)
            moment = _Moment(now, total, dropped[preparation.slot].packets[Direction.EGRESS])
            self._before[attachment.id] = moment
            last = before.get(attachment.id)
            if last is not None and _is_too_much(last, moment, kept):
                suspects.append(attachment.id)
        return tuple(suspects)

    def _queued(self, preparation: Preparation) -> Kept | None:
        """From record and policy alone: whether there is a detour is ingress's affair, and a call each."""
        found = kept_limits(preparation.config, self._context.policy().qos, detour=False)
        return next((kept for kept in found if kept.by is KeptBy.QUEUE), None)

    def _apply(self, id: AttachmentId) -> None:
        with self._target(id) as target:
            if target is not None:
                shape = partial(self._context.shaper.shape, target)
                self._context.engine.project(str(id), Act.SHAPE, shape)

    def _look(self, id: AttachmentId) -> None:
        with self._target(id) as target:
            if target is None or self._context.shaper.is_shaped(target):
                return
            assert target.attachment is not None
            what = (
                f"the limit of {target.preparation.ifname} was changed from inside of the pod; it is put "
                "back, and the program on the interface let no more than a quarter above it through meanwhile"
            )
            log.warning("pod %s/%s: %s", target.attachment.pod.namespace, target.attachment.pod.name, what)
            self._projections.tell_pod(target.attachment.pod, LIMIT_REMOVED, what)
            self._context.engine.project(str(id), Act.SHAPE, partial(self._context.shaper.shape, target))

    @contextmanager
    def _target(self, id: AttachmentId) -> Iterator[Target | None]:
        """The device in its pod; None if it is there no longer."""
        context = self._context
        attachment = context.book.attachment(id)
        preparation = context.book.preparation(attachment.preparation) if attachment is not None else None
        if attachment is None or preparation is None or attachment.state is not AttachmentState.ATTACHED:
            yield None
            return
        with self._homecoming.netns_of(attachment) as netns:
            if netns is None:
                yield None
                return
            hint = context.devices.hint(preparation)
            with open_target(preparation, attachment, context.host_netns, netns, hint) as target:
                yield target if target.find_in_pod() is not None else None

    def _attached(self) -> list[tuple[Attachment, Preparation]]:
        """Those whose traffic the node's kernel sees, and those whose limit is the device's."""
        book = self._context.book
        return [
            (attachment, preparation)
            for attachment in book.attachments()
            if attachment.state is AttachmentState.ATTACHED
            and (preparation := book.preparation(attachment.preparation)) is not None
        ]


def _is_too_much(last: _Moment, now: _Moment, kept: Kept) -> bool:
    allowed = kept.rate * _MBIT * ((now.at - last.at) * _ABOVE + _WAITING_SECONDS)
    return now.dropped != last.dropped or now.sent - last.sent > allowed


def _labels(attachment: Attachment, preparation: Preparation, direction: Direction) -> Labels:
    pod = attachment.pod
    return (
        *(pod.namespace, pod.name, preparation.claim.name, preparation.key.device),
        *(preparation.pod_ifname or "", direction.name.lower()),
    )
