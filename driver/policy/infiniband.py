"""The policy's section `rdma.infiniband`: the GUIDs that VFs are given, and how long their ports may take.

Invariant: a range is of GUIDs that one port each can have: no group address, and none that stands for none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from driver.strict import Key, Kind, integer, record, text
from hw.model import Guid
from hw.rdma.infiniband import guid_number, parse_guid

_GROUP = 1 << 56
"""Of an EUI-64: the lowest bit of its first byte."""
ACTIVE_SECONDS_MAX = 35
"""Kubelet gives a claim 45 seconds."""

GUID: Kind[Guid] = text(
    parse_guid,
    {"pattern": "^(([0-9A-Fa-f]{4}:){3}[0-9A-Fa-f]{4}|([0-9A-Fa-f]{2}:){7}[0-9A-Fa-f]{2})$"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidRange:
    start: Annotated[Guid, Key("start", GUID, "The first, like 0211:22ff:fe00:0000.")]
    end: Annotated[Guid, Key("end", GUID, "The last; it is given too.")]

    def __post_init__(self) -> None:
        first, last = guid_number(self.start), guid_number(self.end)
        if first > last:
            raise ValueError(f"start {self.start} is above end {self.end}")
        if first >> 56 != last >> 56:
            raise ValueError("start and end differ in their first byte: between them are group addresses")
        if first & _GROUP:
            raise ValueError(f"{self.start} is a group address: the first byte of a GUID is an even one")

    @property
    def size(self) -> int:
        return guid_number(self.end) - guid_number(self.start) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InfinibandRules:
    guids: Annotated[
        GuidRange,
        Key(
            "guids",
            record(GuidRange),
            "GUIDs of this node alone, of which each VF on InfiniBand has one, for its node and its port, "
            "while a claim has it. Nobody compares ranges of different nodes.",
        ),
    ]
    active_seconds: Annotated[
        int,
        Key(
            "activeSeconds",
            integer(0, ACTIVE_SECONDS_MAX),
            "How long a VF's port may take to be active once it has its GUID, which the subnet manager "
            "does; then the claim is refused and tried again. 0: it is not waited for.",
        ),
    ] = 20
