"""Making what is agree with what should be: at start, after Synchronize, and when links change.

Invariant: the journal says what should be, the kernel what is, the runtime's list who lives. Nothing
is undone that the kernel shows alive; and with a journal that is not trusted nothing is undone at all
until the runtime's list has been compared with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from driver.errors import DriverError
from driver.execute.engine import EXPECTED
from driver.journal.store import Journal
from driver.lifecycle.claims import Claims
from driver.lifecycle.context import Context
from driver.lifecycle.gate import Gate
from driver.lifecycle.health import Health
from driver.lifecycle.homecoming import Homecoming
from driver.lifecycle.orphans import Orphans
from driver.lifecycle.projections import Projections
from driver.lifecycle.sandboxes import Sandboxes
from driver.lifecycle.upgrades import Upgrades
from driver.model import (
    Attachment,
    AttachmentState,
    DeviceName,
    Preparation,
    PreparationKey,
    PreparationState,
    Sandbox,
    SandboxId,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

DEVICE_PATIENCE = 20.0
"""Seconds that a pass waits for one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A sandbox of the runtime's list: its live containers, and what was attached when the list came.
    newest: of its pod's sandboxes it is the one that may be given devices."""

    sandbox: Sandbox
    newest: bool
    containers: tuple[str, ...]
    attached: frozenset[PreparationKey]


