"""Devices of which one takes what another could have: a PF and its VFs, netdevs that have an RDMA device
together, VFs of the bandwidth that their PF gives out.

Invariant: pure. The scheduler is told of it by counters, and prepare asks here again: what rules out what is
the same for both. No more of a PF's bandwidth is given out than the policy says; what was given is not taken
back, whatever became of policy and port since.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Protocol

from driver.inventory import name_of, quantity
from driver.model import AttributeValue, CounterUse, Device, DeviceName, Preparation
from hw.model import (
    DeviceKind,
    Identity,
    PciIdentity,
    PfAddress,
    SoftwareIdentity,
    bus_of,
    card_of,
    parse_pci_address,
)

VFS = "vfs"
RDMA = "device"
BANDWIDTH = "bandwidth"
"""Names of counters; the last is in bits per second."""


class Shares(Protocol):
    """What a device and a preparation have in common."""

    @property
    def kind(self) -> DeviceKind: ...
    @property
    def identity(self) -> Identity: ...
    @property
    def attributes(self) -> Mapping[str, AttributeValue]: ...
    @property
    def capacities(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True)
class Against:
    """Why a device that is free itself is not to be had, and whether asking again may help by itself."""

    sentence: str
    passing: bool = False


@dataclass(frozen=True, slots=True)
class PortBudget:
    """What a PF gives out, and what of it claims have, in Mb/s. given is more where the policy or the port's
    speed were others when it was given."""

    of: int
    given: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Everything that is there, and who has it. What a claim has may be absent from devices."""

    devices: Mapping[DeviceName, Device]
    held: Mapping[DeviceName, Preparation]
    quarantined: Mapping[DeviceName, str]
    """Withheld until clean, and why."""


