"""The runtime's side of a claim's life: a pod's sandbox comes, starts containers, goes.

Invariant: no container of a pod with a claim of ours starts in a sandbox that is not attached as a
whole; and an event touches only the attachments of exactly its own sandbox.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import uuid
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from driver import plan
from driver.errors import DriverError, NotNow, OutOfTime, Refusal
from driver.execute.engine import EXPECTED, Token, UndoFailed
from driver.execute.target import Vanished, open_target
from driver.lifecycle import containers
from driver.lifecycle.context import Context
from driver.lifecycle.gate import Gate
from driver.lifecycle.health import Health
from driver.lifecycle.homecoming import Homecoming
from driver.lifecycle.patience import Patience
from driver.lifecycle.projections import Projections
from driver.lifecycle.usage import Usage
from driver.model import (
    AS_IT_IS,
    Adjustment,
    Attachment,
    AttachmentId,
    AttachmentState,
    Container,
    DeviceName,
    PodRef,
    Preparation,
    PreparationState,
    Sandbox,
    SandboxId,
)
from hw.errors import BadNetns, HwError, NotFound, Refused
from hw.netns import NetnsHandle, open_netns

log = logging.getLogger(__name__)

LOOK_UP_LIMIT = 0.5
"""Seconds that a hook waits for the API server to say what an unknown pod is."""
DEVICE_IN_USE = "DeviceInUse"
DEVICE_GONE = "DeviceGone"
HOST_NETWORK = "a pod on the host's network cannot be given a network device"
STOP_LIMIT = 0.45
"""Seconds after which StopPodSandbox is answered; the rest follows."""
ENDED_MAX = 4096
"""Stopped sandboxes remembered: an event that comes later than so many others would be acted on."""
LASTING_ERRNOS = frozenset(
    {
        *(errno.EEXIST, errno.EINVAL, errno.EOPNOTSUPP, errno.ERANGE, errno.EPERM),
        *(errno.EADDRNOTAVAIL, errno.EADDRINUSE),
    }
)
"""What a kernel says to a request that it will refuse again: a name taken in the pod, an MTU too large, a
MAC that its port keeps for itself, an address that another one on the same device has."""


@dataclass(frozen=True, slots=True)
class Belonging:
    """What a pod has of ours. open: there are claims it might name, and nobody could say whether."""

    preparations: tuple[Preparation, ...]
    open: bool


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """A living sandbox that was not given its devices, and why."""

    sandbox: Sandbox
    refusal: Refusal

    @property
    def may_pass(self) -> bool:
        """Whether the reason may go away while the sandbox lives: another pod ends, a device is back."""
        return self.refusal.reason in (DEVICE_IN_USE, DEVICE_GONE)


@dataclass(frozen=True, slots=True)
class UnderWay:
    """An attach that a worker has in hand, or waits for."""

    token: Token
    devices: tuple[DeviceName, ...]


class Sandboxes:
    """Implements ports.SandboxHandler, but for synchronize, which is reconcile's."""

    def __init__(
        self,
        context: Context,
        projections: Projections,
        homecoming: Homecoming,
        gate: Gate,
        usage: Usage,
        health: Health,
    ) -> None:
        self._health = health
        self._context = context
        self._projections = projections
        self._homecoming = homecoming
        self._gate = gate
        self._usage = usage
        self._refused: dict[SandboxId, TurnedAway] = {}
        self._under_way: dict[SandboxId, list[UnderWay]] = {}
        self._ended: OrderedDict[SandboxId, None] = OrderedDict()
        self._late: dict[SandboxId, asyncio.Task[None]] = {}
        self._late_lane = asyncio.Semaphore(2)
        self._leaving: set[asyncio.Task[None]] = set()
        self._closed = False
        self._patience = Patience()

    # --- hooks --------------------------------------------------------------------------------------

    async def run_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        try:
            belonging = await self._belonging(sandbox, deadline)
            if belonging.preparations:
                self._gate.check_unprepare()
                await self._attach(sandbox, belonging.preparations, deadline)
        except EXPECTED as error:
            if not self._patience.exhausted(sandbox.pod.uid):
                raise
            # Its containers are refused until it has its devices, which is now tried outside of the hook.
            log.warning("pod %s goes on without its devices for now: %s", sandbox.pod.name, error)
            self.attach_late(sandbox)
        else:
            self._patience.restored(sandbox.pod.uid)

    async def create_container(self, sandbox: Sandbox, container: Container, deadline: float) -> Adjustment:
        belonging = await self._belonging(sandbox, deadline)
        if belonging.open:
            raise NotNow(
                f"container {container.name}: the API server did not say whether pod {sandbox.pod.name} "
                "names a claim that is prepared on this node"
            )
        if not belonging.preparations:
            return AS_IT_IS
        if self.is_attached(sandbox, belonging.preparations):
            return await self._let_in(sandbox, container, deadline)
        if sandbox.netns_path is None:
            self._refuse(sandbox, Refusal("HostNetwork", HOST_NETWORK))
        self.attach_late(sandbox)
        refused = self._refused.get(sandbox.id)
        if refused is not None:
            raise refused.refusal
        raise NotNow(
            f"container {container.name}: pod {sandbox.pod.name} has not been given its network devices yet"
        )

    async def _let_in(self, sandbox: Sandbox, container: Container, deadline: float) -> Adjustment:
        given = [a for a in self._context.book.of_sandbox(sandbox.id) if a.rdma is not None]
        if not given:
            return AS_IT_IS
        look = partial(containers.look, self._context, given, container)
        seen = await self._context.workers.run_until([], look, deadline)
        if seen.disproved:
            self._projections.tell_pod(sandbox.pod, "DeviceFileChanged", seen.disproved)
            raise Refusal("DeviceFileChanged", seen.disproved)
        return seen.adjustment

    async def stop_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._leave(sandbox.id, deadline)

    async def remove_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._leave(sandbox.id, deadline)

    # --- what reconcile uses -------------------------------------------------------------------------

    def is_attached(self, sandbox: Sandbox, preparations: Sequence[Preparation]) -> bool:
        attached = {
            a.preparation
            for a in self._context.book.of_sandbox(sandbox.id)
            if a.state is AttachmentState.ATTACHED
        }
        return all(p.key in attached for p in preparations)

    def known_belongings(self, pod: PodRef) -> tuple[Preparation, ...]:
        """From what is known now, without asking anyone."""
        names = self._context.pods.claims_of(pod.uid)
        return tuple(
            p
            for p in self._context.book.in_namespace(pod.namespace)
            if pod.uid in p.reserved_for or (names is not None and p.claim.name in names)
        )

    def attach_late(self, sandbox: Sandbox) -> None:
        """Queue an attach outside of any hook: for a sandbox that started while the agent was away, or
        before its device was free."""
        refused = self._refused.get(sandbox.id)
        hopeless = sandbox.netns_path is None or (refused is not None and not refused.may_pass)
        if hopeless or self._closed or sandbox.id in self._late or sandbox.id in self._ended:
            return
        task = asyncio.get_running_loop().create_task(self._attach_late(sandbox))
        self._late[sandbox.id] = task
        task.add_done_callback(lambda done: self._forget_late(sandbox.id, done))

    def _forget_late(self, id: SandboxId, task: asyncio.Task[None]) -> None:
        if self._late.get(id) is task:
            del self._late[id]

    async def close(self) -> None:
        self._closed = True
        tasks = list(self._late.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- inside -------------------------------------------------------------------------------------

    async def _belonging(self, sandbox: Sandbox, deadline: float) -> Belonging:
        pod = sandbox.pod
        if sandbox.static:
            # Nobody need be asked what it names: the API server itself may be such a pod.
            return Belonging(self.known_belongings(pod), open=False)
        candidates = self._context.book.in_namespace(pod.namespace)
        if not candidates:
            return Belonging((), open=False)
        names = self._context.pods.claims_of(pod.uid)
        if names is None and any(pod.uid not in p.reserved_for for p in candidates):
            limit = min(deadline, self._context.clock.monotonic() + LOOK_UP_LIMIT)
            await self._context.pods.look_up(pod, limit)
            names = self._context.pods.claims_of(pod.uid)
        mine = self.known_belongings(pod)
        return Belonging(mine, open=names is None and len(mine) < len(candidates))

    async def _attach(self, sandbox: Sandbox, preparations: Sequence[Preparation], deadline: float) -> None:
        if sandbox.id in self._ended:
            raise NotNow(f"sandbox {sandbox.id} has been stopped: it is given no device")
        token = Token(self._context.clock, deadline)
        devices = tuple(p.key.unit for p in preparations)
        under_way = UnderWay(token, devices)
        self._under_way.setdefault(sandbox.id, []).append(under_way)
        try:
            await self._context.workers.run_until(
                devices,
                lambda: self._attach_now(sandbox, preparations, token),
                deadline,
                token,
            )
        except Refusal as refusal:
            self._refuse(sandbox, refusal)
        else:
            self._refused.pop(sandbox.id, None)
        finally:
            self._under_way[sandbox.id].remove(under_way)
            if not self._under_way[sandbox.id]:
                del self._under_way[sandbox.id]
        for uid in {p.key.claim_uid for p in preparations}:
            self._projections.report_claim(uid)
        self._health.holders_changed()

    async def _attach_late(self, sandbox: Sandbox) -> None:
        async with self._late_lane:
            preparations = self.known_belongings(sandbox.pod)
            if not preparations or self.is_attached(sandbox, preparations):
                return
            try:
                self._gate.check_unprepare()
                await self._attach(sandbox, preparations, self._context.clock.monotonic() + 30.0)
            except EXPECTED as error:
                log.warning("late attach of pod %s: %s", sandbox.pod.name, error)

    async def _leave(self, id: SandboxId, deadline: float) -> None:
        self._end(id)
        under_way = tuple(self._under_way.get(id, ()))
        for each in under_way:
            each.token.revoke()
        late = self._late.pop(id, None)
        if late is not None:
            late.cancel()
        devices = {a.preparation.unit for a in self._context.book.of_sandbox(id)}
        devices.update(device for each in under_way for device in each.devices)
        if not devices:
            return
        limit = min(deadline, self._context.clock.monotonic() + STOP_LIMIT)
        task = asyncio.get_running_loop().create_task(self._go_home(id, devices))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        done, _ = await asyncio.wait({task}, timeout=max(limit - self._context.clock.monotonic(), 0.0))
        if done:
            task.result()
        else:
            log.info("sandbox %s is stopping; its devices are still on their way home", id)

    async def _go_home(self, id: SandboxId, devices: set[DeviceName]) -> None:
        await self._context.workers.run(devices, lambda: self.bring_home(id))
        self._attach_who_waited()

    def _end(self, id: SandboxId) -> None:
        """An id never comes back to life: whatever still comes for it finds that it is over."""
        self._refused.pop(id, None)
        self._ended[id] = None
        self._ended.move_to_end(id)
        while len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)

    def _attach_who_waited(self) -> None:
        """A device came home: whoever was refused because of its holder may have it now."""
        for refused in tuple(self._refused.values()):
            self.attach_late(refused.sandbox)

    def bring_home(self, id: SandboxId) -> None:
        """In a worker: every device of one sandbox. Reconcile goes on with those that make trouble."""
        for attachment in self._context.book.of_sandbox(id):
            try:
                self._homecoming.bring_home(attachment)
            except EXPECTED as error:
                log.error("bringing %s home: %s", attachment.preparation.unit, error)
        self._projections.offer()

    def forget_unlisted(self, listed: Collection[SandboxId]) -> None:
        """The runtime's list has come: of a sandbox that is not in it no Stop may ever be heard."""
        for id in self._refused.keys() - listed:
            del self._refused[id]

    def _refuse(self, sandbox: Sandbox, refusal: Refusal) -> None:
        before = self._refused.get(sandbox.id)
        if sandbox.id in self._ended or (before is not None and str(before.refusal) == str(refusal)):
            return
        log.warning("pod %s/%s: %s", sandbox.pod.namespace, sandbox.pod.name, refusal)
        self._refused[sandbox.id] = TurnedAway(sandbox, refusal)
        self._context.telemetry.refused(refusal.reason)
        self._projections.tell_pod(sandbox.pod, refusal.reason, str(refusal))

    # --- in a worker, holding the devices --------------------------------------------------------------

    def _attach_now(self, sandbox: Sandbox, preparations: Sequence[Preparation], token: Token) -> None:
        current = [self._context.book.preparation(p.key) for p in preparations]
        living = [p for p in current if p is not None and p.state is PreparationState.PREPARED]
        if len(living) < len(preparations):
            raise NotNow("the claim was taken back meanwhile")
        token.check(0.0)
        # What is in this sandbox already stays there: its containers may be running.
        missing = [p for p in living if not self.is_attached(sandbox, [p])]
        if not missing:
            return
        try:
            # Opened first: a sandbox that is gone must not take the device from the one that lives.
            with self._open(sandbox) as netns:
                self._make_way(sandbox, missing)
                # What was put in order may have another record since.
                ready = [self._context.book.preparation(p.key) or p for p in missing]
                self._attach_all(sandbox, ready, netns, token)
        except EXPECTED as error:
            classified = _classified(error)
            if classified is error:
                raise
            raise classified from error

    def _attach_all(
        self, sandbox: Sandbox, preparations: Sequence[Preparation], netns: NetnsHandle, token: Token
    ) -> None:
        made: list[tuple[Attachment, Preparation]] = []
        try:
            for preparation in preparations:
                attachment = self._attach_one(sandbox, preparation, netns, token)
                made.append((attachment, preparation))
            # The last step may have been the one that stalled.
            token.check(0.0)
            self._confirm(made)
        except EXPECTED:
            for attachment, preparation in reversed(made):
                self._back_out(attachment, preparation, netns)
            raise

    def _back_out(self, attachment: Attachment, preparation: Preparation, netns: NetnsHandle) -> None:
        current = self._context.book.attachment(attachment.id)
        try:
            if current is not None and current.state is AttachmentState.ATTACHING:
                self._homecoming.undo_attach(current, preparation, netns)
            elif current is not None:
                self._homecoming.bring_home(current)
        except EXPECTED as error:
            # It is on record, so reconcile goes on with it; the others must still come out.
            log.error("taking %s out again: %s", preparation.key.unit, error)

    def _open(self, sandbox: Sandbox) -> NetnsHandle:
        if sandbox.netns_path is None:
            raise Refusal("HostNetwork", HOST_NETWORK)
        try:
            return open_netns(sandbox.netns_path, spare=True)
        except BadNetns as error:
            raise Refusal("BadNetworkNamespace", str(error)) from error
        except NotFound as error:
            raise NotNow(str(error)) from error

    def _make_way(self, sandbox: Sandbox, preparations: Sequence[Preparation]) -> None:
        """An exclusive device comes home from where it was: an older sandbox of this pod, or a dead one."""
        for preparation in preparations:
            if preparation.rdma_only and preparation.rdma is not None and not preparation.rdma.moves:
                # Given by its files alone, to as many pods as its claim names.
                continue
            for other in self._context.book.attachments_of(preparation.key):
                same_pod = other.pod.uid == sandbox.pod.uid
                if not same_pod and self._homecoming.is_alive(other):
                    raise Refusal(
                        DEVICE_IN_USE,
                        f"{preparation.key.unit} is in pod {other.pod.namespace}/{other.pod.name}; "
                        "its claim cannot be shared",
                    )
                if not self._homecoming.bring_home(other):
                    raise NotNow(f"{preparation.key.unit} has not come home clean from an earlier sandbox")
            self._check_clean(preparation)

    def _check_clean(self, preparation: Preparation) -> None:
        """There is no second prepare for a sandbox made anew, so a withheld device is looked at here too, and
        one that was made anew by others meanwhile."""
        device = preparation.key.unit
        if device not in self._context.book.quarantines() and not self._homecoming.is_ended(preparation):
            return
        problems = self._homecoming.make_ready(preparation)
        if problems:
            error = problems[-1].error
            if isinstance(error, Vanished):
                # It may be long in coming back, or never come: no error of the hook, which a runtime keeps.
                raise Refusal(DEVICE_GONE, f"{device} is no more, or not there now: {error}")
            raise NotNow(f"{device} is withheld until it is clean: {error}")
        self._context.book.release(device)

    def _attach_one(
        self, sandbox: Sandbox, preparation: Preparation, netns: NetnsHandle, token: Token
    ) -> Attachment:
        context = self._context
        assert sandbox.netns_path is not None
        attachment = context.book.open_attachment(
            Attachment(
                id=AttachmentId(uuid.uuid4().hex),
                preparation=preparation.key,
                pod=sandbox.pod,
                sandbox=sandbox.id,
                netns_path=sandbox.netns_path,
                netns_cookie=netns.cookie,
                boot_id=context.boot_id,
                state=AttachmentState.ATTACHING,
                generation=context.book.next_generation(),
            )
        )
        hint = context.devices.hint(preparation)
        try:
            self._homecoming.hold(attachment, preparation, netns)
            with open_target(preparation, attachment, context.host_netns, netns, hint) as target:
                context.engine.run(plan.attach(attachment, preparation, context.hook), target, token)
                return replace(attachment, rdma=next(iter(target.given), None))
        except UndoFailed as failed:
            if self._homecoming.bring_home(attachment):
                raise failed.first from None
            raise
        except EXPECTED:
            self._homecoming.close_attachment(attachment)
            raise

    def _confirm(self, made: Sequence[tuple[Attachment, Preparation]]) -> None:
        for attachment, preparation in made:
            self._usage.begin(attachment, preparation)
        self._context.book.advance_attachments([a for a, _ in made], AttachmentState.ATTACHED)
        for uid in {p.key.claim_uid for _, p in made}:
            self._projections.publish_claim(uid)


def _classified(error: Exception) -> Exception:
    """A lasting refusal of the kernel must not fail the hook: only a retry's cure may."""
    if isinstance(error, UndoFailed | OutOfTime | Refusal | NotNow):
        return error
    if isinstance(error, Refused) and error.errno in LASTING_ERRNOS:
        return Refusal("AttachRefused", str(error))
    if isinstance(error, HwError | OSError | DriverError):
        return NotNow(str(error))
    return error