class Reconcile:
    """Compares and repairs. Its passes never overlap."""

    def __init__(
        self,
        context: Context,
        journal: Journal,
        projections: Projections,
        homecoming: Homecoming,
        claims: Claims,
        sandboxes: Sandboxes,
        gate: Gate,
        orphans: Orphans,
        health: Health,
        upgrades: Upgrades,
    ) -> None:
        self._health = health
        self._orphans = orphans
        self._context = context
        self._upgrades = upgrades
        self._journal = journal
        self._projections = projections
        self._homecoming = homecoming
        self._claims = claims
        self._sandboxes = sandboxes
        self._gate = gate
        self._lane = asyncio.Lock()
        self._nothing_left: object = None
        """The state of the book in which nothing was left to go on with."""
        self._told_bare: set[tuple[SandboxId, str]] = set()
        self._listed: list[Listed] = []

    # --- passes -------------------------------------------------------------------------------------

    async def at_start(self) -> None:
        """Finish or undo what an earlier agent began, before anything new is taken on."""
        async with self._lane:
            if self._gate.recovery:
                return
            if self._journal.state().recovery:
                # Whoever started us goes on without the runtime's word.
                await self._in_worker(self._orphans.find)
                await self._note(self._journal.recovery_done)
            await self._settle()

    async def with_runtime(
        self,
        sandboxes: Sequence[Sandbox],
        containers: Mapping[SandboxId, Sequence[str]],
        attachments: Sequence[Attachment],
    ) -> None:
        """The runtime's list has come: let go of the dead, attach the waiting, report the bare.

        attachments are those there were when the list was made: a sandbox that came later is not in it.
        """
        async with self._lane:
            if self._gate.recovery:
                await self._recover(sandboxes)
            known = {sandbox.id for sandbox in sandboxes}
            for attachment in attachments:
                if attachment.sandbox not in known:
                    await self._on_device(attachment.preparation.unit, self._homeward(attachment))
            self._listed = self._as_listed(sandboxes, containers, attachments)
            self._told_bare &= {(each.sandbox.id, name) for each in self._listed for name in each.containers}
            self.attach_waiting()
            self._projections.offer()

    async def after_change(self, returned: Iterable[DeviceName]) -> None:
        """Links changed: devices may have come home by themselves, or be clean at last."""
        async with self._lane:
            if self._gate.recovery or not self._gate.settled:
                return
            came = set(returned) | await self._in_worker(self._ended_shares)
            for attachment in self._context.book.attachments():
                if attachment.preparation.unit in came or attachment.state is AttachmentState.DETACHING:
                    await self._on_device(attachment.preparation.unit, self._if_home(attachment))
            await self._mend()
            self._give_back()
            self._projections.offer()

    async def again(self) -> None:
        """Go on with what did not work before, if there is anything: nothing else may ever ask for it."""
        book = self._context.book
        if self._is_quiet():
            return
        # Before the look: what changes meanwhile is looked at next time.
        state = book.state
        await self._in_worker(book.catch_up)
        if await self._in_worker(self._orphans.forget_gone):
            self._projections.offer()
        leaving = any(a.state is AttachmentState.DETACHING for a in book.attachments())
        returned = await self._in_worker(self._rdma_returned)
        if leaving or returned or self._unfinished():
            await self.after_change(returned)
        elif not self._may_return_unheard():
            self._nothing_left = state

    def _is_quiet(self) -> bool:
        """Whether it is known that there is nothing to go on with: so it is nearly always."""
        book = self._context.book
        return book.state is self._nothing_left and not book.behind and not book.quarantines()

    def attach_waiting(self) -> None:
        """Queue an attach for every listed sandbox whose pod is known to have devices and has none, and
        tell what ran in it. Sandboxes of pods that are not known yet are looked at again."""
        still_unknown = []
        for listed in self._listed:
            sandbox = listed.sandbox
            belongings = self._sandboxes.known_belongings(sandbox.pod)
            if not listed.attached.issuperset(p.key for p in belongings):
                self._report_bare(listed)
            if listed.newest and not self._sandboxes.is_attached(sandbox, belongings):
                self._sandboxes.attach_late(sandbox)
            if self._context.pods.claims_of(sandbox.pod.uid) is None:
                still_unknown.append(listed)
        self._listed = still_unknown

    def _ended_shares(self) -> frozenset[DeviceName]:
        """What living pods had of a device that is no more, or was away."""
        attached = (a for a in self._context.book.attachments() if a.state is AttachmentState.ATTACHED)
        return frozenset(a.preparation.unit for a in attached if self._homecoming.has_ended(a))

    def _rdma_returned(self) -> frozenset[DeviceName]:
        """RDMA devices without a netdev whose pod's netns died: no link event tells of them."""
        candidates = self._may_return_unheard()
        return frozenset(a.preparation.unit for a in candidates if self._homecoming.is_home(a))

    def _may_return_unheard(self) -> list[Attachment]:
        book = self._context.book
        alone = {p.key for p in book.preparations() if p.rdma_only}
        return [a for a in book.attachments() if a.preparation in alone]

    # --- parts --------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        context = self._context
        await self._try("noting what another version counted", self._upgrades.begin)
        await self._try("taking over devices in pods", self._adopt)
        for attachment in context.book.attachments():
            await self._on_device(attachment.preparation.unit, self._resume_attachment(attachment))
        for preparation in context.book.preparations():
            await self._on_device(preparation.key.unit, self._resume_preparation(preparation))
        await self._try("looking for devices that no record tells of", self._orphans.keep_slots)
        await self._try(
            "sweeping CDI specs and live files", lambda: self._projections.sweep(self._orphans.claims())
        )
        await self._try("ending shares that no record tells of", self._orphans.end_shares)
        await self._try("sweeping programs", self._sweep_programs)
        await self._try("letting go of what another version counted", self._upgrades.finish)
        await self._mend()
        if self._journal.state().boot_changed:
            await self._try("after the reboot", self._forget_before_boot)
            await self._note(self._journal.boot_done)
        self._gate.settled = True
        self._projections.offer()

    def _adopt(self) -> None:
        context, book = self._context, self._context.book
        in_pods = {a.preparation.unit for a in book.attachments() if a.boot_id == context.boot_id}
        # A reboot made every device anew: nothing that is on one is a pod's.
        withheld = frozenset() if self._journal.state().boot_changed else frozenset(book.quarantines())
        context.foreign.adopt(in_pods, withheld)

    def _resume_attachment(self, attachment: Attachment) -> Callable[[], object]:
        def work() -> None:
            if self._context.book.attachment(attachment.id) != attachment:
                return
            preparation = self._context.book.preparation(attachment.preparation)
            with self._homecoming.netns_of(attachment) as netns:
                if preparation is None or netns is None or self._is_over(attachment, preparation):
                    self._homecoming.bring_home(attachment)
                elif attachment.state is AttachmentState.ATTACHING:
                    self._homecoming.undo_attach(attachment, preparation, netns)
                else:
                    self._homecoming.hold(attachment, preparation, netns)
                    self._projections.publish_claim(attachment.preparation.claim_uid)
                    self._projections.report_claim(attachment.preparation.claim_uid)

        return work

    def _is_over(self, attachment: Attachment, preparation: Preparation) -> bool:
        """Whether it is on its way home, or its device is home though its netns lives: its driver was bound
        anew while no agent ran, say."""
        if attachment.state is AttachmentState.ATTACHED:
            at_home = self._context.devices.is_at_home(preparation)
            return at_home or self._homecoming.has_ended(attachment)
        return attachment.state is AttachmentState.DETACHING

    def _resume_preparation(self, preparation: Preparation) -> Callable[[], object]:
        def work() -> None:
            context = self._context
            if context.book.preparation(preparation.key) != preparation:
                return
            if preparation.state is not PreparationState.PREPARED:
                self._claims.finish([preparation])
                return
            if context.book.attachments_of(preparation.key):
                self._homecoming.rearm(preparation, must_be_home=False)
                return
            problems = self._homecoming.make_ready(preparation)
            if problems:
                context.book.quarantine(preparation.key.unit, str(problems[-1].error), context.clock.wall())
            else:
                context.book.release(preparation.key.unit)

        return work

    def _forget_before_boot(self) -> None:
        """A reboot makes every device anew: one that is withheld with no record of it is as good as any."""
        book = self._context.book
        for device in book.quarantines().keys() - {p.key.unit for p in book.preparations()}:
            book.release(device)

    def _sweep_programs(self) -> None:
        context = self._context
        wanted = {p.key.unit for p in context.book.preparations()} | self._orphans.devices()
        for device in context.foreign.devices() - wanted:
            known = context.devices.get(device)
            context.foreign.sweep(device, known.ifindex if known is not None else None)
        programs = context.programs
        if programs is None:
            return
        for name in programs.names():
            if DeviceName(name) not in wanted:
                log.info("removing the programs left on %s", name)
                programs.detach(name)

    async def _recover(self, sandboxes: Sequence[Sandbox]) -> None:
        """The journal was lost or is old; its records came from the mirror. What the runtime and the
        kernel both confirm is kept as it is, and so the rest is known to be over."""
        log.warning("recovery: %s", self._gate.recovery)
        known = {sandbox.id for sandbox in sandboxes}
        confirmed = [
            a for a in self._context.book.attachments() if a.sandbox in known and await self._alive(a)
        ]
        log.warning(
            "recovery: %d of %d attachments confirmed by the runtime and the kernel",
            len(confirmed),
            len(self._context.book.attachments()),
        )
        await self._in_worker(self._orphans.find)
        await self._note(self._journal.recovery_done)
        self._gate.recovery = ""
        await self._settle()

    async def _mend(self) -> None:
        """What is on its way home, or was not clean, and is in no pod."""
        for preparation in (*self._unfinished(), *await self._in_worker(self._made_anew)):
            await self._on_device(preparation.key.unit, self._resume_preparation(preparation))

    def _made_anew(self) -> list[Preparation]:
        """Prepared, in no pod, and not what was prepared any more: its driver was bound anew, or its PF's VFs
        were made anew, by others."""
        book = self._context.book
        return [
            p
            for p in book.preparations()
            if p.state is PreparationState.PREPARED
            and not book.attachments_of(p.key)
            and self._homecoming.is_ended(p)
        ]

    def _give_back(self) -> None:
        """What a living pod lost goes into it again, once it is as it was prepared."""
        book = self._context.book
        for key, sandbox in self._health.to_give_back():
            preparation = book.preparation(key)
            ready = preparation is not None and preparation.state is PreparationState.PREPARED
            if ready and key.unit not in book.quarantines():
                self._sandboxes.attach_late(sandbox)

    def _unfinished(self) -> list[Preparation]:
        book = self._context.book
        quarantined = book.quarantines()
        return [
            p
            for p in book.preparations()
            if (p.state is PreparationState.UNPREPARING or p.key.unit in quarantined)
            and not book.attachments_of(p.key)
        ]

    def _report_bare(self, listed: Listed) -> None:
        sandbox = listed.sandbox
        bare = [name for name in listed.containers if (sandbox.id, name) not in self._told_bare]
        if bare:
            self._told_bare.update((sandbox.id, name) for name in bare)
            self._context.telemetry.ran_bare(len(bare))
            self._projections.tell_pod(
                sandbox.pod,
                "RanWithoutDevices",
                f"ran without the pod's network devices while the agent was away: {', '.join(bare)}",
            )

    def _as_listed(
        self,
        sandboxes: Sequence[Sandbox],
        containers: Mapping[SandboxId, Sequence[str]],
        attachments: Sequence[Attachment],
    ) -> list[Listed]:
        newest = {sandbox.id for sandbox in self._newest_first(sandboxes)}
        attached: dict[SandboxId, set[PreparationKey]] = {}
        for attachment in attachments:
            if attachment.state is AttachmentState.ATTACHED:
                attached.setdefault(attachment.sandbox, set()).add(attachment.preparation)
        return [
            Listed(
                sandbox=sandbox,
                newest=sandbox.id in newest,
                containers=tuple(containers.get(sandbox.id, ())),
                attached=frozenset(attached.get(sandbox.id, ())),
            )
            for sandbox in sandboxes
        ]

    def _newest_first(self, sandboxes: Sequence[Sandbox]) -> list[Sandbox]:
        """One living sandbox per pod: the runtime lists dead ones beside it, and later ones come later."""
        chosen = {}
        for sandbox in sandboxes:
            if sandbox.netns_path is not None and sandbox.netns_path.exists():
                chosen[sandbox.pod.uid] = sandbox
        return list(chosen.values())

    def _homeward(self, attachment: Attachment) -> Callable[[], object]:
        return lambda: self._homecoming.bring_home(attachment)

    def _if_home(self, attachment: Attachment) -> Callable[[], object]:
        """Looked at again under the device's lock: by then it may have gone into a pod."""

        def work() -> None:
            leaving = attachment.state is AttachmentState.DETACHING
            if leaving or self._homecoming.is_home(attachment) or self._homecoming.has_ended(attachment):
                self._note_loss(attachment)
                self._homecoming.bring_home(attachment)

        return work

    def _note_loss(self, attachment: Attachment) -> None:
        """Its netns died and it came home: nothing to tell. Its pod lives: it lost its device."""
        current = self._context.book.attachment(attachment.id)
        preparation = self._context.book.preparation(attachment.preparation)
        if current is None or preparation is None or current.state is not AttachmentState.ATTACHED:
            return
        if self._homecoming.is_alive(current):
            self._health.lose(current, dead=self._homecoming.is_dead(preparation))

    async def _note(self, done: Callable[[], None]) -> None:
        """On a full disk it is done again after the next start, which changes nothing."""
        try:
            await self._in_worker(done)
        except DriverError as error:
            log.warning("%s", error)

    async def _alive(self, attachment: Attachment) -> bool:
        return await self._in_worker(lambda: self._homecoming.is_alive(attachment))

    async def _on_device(self, device: DeviceName, work: Callable[[], object]) -> None:
        """One device's trouble is its own: it is logged, and the pass goes on, at the latest when patience
        with a device that is stuck is over; the work is still done when its turn comes."""
        try:
            patience = self._context.clock.monotonic() + DEVICE_PATIENCE
            await self._context.workers.run_until([device], work, patience)
        except EXPECTED as error:
            log.error("reconciling %s: %s", device, error)

    async def _try(self, what: str, work: Callable[[], None]) -> None:
        """Leftovers are in no pod's way: what does not work is logged, and tried again at the next start."""
        try:
            await self._in_worker(work)
        except EXPECTED as error:
            log.error("%s: %s", what, error)

    async def _in_worker(self, work: Callable[[], T]) -> T:
        return await self._context.workers.run([], work)
