"""What keeps a pod's interface to its limits: decided from its config and the node's policy, by nobody else.

Invariant: pure. The same config and policy give the same shaping, so what is in force can be told, compared
and made again from the records alone. Rates are Mb/s in what users say, bytes per second in what kernels are
told.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bpf.layout import CLASSES, LEAF
from bpf.limits import NO_MARK, NO_RULES, Police, Rules
from driver.errors import ConfigError, FieldProblem
from driver.model import Device, NicConfig, Preparation
from driver.qos import PodMarks, QosClass, QosPolicy
from driver.traffic import Enforcement, QosConfig
from hw.model import DeviceKind, Direction
from hw.qdisc import ROOT_HANDLE, FqQueue, HtbClass, HtbTree, Minor

_MBIT = 125_000
"""Bytes per second."""
_GSO_SECONDS = 1000
"""A packet that stands for several lasts at most 1/1000 s at the limit: others wait for it to pass."""
_GSO_LEAST = 2
"""In MTUs: a sender needs room for more than one segment."""
_GSO_MOST = 65536
_HEADERS = 400
"""The kernel takes off for headers what it may need at most."""
_BURST_SECONDS = 1000
"""A burst is 1/1000 s: what a timer that is late by that much has to make up for."""
_BURST_FREE = (65536, 250)
"""Or 1/250 s, up to what a device sends at once anyway: busy nodes have later timers."""
_EGRESS_QUEUE_SECONDS = 160
"""6 ms wait at most in a class. The sender is on this node and is told at once."""
_INGRESS_QUEUE_SECONDS = 50
"""20 ms: senders are elsewhere, and learn of a drop a round trip later."""
_INGRESS_QUEUE_LEAST = 4 * _GSO_MOST
_BACKSTOP = (5, 4)
"""Of the limit: what a pod can have that took a queue off. Bursts are larger than any queue, so that nothing
is dropped that a queue in place would have taken."""
_BACKSTOP_BURST_SECONDS = 10
_BACKSTOP_BURST_LEAST = 4 * _GSO_MOST
_POLICE_BURST_SECONDS = 20
_FRAME_LEAST = 42
"""Bytes of a packet without payload, as counted."""
_FQ_ROOM_LEAST = 1000
_LEAST_SHARE = 1000
"""A class that is guaranteed nothing has this part of the limit: HTB takes no 0."""

POLICED = ("tx_policed", "rx_policed")
QUEUE_DROPPED = ("tx_queue_dropped", "rx_queue_dropped")
"""Counters of packets that were counted and then dropped, by the programs or by a queue; by direction."""


class KeptBy(enum.StrEnum):
    """What keeps a limit, as status and metrics say it."""

    DEVICE = "device"
    QUEUE = "htb"
    DEPARTURES = "fq"
    DETOUR = "ifb"
    POLICE = "police"

    @property
    def cooperative(self) -> bool:
        """Whether a pod with NET_ADMIN can disturb it: what it has then is at most a quarter more."""
        return self in (KeptBy.QUEUE, KeptBy.DEPARTURES, KeptBy.DETOUR)


@dataclass(frozen=True, slots=True)
class Kept:
    """A limit in force: Mb/s."""

    direction: Direction
    rate: int
    by: KeptBy

    def __str__(self) -> str:
        how = f"{self.by}, cooperative" if self.by.cooperative else str(self.by)
        return f"{self.direction.name.lower()} at most {self.rate} Mb/s ({how})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """What is to be done to an interface. rules are those of a detour, but for its index, which is known once
    there is one. gso_max_size None: as the device has it. ingress_police: where there can be no detour."""

    egress: HtbTree | FqQueue | None
    ingress: HtbTree | None
    rules: Rules
    gso_max_size: int | None
    ingress_police: Police | None

    def rules_with(self, detour: int) -> Rules:
        """detour 0: the kernel has none."""
        if self.ingress is None:
            return self.rules
        if detour:
            return replace(self.rules, detour=detour)
        return replace(
            self.rules,
            queues=(self.rules.queues[0], 0),
            police=(self.rules.police[0], self.ingress_police),
            guaranteed=(self.rules.guaranteed[0], NO_RULES.guaranteed[1]),
        )


def sized(device: Device, config: NicConfig) -> NicConfig:
    """config with the device's size for its egress rate, where none is asked for. ConfigError for rates above
    the size, which others were promised."""
    portion = device.portion
    if portion is None or device.kind is not DeviceKind.VF:
        return config
    qos, vf = config.qos, config.vf
    asked = {
        "qos.egress.rate": qos.egress_rate,
        "qos.egress.minRate": qos.egress_min_rate,
        "vf.maxRate": vf.max_rate,
        "vf.minRate": vf.min_rate,
    }
    _check_below(
        portion.size, asked, f"the size of {device.name} (capacity bandwidth)", "a device of a larger size"
    )
    if qos.egress_rate or vf.max_rate:
        return config
    return replace(config, qos=replace(qos, egress_rate=portion.size, by_size=True))


def shared(device: Device, config: NicConfig, size: int) -> NicConfig:
    """config with what a claim has of a device that is given out in parts for its rates, each way, where it
    does not ask for less. ConfigError for rates above that."""
    qos = config.qos
    asked = {"qos.egress.rate": qos.egress_rate, "qos.ingress.rate": qos.ingress_rate}
    _check_below(
        size, asked, f"what the claim has of {device.name} (capacity bandwidth)", "more of the capacity"
    )
    egress, ingress = qos.egress_rate or size, qos.ingress_rate or size
    by_size = not qos.egress_rate
    return replace(config, qos=replace(qos, egress_rate=egress, ingress_rate=ingress, by_size=by_size))


def _check_below(most: int, asked: Mapping[str, int | None], what: str, instead: str) -> None:
    problems = [
        FieldProblem(path, f"{rate}M is above {most}M, {what}: ask for less, or for {instead}")
        for path, rate in asked.items()
        if (rate or 0) > most
    ]
    if problems:
        raise ConfigError(problems)


def check(device: Device, config: NicConfig, policy: QosPolicy) -> None:
    """ConfigError for limits that nobody could keep on this device, and for a class that the node has not."""
    qos = config.qos
    problems = []
    if qos.traffic_class is not None and policy.index_of(qos.traffic_class) is None:
        known = ", ".join(each.name for each in policy.classes)
        problems.append(
            FieldProblem("qos.class", f"{qos.traffic_class} is no class of this node, which has {known}")
        )
    if device.kind is not DeviceKind.VF and qos.on_pf:
        problems.append(
            FieldProblem("qos.enforcement", f"{device.name} is no VF: no hardware limits it alone")
        )
    if qos.egress_min_rate and (device.kind is not DeviceKind.VF or qos.enforcement is Enforcement.SOFTWARE):
        problems.append(
            FieldProblem(
                "qos.egress.minRate", f"only hardware could keep it for {device.name}, and that will not"
            )
        )
    if config.rdma.ipoib is not None and any(_software_rates(settled(device, config).qos, policy)):
        told = (
            f"{device.name} has a limit that the node's kernel would keep (qos, or node policy, podLimits), "
            "on its port's own interface alone; leave one of the two out, or have its PF keep it (vf.maxRate)"
        )
        problems.append(FieldProblem("rdma.ipoib", told))
    if config.by_file:
        asked = {
            "qos.class": qos.traffic_class,
            "qos.ingress.rate": qos.ingress_rate,
            "qos.egress.burst": qos.egress_burst,
        }
        unseen = (
            f"{device.name} is given by its files (vf.driver): the node's kernel does not see its packets"
        )
        problems += [FieldProblem(path, unseen) for path, value in asked.items() if value]
        if qos.egress_rate and qos.enforcement is Enforcement.SOFTWARE:
            problems.append(FieldProblem("qos.enforcement", unseen))
    if problems:
        raise ConfigError(problems)


def passes_by(preparation: Preparation) -> bool:
    """Whether traffic of a device that has a size passes by what keeps it to that."""
    binding, config = preparation.rdma, preparation.config
    by_device = config.qos.on_pf or config.vf.max_rate
    return preparation.size is not None and not by_device and binding is not None and not binding.software


def past_size(preparation: Preparation) -> FieldProblem:
    """Why a device that passes_by is not given away."""
    return FieldProblem(
        "qos.enforcement",
        f"{preparation.key.unit} has an RDMA device, whose packets the node's kernel does not see, and a "
        f"size of {preparation.size}M (node policy, bandwidth), to which only its PF could hold it",
    )


def settled(device: Device, config: NicConfig) -> NicConfig:
    """config with who keeps its egress rates: the device, where it is a VF whose PF can be told."""
    qos = config.qos
    if qos.enforcement is not Enforcement.AUTO:
        return config
    asked = bool(qos.egress_rate or qos.egress_min_rate)
    hardware = asked and (device.vf is not None or config.by_file)
    return _kept_by(config, Enforcement.HARDWARE if hardware else Enforcement.SOFTWARE)


def instead(config: NicConfig, *, asked: NicConfig) -> NicConfig | None:
    """config with its rate kept by the node's kernel, after a device refused; None where that was not what
    the device was asked for, or nobody else may or can keep it."""
    qos = asked.qos
    if qos.enforcement is not Enforcement.AUTO or not config.qos.on_pf:
        return None
    nobody = qos.egress_min_rate or asked.by_file or asked.rdma.ipoib is not None
    return None if nobody else _kept_by(config, Enforcement.SOFTWARE)


def _kept_by(config: NicConfig, enforcement: Enforcement) -> NicConfig:
    return replace(config, qos=replace(config.qos, enforcement=enforcement))


def shaping(config: NicConfig, policy: QosPolicy, *, mtu: int, departs: bool = False) -> Shaping:
    """Of an interface that the node's kernel drives. config is a preparation's; mtu the interface's. departs:
    what it sends is told when to leave, and waits in one queue."""
    qos = config.qos
    egress, ingress = _software_rates(qos, policy)
    classes = policy.classes
    gso = _gso(egress, mtu) if egress else None
    out = (
        _tree(
            egress, classes, gso or _GSO_MOST, max(egress * _MBIT // _EGRESS_QUEUE_SECONDS, 4 * (gso or mtu))
        )
        if egress
        else None
    )
    if out is not None and qos.egress_burst is not None:
        out = replace(out, burst=max(qos.egress_burst, 2 * mtu))
    queue = max(ingress * _MBIT // _INGRESS_QUEUE_SECONDS, _INGRESS_QUEUE_LEAST)
    into = _tree(ingress, classes, _GSO_MOST, queue) if ingress else None
    departing = out if departs else None
    return Shaping(
        egress=_one_queue(departing) if departing is not None else out,
        ingress=into,
        rules=Rules(
            one_class=_one_class(qos, policy),
            queues=(ROOT_HANDLE if egress else 0, ROOT_HANDLE if ingress else 0),
            marks=_marks(policy),
            police=(
                _out_police(egress, out, departs=departs) if out is not None else None,
                _backstop(ingress, queue) if into is not None else None,
            ),
            guaranteed=(_guaranteed(out), _guaranteed(into)),
            credit=departing.burst if departing is not None else None,
        ),
        gso_max_size=gso,
        ingress_police=_police(ingress) if ingress else None,
    )


def kept(config: NicConfig, policy: QosPolicy, *, detour: bool, departs: bool = False) -> tuple[Kept, ...]:
    """The limits of an attached interface, as the same shaping keeps them. detour: it has one; departs: as of
    shaping."""
    qos = config.qos
    egress, ingress = (0, 0) if config.by_file else _software_rates(qos, policy)
    found = []
    if egress:
        found.append(Kept(Direction.EGRESS, egress, KeptBy.DEPARTURES if departs else KeptBy.QUEUE))
    elif qos.on_pf and qos.egress_rate:
        found.append(Kept(Direction.EGRESS, qos.egress_rate, KeptBy.DEVICE))
    if ingress:
        found.append(Kept(Direction.INGRESS, ingress, KeptBy.DETOUR if detour else KeptBy.POLICE))
    return tuple(found)


def _software_rates(qos: QosConfig, policy: QosPolicy) -> tuple[int, int]:
    """What the node's kernel is to keep, each way: the lowest that was said, but for what the device does."""
    egress = _lower(qos.egress_rate, policy.limits.egress)
    if qos.on_pf and egress == qos.egress_rate:
        egress = 0
    return egress, _lower(qos.ingress_rate, policy.limits.ingress)


