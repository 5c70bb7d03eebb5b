"""Traffic classes: which class a packet's DSCP or PCP puts it in, for counting and shaping.

Invariant: every DSCP and every PCP is in exactly one class; what no class names is in class 0. What the
classes are guaranteed of a limit is not more than the whole. Pure.

DSCP is the upper six bits of the IPv4 TOS or IPv6 traffic class byte (RFC 2474); PCP is the priority of
a VLAN tag (IEEE 802.1Q).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from bpf.layout import CLASSES
from driver.errors import ConfigError, FieldProblem
from driver.strict import Key, Kind, converted, integer, listing, shown, text
from driver.traffic import CLASS_NAME_PATTERN, class_name

DSCPS = 64
PCPS = 8
PRIORITIES = 8
DEFAULT_PRIORITY = 4


def _marks(count: int) -> Kind[frozenset[int]]:
    return converted(listing(integer(0, count - 1), maximum=count), frozenset)


@dataclass(frozen=True, slots=True, kw_only=True)
class QosClass:
    """One traffic class. index is its place in the BPF maps and so in the usage ledger: a class that
    keeps its meaning should keep its index."""

    name: Annotated[
        str,
        Key("name", text(class_name, {"pattern": f"^{CLASS_NAME_PATTERN}$"}), "As in metrics and claims."),
    ]
    index: Annotated[int, Key("index", integer(0, CLASSES - 1), "0 to 7; 0 takes what no class names.")]
    dscp: Annotated[frozenset[int], Key("dscp", _marks(DSCPS), "DSCP values of this class.")] = frozenset()
    pcp: Annotated[frozenset[int], Key("pcp", _marks(PCPS), "VLAN priorities of this class.")] = frozenset()
    priority: Annotated[
        int,
        Key(
            "priority",
            integer(0, PRIORITIES - 1),
            "0 to 7. Of what the others leave of a limit, classes of a lower number take first.",
        ),
    ] = DEFAULT_PRIORITY
    guaranteed: Annotated[
        int, Key("guaranteed", integer(0, 100), "Percent of a limit that it can always have.")
    ] = 0
    ceiling: Annotated[
        int, Key("ceiling", integer(1, 100), "Percent of a limit that it can have at most.")
    ] = 100
    mark: Annotated[
        int | None,
        Key("mark", integer(0, DSCPS - 1), "DSCP that its packets leave the pod with; absent: their own."),
    ] = None

    def __post_init__(self) -> None:
        class_name(self.name)
        if not 0 <= self.index < CLASSES:
            raise ValueError(f"class {self.name}: index {self.index} is not 0 to {CLASSES - 1}")
        for marks, count in ((self.dscp, DSCPS), (self.pcp, PCPS)):
            if any(not 0 <= mark < count for mark in marks):
                raise ValueError(f"class {self.name}: {sorted(marks)} are not all 0 to {count - 1}")
        if self.guaranteed > self.ceiling:
            raise ValueError(f"guaranteed {self.guaranteed} is above ceiling {self.ceiling}")


@dataclass(frozen=True, slots=True)
class ClassMaps:
    """Class index by DSCP (64 entries) and by PCP (8), and the classes' names by index (1 to 8)."""

    dscp: tuple[int, ...]
    pcp: tuple[int, ...]
    names: tuple[str, ...]


class PodMarks(enum.StrEnum):
    """Whether a pod's own DSCPs and VLAN priorities say which class its packets are in. clear: they do not,
    and packets leave with the mark of their class, or none."""

    TRUST = "trust"
    CLEAR = "clear"


class EgressShaper(enum.StrEnum):
    """What queues what the node's kernel limits on its way out of a pod. htb: by class. fq: by the time at
    which the program on the interface says that a packet leaves, all classes in one queue."""

    HTB = "htb"
    FQ = "fq"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodLimits:
    """What any pod's interface has at most, in Mb/s; 0: no limit."""

    egress: int = 0
    ingress: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QosPolicy:
    """What a node does with the traffic of its pods, whatever their claims say."""

    classes: tuple[QosClass, ...]
    marks: PodMarks = PodMarks.TRUST
    limits: PodLimits = PodLimits()
    shaper: EgressShaper = EgressShaper.HTB

    def index_of(self, name: str) -> int | None:
        """Of a class; None if there is none of that name."""
        return next((each.index for each in self.classes if each.name == name), None)


