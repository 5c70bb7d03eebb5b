"""VFs made as the policy says, beside everything else that goes on.

Invariant: a PF and its VFs are held, as for any work on a device, while its number of VFs changes, and what
is decided is decided again then. VFs that are not finished are offered to nobody. What does not work is said
once, and tried again when something changed, or after a while that grows.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from driver.execute.engine import EXPECTED
from driver.inventory import name_of
from driver.lifecycle.context import Context
from driver.lifecycle.gate import Gate
from driver.lifecycle.one_address import asked_for
from driver.lifecycle.projections import Projections
from driver.model import DeviceName, EventKind
from driver.provision.carry_out import addresses
from driver.provision.plan import PortPlan, Verdict
from driver.provision.survey import Survey, held_devices
from hw.model import PciIdentity, PfAddress, bus_of, card_of, parse_pci_address

log = logging.getLogger(__name__)

START_PATIENCE = 10.0
"""Seconds that the first offer waits for VFs: those of a card with a hundred take longer, and come later."""
AT_ONCE = 3
"""PFs that are worked on at one time: threads are for pods, too."""
NOT_AS_WANTED = "VFsNotAsWanted"
FIRST_RETRY = 15.0
LAST_RETRY = 600.0
"""Seconds before a PF that did not do as told is tried again: twice as long each time, up to this."""


@dataclass(slots=True)
class _Failure:
    text: str
    wait: float
    until: float


class Provisioning:
    """Runs never overlap; a run asked for during one follows it."""

    def __init__(
        self,
        context: Context,
        projections: Projections,
        gate: Gate,
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        """changed is awaited after VFs came or went, to have them seen and offered."""
        self._context = context
        self._projections = projections
        self._gate = gate
        self._changed = changed
        self._lane = asyncio.Lock()
        self._looking = threading.Lock()
        self._told: dict[str, str] = {}
        self._failures: dict[PfAddress, _Failure] = {}
        self._held: Mapping[PfAddress, str] = {}
        self._pending = False
        self._asked = False

    async def at_start(self, first: asyncio.Task[None]) -> None:
        """Wait for the first run, if it is done soon: it goes on if it is not."""
        await asyncio.wait({first}, timeout=START_PATIENCE)
        if not first.done():
            log.warning("VFs are still being made: other devices are offered meanwhile")

    async def run(self) -> None:
        """Look, and do what is to be done. What does not work is logged, and tried again."""
        if self._asked:
            return
        self._asked = True
        try:
            await self._lane.acquire()
        finally:
            self._asked = False
        try:
            before = self._held
            if not await self._look_and_do() and self._held != before:
                # What is held back no longer is there to be offered.
                await self._changed()
        except EXPECTED as error:
            self._pending = True
            log.error("looking after VFs: %s", error)
        finally:
            self._lane.release()

    async def again(self) -> None:
        """What is still to be done, if there is anything; also when a reason against it may be gone."""
        if self._pending:
            await self.run()

    def policy_changed(self) -> None:
        self._failures.clear()

    async def remove_all(self) -> tuple[str, ...]:
        """For a node that is to be without an agent: what was made here goes. What stays, with its reason."""
        async with self._lane:
            found = await self._context.workers.run([], self._survey)
            left = []
            for plan in found.leaving.values():
                if plan.verdict is Verdict.REMOVE:
                    left += await self._remove(plan)
                elif plan.why:
                    left.append(plan.why)
            for address in found.gone:
                self._context.provision.forget(address)
            if not left:
                self._context.provision.remove_rules()
            return tuple(left)

    # --- parts --------------------------------------------------------------------------------------

    def _idle(self) -> bool:
        """A node whose policy never made VFs is not looked at for them."""
        return not self._context.policy().sriov and not self._context.provision.has_records

    def _survey(self) -> Survey:
        book = self._context.book
        quarantined = {name: q.reason for name, q in book.quarantines().items()}
        held = held_devices(book.preparations(), quarantined)
        found = self._context.provision.survey(self._context.policy(), held)
        # Those of devices in pods are not to be seen from here.
        return replace(found, macs=found.macs | asked_for(book.preparations()))

    async def _look_and_do(self) -> bool:
        """Whether anything was done, successfully or not."""
        if self._idle():
            await self._context.workers.run([], lambda: self._hold_back({}))
            return False
        found = await self._context.workers.run([], self._look)
        self._note(found)
        if self._gate.recovery or self._gate.policy_problem:
            # Who has what is not known, or what is wanted.
            return False
        await self._context.workers.run([], lambda: self._forget(found))
        return await self._carry_out(found)

    def _look(self) -> Survey:
        """In a worker. What nobody may be given until it is done is held back from now on."""
        with self._looking:
            found = self._survey()
            reasons = {pf: reason for pf, plan in found.plans.items() if (reason := self._held_back(plan))}
            self._hold_back(reasons)
            return found

    def _hold_back(self, reasons: Mapping[PfAddress, str]) -> None:
        if reasons != self._held:
            self._held = reasons
            self._context.devices.hold_back(reasons)
            self._context.devices.rescan()

    def _note(self, found: Survey) -> None:
        """Whether there is more to do, and what there is to say, once."""
        self._pending = any(plan.changes or plan.verdict is Verdict.REFUSED for plan in found.plans.values())
        for problem in found.problems:
            self._tell(problem, problem)
        if self._gate.policy_problem:
            return
        for address, plan in found.plans.items():
            if plan.why:
                self._tell(address, plan.why, node=plan.verdict is not Verdict.NONE)
            elif not plan.changes:
                self._told.pop(address, None)

    def _held_back(self, plan: PortPlan) -> str | None:
        failure = self._failures.get(plan.port.address)
        if plan.changes:
            return (
                f"its PF's VFs could not be made: {failure.text}"
                if failure
                else "its PF's VFs are being made"
            )
        if plan.unfinished:
            return f"its PF's VFs are not finished: {plan.why}"
        return None

    def _tell(self, about: str, sentence: str, *, node: bool = True) -> None:
        """Once, to the log, and to the node where someone is to do something about it."""
        if self._told.get(about) == sentence:
            return
        self._told[about] = sentence
        log.warning("%s", sentence)
        if node:
            self._projections.tell_node(EventKind.WARNING, NOT_AS_WANTED, sentence)

    def _forget(self, found: Survey) -> None:
        """Records that tell of nothing any more: the next VFs there may be made by others."""
        refused = {
            pf
            for pf, plan in found.plans.items()
            if plan.verdict is Verdict.REFUSED and plan.making is not None and plan.port.num_vfs == 0
        }
        for address in found.gone | refused:
            self._context.provision.forget(address)

    async def _carry_out(self, found: Survey) -> bool:
        groups = _groups(found.plans.values())
        now = self._context.clock.monotonic()
        due = [
            group
            for group in groups
            if all(
                plan.port.address not in self._failures or self._failures[plan.port.address].until <= now
                for plan in group
            )
        ]
        if not due:
            return False
        wait = await self._context.workers.run(
            [], lambda: self._context.provision.keep_hands_off(found.plans.values())
        )
        # Not a wait for anything that could be looked at: only udev knows when it has read its rules.
        await asyncio.sleep(wait)
        turn = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*(self._one(group, turn) for group in due))
        self._note(await self._context.workers.run([], self._look))
        await self._changed()
        return True

    async def _one(self, group: Iterable[PortPlan], turn: asyncio.Semaphore) -> None:
        pfs = frozenset(plan.port.address for plan in group)
        async with turn:
            try:
                await self._context.workers.run(self._devices_of(pfs), lambda: self._decide_and_do(pfs))
            except EXPECTED as error:
                for pf in pfs:
                    self._failed(pf, str(error))
            else:
                for pf in pfs:
                    self._failures.pop(pf, None)

    def _decide_and_do(self, pfs: frozenset[PfAddress]) -> None:
        """In a worker, holding the devices: what was decided before may not be true any more."""
        found = self._survey()
        plans = [plan for pf, plan in found.plans.items() if pf in pfs and plan.changes]
        try:
            self._context.provision.carry_out(plans, addresses(found))
        finally:
            # Whoever waits for one of these devices must find it as it is now.
            self._look()
            self._context.devices.rescan()

    def _failed(self, pf: PfAddress, text: str) -> None:
        before = self._failures.get(pf)
        wait = min(before.wait * 2, LAST_RETRY) if before else FIRST_RETRY
        self._failures[pf] = _Failure(text, wait, self._context.clock.monotonic() + wait)
        self._tell(pf, f"PF {pf}: its VFs could not be made, which is tried again: {text}")

    async def _remove(self, plan: PortPlan) -> list[str]:
        pf = plan.port.address

        def work() -> None:
            self._context.provision.carry_out([plan], {})
            self._context.devices.rescan()

        try:
            await self._context.workers.run(self._devices_of(frozenset({pf})), work)
        except EXPECTED as error:
            return [f"the VFs of PF {pf} could not be removed: {error}"]
        return []

    def _devices_of(self, pfs: frozenset[PfAddress]) -> frozenset[DeviceName]:
        """Names of the PFs and of all their VFs that were ever seen, of devices in pods as well."""
        book = self._context.book
        known = {(d.name, d.identity) for d in self._context.devices.current().values()}
        known |= {(p.key.device, p.identity) for p in book.preparations()}
        names = {name_of(PciIdentity(parse_pci_address(pf))) for pf in pfs if bus_of(pf) == "pci"}
        names |= {name for name, identity in known if card_of(identity) in pfs}
        return frozenset(names)


def _groups(plans: Iterable[PortPlan]) -> list[list[PortPlan]]:
    """PFs that change, those of one bond together."""
    groups: defaultdict[object, list[PortPlan]] = defaultdict(list)
    for plan in plans:
        if plan.changes:
            groups[plan.port.bond or plan.port.address].append(plan)
    return list(groups.values())