class Sharing:
    """The relations between the devices of one picture; made once for all questions about it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._all: Mapping[DeviceName, Shares] = {**node.devices, **node.held}
        self._ports: defaultdict[PfAddress, list[DeviceName]] = defaultdict(list)
        self._vfs: defaultdict[PfAddress, list[DeviceName]] = defaultdict(list)
        self._rdma: defaultdict[str, list[DeviceName]] = defaultdict(list)
        self._given_out: dict[PfAddress, int] = {}
        self._parts: defaultdict[DeviceName, list[DeviceName]] = defaultdict(list)
        for name, preparation in sorted(node.held.items()):
            if preparation.share is not None:
                self._parts[preparation.key.device].append(name)
        self._in_parts: defaultdict[PfAddress, list[DeviceName]] = defaultdict(list)
        for name, each in sorted(self._all.items()):
            port = port_of(each)
            shared = each.kind is DeviceKind.SHARED
            # Also when it is not given out in parts any more, and claims have some of it.
            if port is not None and not is_whole(each) and (shared or name in self._parts):
                self._in_parts[port].append(name)
            if shared:
                # Parts take from it alone: what it gives out is not its VFs'.
                continue
            if port is not None:
                (self._ports if is_whole(each) else self._vfs)[port].append(name)
                device = node.devices.get(name)
                if device is not None and device.portion is not None:
                    self._given_out[port] = device.portion.of
            rdma = each.attributes.get("rdmaDevice")
            if isinstance(rdma, str):
                self._rdma[rdma].append(name)

    def rivals(self, name: DeviceName) -> tuple[DeviceName, ...]:
        """Those that nobody may have while someone has this one."""
        each = self._all.get(name)
        if each is None:
            return ()
        if each.kind is DeviceKind.SHARED:
            port = None if is_whole(each) else port_of(each)
            return tuple(self._ports.get(port, ())) if port is not None else ()
        # The node policy may have had it given out in parts before; they may not be clean.
        found: list[DeviceName] = list(self._parts.get(name, ()))
        port = port_of(each)
        if port is not None:
            found += (self._vfs if is_whole(each) else self._ports).get(port, [])
        found += self._rdma.get(str(each.attributes.get("rdmaDevice")), [])
        return tuple(other for other in dict.fromkeys(found) if other != name)

    def to_lock(self, name: DeviceName) -> frozenset[DeviceName]:
        """It and those of its rivals that do not lock it themselves: a PF waits for its VFs, and these do not
        wait for each other."""
        mine = self._all.get(name)
        if mine is None:
            return frozenset({name})
        port = port_of(mine)
        others = (other for other in self.rivals(name) if port is None or other not in self._ports[port])
        return frozenset({name, *others})

    def against(self, name: DeviceName) -> Against | None:
        """What is against giving it away, on the part of others."""
        node = self._node
        waiting = None
        if name in self._all and (why := self.in_parts(name)):
            return Against(why)
        for other in self.rivals(name):
            what = self._called(name, other)
            if holder := node.held.get(other):
                claim = holder.claim
                return Against(f"{what} is held by claim {claim.namespace}/{claim.name}")
            if reason := node.quarantined.get(other):
                waiting = waiting or Against(f"{what} is withheld until it is clean: {reason}", passing=True)
            elif self._others_have(name, other):
                return Against(f"{what} is not free: {node.devices[other].withheld}")
        return waiting

    def in_others_hands(self, name: DeviceName) -> bool:
        """Whether others than claims have one that it shares with."""
        held = self._node.held
        return any(other not in held and self._others_have(name, other) for other in self.rivals(name))

    def _others_have(self, name: DeviceName, other: DeviceName) -> bool:
        """Whether others than claims have a rival in a way that rules this one out. A PF that the host uses
        where it is, with an address or in a bond, has its VFs for others."""
        device = self._node.devices.get(other)
        if device is None or not device.taken:
            return False
        its_pf = is_whole(device) and not is_whole(self._all[name])
        return not its_pf or device.ifindex is None

    def in_parts(self, name: DeviceName) -> str:
        """Why a device cannot be given whole, a sentence: claims have parts of it from when the policy had it
        so, or it is a PF with a VF that is given out in parts. "" if it can be."""
        each = self._all[name]
        if each.kind is DeviceKind.SHARED:
            return ""
        if parts := self._parts.get(name):
            claim = self._node.held[parts[0]].claim
            return f"{parts[0]}, a part of it, is held by claim {claim.namespace}/{claim.name}"
        port = port_of(each)
        vfs = self._in_parts.get(port) if port is not None and is_whole(each) else None
        return f"its VF {vfs[0]} is given out in parts (node policy, shared)" if vfs else ""

    def quarantine(self, name: DeviceName) -> bool:
        """Whether it or one that it shares with is withheld until it is clean."""
        return any(each in self._node.quarantined for each in (name, *self.rivals(name)))

    def uses(
        self, offered: Iterable[DeviceName], promised: AbstractSet[DeviceName] = frozenset()
    ) -> Mapping[DeviceName, tuple[CounterUse, ...]]:
        """Counters for those of the offered that rule each other out; for a device alone there are none.

        promised: what the scheduler gave to claims that were refused here, and counts until they end.
        """
        there = frozenset(offered)
        found: defaultdict[DeviceName, list[CounterUse]] = defaultdict(list)
        for port, wholes in self._ports.items():
            vfs = there.intersection(self._vfs[port])
            self._count_vfs(port, there.intersection(wholes), vfs, promised, found)
        for rdma, names in self._rdma.items():
            together = there.intersection(names)
            label = re.sub(r"[^a-z0-9-]", "-", f"rdma-{rdma}".lower()).strip("-")
            if len(together) > 1 and len(label) <= 63:
                for name in together:
                    found[name].append(CounterUse(set=label, takes={RDMA: "1"}, of={RDMA: "1"}))
        return {name: tuple(uses) for name, uses in found.items()}

    def _count_vfs(
        self,
        port: PfAddress,
        wholes: frozenset[DeviceName],
        vfs: frozenset[DeviceName],
        promised: AbstractSet[DeviceName],
        found: Mapping[DeviceName, list[CounterUse]],
    ) -> None:
        every: dict[str, str] = {}
        budget = self._budget(port)
        if wholes and vfs:
            # How many there can be, which stays the same while some come and go.
            total = max(len(vfs), *(int(self._all[name].capacities.get(VFS, "0")) for name in wholes))
            every[VFS] = str(total)
        if budget is not None and vfs:
            # Less than what is given would leave less than nothing, for which the scheduler gives no device
            # with counters of the whole pool any more.
            more = sum(self._takes(name, budget.of) for name in promised & vfs - self._node.held.keys())
            every[BANDWIDTH] = quantity(max(budget.of, budget.given + more))
        if not every:
            return
        use = CounterUse(set=_set_of(port), takes=every, of=every)
        given = any(name in self._node.held for name in wholes)
        for name in wholes:
            found[name].append(replace(use, instead=not given))
        over = frozenset(self._over(port, vfs))
        for name in vfs:
            each = {VFS: "1", BANDWIDTH: quantity(self._takes(name, budget.of if budget else 0))}
            takes = {counter: each[counter] for counter in every}
            instead = (given or name in over) and name not in self._node.held
            found[name].append(replace(use, takes=takes, instead=instead))

    # --- bandwidth --------------------------------------------------------------------------------------

    def budgets(self) -> Mapping[PfAddress, PortBudget]:
        """Of the PFs of which the policy says what is given out."""
        found = {port: self._budget(port) for port in sorted(self._given_out)}
        return {port: budget for port, budget in found.items() if budget is not None}

    def over_budget(self, sizes: Mapping[DeviceName, int | None]) -> str:
        """Why these free devices cannot all be given away now, a sentence; "" if they can. sizes in Mb/s;
        None is without, and bound by nobody."""
        for port, budget in self.budgets().items():
            mine = [name for name in sizes if name in self._vfs[port]]
            wanted = sum(sizes[name] or budget.of for name in mine)
            if mine and budget.given + wanted > budget.of:
                return (
                    f"{' and '.join(mine)} would take {quantity(wanted)} of PF {port}, which gives out "
                    f"{quantity(budget.of)}, and claims have {quantity(budget.given)} of that already"
                )
        return ""

    def _budget(self, port: PfAddress) -> PortBudget | None:
        of = self._given_out.get(port)
        if of is None:
            return None
        held = self._node.held
        given = sum(self._takes(name, of) for name in self._vfs[port] if name in held)
        given += self._parts_beyond(port)
        return PortBudget(of, given + of * any(name in held for name in self._ports[port]))

    def _parts_beyond(self, port: PfAddress) -> int:
        """Mb/s that claims have in parts of a PF and its VFs beyond what the policy takes off for that by
        now."""
        here = [each for each in self._node.devices.values() if port_of(each) == port]
        had = [self._node.held[part].size or 0 for each in here for part in self._parts.get(each.name, ())]
        taken_off = sum(each.sharable.bandwidth for each in here if each.sharable is not None)
        return max(sum(had) - taken_off, 0)

    def _takes(self, name: DeviceName, of: int) -> int:
        """What was given without a size is bound by nobody."""
        preparation = self._node.held.get(name)
        if preparation is not None:
            speed = preparation.attributes.get("linkSpeed")
            return preparation.size or (speed if isinstance(speed, int) else of)
        portion = self._node.devices[name].portion if name in self._node.devices else None
        return portion.size if portion is not None else of

    def _over(self, port: PfAddress, vfs: AbstractSet[DeviceName]) -> Iterator[DeviceName]:
        """Which of the free VFs are more than the PF gives out, if all before them are given away."""
        budget = self._budget(port)
        if budget is None:
            return
        left = budget.of - budget.given
        for name in sorted(vfs - self._node.held.keys(), key=self._index):
            takes = self._takes(name, budget.of)
            if takes > left:
                yield name
            else:
                left -= takes

    def _index(self, name: DeviceName) -> int:
        identity = self._all[name].identity
        return 0 if isinstance(identity, SoftwareIdentity) else identity.vf_index or 0

    def _called(self, name: DeviceName, other: DeviceName) -> str:
        mine, others = self._all[name], self._all[other]
        if port_of(mine) != port_of(others) or is_whole(mine) == is_whole(others):
            return f"{other}, which has the same RDMA device,"
        return f"its {'VF' if is_whole(mine) else 'PF'} {other}"


def port_of(thing: Shares) -> PfAddress | None:
    """The PF whose VF it is, or which it is; None for what is neither."""
    return card_of(thing.identity)


def is_whole(thing: Shares) -> bool:
    """Whether it is a whole port. A VF that a virtual machine was given is one as well: it knows no PF."""
    return isinstance(thing.identity, SoftwareIdentity) or thing.identity.vf_index is None


def _set_of(port: PfAddress) -> str:
    """The name of a PF's counter set, a DNS label: that of the PF as a device; a simulated card's own."""
    return name_of(PciIdentity(parse_pci_address(port))) if bus_of(port) == "pci" else port