def _lower(one: int, other: int) -> int:
    """0 is no limit."""
    return min(one, other) if one and other else one or other


def _tree(rate: int, classes: Sequence[QosClass], gso: int, queue: int) -> HtbTree:
    limit = rate * _MBIT
    return HtbTree(
        rate=limit,
        burst=_burst(limit, gso),
        quantum=gso,
        default=Minor(LEAF),
        classes=tuple(
            HtbClass(
                minor=Minor(LEAF + each.index),
                rate=max(limit * each.guaranteed // 100, limit // _LEAST_SHARE),
                ceil=limit * each.ceiling // 100,
                priority=each.priority,
                queue=queue,
            )
            for each in sorted(classes, key=lambda each: each.index)
        ),
    )


def _burst(limit: int, gso: int) -> int:
    size, seconds = _BURST_FREE
    return max(limit // _BURST_SECONDS, min(limit // seconds, size), gso)


def _gso(rate: int, mtu: int) -> int:
    return min(max(rate * _MBIT // _GSO_SECONDS, _GSO_LEAST * mtu + _HEADERS), _GSO_MOST)


def _backstop(rate: int, burst: int) -> Police:
    most, of = _BACKSTOP
    limit = rate * _MBIT * most // of
    return Police(limit, max(limit // _BACKSTOP_BURST_SECONDS, _BACKSTOP_BURST_LEAST, 2 * burst))


def _one_queue(tree: HtbTree) -> FqQueue:
    """With room for all that the program lets wait in it, however small the packets are."""
    return FqQueue(packets=max(_waiting(tree) // _FRAME_LEAST, _FQ_ROOM_LEAST))


def _out_police(rate: int, tree: HtbTree, *, departs: bool) -> Police:
    """Of the clock that says when packets leave: what would wait for longer than in one of the tree's queues
    is dropped, so nothing is sent above the limit even if there is no queue that waits."""
    return Police(tree.rate, _waiting(tree)) if departs else _backstop(rate, tree.burst)


def _waiting(tree: HtbTree) -> int:
    return tree.burst + tree.classes[0].queue


def _guaranteed(tree: HtbTree | None) -> tuple[int, ...]:
    """By class, as the queue guarantees it."""
    shares = [0] * CLASSES
    for each in tree.classes if tree is not None else ():
        shares[each.minor - LEAF] = each.rate
    return tuple(shares)


def _police(rate: int) -> Police:
    limit = rate * _MBIT
    return Police(limit, max(limit // _POLICE_BURST_SECONDS, 2 * _GSO_MOST))


def _one_class(qos: QosConfig, policy: QosPolicy) -> int | None:
    """A class that the policy no longer has is none: its packets are classed as if it were not asked for."""
    asked = policy.index_of(qos.traffic_class) if qos.traffic_class is not None else None
    return 0 if asked is None and policy.marks is PodMarks.CLEAR else asked


def _marks(policy: QosPolicy) -> tuple[int, ...]:
    unmarked = 0 if policy.marks is PodMarks.CLEAR else NO_MARK
    marks = list(Rules().marks)
    for each in policy.classes:
        marks[each.index] = unmarked if each.mark is None else each.mark
    return tuple(marks)
