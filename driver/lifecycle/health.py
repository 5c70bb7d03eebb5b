"""Looks after the health of what is offered and of what is in pods, and tells it.

Invariant: what is told is what driver.health decided; it is told once, however often it is looked, and
nothing here touches a device. Between two looks there is no polling: either something was heard, or a moment
has come that the last look named.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from driver.execute.engine import EXPECTED
from driver.health import NOTHING, Subject, Troubles, View, Watch, advance, healths, next_look, seen_now
from driver.lifecycle.context import Context
from driver.lifecycle.gate import Gate
from driver.lifecycle.homecoming import Homecoming
from driver.lifecycle.projections import Projections
from driver.lifecycle.reporters import Sick, of_device, of_port, sick_reporters
from driver.model import (
    Attachment,
    AttachmentState,
    DeviceName,
    EventKind,
    PoolName,
    Preparation,
    PreparationKey,
    PreparationState,
    Sandbox,
    device_of,
)
from driver.troubles import DeviceHealth, Trouble

log = logging.getLogger(__name__)

SICK, WELL = "DeviceUnhealthy", "DeviceHealthy"
PORT_SICK, PORT_WELL = "PortUnhealthy", "PortHealthy"


@dataclass(frozen=True, slots=True)
class Loss:
    """A device that its pod has no more, though the pod lives. sandbox: to be given it again, where what was
    in it died; None where someone in the pod gave it away."""

    text: str
    sandbox: Sandbox | None


class HealthFeed:
    """The last word on every device, for whoever waits for the next. For use within one event loop."""

    def __init__(self, pool: PoolName) -> None:
        self.pool = pool
        self.version = 0
        self.devices: Sequence[DeviceHealth] = ()
        self._changed = asyncio.Event()

    def put(self, devices: Sequence[DeviceHealth]) -> None:
        if list(devices) == list(self.devices):
            return
        self.devices = tuple(devices)
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def newer_than(self, version: int, seconds: float) -> None:
        """Returns when there is a newer one, or after that many seconds."""
        if self.version > version:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return


class Health:
    """Looks never overlap. `run` is a task of its own."""

    def __init__(
        self, context: Context, projections: Projections, homecoming: Homecoming, gate: Gate
    ) -> None:
        self._context = context
        self._projections = projections
        self._homecoming = homecoming
        self._gate = gate
        self.feed = HealthFeed(context.pool)
        self._lane = asyncio.Lock()
        self._watch = Watch()
        self._told: Mapping[DeviceName, DeviceHealth] = {}
        self._losses: dict[PreparationKey, Loss] = {}
        self._sick: Sick = {}
        self._due: float | None = None
        self._asked = False
        self._stir = asyncio.Event()

    # --- asked for ----------------------------------------------------------------------------------

    def nudge(self) -> None:
        """Have it look, soon: something that it looks at has changed. Event loop only."""
        self._asked = True
        self._stir.set()

    def holders_changed(self) -> None:
        """A pod or a claim got a device, or gave one back: no news where all are well."""
        if self._watch.entries or self._losses or self._context.book.quarantines():
            self.nudge()

    async def ask_reporters(self) -> None:
        """Devlink's health reporters may say something else than before."""
        self._sick = await self._context.workers.run([], sick_reporters)
        self.nudge()

    async def run(self) -> None:
        while True:
            await self._until_due()
            try:
                await self.look()
            except EXPECTED as error:
                log.error("looking after the health of devices: %s", error)

    async def _until_due(self) -> None:
        while not self._asked:
            wait = None if self._due is None else max(self._due - self._context.clock.monotonic(), 0.0)
            try:
                async with asyncio.timeout(wait):
                    await self._stir.wait()
            except TimeoutError:
                break
            self._stir.clear()
        self._asked = False

    async def look(self) -> None:
        """Look now, and tell what changed."""
        async with self._lane:
            views = await self._context.workers.run([], self._views)
            before, told = self._watch, self._told
            rules = self._context.policy().health.rule
            self._watch = advance(before, seen_now(views), rules, self._context.clock.monotonic())
            self._told = healths(self._watch, views, told, self._context.clock.wall())
            self._due = next_look(self._watch, rules)
            self._stir.set()
            kept = frozenset(
                view.name
                for view in views
                if view.held is None and self._watch.pending(Subject(view.name), Trouble.NO_DRIVER)
            )
            shown = self._projections.show_health(self._told, kept)
            self.feed.put(tuple(health for name, health in self._told.items() if device_of(name) == name))
            self._tell_ports(before)
            self._tell_devices(told)
            if shown and self._gate.settled and not self._gate.recovery:
                self._projections.offer()

    def counts(self) -> Mapping[str, int]:
        """Devices that are unwell by what they have, for the gauge."""
        found = dict.fromkeys((trouble.value for trouble in Trouble), 0)
        for health in tuple(self._told.values()):
            for finding in health.findings:
                found[finding.trouble.value] += 1
        return found

    # --- losses -------------------------------------------------------------------------------------

    def lose(self, attachment: Attachment, *, dead: bool) -> None:
        """A device came home from a pod that lives. dead: what the pod had of it is no more."""
        device, pod = attachment.preparation.unit, attachment.pod
        if dead:
            text = f"{device} was reset or unbound under pod {pod.name}; it is given back when it is clean"
            sandbox = Sandbox(id=attachment.sandbox, pod=pod, netns_path=attachment.netns_path)
        else:
            text = f"{device} was moved out of pod {pod.name}; delete the pod to have it given away again"
            sandbox = None
        self._losses[attachment.preparation] = Loss(text, sandbox)

    def to_give_back(self) -> Sequence[tuple[PreparationKey, Sandbox]]:
        return [(key, loss.sandbox) for key, loss in tuple(self._losses.items()) if loss.sandbox is not None]

    # --- seen, in a worker thread ---------------------------------------------------------------------

    def _views(self) -> list[View]:
        """Of every device that is offered, was the last time, or is held."""
        context, book = self._context, self._context.book
        current = context.devices.current()
        attached = {a.preparation.unit: a for a in book.attachments() if a.state is AttachmentState.ATTACHED}
        held = {p.key.unit: p for p in book.preparations()}
        quarantines = book.quarantines()
        self._forget_losses(held, attached)
        names = {name for name, device in current.items() if not device.withheld} | held.keys()
        names |= self._projections.offered() & current.keys()
        views = []
        for name in sorted(names):
            device, preparation = current.get(name), held.get(name)
            quarantine = quarantines.get(name)
            loss = self._losses.get(preparation.key) if preparation is not None else None
            views.append(
                View(
                    name=name,
                    device=device,
                    held=preparation,
                    in_hand=self._in_hand(name, preparation, name in attached),
                    attached=name in attached,
                    dead=name in attached
                    and preparation is not None
                    and self._homecoming.is_dead(preparation),
                    lost=loss.text if loss is not None else "",
                    reporters=of_device(device, self._sick),
                    port_reporters=of_port(device, self._sick),
                    quarantine=quarantine.reason if quarantine is not None else "",
                )
            )
        return views

    def _forget_losses(
        self, held: Mapping[DeviceName, Preparation], attached: Mapping[DeviceName, Attachment]
    ) -> None:
        for key in tuple(self._losses):
            preparation = held.get(key.unit)
            over = preparation is None or preparation.key != key or key.unit in attached
            if over or (preparation is not None and preparation.state is not PreparationState.PREPARED):
                self._losses.pop(key, None)

    def _in_hand(self, name: DeviceName, preparation: Preparation | None, attached: bool) -> bool:
        """Whether this driver itself may be at its driver now, so that nothing follows from what is seen."""
        if preparation is None:
            device = self._context.devices.get(name)
            return device is not None and bool(self._context.devices.held_back(device.identity))
        if preparation.state is not PreparationState.PREPARED:
            return True
        return not attached and self._context.workers.is_busy(name)

    # --- told -----------------------------------------------------------------------------------------

    def _tell_ports(self, before: Watch) -> None:
        """To the node, once for all that is behind a port."""
        names: frozenset[str] = frozenset(self._told)
        for subject in sorted(self._watch.subjects | before.subjects):
            if subject in names:
                continue
            old, new = before.counted(subject), self._watch.counted(subject)
            fresh = [text for trouble, text in new.items() if trouble not in old]
            if fresh:
                log.warning("%s", "; ".join(fresh))
                self._projections.tell_node(EventKind.WARNING, PORT_SICK, "; ".join(fresh))
            elif old and not new and subject in self._watch.subjects:
                text = f"port {subject} is well again"
                log.info("%s", text)
                self._projections.tell_node(EventKind.NORMAL, PORT_WELL, text)

    def _tell_devices(self, before: Mapping[DeviceName, DeviceHealth]) -> None:
        """To claims and pods that hold it; to the node, of its own troubles, where nobody does."""
        for name, health in self._told.items():
            old = before.get(name)
            had = {f.trouble for f in old.findings} if old is not None else set()
            # Of a quarantine whoever made it tells.
            fresh = [
                f for f in health.findings if f.trouble not in had and f.trouble is not Trouble.QUARANTINED
            ]
            own = self._own(name)
            if fresh:
                text = "; ".join(f.text for f in fresh)
                node_text = "; ".join(f.text for f in fresh if f.trouble in own)
                self._tell(name, EventKind.WARNING, SICK, text, node_text)
            elif health.healthy and had - {Trouble.QUARANTINED}:
                text = f"{name} is well again"
                self._tell(name, EventKind.NORMAL, WELL, text, text if Trouble.NO_DRIVER in had else "")
            if old is not None and old.findings != health.findings:
                self._report(name)

    def _own(self, name: DeviceName) -> Troubles:
        return self._watch.counted(Subject(name)) if Subject(name) in self._watch.subjects else NOTHING

    def _tell(self, name: DeviceName, kind: EventKind, reason: str, text: str, node_text: str) -> None:
        holders = self._context.book.of_device(name)
        if holders:
            log.log(logging.WARNING if kind is EventKind.WARNING else logging.INFO, "%s", text)
        elif node_text:
            log.log(logging.WARNING if kind is EventKind.WARNING else logging.INFO, "%s", node_text)
            self._projections.tell_node(kind, reason, node_text)
        for holder in holders:
            self._projections.tell(holder.claim, kind, reason, text)
            for attachment in self._context.book.attachments_of(holder.key):
                self._projections.tell(attachment.pod, kind, reason, text)

    def _report(self, name: DeviceName) -> None:
        for uid in {holder.key.claim_uid for holder in self._context.book.of_device(name)}:
            self._projections.report_claim(uid)
