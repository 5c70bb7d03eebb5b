"""The shape of the BPF maps, mirrored from c/acct.h; a test compares the two.

Invariant: a slot's value is one wide record, so that one batch call reads every pod.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, NewType

Slot = NewType("Slot", int)
"""Index of an attachment's record in the accounting map."""

DIRECTIONS = 2
CLASSES = 8
KINDS = 4
CELL_BYTES = 16
"""struct cell { u64 bytes; u64 packets; }"""
VALUE_BYTES = DIRECTIONS * CLASSES * KINDS * CELL_BYTES
"""Per slot and per possible CPU: 1 KiB."""

DSCPS = 64
PCPS = 8
CLASSES_BYTES = DSCPS + PCPS + 4
"""struct classes { u8 dscp[64]; u8 pcp[8]; u32 flags; }, the one entry of map `classes`."""
CLASSES_FORMAT = POLICE_FORMAT = 1
RULES_FORMAT = 2
"""Of the maps without counts: raised when what is in one means something else, so that another version of the
agent does not take it over. The shape of the counts tells itself: bpf.record."""
PCP_WINS = 1
"""Flag: a VLAN-tagged packet's class is its priority's, whatever its DSCP."""

RULES_BYTES = 192
"""struct rules of c/limit.h, one per slot of map `rules`."""
POLICE_BYTES = 176
"""struct police of c/limit.h, one per slot of map `police`."""
RULES_ANY = 1
RULES_ONE_CLASS = 2
RULES_MARK = 4
RULES_DEPART = 8
LEAF = 0x10
"""The minor number of class 0's queue; the others' follow."""


class TrafficKind(enum.IntEnum):
    """Third index of a cell."""

    OTHER = 0
    IP = 1
    TCP = 2
    ROCE = 3
    """UDP to port 4791 (RoCEv2)."""


class Framing(enum.IntEnum):
    """What lies before the IP header of a device's packets, by its ARPHRD_* type. The value is set beside the
    slot in the constant that each copy of a program has of its own."""

    ETHERNET = 0
    IPOIB = 1 << 30
    """ARPHRD_INFINIBAND: 20 bytes that the kernel keeps the receiver's address in and that are on no wire,
    and IPoIB's own header of 4 (RFC 4391), in both directions."""


class Hook(enum.StrEnum):
    """Where the programs sit."""

    TCX = "tcx"
    CLSACT = "clsact"


class Cell(NamedTuple):
    """One counter of a slot. direction 0 egress, 1 ingress, as the pod sees it.

    A tuple and no dataclass, since thousands are made for each scrape.
    """

    direction: int
    traffic_class: int
    kind: TrafficKind
    bytes: int
    packets: int
