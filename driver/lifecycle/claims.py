"""Kubelet's side of a claim's life: prepare and unprepare.

Invariant: a device is prepared for one claim at a time, from home and clean; a refusal never touches
whoever holds it. Every call may be repeated, overlap another and be cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from driver import claimconfig, limits, plan
from driver.cdi import cdi_id
from driver.errors import ConfigError, DriverError, NotNow, Refusal
from driver.execute.engine import EXPECTED, Token
from driver.execute.target import Vanished, open_target
from driver.lifecycle import guids, one_address
from driver.lifecycle.context import Context
from driver.lifecycle.fitting import check_pf
from driver.lifecycle.gate import Gate
from driver.lifecycle.homecoming import HIDDEN, QUARANTINED, Homecoming
from driver.lifecycle.orphans import Orphans
from driver.lifecycle.ports import ClaimFailed
from driver.lifecycle.projections import Projections
from driver.lifecycle.relations import check_budgets, check_rivals, check_room, to_lock
from driver.lifecycle.wanted import Coming, Wanted, asking, clean, named, record, want
from driver.lifecycle.workers import KeyedLocks
from driver.model import (
    Claim,
    ClaimRef,
    ClaimUid,
    Device,
    DeviceName,
    DriverEvent,
    EventKind,
    NicConfig,
    Preparation,
    PreparationKey,
    PreparationState,
    PreparedDevice,
)
from driver.plan import Act
from driver.policy import ResetPolicy
from hw.model import DeviceKind, LinkSettings

log = logging.getLogger(__name__)

FOREIGN_PROGRAMS = "ForeignPrograms"
UNPREPARE_PATIENCE = 10.0
"""Seconds that unprepare waits for a clean device before it quarantines it and lets the pod go."""


class Claims:
    """Implements ports.ClaimHandler."""

    def __init__(
        self, context: Context, projections: Projections, homecoming: Homecoming, gate: Gate, orphans: Orphans
    ) -> None:
        self._orphans = orphans
        self._context = context
        self._projections = projections
        self._homecoming = homecoming
        self._gate = gate
        self._locks: KeyedLocks[ClaimUid] = KeyedLocks()
        self._coming: dict[ClaimUid, Coming] = {}
        self._reset: set[PreparationKey] = set()
        self._giving_out = threading.Lock()

    async def prepare(
        self, claims: Sequence[ClaimRef], deadline: float
    ) -> Mapping[ClaimUid, tuple[PreparedDevice, ...] | ClaimFailed]:
        answers = await asyncio.gather(*(self._prepare(ref, deadline) for ref in claims))
        return {ref.uid: answer for ref, answer in zip(claims, answers, strict=True)}

    async def unprepare(
        self, claims: Sequence[ClaimRef], deadline: float
    ) -> Mapping[ClaimUid, ClaimFailed | None]:
        answers = await asyncio.gather(*(self._unprepare(ref, deadline) for ref in claims))
        return {ref.uid: answer for ref, answer in zip(claims, answers, strict=True)}

    # --- prepare ------------------------------------------------------------------------------------

    async def _prepare(self, ref: ClaimRef, deadline: float) -> tuple[PreparedDevice, ...] | ClaimFailed:
        try:
            async with self._locks.hold(ref.uid):
                return await self._prepare_locked(ref, deadline)
        except EXPECTED as error:
            self._tell(ref, "PrepareFailed", str(error))
            return ClaimFailed(str(error))

    async def _prepare_locked(self, ref: ClaimRef, deadline: float) -> tuple[PreparedDevice, ...]:
        self._gate.check_prepare()
        existing = self._existing(ref)
        if existing:
            return self._answer(existing)
        claim = await self._context.claims.read_claim(ref)
        token = Token(self._context.clock, deadline)
        if any(self._context.devices.get(each.device) is None for each in claim.devices):
            # What the scheduler knows of it was true once, and its event may still be on the way to us.
            await self._context.workers.run_until([], self._context.devices.rescan, deadline)
        wanted = self._examine(claim)
        # No await since the check, so of two claims of one pod one is checked against the other.
        self._coming[ref.uid] = Coming(claim.reserved_for, tuple(named(wanted)), asking(claim, wanted))
        try:
            done = await self._context.workers.run_until(
                to_lock(self._context, [each.unit for each in wanted]),
                lambda: self._prepare_devices(claim, wanted, token),
                deadline,
                token,
            )
        except EXPECTED:
            # Taking it back may have ended in quarantine.
            self._projections.offer()
            raise
        finally:
            del self._coming[ref.uid]
        return self._answer(done)

    def _existing(self, ref: ClaimRef) -> tuple[Preparation, ...]:
        """What is on record of the claim, if it is whole and can be given to a pod; empty if nothing is."""
        book = self._context.book
        existing = book.of_claim(ref.uid)
        if any(p.state is not PreparationState.PREPARED for p in existing):
            raise NotNow(f"claim {ref.name} is still being taken back from an earlier attempt")
        quarantined = book.quarantines()
        for preparation in existing:
            device = preparation.key.unit
            if device in quarantined:
                raise NotNow(f"{device} is withheld until it is clean: {quarantined[device].reason}")
        return existing

    def _examine(self, claim: Claim) -> list[Wanted]:
        """Every check that needs no lock. Raises the first lasting reason against the claim."""
        if not claim.allocated:
            raise NotNow(f"claim {claim.ref.name} is not allocated")
        if not claim.devices:
            raise Refusal(
                "NoDevice", f"claim {claim.ref.name} has no device of driver {self._context.driver}"
            )
        policy = self._context.policy()
        wanted: list[Wanted] = []
        for allocated in claim.devices:
            if allocated.admin_access:
                raise Refusal("AdminAccess", "adminAccess to a network device is not supported")
            if allocated.pool != self._context.pool:
                raise Refusal(
                    "WrongPool", f"device {allocated.device} is of pool {allocated.pool}, not this node's"
                )
            device = self._context.devices.get(allocated.device)
            if device is None:
                raise Refusal("NoSuchDevice", f"this node has no device {allocated.device} now")
            # Also before its turn comes: whoever cleans it may be long about it.
            self._check_quarantine(device.name)
            if any((device.name, allocated.share_id) == (w.device.name, w.key.share_id) for w in wanted):
                raise Refusal("DeviceTwice", f"{device.name} is allocated twice and cannot be shared")
            wanted.append(want(claim, allocated, device, policy.claim_limits, policy.qos, self._context.hook))
        self._check_pod(claim, wanted)
        self._check_addresses(claim, wanted)
        return wanted

    def _check_pod(self, claim: Claim, wanted: Sequence[Wanted]) -> None:
        """ConfigError if two devices of one pod cannot stand together, of other claims of it too."""
        together = named(wanted)
        together += [
            (f"{other.key.unit} of claim {other.claim.name}", other.config, other.ifname)
            for other in self._context.book.preparations()
            if other.state is PreparationState.PREPARED
            and other.key.claim_uid not in {claim.ref.uid, *self._coming}
            and other.reserved_for & claim.reserved_for
            and not other.by_file
        ]
        for coming in self._coming.values():
            if coming.reserved_for & claim.reserved_for:
                together += coming.devices
        claimconfig.check_together(together)

    def _check_addresses(self, claim: Claim, wanted: Sequence[Wanted]) -> None:
        others = [*one_address.on_record(self._context.book.preparations(), but=claim.ref.uid)]
        others += [each for coming in self._coming.values() for each in coming.addresses]
        one_address.check(asking(claim, wanted), others)

    def _prepare_devices(
        self, claim: Claim, wanted: Sequence[Wanted], token: Token
    ) -> tuple[Preparation, ...]:
        """In a worker, holding every device. All or none, also on record."""
        context = self._context
        # An earlier call that nobody waited for any more may have got here first.
        existing = self._existing(claim.ref)
        if existing:
            return existing
        token.check(0.0)
        look = context.devices.as_it_is
        wanted = [replace(each, device=look(each.device)) for each in wanted]
        for each in wanted:
            self._check_free(each, claim.ref)
            check_pf(each.device, each.config)
            mac = each.config.interface.hardware_address
            holder = context.devices.who_else_has(mac, each.device) if mac is not None else ""
            if mac is not None and holder:
                raise one_address.refused(each.unit, mac, holder)
        check_rivals(context, {each.device.name for each in wanted}, claim.ref.uid)
        made = self._records(claim, wanted)
        if past := next((each for each in made if limits.passes_by(each)), None):
            raise ConfigError([limits.past_size(past)])
        opened = self._open(claim.ref.uid, made, [each.device for each in wanted])
        try:
            done = [
                self._prepare_one(preparation, each.config, token)
                for preparation, each in zip(opened, wanted, strict=True)
            ]
            return context.book.advance_preparations(done, PreparationState.PREPARED)
        except EXPECTED as error:
            self.finish(opened, reset=False)
            if isinstance(error, DriverError):
                raise
            raise NotNow(str(error)) from error

    def _records(self, claim: Claim, wanted: Sequence[Wanted]) -> list[Preparation]:
        context = self._context
        policy, indices = context.policy(), context.book.indices()
        return [
            replace(
                record(claim, each, context.driver, indices),
                no_iommu=policy.vfio.no_iommu and each.config.by_file,
                rdma=context.rdma.binding(each.device, each.config, policy.rdma)
                if each.size is None
                else None,
            )
            for each in wanted
        ]

    def _open(
        self, uid: ClaimUid, made: Sequence[Preparation], devices: Sequence[Device]
    ) -> tuple[Preparation, ...]:
        with self._giving_out:
            try:
                check_budgets(self._context, {each.key.unit: each.size for each in made}, uid)
                check_room(self._context, made, devices, uid)
            except Refusal:
                self._projections.promise(uid, [each.key.unit for each in made if each.share is None])
                raise
            opened = self._context.book.open_preparations(guids.give(self._context, made, devices))
        self._projections.promise(uid, ())
        return opened

    def _prepare_one(self, preparation: Preparation, config: NicConfig, token: Token) -> Preparation:
        """config as it was asked for: where a device turns out not to keep rates, and it may be the node's
        kernel that does, it is. Returns the record as it is then."""
        try:
            return self._run(preparation, token)
        except Refusal as refusal:
            software = limits.instead(preparation.config, asked=config)
            if software is None or limits.passes_by(replace(preparation, config=software)):
                raise
            log.info("%s: its limit is kept by the node's kernel: %s", preparation.key.unit, refusal)
            preparation = self._context.book.amend_preparation(replace(preparation, config=software))
            return self._run(preparation, token)

    def _run(self, preparation: Preparation, token: Token) -> Preparation:
        context = self._context
        hint = context.devices.hint(preparation)
        with open_target(preparation, None, context.host_netns, None, hint) as target:
            context.engine.run(plan.prepare(preparation, context.hook), target, token)
            if told := context.foreign.told(target):
                log.warning("%s", told)
                self._tell(preparation.claim, FOREIGN_PROGRAMS, told)
            if preparation.share is not None and (link := target.find_at_home()) is not None:
                return replace(preparation, baseline=clean(LinkSettings.of(link)))
            return replace(preparation, rdma=context.rdma.binding_now(target))

    def _check_free(self, wanted: Wanted, ref: ClaimRef) -> None:
        """The last guard, whatever the scheduler, taints and tolerations say."""
        device = wanted.device
        self._check_quarantine(device.name)
        for holder in self._context.book.of_device(device.name):
            # Of a device that is given out in parts others may have theirs, but nobody the whole of it.
            if holder.key.claim_uid != ref.uid and holder.key.unit in (wanted.unit, device.name):
                raise Refusal(
                    "DeviceInUse",
                    f"{holder.key.unit} is held by claim {holder.claim.namespace}/{holder.claim.name}",
                )
        if device.withheld:
            raise Refusal("Withheld", f"{device.name} is not given away: {device.withheld}")
        if device.kind is not DeviceKind.RDMA and (device.ifindex is None or device.settings is None):
            raise NotNow(f"{device.name} is not in the host's network namespace now")

    def _check_quarantine(self, name: DeviceName) -> None:
        quarantine = self._context.book.quarantines().get(name)
        if quarantine is not None:
            raise NotNow(f"{name} is withheld until it is clean: {quarantine.reason}")

    def _take_back(self, leaving: Preparation, *, reset: bool) -> None:
        """Undo a preparation that is in no pod. The record, which says what clean is, stays until the
        device is clean or is no more; reconcile goes on with what does not work.

        reset: a pod may have had it. A driver that began anew with it is not made to do so each time.
        """
        context = self._context
        if self._homecoming.is_hidden(leaving):
            self._withhold(leaving, HIDDEN)
            return
        reset = reset and leaving.key not in self._reset and context.policy().reset is ResetPolicy.REPROBE
        with open_target(leaving, None, context.host_netns, None, context.devices.hint(leaving)) as target:
            problems = context.engine.bring_home(plan.unprepare(leaving, reset=reset), target)
        errors = {problem.act: problem.error for problem in problems}
        if reset and not errors.keys() & {Act.UNBIND, Act.TO_KERNEL}:
            self._reset.add(leaving.key)
        if _is_gone(errors):
            # Nothing told us of its end: the picture may be from when it was at home.
            context.devices.rescan()
        else:
            context.devices.see_home(leaving)
            if errors:
                self._withhold(leaving, _why_kept(errors))
                return
        context.foreign.sweep(leaving.key.unit, context.devices.hint(leaving))
        context.book.close_preparation(leaving)
        self._reset.discard(leaving.key)

    def _withhold(self, preparation: Preparation, reason: str) -> None:
        if self._context.book.quarantine(preparation.key.unit, reason, self._context.clock.wall()):
            self._tell(preparation.claim, QUARANTINED, f"{preparation.key.unit} is withheld: {reason}")

    def _answer(self, preparations: Sequence[Preparation]) -> tuple[PreparedDevice, ...]:
        return tuple(
            PreparedDevice(
                request=p.request,
                pool=p.key.pool,
                device=p.key.device,
                share_id=p.key.share_id,
                cdi_ids=(cdi_id(self._context.driver, p.key),),
            )
            for p in preparations
        )

    # --- unprepare ----------------------------------------------------------------------------------

    async def _unprepare(self, ref: ClaimRef, deadline: float) -> ClaimFailed | None:
        try:
            async with self._locks.hold(ref.uid):
                await self._unprepare_locked(ref.uid, deadline)
        except EXPECTED as error:
            log.error("unprepare of claim %s/%s: %s", ref.namespace, ref.name, error)
            return ClaimFailed(str(error))
        self._context.statuses.write_status(ref, ())
        return None

    async def _unprepare_locked(self, uid: ClaimUid, deadline: float) -> None:
        self._gate.check_unprepare()
        self._projections.promise(uid, ())
        # At once, not when the devices are free: nothing may be answered or attached from this record
        # any more, though whoever has a device in hand may be long about it.
        leaving = await self._context.workers.run([], lambda: self._begin_leaving(uid))
        if not leaving:
            await self._context.workers.run([], lambda: self._orphans.end(uid))
            self._projections.offer()
            return
        patience = min(deadline, self._context.clock.monotonic() + UNPREPARE_PATIENCE)
        devices = [p.key.unit for p in leaving]
        try:
            await self._context.workers.run_until(devices, lambda: self.finish(leaving), patience)
        except NotNow:
            await self._context.workers.run([], lambda: self._note_late(leaving))
        self._projections.offer()

    def _begin_leaving(self, uid: ClaimUid) -> tuple[Preparation, ...]:
        book = self._context.book
        return book.advance_preparations(book.of_claim(uid), PreparationState.UNPREPARING, insist=False)

    def _note_late(self, preparations: Sequence[Preparation]) -> None:
        for preparation in preparations:
            self._context.book.quarantine(
                preparation.key.unit,
                "it did not come home in time",
                self._context.clock.wall(),
                held=preparation.key,
            )

    async def release_all(self) -> None:
        """Take back every preparation of this node. What does not come stays in the book."""
        for preparation in self._context.book.preparations():
            await self._context.workers.run([preparation.key.unit], partial(self.finish, [preparation]))

    def finish(self, preparations: Sequence[Preparation], *, reset: bool = True) -> None:
        """In a worker, holding the devices: home from every pod, programs off, and each record closed if
        nothing of it is open. reset is False where no pod can have had them.

        What could not be brought home stays in the book as UNPREPARING, quarantined, for reconcile.
        """
        book = self._context.book
        living = [now for known in preparations if (now := book.preparation(known.key)) is not None]
        for leaving in book.advance_preparations(living, PreparationState.UNPREPARING, insist=False):
            try:
                for attachment in book.attachments_of(leaving.key):
                    self._homecoming.bring_home(attachment)
                if not book.attachments_of(leaving.key):
                    self._take_back(leaving, reset=reset)
            except EXPECTED as error:
                log.error("taking %s back: %s", leaving.key.unit, error)
                self._withhold(leaving, str(error))

    def _tell(self, ref: ClaimRef, reason: str, message: str) -> None:
        self._context.events.emit(
            DriverEvent(subject=ref, kind=EventKind.WARNING, reason=reason, message=message)
        )


def _is_gone(errors: Mapping[Act, Exception]) -> bool:
    """Whether the device is no more. One that has no netdev since no driver took it is there all the same."""
    bound = errors.get(Act.UNBIND) or errors.get(Act.TO_KERNEL)
    found = [bound] if bound is not None else list(errors.values())
    return any(isinstance(error, Vanished) for error in found)


def _why_kept(errors: Mapping[Act, Exception]) -> str:
    """What a driver did, what the looks at the device and its PF found, or else what went wrong last."""
    telling = (Act.UNBIND, Act.TO_KERNEL, Act.VERIFY_VF, Act.VERIFY, Act.RESTORE_PORT, Act.RDMA_VERIFY)
    found = [errors[act] for act in telling if act in errors] or [list(errors.values())[-1]]
    return "; ".join(dict.fromkeys(map(str, found)))
