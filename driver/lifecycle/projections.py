"""What is written from the truth and never read to decide: CDI specs, live files, status, slices.

Invariant: a container can start only while its claim's spec stands and its netns cookie is in the live
file. So the live file is widened before the spec appears, and the spec is gone before it is narrowed
to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path

from driver import limits
from driver.cdi import CdiEntry
from driver.inventory import capacity_requests
from driver.lifecycle.context import Context
from driver.lifecycle.relations import sharing
from driver.model import (
    Attachment,
    AttachmentState,
    ClaimRef,
    ClaimUid,
    CounterUse,
    DeviceName,
    DeviceStatus,
    DriverEvent,
    EventKind,
    NodeRef,
    OfferedDevice,
    PodRef,
    Preparation,
    Taint,
)
from driver.sharing import VFS
from driver.troubles import DeviceHealth, Trouble
from hw.ipoib import full_member

log = logging.getLogger(__name__)


class Projections:
    """Writes what the book says. Every method may be repeated."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._healths: Mapping[DeviceName, DeviceHealth] = {}
        self._kept: frozenset[DeviceName] = frozenset()
        self._offered: Mapping[DeviceName, OfferedDevice] = {}
        self._promised: dict[ClaimUid, frozenset[DeviceName]] = {}

    # --- files, in worker threads -------------------------------------------------------------------

    def publish_claim(self, uid: ClaimUid) -> None:
        """Make spec and live file say what is attached of this claim now; remove both if nothing is."""
        attached = self._attached(uid)
        context = self._context
        owner = f"claim/{uid}"
        if not attached:
            context.engine.project(owner, "remove-cdi-spec", lambda: context.cdi.remove(uid))
            context.engine.project(owner, "remove-live-file", lambda: context.live.remove(uid))
            return
        cookies = tuple(sorted({a.netns_cookie for a, _ in attached}))
        entries = tuple({p.key: self._entry(a, p) for a, p in attached}.values())
        proofs = tuple(dict.fromkeys(proof for a, p in attached for proof in context.rdma.proofs(a, p)))
        context.engine.project(owner, "write-live-file", lambda: context.live.write(uid, cookies, proofs))
        context.engine.project(owner, "write-cdi-spec", lambda: context.cdi.write(uid, entries))

    def _entry(self, attachment: Attachment, preparation: Preparation) -> CdiEntry:
        files: tuple[Path, ...] = ()
        if preparation.config.by_file and preparation.pci_address is not None:
            files = self._context.devices.vfio_files(preparation.pci_address)
        return CdiEntry(
            key=preparation.key,
            ifname=preparation.pod_ifname,
            pci_address=preparation.pci_address,
            files=files,
            rdma=attachment.rdma,
            wishes=preparation.config.rdma,
        )

    def sweep(self, keep: frozenset[ClaimUid]) -> None:
        """Remove specs and live files of claims that have nothing attached, but of those to keep."""
        attached = {
            a.preparation.claim_uid
            for a in self._context.book.attachments()
            if a.state is AttachmentState.ATTACHED
        }
        for uid in self._context.cdi.claims() | self._context.live.claims():
            if uid not in attached and uid not in keep:
                log.info("removing what is left of claim %s, which has no live attachment", uid)
                self.publish_claim(uid)

    def _attached(self, uid: ClaimUid) -> list[tuple[Attachment, Preparation]]:
        book = self._context.book
        pairs = []
        for attachment in book.attachments():
            preparation = book.preparation(attachment.preparation)
            if (
                attachment.state is AttachmentState.ATTACHED
                and attachment.preparation.claim_uid == uid
                and preparation is not None
            ):
                pairs.append((attachment, preparation))
        return pairs

    # --- towards the API server, from any thread -----------------------------------------------------

    def report_claim(self, uid: ClaimUid) -> None:
        """Queue status.devices of the claim: every attached device, as the API wants the whole list."""
        attached = self._attached(uid)
        if not attached:
            return
        statuses = tuple(
            DeviceStatus(
                claim=p.claim,
                pool=p.key.pool,
                device=p.key.device,
                share_id=p.key.share_id,
                ready=True,
                reason="Attached",
                message=self._said(a, p),
                interface=p.pod_ifname,
                mac=None if p.by_file else p.mac,
                addresses=p.config.interface.addresses,
                hook="" if p.by_file else self._context.hook,
                unhealthy=self._unhealthy(p),
                partition=_partition(p),
                ipoib=p.config.rdma.ipoib,
            )
            for a, p in attached
        )
        self._context.statuses.write_status(attached[0][1].claim, statuses)

    def _said(self, attachment: Attachment, preparation: Preparation) -> str:
        pod = attachment.pod.name
        if preparation.config.by_file:
            driver = preparation.config.vf.driver
            said = f"{preparation.pci_address} on {driver} for pod {pod}, not counted"
        elif preparation.rdma_only:
            said = f"for pod {pod}"
        else:
            said = f"{preparation.ifname} in pod {pod}, counted by {self._context.hook}"
        in_software = [
            str(each) for each in self.limits_of(preparation) if each.by is not limits.KeptBy.DEVICE
        ]
        said += _limits(preparation) + _rdma_said(attachment) + _ipoib_said(preparation)
        return "; ".join([said, *in_software])

    def _unhealthy(self, preparation: Preparation) -> str | None:
        """Of a share also what is wrong with the device that it is a share of. None: neither was looked
        at."""
        names = dict.fromkeys((preparation.key.device, preparation.key.unit))
        found = [health.message for name in names if (health := self._healths.get(name)) is not None]
        return "; ".join(filter(None, found)) if found else None

    def limits_of(self, preparation: Preparation) -> tuple[limits.Kept, ...]:
        """The limits that are in force for an attached device."""
        context = self._context
        config, qos = preparation.config, context.policy().qos
        asked = limits.kept(config, qos, detour=False)
        if all(each.by is limits.KeptBy.DEVICE for each in asked):
            # Nothing that the maps could say more of; and so it is with most devices.
            return asked
        maps, slot = context.accounting.limits, preparation.slot
        return limits.kept(config, qos, detour=bool(maps.detour(slot)), departs=maps.departs(slot))

    def offer(self) -> None:
        """Say what this node offers. A device in use keeps the attributes it had when it was prepared,
        so attach, detach and a restart change nothing here; one that is given out in shares is as it is."""
        context = self._context
        relations = sharing(context)
        held = {p.key.device: p for p in context.book.preparations() if p.share is None}
        offered = {
            device.name: OfferedDevice(
                name=device.name,
                attributes=device.attributes,
                capacities=device.capacities,
                requests=capacity_requests(device.sharable) if device.sharable is not None else {},
            )
            for device in context.devices.current().values()
            if not device.withheld
            and not relations.in_others_hands(device.name)
            and not relations.in_parts(device.name)
        }
        for name, preparation in held.items():
            offered[name] = OfferedDevice(
                name=name, attributes=preparation.attributes, capacities=preparation.capacities
            )
        for name in self._kept - offered.keys():
            # Its driver was taken from it: what is known of it is from when it had one.
            if name in self._offered:
                offered[name] = self._offered[name]
        self._offered = offered
        uses = relations.uses(offered, frozenset[DeviceName]().union(*tuple(self._promised.values())))
        context.slices.offer(
            tuple(
                replace(
                    offered[name],
                    uses=uses.get(name, ()),
                    taints=self._taints(name, bool(relations.quarantine(name))),
                )
                for name in sorted(offered, key=lambda name: _rank(offered[name], uses.get(name, ())))
            )
        )

    def promise(self, uid: ClaimUid, names: Collection[DeviceName]) -> None:
        """The scheduler gave these to a claim that was refused, since too little is left: counters are to be
        large enough for them too. No names: nothing of the claim is promised any more."""
        self._promised.pop(uid, None)
        if names:
            self._promised[uid] = frozenset(names)

    def offered(self) -> AbstractSet[DeviceName]:
        """What was offered the last time."""
        return self._offered.keys()

    def show_health(self, healths: Mapping[DeviceName, DeviceHealth], kept: frozenset[DeviceName]) -> bool:
        """What offers and statuses say of devices from now on. kept: to be offered as before, though they
        are withheld. Whether another offer is due."""
        before = {name: _troubles(health) for name, health in self._healths.items()}
        after = {name: _troubles(health) for name, health in healths.items()}
        due = kept != self._kept or any(before.get(name, []) != now for name, now in after.items())
        self._healths, self._kept = healths, kept
        return due

    def _taints(self, name: DeviceName, quarantined: bool) -> tuple[Taint, ...]:
        health = self._healths.get(name)
        found = set(_troubles(health)) if health is not None else set()
        # The book is the first to know of it.
        found = found | {Trouble.QUARANTINED} if quarantined else found - {Trouble.QUARANTINED}
        rule = self._context.policy().health.rule
        return tuple(
            Taint(key=f"{self._context.driver}/{trouble}", value="true", effect=effect)
            for trouble in sorted(found)
            if (effect := rule(trouble).effect) is not None
        )

    def tell(self, subject: ClaimRef | PodRef, kind: EventKind, reason: str, message: str) -> None:
        self._context.events.emit(DriverEvent(subject=subject, kind=kind, reason=reason, message=message))

    def tell_pod(self, pod: PodRef, reason: str, message: str) -> None:
        self.tell(pod, EventKind.WARNING, reason, message)

    def tell_node(self, kind: EventKind, reason: str, message: str) -> None:
        """Of what concerns no claim. The pool is named as the node is."""
        node = NodeRef(self._context.pool)
        self._context.events.emit(DriverEvent(subject=node, kind=kind, reason=reason, message=message))


