"""The lifecycle as one object: what the adapters call, and what runs by itself between calls.

Invariant: this is the only caller of plan and execute and the only writer of states.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial

from driver.clock import beat
from driver.execute.engine import EXPECTED
from driver.journal.store import Journal
from driver.lifecycle.abilities import VfAbilities
from driver.lifecycle.claims import Claims
from driver.lifecycle.context import Context
from driver.lifecycle.gate import Gate
from driver.lifecycle.health import Health, HealthFeed
from driver.lifecycle.homecoming import Homecoming
from driver.lifecycle.keeping import Keeping
from driver.lifecycle.metering import Metering
from driver.lifecycle.orphans import Orphans
from driver.lifecycle.ports import ClaimFailed
from driver.lifecycle.projections import Projections
from driver.lifecycle.provisioning import Provisioning
from driver.lifecycle.reconcile import Reconcile
from driver.lifecycle.relations import sharing
from driver.lifecycle.reporters import watch_reporters
from driver.lifecycle.resources import Resources
from driver.lifecycle.sandboxes import Sandboxes
from driver.lifecycle.upgrades import Upgrades
from driver.lifecycle.usage import Usage
from driver.model import (
    Adjustment,
    Attachment,
    ClaimRef,
    ClaimUid,
    Container,
    DeviceName,
    PreparedDevice,
    Sandbox,
    SandboxId,
)
from driver.qos import class_maps
from hw.model import Identity, IfIndex, LinkInfo
from hw.netns import travelling

log = logging.getLogger(__name__)

AGAIN_EVERY = 5.0
"""Seconds between tries to finish what a full disk or a pod's leftovers held up. Costs nothing else."""
VFS_AGAIN_EVERY = 30.0
"""Seconds between looks whether VFs can be made by now, while there are some to be made."""
CHECKPOINT_EVERY = 60.0
"""Seconds between ledger checkpoints: a crash loses at most this much, and the gap is recorded."""
PRUNE_EVERY = 86400.0
"""Seconds between looks at the ledger for what is too old."""
LIMITS_EVERY = 0.4
"""Seconds between looks at whether pods keep to their limits: counters only, unless one does not. The look
after the next sees a whole one without them: a limit taken off under traffic is told within a second."""
METERS_EVERY = 30.0
"""Seconds between readings of what devices count themselves: a thread goes from pod to pod."""
LAST_CHECKPOINT = 5.0
"""Seconds for the one at a stop."""