def _class(index: int, name: str, priority: int, guaranteed: int, *dscp: int) -> QosClass:
    """pcp is the index: that is how switches number them."""
    return QosClass(
        name=name,
        index=index,
        dscp=frozenset(dscp),
        pcp=frozenset({index}),
        priority=priority,
        guaranteed=guaranteed,
    )


DEFAULT_CLASSES: tuple[QosClass, ...] = (
    # DF, RFC 2474; named here though class 0 would take it anyway.
    _class(0, "best-effort", 3, 20, 0),
    # LE, RFC 8622; CS1, low-priority data, RFC 4594; AF1x, high-throughput data, RFC 2597 and RFC 4594.
    _class(1, "bulk", 4, 5, 1, 8, 10, 12, 14),
    # CS2, operations and management, RFC 4594; AF2x, low-latency data, RFC 2597.
    _class(2, "low-latency", 2, 10, 16, 18, 20, 22),
    # CS3 and AF3x, RFC 2474 and RFC 2597: RoCEv2 data is marked 24 or 26 in common lossless fabrics.
    _class(3, "roce-data", 2, 30, 24, 26, 28, 30),
    # CS4 and AF4x, interactive media, RFC 4594 and RFC 2597.
    _class(4, "media", 2, 10, 32, 34, 36, 38),
    # CS5, signalling, RFC 4594; VOICE-ADMIT, RFC 5865; EF, RFC 3246.
    _class(5, "real-time", 1, 10, 40, 44, 46),
    # CS6: RoCEv2's congestion notification in common lossless fabrics; also routing, RFC 4594.
    _class(6, "cnp", 0, 5, 48),
    # CS7, reserved for network control, RFC 2474 and RFC 4594.
    _class(7, "control", 0, 5, 56),
)
"""Used where the node policy names no classes."""


def class_problems(classes: Sequence[QosClass]) -> tuple[FieldProblem, ...]:
    """What is wrong with the classes taken together, with paths like `qosClasses[2].dscp`."""
    if not classes:
        return (FieldProblem("qosClasses", "needs at least the class with index 0"),)
    found = [
        *_twice(classes, "name", lambda entry: (entry.name,)),
        *_twice(classes, "index", lambda entry: (entry.index,)),
        *_twice(classes, "dscp", lambda entry: sorted(entry.dscp)),
        *_twice(classes, "pcp", lambda entry: sorted(entry.pcp)),
    ]
    guaranteed = sum(entry.guaranteed for entry in classes)
    if guaranteed > 100:
        found.append(FieldProblem("qosClasses", f"guarantee {guaranteed} % of a limit together"))
    indices = {entry.index for entry in classes}
    missing = sorted(set(range(max(indices) + 1)) - indices)
    if missing:
        found.append(
            FieldProblem("qosClasses", f"index {missing[0]} is missing: indices go from 0 without a gap")
        )
    return tuple(found)


def shaper_problems(classes: Sequence[QosClass], shaper: EgressShaper) -> Iterator[FieldProblem]:
    """What of the classes the shaper could not keep, with paths like `qosClasses[2].ceiling`."""
    for position, entry in enumerate(classes):
        if shaper is EgressShaper.FQ and entry.ceiling < 100:
            yield FieldProblem(
                f"qosClasses[{position}].ceiling",
                "is kept by htb only, and shaper is fq: leave one of them out",
            )


def _twice(
    classes: Sequence[QosClass], field: str, values: Callable[[QosClass], Sequence[object]]
) -> Iterator[FieldProblem]:
    owner: dict[object, QosClass] = {}
    for position, entry in enumerate(classes):
        for value in values(entry):
            first = owner.setdefault(value, entry)
            if first is not entry:
                yield FieldProblem(
                    f"qosClasses[{position}].{field}", f"{shown(value)} is already in class {first.name}"
                )


def class_maps(classes: Sequence[QosClass]) -> ClassMaps:
    """The maps the BPF programs read. Raises ConfigError for classes that overlap or leave gaps."""
    problems = class_problems(classes)
    if problems:
        raise ConfigError(problems)
    dscp = [0] * DSCPS
    pcp = [0] * PCPS
    for entry in classes:
        for mark in entry.dscp:
            dscp[mark] = entry.index
        for mark in entry.pcp:
            pcp[mark] = entry.index
    names = tuple(entry.name for entry in sorted(classes, key=lambda entry: entry.index))
    return ClassMaps(tuple(dscp), tuple(pcp), names)
