"""Limits of attached devices over time: a new policy, a restart, and pods that take them off.

Invariant: what is in force follows from record, policy and rules, and is looked up anew when one of them is
another; beside that nothing is remembered here but what the counters were a moment ago. A device is worked on
under its lock, in its own pod, or not at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from bpf.layout import Slot
from driver.execute.engine import EXPECTED
from driver.execute.share import made_past
from driver.execute.target import Target, open_target
from driver.lifecycle.context import Context
from driver.lifecycle.homecoming import Homecoming
from driver.lifecycle.projections import Projections
from driver.limits import Kept
from driver.model import Attachment, AttachmentId, AttachmentState, Preparation
from driver.plan import Act
from hw.model import Direction

log = logging.getLogger(__name__)

LIMIT_REMOVED = "LimitRemoved"
_MBIT = 125_000
_ABOVE = 1.02
"""What a pod hands over is at most its limit over the time, but for what waits in its queue."""
_WAITING_SECONDS = 0.02
_ALL_EVERY = 75
"""Passes of watch, in 30 s, from one look at everybody to the next: of who sends little, only that tells."""

Labels = tuple[str, ...]
"""namespace, pod, claim, device, interface, direction, and for a limit by what it is kept."""


@dataclass(frozen=True, slots=True)
class _Moment:
    """Of one attachment and direction: monotonic time, and the bytes counted and packets dropped by then."""

    at: float
    counted: int
    dropped: int


@dataclass(frozen=True, slots=True)
class _InForce:
    """What was found of everybody at one time, and of which records, policy and rules it was made."""

    made_of: tuple[object, object, object]
    limited: tuple[tuple[Attachment, Preparation, tuple[Kept, ...]], ...]
    queued: tuple[tuple[Attachment, Slot, Kept], ...]
    """What queues keep, each way."""
    departing: tuple[tuple[Attachment, Preparation], ...]


class Keeping:
    """Every method that is no coroutine may be called by any thread."""

    def __init__(self, context: Context, projections: Projections, homecoming: Homecoming) -> None:
        self._context = context
        self._projections = projections
        self._homecoming = homecoming
        self._before: dict[tuple[AttachmentId, Direction], _Moment] = {}
        self._passes = 0
        self._hidden: set[AttachmentId] = set()
        self._known: _InForce | None = None
        self._wake: Callable[[], object] | None = None
        context.book.listen(self._changed)

    async def apply_all(self, *, report: bool) -> None:
        """Make every attached device's limits what they are to be by now, and say so in the statuses."""
        try:
            await self._apply_all(report=report)
        finally:
            self._changed()

    async def _apply_all(self, *, report: bool) -> None:
        for attachment, _ in self._attached():
            device = attachment.preparation.unit
            try:
                await self._context.workers.run([device], partial(self._apply, attachment.id))
            except EXPECTED as error:
                log.error("the limits of %s are as they were: %s", device, error)
        if report:
            for uid in {attachment.preparation.claim_uid for attachment, _ in self._attached()}:
                self._projections.report_claim(uid)

    async def until_worth_a_look(self) -> None:
        """Wait as long as it is known that nobody has a queue. So it is on most nodes, and to look again and
        again would be most of what an agent does at rest."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        self._wake = partial(loop.call_soon_threadsafe, woken.set)
        try:
            # What changed before this look is seen by it, and what changes after it is told.
            while self._has_none():
                await woken.wait()
                woken.clear()
        finally:
            self._wake = None

    def _has_none(self) -> bool:
        known = self._known
        return known is not None and not known.queued and not self._before and self._is_good(known)

    def _changed(self) -> None:
        wake = self._wake
        if wake is not None:
            wake()

    async def watch(self) -> None:
        """Look at the queues of pods that send or get more than a queue would let through; now and then at
        those of all."""
        if self._has_none():
            return
        for id in await self._context.workers.run([], self._suspects):
            attachment = self._context.book.attachment(id)
            if attachment is None:
                continue
            device = attachment.preparation.unit
            try:
                await self._context.workers.run([device], partial(self._look, id))
            except EXPECTED as error:
                log.error("whether %s is kept to its limits is not known: %s", device, error)

    def limits(self) -> Mapping[Labels, float]:
        """Bits per second of every limit that is in force."""
        return {
            (*_labels(attachment, preparation, kept.direction), kept.by.value): kept.rate * 1e6
            for attachment, preparation, limits in self._in_force().limited
            for kept in limits
        }

    def dropped(self) -> Mapping[Labels, float]:
        """Packets that the programs dropped, of every device that has a limit."""
        limited = self._in_force().limited
        found = self._context.accounting.limits.dropped([preparation.slot for _, preparation, _ in limited])
        return {
            _labels(attachment, preparation, direction): found[preparation.slot].packets[direction]
            for attachment, preparation, _ in limited
            if preparation.slot in found
            for direction in Direction
        }

    def waiting(self) -> Mapping[Labels, float]:
        """Seconds that what a pod sends now waits, of every device whose packets are told when to leave."""
        maps = self._context.accounting.limits
        return {
            _labels(attachment, preparation, Direction.EGRESS): seconds
            for attachment, preparation in self._in_force().departing
            if (seconds := maps.waiting(preparation.slot)) is not None
        }

    def _in_force(self) -> _InForce:
        """Asked for several times a second and at each scrape, and the same for hours on most nodes."""
        known = self._known
        if known is None or not self._is_good(known):
            known = self._known = self._look_up()
        return known

    def _is_good(self, known: _InForce) -> bool:
        return all(one is other for one, other in zip(known.made_of, self._sources(), strict=True))

    def _sources(self) -> tuple[object, object, object]:
        context = self._context
        return context.book.state, context.policy(), context.accounting.limits.state

    def _look_up(self) -> _InForce:
        # Before the rest: what changes meanwhile makes this one of no good.
        sources = self._sources()
        attached = self._attached()
        limited = [(a, p, kept) for a, p in attached if (kept := self._projections.limits_of(p))]
        departing = self._context.accounting.limits.departing([p.slot for _, p in attached])
        return _InForce(
            made_of=sources,
            limited=tuple(limited),
            queued=tuple((a, p.slot, each) for a, p, kept in limited for each in kept if each.by.cooperative),
            departing=tuple((a, p) for a, p in attached if p.slot in departing),
        )

    # --- in a worker ----------------------------------------------------------------------------------

    def _suspects(self) -> tuple[AttachmentId, ...]:
        """Who has more counted since the last time than a queue in place lets through, or was dropped of; or
        everybody who has a queue."""
        queued = self._in_force().queued
        slots = sorted({slot for _, slot, _ in queued})
        counted = self._context.accounting.read_slots(slots) if slots else {}
        dropped = self._context.accounting.limits.dropped(slots)
        now = self._context.clock.monotonic()
        before, self._before = self._before, {}
        self._hidden &= {attachment.id for attachment, _, _ in queued}
        self._passes += 1
        everybody = self._passes % _ALL_EVERY == 0
        suspects: dict[AttachmentId, None] = {}
        for attachment, slot, kept in queued:
            total = sum(cell.bytes for cell in counted[slot] if cell.direction == kept.direction)
            moment = _Moment(now, total, dropped[slot].packets[kept.direction])
            key = (attachment.id, kept.direction)
            self._before[key] = moment
            last = before.get(key)
            if everybody or (last is not None and _is_too_much(last, moment, kept)):
                suspects[attachment.id] = None
        return tuple(suspects)

    def _apply(self, id: AttachmentId) -> None:
        with self._target(id) as target:
            if target is not None:
                shape = partial(self._context.shaper.shape, target)
                self._context.engine.project(str(id), Act.SHAPE, shape)

    def _look(self, id: AttachmentId) -> None:
        with self._target(id) as target:
            if target is None:
                self._look_for(id)
                return
            self._hidden.discard(id)
            self._end_made_past(target)
            if self._context.shaper.is_shaped(target):
                return
            assert target.attachment is not None
            self._tell(
                target.attachment,
                f"the limit of {target.preparation.pod_ifname} was changed from inside of the pod; it is put "
                "back, and the program on the interface let at most a quarter above it through meanwhile",
            )
            self._context.engine.project(str(id), Act.SHAPE, partial(self._context.shaper.shape, target))

    def _end_made_past(self, target: Target) -> None:
        assert target.attachment is not None
        for link in made_past(target, self._context.book.indices()):
            assert target.pod is not None
            target.pod.delete(link.ifindex)
            self._tell(
                target.attachment,
                f"{link.kind} {link.name!a}, made from inside of the pod on the device underneath its "
                f"{target.preparation.pod_ifname}, is removed: what it sent was neither counted nor limited",
            )

    def _look_for(self, id: AttachmentId) -> None:
        """It is not where it was put. At home, or gone, it is others' affair; where its pod hid it there is
        none of its queues, and none can be made."""
        found = self._records(id)
        if found is None or id in self._hidden:
            return
        attachment, preparation = found
        if not self._homecoming.is_hidden(preparation):
            return
        self._hidden.add(id)
        self._tell(
            attachment,
            f"{preparation.pod_ifname} was taken to another network namespace from inside of the pod, where "
            "it has no queue: the program on the interface lets at most a quarter above its limits through",
        )

    def _tell(self, attachment: Attachment, what: str) -> None:
        log.warning("pod %s/%s: %s", attachment.pod.namespace, attachment.pod.name, what)
        self._projections.tell_pod(attachment.pod, LIMIT_REMOVED, what)

    @contextmanager
    def _target(self, id: AttachmentId) -> Iterator[Target | None]:
        """The device in its pod; None if it is there no longer."""
        context, found = self._context, self._records(id)
        if found is None:
            yield None
            return
        attachment, preparation = found
        with self._homecoming.netns_of(attachment) as netns:
            if netns is None:
                yield None
                return
            hint = context.devices.hint(preparation)
            with open_target(preparation, attachment, context.host_netns, netns, hint) as target:
                yield target if target.find_in_pod() is not None else None

    def _records(self, id: AttachmentId) -> tuple[Attachment, Preparation] | None:
        attachment = self._context.book.attachment(id)
        if attachment is None or attachment.state is not AttachmentState.ATTACHED:
            return None
        preparation = self._context.book.preparation(attachment.preparation)
        return (attachment, preparation) if preparation is not None else None

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
    return now.dropped != last.dropped or now.counted - last.counted > allowed


def _labels(attachment: Attachment, preparation: Preparation, direction: Direction) -> Labels:
    pod = attachment.pod
    return (
        *(pod.namespace, pod.name, preparation.claim.name, preparation.key.device),
        *(preparation.pod_ifname or "", direction.name.lower()),
    )