class Lifecycle:
    """Implements ports.ClaimHandler and ports.SandboxHandler."""

    def __init__(self, context: Context, journal: Journal, usage: Usage, metering: Metering) -> None:
        self._context = context
        self._journal = journal
        self.gate = Gate(journal.state().recovery)
        self.hook = context.hook
        self._projections = Projections(context)
        self._homecoming = Homecoming(context, self._projections)
        self._health = Health(context, self._projections, self._homecoming, self.gate)
        self._orphans = Orphans(context, self._projections, usage)
        self._claims = Claims(context, self._projections, self._homecoming, self.gate, self._orphans)
        self._sandboxes = Sandboxes(
            context, self._projections, self._homecoming, self.gate, usage, self._health
        )
        self._upgrades = Upgrades(context)
        self._reconcile = Reconcile(
            context,
            journal,
            self._projections,
            self._homecoming,
            self._claims,
            self._sandboxes,
            self.gate,
            self._orphans,
            self._health,
            self._upgrades,
        )
        self._provisioning = Provisioning(
            context, self._projections, self.gate, lambda: self.links_changed(None)
        )
        self.keeping = Keeping(context, self._projections, self._homecoming)
        self._usage = usage
        self._metering = metering
        self.resources = Resources(context.book, context.rdma.host, context.paths.proc)
        self._abilities = VfAbilities(context)
        self._makes_vfs = False
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life of the agent ----------------------------------------------------------------------------

    async def start(self, *, make_vfs: bool = True) -> None:
        """Look at the node, make the VFs that the policy asks for, and settle what an earlier agent left.
        Then the adapters may be started."""
        await self._context.workers.run([], self._context.devices.rescan)
        if make_vfs:
            await self._provisioning.at_start(self._spawn(self._provisioning.run))
            self._spawn(lambda: _every(VFS_AGAIN_EVERY, self._provisioning.again))
        self._makes_vfs = make_vfs
        await self._ask_drivers()
        # What is unwell now must not be offered as well for a moment.
        await self._health.ask_reporters()
        await self._health.look()
        if self._journal.state().boot_changed:
            await self._context.workers.run([], self._usage.machine_restarted)
        await self._reconcile.at_start()
        self._health.nudge()
        self._spawn(self._health.run)
        self._spawn(lambda: watch_reporters(self._health.ask_reporters))
        await self._context.workers.run([], self._usage.started)
        self._spawn(lambda: _every(PRUNE_EVERY, self._prune, at_once=True))
        self._spawn(lambda: _every(CHECKPOINT_EVERY, self._checkpoint))
        self._spawn(lambda: _every(METERS_EVERY, self._read_meters, at_once=True))
        self._spawn(lambda: _every(AGAIN_EVERY, self._reconcile.again))
        self._spawn(self._keep_limits)

    async def _keep_limits(self) -> None:
        """The policy may have changed while no agent ran."""
        await self.keeping.apply_all(report=False)

        async def look() -> None:
            await self.keeping.until_worth_a_look()
            await self.keeping.watch()

        await _every(LIMITS_EVERY, look)

    async def stop(self, deadline: float) -> None:
        """Nothing half done: wait for what is in hand; attached devices stay as they are, counted."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._sandboxes.close()
        workers = self._context.workers
        if not await workers.idle(deadline):
            log.error("stopping with work still in hand; the next start settles it")
        try:
            last = self._context.clock.monotonic() + LAST_CHECKPOINT
            await workers.run_until([], self._usage.checkpoint, last)
        except EXPECTED as error:
            log.error("the last usage checkpoint: %s", error)
        self._homecoming.close()
        self._context.workers.close()

    def device_counts(self) -> Mapping[str, int]:
        """Devices by what they are now, for the gauge."""
        book = self._context.book
        devices = self._context.devices.current()
        held = {p.key.unit for p in book.preparations()}
        return {
            "offered": sum(not d.withheld for d in devices.values()),
            "withheld": sum(bool(d.withheld) for d in devices.values()),
            "prepared": len(held),
            "attached": len({a.preparation.unit for a in book.attachments()}),
            "quarantined": len(book.quarantines()),
        }

    def port_bandwidth(self) -> Mapping[tuple[str, ...], float]:
        """Bits per second that PFs give out in sizes, and devices in shares, and that claims have of them,
        for the gauge."""
        found: dict[str, tuple[int, int]] = {
            port: (budget.of, budget.given) for port, budget in sharing(self._context).budgets().items()
        }
        parts = [p for p in self._context.book.preparations() if p.share is not None]
        for device in self._context.devices.current().values():
            if device.sharable is not None:
                given = sum(p.size or 0 for p in parts if p.key.device == device.name)
                found[device.name] = (device.sharable.bandwidth, given)
        return {
            (port, part): number * 1e6
            for port, pair in found.items()
            for part, number in zip(("budget", "given"), pair, strict=True)
        }

    @property
    def health(self) -> HealthFeed:
        """What kubelet is told of the devices."""
        return self._health.feed

    def unhealthy_counts(self) -> Mapping[str, int]:
        """Devices that are unwell by what they have, for the gauge."""
        return self._health.counts()

    def attached_pods(self) -> tuple[str, ...]:
        """Pods that have devices of ours, as namespace/name."""
        pods = {a.pod for a in self._context.book.attachments()}
        return tuple(sorted(f"{pod.namespace}/{pod.name}" for pod in pods))

    async def release_all(self) -> tuple[str, ...]:
        """Take every claim back, whatever lives; returns what did not come home, a sentence each."""
        await self._claims.release_all()
        await self._context.workers.run([], self._orphans.end_all)
        left = [f"{p.key.unit} did not come home" for p in self._context.book.preparations()]
        left += [f"{q.device}: {q.reason}" for q in self._context.book.quarantines().values()]
        return tuple(left)

    async def remove_vfs(self) -> tuple[str, ...]:
        """Unmake the VFs that were made here; returns what stays, a sentence each."""
        return await self._provisioning.remove_all()

    def is_strange(self, link: LinkInfo) -> bool:
        """Whether a link of the host's that has changed to this is none of ours: nothing to look at."""
        return self._context.devices.is_strange(link)

    async def links_changed(self, changed: frozenset[IfIndex] | None) -> None:
        """None: events were lost, look at everything."""
        context = self._context
        returned = None
        if changed is not None:
            seen = await context.workers.run([], lambda: context.devices.look(changed, self._away))
            if not seen.rescan and not seen.returned:
                return
            returned = None if seen.rescan else seen.returned
        if returned is None:
            await context.workers.run([], context.devices.rescan)
            returned = frozenset(self._away())
            self._look_after_vfs()
            self._spawn(self._ask_abilities)
            # Before it is mended: a pod that lost its device for a moment lost it.
            await self._health.look()
        await self._reconcile.after_change(returned)
        self._health.holders_changed()

    async def _ask_abilities(self) -> None:
        if await self._ask_drivers():
            self._projections.offer()

    async def _ask_drivers(self) -> bool:
        """Not while it is not known who has what, nor by who only takes devices back."""
        return self._makes_vfs and not self.gate.recovery and await self._abilities.run()

    def _look_after_vfs(self) -> None:
        """In a task of its own: it may take long, and nobody waits for it."""
        if self._makes_vfs:
            self._spawn(self._provisioning.run)

    def _away(self) -> dict[DeviceName, Identity]:
        """The devices that are in pods."""
        book = self._context.book
        return {
            a.preparation.unit: p.identity
            for a in book.attachments()
            if (p := book.preparation(a.preparation)) is not None
        }

    async def policy_changed(self) -> None:
        """Offer by the new policy, make VFs by it, and count and limit by it from now on."""
        self._provisioning.policy_changed()
        await self._context.workers.run([], self._set_classes)
        await self._context.workers.run([], lambda: self._context.rdma.apply(self._context.policy().rdma))
        await self.keeping.apply_all(report=True)
        await self.links_changed(None)

    def _set_classes(self) -> None:
        classes = class_maps(self._context.policy().classes)
        self._usage.set_class_names(classes.names)
        self._context.accounting.set_classes(classes.dscp, classes.pcp)

    async def _prune(self) -> None:
        await self._context.workers.run([], self._usage.prune)

    async def _read_meters(self) -> None:
        settled = self.gate.settled and not self.gate.recovery

        def read() -> None:
            self._metering.settle(self._homecoming.reach, all_known=settled)
            self.resources.look(self._homecoming.reach)

        # One thread that goes from pod to pod: 256 of them took ten times as long to start as to do this.
        await self._context.workers.run([], partial(travelling, read))

    async def _checkpoint(self) -> None:
        await self._context.workers.run([], self._usage.checkpoint)
        if self.gate.settled and not self.gate.recovery:
            await self._context.workers.run([], self._upgrades.let_go)

    # --- ports.ClaimHandler ---------------------------------------------------------------------------

    async def prepare(
        self, claims: Sequence[ClaimRef], deadline: float
    ) -> Mapping[ClaimUid, tuple[PreparedDevice, ...] | ClaimFailed]:
        return await self._claims.prepare(claims, deadline)

    async def unprepare(
        self, claims: Sequence[ClaimRef], deadline: float
    ) -> Mapping[ClaimUid, ClaimFailed | None]:
        answers = await self._claims.unprepare(claims, deadline)
        self._health.holders_changed()
        # Its holder may have been what kept a PF's VFs as they were.
        self._look_after_vfs()
        return answers

    # --- ports.SandboxHandler -------------------------------------------------------------------------

    def runtime_connected(self, name: str, version: str) -> None:
        log.info("registered with %s %s", name, version)
        self.gate.runtime = True

    def runtime_lost(self) -> None:
        log.warning("the container runtime is gone; claims are not prepared until it is back")
        self.gate.runtime = False

    async def synchronize(
        self, sandboxes: Sequence[Sandbox], containers: Mapping[SandboxId, Sequence[str]]
    ) -> None:
        copied = tuple(sandboxes)
        running = {id: tuple(names) for id, names in containers.items()}
        self._sandboxes.forget_unlisted({sandbox.id for sandbox in copied})
        attachments = self._context.book.attachments()
        self._spawn(lambda: self._settle_with_runtime(copied, running, attachments))

    async def _settle_with_runtime(
        self,
        sandboxes: Sequence[Sandbox],
        containers: Mapping[SandboxId, Sequence[str]],
        attachments: Sequence[Attachment],
    ) -> None:
        await self._reconcile.with_runtime(sandboxes, containers, attachments)
        # In recovery nothing was known of who has what until now.
        self._look_after_vfs()

    async def run_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._sandboxes.run_sandbox(sandbox, deadline)

    async def stop_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._sandboxes.stop_sandbox(sandbox, deadline)

    async def remove_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._sandboxes.remove_sandbox(sandbox, deadline)

    async def create_container(self, sandbox: Sandbox, container: Container, deadline: float) -> Adjustment:
        return await self._sandboxes.create_container(sandbox, container, deadline)

    def pods_changed(self) -> None:
        """The pod watch learnt something: a waiting sandbox may be attachable now."""
        self._reconcile.attach_waiting()

    def _spawn(self, work: Callable[[], Coroutine[object, object, None]]) -> asyncio.Task[None]:
        """A function, not a coroutine: a task that is stopped before its first step never makes one."""
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _every(seconds: float, work: Callable[[], Awaitable[None]], *, at_once: bool = False) -> None:
    """Again and again, by the clock's beat; one time that fails does not end it."""
    while True:
        if not at_once:
            await beat(seconds)
        at_once = False
        try:
            await work()
        except EXPECTED as error:
            log.error("%s", error)


async def _logged(work: Callable[[], Coroutine[object, object, None]]) -> None:
    try:
        await work()
    except Exception:
        # The last line of a background task: a bug must be seen, and must not end the agent.
        log.exception("a background task failed")
