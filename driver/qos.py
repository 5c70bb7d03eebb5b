"""Traffic classes: which class a packet's DSCP or PCP puts it in, for counting and shaping.

Invariant: every DSCP and every PCP is in exactly one class; what no class names is in class 0. Pure.

DSCP is the upper six bits of the IPv4 TOS or IPv6 traffic class byte (RFC 2474); PCP is the priority of
a VLAN tag (IEEE 802.1Q).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from bpf.layout import CLASSES
from driver.errors import ConfigError, FieldProblem
from driver.strict import Key, Kind, converted, integer, listing, shown, text

DSCPS = 64
PCPS = 8
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a class name: 1 to 32 lower-case letters, digits and '-'")
    return value


def _marks(count: int) -> Kind[frozenset[int]]:
    return converted(listing(integer(0, count - 1), maximum=count), frozenset)


@dataclass(frozen=True, slots=True, kw_only=True)
class QosClass:
    """One traffic class. index is its place in the BPF maps and so in the usage ledger: a class that
    keeps its meaning should keep its index."""

    name: Annotated[
        str, Key("name", text(_name, {"pattern": f"^{_NAME.pattern}$"}), "As in metrics, usage and claims.")
    ]
    index: Annotated[int, Key("index", integer(0, CLASSES - 1), "0 to 7; 0 takes what no class names.")]
    dscp: Annotated[frozenset[int], Key("dscp", _marks(DSCPS), "DSCP values of this class.")] = frozenset()
    pcp: Annotated[frozenset[int], Key("pcp", _marks(PCPS), "VLAN priorities of this class.")] = frozenset()

    def __post_init__(self) -> None:
        _name(self.name)
        if not 0 <= self.index < CLASSES:
            raise ValueError(f"class {self.name}: index {self.index} is not 0 to {CLASSES - 1}")
        for marks, count in ((self.dscp, DSCPS), (self.pcp, PCPS)):
            if any(not 0 <= mark < count for mark in marks):
                raise ValueError(f"class {self.name}: {sorted(marks)} are not all 0 to {count - 1}")


@dataclass(frozen=True, slots=True)
class ClassMaps:
    """Class index by DSCP (64 entries) and by PCP (8), and the classes' names by index (1 to 8)."""

    dscp: tuple[int, ...]
    pcp: tuple[int, ...]
    names: tuple[str, ...]


def _class(index: int, name: str, pcp: int, *dscp: int) -> QosClass:
    return QosClass(name=name, index=index, dscp=frozenset(dscp), pcp=frozenset({pcp}))


DEFAULT_CLASSES: tuple[QosClass, ...] = (
    # DF, RFC 2474; named here though class 0 would take it anyway.
    _class(0, "best-effort", 0, 0),
    # LE, RFC 8622; CS1, low-priority data, RFC 4594; AF1x, high-throughput data, RFC 2597 and RFC 4594.
    _class(1, "bulk", 1, 1, 8, 10, 12, 14),
    # CS2, operations and management, RFC 4594; AF2x, low-latency data, RFC 2597.
    _class(2, "low-latency", 2, 16, 18, 20, 22),
    # CS3 and AF3x, RFC 2474 and RFC 2597: RoCEv2 data is marked 24 or 26 in common lossless fabrics.
    _class(3, "roce-data", 3, 24, 26, 28, 30),
    # CS4 and AF4x, interactive media, RFC 4594 and RFC 2597.
    _class(4, "media", 4, 32, 34, 36, 38),
    # CS5, signalling, RFC 4594; VOICE-ADMIT, RFC 5865; EF, RFC 3246.
    _class(5, "real-time", 5, 40, 44, 46),
    # CS6: RoCEv2's congestion notification in common lossless fabrics; also routing, RFC 4594.
    _class(6, "cnp", 6, 48),
    # CS7, reserved for network control, RFC 2474 and RFC 4594.
    _class(7, "control", 7, 56),
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
    indices = {entry.index for entry in classes}
    missing = sorted(set(range(max(indices) + 1)) - indices)
    if missing:
        found.append(
            FieldProblem("qosClasses", f"index {missing[0]} is missing: indices go from 0 without a gap")
        )
    return tuple(found)


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
