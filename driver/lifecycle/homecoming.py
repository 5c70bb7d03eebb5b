"""Bringing a device home from a pod: the one way back, whatever sent it.

Invariant: when an attachment is closed its device is at home and clean, or quarantined, or gone from
the node; and its counters are in the ledger. Runs in worker threads, under the device's lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from bpf.errors import BpfError
from driver import plan
from driver.errors import DriverError
from driver.execute import filters
from driver.execute.engine import EXPECTED, Problem
from driver.execute.target import NotClean, Target, Vanished, open_target
from driver.lifecycle.context import Context
from driver.lifecycle.projections import Projections
from driver.lifecycle.shares import renewed
from driver.model import Attachment, AttachmentId, AttachmentState, Preparation
from driver.plan import Act
from hw.errors import HwError
from hw.netns import NetnsHandle, open_netns

log = logging.getLogger(__name__)

QUARANTINED = "DeviceQuarantined"
HIDDEN = "its pod put it into a network namespace of its own, which still lives: end what is left of the pod"


class Homecoming:
    """Knows the netns of every living attachment and how to empty it of our devices."""

    def __init__(self, context: Context, projections: Projections) -> None:
        self._context = context
        self._projections = projections
        self._held: dict[AttachmentId, NetnsHandle] = {}
        self._lock = threading.Lock()

    # --- netns ---------------------------------------------------------------------------------------

    def hold(self, attachment: Attachment, preparation: Preparation, netns: NetnsHandle) -> None:
        """Keep the netns of a device that the kernel would destroy with it, until the device is home.

        Some runtimes remove the netns before they say that the pod stopped. A physical device comes
        home by itself then; a virtual one would be gone. Let go when the attachment is closed.
        """
        if preparation.dies_with_netns:
            with self._lock:
                previous = self._held.pop(attachment.id, None)
                self._held[attachment.id] = netns.duplicate()
            if previous is not None:
                previous.close()

    def let_go(self, attachment: Attachment) -> None:
        with self._lock:
            netns = self._held.pop(attachment.id, None)
        if netns is not None:
            netns.close()

    def close(self) -> None:
        with self._lock:
            held = list(self._held.values())
            self._held.clear()
        for netns in held:
            netns.close()

    @contextmanager
    def netns_of(self, attachment: Attachment) -> Iterator[NetnsHandle | None]:
        """The attachment's own netns, proven by its cookie, or None if it is gone."""
        with self._lock:
            held = self._held.get(attachment.id)
            own = held.duplicate() if held is not None else None
        if own is None and attachment.boot_id == self._context.boot_id:
            try:
                own = open_netns(attachment.netns_path)
            except HwError:
                own = None
            if own is not None and own.cookie != attachment.netns_cookie:
                own.close()
                own = None
        try:
            yield own
        finally:
            if own is not None:
                own.close()

    @contextmanager
    def reach(self, attachment: Attachment) -> Iterator[Target | None]:
        """The device of a living attachment where it is; None if there is no record of it any more."""
        context = self._context
        preparation = context.book.preparation(attachment.preparation)
        if preparation is None:
            yield None
            return
        hint = context.devices.hint(preparation)
        with (
            self.netns_of(attachment) as netns,
            open_target(preparation, attachment, context.host_netns, netns, hint) as target,
        ):
            yield target

    def is_alive(self, attachment: Attachment) -> bool:
        with self.netns_of(attachment) as netns:
            return netns is not None

    def is_home(self, attachment: Attachment) -> bool:
        """Whether the device of an attachment is at home by itself: its netns died."""
        context = self._context
        preparation = context.book.preparation(attachment.preparation)
        if preparation is None:
            return False
        hint = context.devices.hint(preparation)
        with open_target(preparation, attachment, context.host_netns, None, hint) as target:
            if preparation.rdma_only:
                moves = preparation.rdma is not None and preparation.rdma.moves
                return moves and context.rdma.is_home(target)
            return target.find_at_home() is not None

    def is_hidden(self, preparation: Preparation) -> bool:
        """Whether the device is there, but not at home: in a netns that nobody told us of."""
        context = self._context
        device = preparation.key.unit
        if preparation.by_file:
            return False
        with open_target(
            preparation, None, context.host_netns, None, context.devices.hint(preparation)
        ) as target:
            if target.find_at_home() is not None:
                return False
        if preparation.dies_with_netns:
            # Its programs are on it wherever it is, and say when it is no more.
            pair = context.programs.state(device) if context.programs is not None else None
            return pair is not None and pair.alive
        context.devices.rescan()
        if context.devices.get(device) is None:
            return False
        # Between two drivers it has no netdev that could be anywhere.
        address = preparation.pci_address
        return address is None or context.devices.has_netdev(address)

    # --- the way home --------------------------------------------------------------------------------

    def bring_home(self, attachment: Attachment) -> bool:
        """Detach and close. True if the device is home and clean, or gone with its netns."""
        context = self._context
        current = context.book.attachment(attachment.id)
        if current is None:
            return True
        attachment = current
        preparation = context.book.preparation(attachment.preparation)
        if preparation is None:
            context.book.close_attachment(attachment)
            self.let_go(attachment)
            return True
        (leaving,) = context.book.advance_attachments([attachment], AttachmentState.DETACHING, insist=False)
        self._withdraw(leaving)
        with (
            self.netns_of(leaving) as netns,
            open_target(
                preparation,
                leaving,
                context.host_netns,
                netns,
                context.devices.hint(preparation),
            ) as target,
        ):
            problems = context.engine.bring_home(plan.detach(leaving, preparation), target)
        return self._conclude(leaving, preparation, problems)

    def undo_attach(
        self, attachment: Attachment, preparation: Preparation, netns: NetnsHandle | None
    ) -> None:
        """An attach that did not get through, or was cut off by a crash: nothing ran in the pod yet."""
        context = self._context
        with open_target(
            preparation,
            attachment,
            context.host_netns,
            netns,
            context.devices.hint(preparation),
        ) as target:
            try:
                context.engine.undo(plan.attach(attachment, preparation, context.hook), target)
            except EXPECTED as error:
                log.warning("undoing the attach of %s: %s", preparation.key.unit, error)
                (leaving,) = context.book.advance_attachments(
                    [attachment], AttachmentState.DETACHING, insist=False
                )
                self._conclude(leaving, preparation, self._look(leaving, target))
                return
        self.close_attachment(attachment)

    def close_attachment(self, attachment: Attachment) -> None:
        self._context.book.close_attachment(attachment)
        self.let_go(attachment)

    def check_clean(self, preparation: Preparation) -> tuple[Problem, ...]:
        """Compare a device that should be at home with its baseline, mending what can be mended. A share
        whose interface is no more is made anew."""
        context = self._context
        with open_target(
            preparation,
            None,
            context.host_netns,
            None,
            context.devices.hint(preparation),
        ) as target:
            made: tuple[Problem, ...] = ()
            if preparation.share is not None:
                # Before anything is looked at: there is to be something to look at.
                made = context.engine.bring_home(plan.remake(preparation), target)
            try:
                context.foreign.note_anew(target)
            except EXPECTED as error:
                return (*made, Problem(Act.NOTE_FOREIGN, error))
            return made or context.engine.bring_home(plan.tidy(preparation), target)

    def make_ready(self, preparation: Preparation) -> tuple[Problem, ...]:
        """Have a prepared device that is in no pod be as its prepare left it, programs included. What stands
        against it, or nothing."""
        try:
            preparation = renewed(self._context, preparation)
        except EXPECTED as error:
            return (Problem(Act.SHARE_MAKE, error),)
        problems = self.check_clean(preparation)
        if not problems:
            # Its netdev may be another one than the last scan saw.
            self._context.devices.see_home(preparation)
            self.rearm(preparation, must_be_home=True)
        return problems

    def rearm(self, preparation: Preparation, *, must_be_home: bool) -> None:
        """Programs as this version has them, on the same device: pins outlive an agent, not a reboot."""
        programs = self._context.programs
        if preparation.by_file:
            return
        if programs is None:
            self._refilter(preparation)
            return
        device = preparation.key.unit
        ifindex = self._context.devices.hint(preparation)
        if must_be_home and ifindex is not None:
            programs.attach(device, ifindex, preparation.slot, preparation.framing)
        elif programs.repoint_all({device: preparation.slot}):
            log.error("the programs of %s are gone while it is in a pod: it is not counted there", device)

    def _refilter(self, preparation: Preparation) -> None:
        """Filters of this version in place of those in the pod; a device at home has none."""
        context = self._context
        for attachment in context.book.attachments_of(preparation.key):
            if attachment.state is not AttachmentState.ATTACHED or preparation.rdma_only:
                continue
            with self.reach(attachment) as target:
                if target is not None and target.find_in_pod() is not None:
                    attach = partial(filters.attach, target, accounting=context.accounting)
                    context.engine.project(str(attachment.id), Act.FILTER, attach)

    def is_ended(self, preparation: Preparation) -> bool:
        """Whether what was prepared, and is in no pod, must be put in order before it can go into one. As
        is_dead; of a share that can also be seen where there are no programs to say so."""
        if preparation.share is not None and self._context.programs is None:
            return not self._context.devices.is_at_home(preparation)
        return self.is_dead(preparation)

    def has_ended(self, attachment: Attachment) -> bool:
        """Whether the interface of a share is no more while its pod lives, as its programs say: the device
        under it was away, or its pod deleted it."""
        preparation = self._context.book.preparation(attachment.preparation)
        return preparation is not None and preparation.share is not None and self.is_dead(preparation)

    def is_dead(self, preparation: Preparation) -> bool:
        """Whether the netdev that was prepared is no more. There may be another in its place, without its
        programs and with none of what its PF was told for it. False where there are no programs to say so:
        with clsact, and of a device that is given by its files."""
        programs = self._context.programs
        if programs is None or preparation.by_file:
            return False
        try:
            pair = programs.state(preparation.key.unit)
        except BpfError as error:
            log.warning("%s: %s", preparation.key.unit, error)
            return False
        return pair is None or not pair.alive

    def _withdraw(self, attachment: Attachment) -> None:
        try:
            self._projections.publish_claim(attachment.preparation.claim_uid)
        except EXPECTED as error:
            # The device goes home all the same: the spec of a netns that is no more starts nothing.
            log.error("withdrawing the CDI spec of %s: %s", attachment.preparation.claim_uid, error)

    def _look(self, attachment: Attachment, target: Target) -> tuple[Problem, ...]:
        return self._context.engine.bring_home(plan.detach(attachment, target.preparation), target)

    def _conclude(
        self, attachment: Attachment, preparation: Preparation, problems: tuple[Problem, ...]
    ) -> bool:
        """Close, or keep and quarantine, by what the last look at the device said."""
        context = self._context
        device = preparation.key.unit
        errors = {problem.act: problem.error for problem in problems}
        if Act.FOLD in errors:
            context.book.quarantine(
                device, f"its counters are not in the ledger: {errors[Act.FOLD]}", self._now()
            )
            return False
        last = (Act.VERIFY, Act.VERIFY_VFIO, Act.RDMA_VERIFY, Act.IPOIB_REMOVE)
        verdict = next((errors[act] for act in last if act in errors), None)
        if verdict is None:
            context.book.release(device)
        elif isinstance(verdict, Vanished):
            if self.is_hidden(preparation):
                self._withhold(attachment, preparation, HIDDEN)
                self._note_gap(attachment)
                self.close_attachment(attachment)
                return False
            log.warning("%s is gone; pod %s had it", device, attachment.pod.name)
        else:
            self._withhold(attachment, preparation, str(verdict))
            if not isinstance(verdict, NotClean):
                return False
        self.close_attachment(attachment)
        return verdict is None or isinstance(verdict, Vanished)

    def _withhold(self, attachment: Attachment, preparation: Preparation, reason: str) -> None:
        device = preparation.key.unit
        log.warning("%s is withheld: %s", device, reason)
        if self._context.book.quarantine(device, reason, self._now()):
            self._projections.tell_pod(attachment.pod, QUARANTINED, f"{device} is withheld: {reason}")

    def _note_gap(self, attachment: Attachment) -> None:
        now, reason = self._now(), "the pod hid the device: what it sent after the pod's end is not counted"
        try:
            self._context.ledger.gap(attachment.id, now, now, reason)
        except DriverError as error:
            log.error("%s", error)

    def _now(self) -> float:
        return self._context.clock.wall()