def _troubles(health: DeviceHealth) -> list[Trouble]:
    return [finding.trouble for finding in health.findings]


def _limits(preparation: Preparation) -> str:
    """What the pod is held to by hardware, and by which part of it."""
    asked, wanted = preparation.config.on_pf(), preparation.vf_wanted
    parts = [
        f"{words} {rate} Mb/s"
        for words, rate in (("at least", asked.get("min_rate")), ("at most", asked.get("max_rate")))
        if rate
    ]
    return f", sends {' and '.join(parts)} by {wanted.rates_by}" if wanted is not None and parts else ""


def _rank(device: OfferedDevice, uses: Sequence[CounterUse]) -> tuple[bool, bool, DeviceName]:
    """The scheduler takes the first that fits: whoever asks for any device is to get a whole one if there is
    one, and must not get a PF."""
    takes_all = any(VFS in use.of and use.takes == use.of for use in uses)
    return takes_all, bool(device.requests), device.name


def _partition(preparation: Preparation) -> int | None:
    chosen = preparation.config.rdma.partition
    return full_member(chosen) if chosen is not None else None


def _ipoib_said(preparation: Preparation) -> str:
    wish, partition = preparation.config.rdma.ipoib, _partition(preparation)
    if wish is None or partition is None:
        return ""
    return f", beside it {wish.name} of partition {partition:#06x}"


def _rdma_said(attachment: Attachment) -> str:
    given = attachment.rdma
    if given is None:
        return ""
    address = f"GID {given.gid_index}, {given.gid}" if given.gid else "no RoCE v2 address"
    return f", RDMA device {given.name} ({address})"
