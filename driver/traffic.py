"""What a claim can say of an interface's traffic, as types.

Invariant: frozen values without I/O, and below the model, which has them in a device's config.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from hw.subinterface import SubinterfaceKind, SubinterfaceMode

CLASS_NAME_PATTERN = r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"


def class_name(value: str) -> str:
    """value, if it can be the name of a traffic class; ValueError."""
    if not re.fullmatch(CLASS_NAME_PATTERN, value):
        raise ValueError(f"{value[:40]!r} is not a class name: 1 to 32 lower-case letters, digits and '-'")
    return value


class Enforcement(enum.StrEnum):
    """By what a limit is to be kept. auto: by the device where it can, else by the node's kernel."""

    AUTO = "auto"
    HARDWARE = "hardware"
    SOFTWARE = "software"


@dataclass(frozen=True, slots=True, kw_only=True)
class QosConfig:
    """Section `qos`. Rates in Mb/s, 0 for none; burst in bytes. traffic_class is a name of the node policy's.

    In the record of a preparation enforcement says by what the egress rate is kept, and is never AUTO.
    """

    traffic_class: str | None = None
    enforcement: Enforcement = Enforcement.AUTO
    egress_rate: int = 0
    by_size: bool = False
    """The egress rate is the device's size by the node policy: nobody asked for it."""
    egress_burst: int | None = None
    egress_min_rate: int = 0
    ingress_rate: int = 0

    @property
    def on_pf(self) -> bool:
        """Whether the egress rates are the device's to keep."""
        return self.enforcement is Enforcement.HARDWARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """What a device takes of the bandwidth that its PF gives out, and how much that is. Mb/s."""

    size: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """What one claim can ask for of something that is given out in parts. Mb/s; default is what one has who
    asks for nothing. Multiples of step above least, or anything where that is 0."""

    default: int
    least: int
    most: int
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VlanRange:
    """Ids from first to last, both included."""

    first: int
    last: int

    def __contains__(self, id: int) -> bool:
        return self.first <= id <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharable:
    """How a device is given out in shares, each an interface of its own on top of it, which its pod gets.

    bandwidth: Mb/s of all shares together, each way. shares: how many there are at most. vlans: what claims
    may choose from; empty for what is no VLAN.
    """

    kind: SubinterfaceKind
    mode: SubinterfaceMode | None
    bandwidth: int
    amounts: Amounts
    shares: int
    vlans: tuple[VlanRange, ...] = ()


NO_QOS = QosConfig()
"""Nothing is asked for."""
