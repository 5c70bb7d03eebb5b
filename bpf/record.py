"""What a version of this agent says of its maps, pinned beside them, so that any other can read them.

Invariant: a record is taken whole or not at all. Two versions with the same record have the same maps, and
share them; the folder's name is made of the record, so maps of two shapes never meet in one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from bpf import layout
from bpf.layout import TrafficKind

FORMAT = 1
"""Of the text: raised when an older version could misread it."""
RECORD_BYTES = 1024
_LANE = 8
_AT_MOST = 1 << 16
MAPS_WITHOUT_COUNTS = ("classes", "rules", "police")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a slot's value in map `acct`, per CPU: cells of unsigned 64-bit numbers in the machine's order, by
    direction (egress, ingress), then class, then kind. Places are in bytes."""

    classes: int
    kinds: tuple[str, ...]
    first_at: int
    cell_bytes: int
    bytes_at: int
    packets_at: int
    value_bytes: int

    def __post_init__(self) -> None:
        sizes = (self.first_at, self.cell_bytes, self.bytes_at, self.packets_at, self.value_bytes)
        if any(size % _LANE or not 0 <= size <= _AT_MOST for size in sizes):
            raise ValueError("a place is not one of a 64-bit number")
        if not 0 < self.classes <= _AT_MOST or not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError("there are no classes or kinds")
        if max(self.bytes_at, self.packets_at) + _LANE > self.cell_bytes or self.bytes_at == self.packets_at:
            raise ValueError("a cell has no room for its numbers")
        if self.first_at + self.cells * self.cell_bytes > self.value_bytes:
            raise ValueError("a value has no room for its cells")

    @property
    def cells(self) -> int:
        return layout.DIRECTIONS * self.classes * len(self.kinds)


@dataclass(frozen=True, slots=True)
class Record:
    """maps: of each map without counts, what tells whether another version can use it as it is."""

    acct: Shape
    maps: Mapping[str, str]

    def dump(self) -> str:
        return json.dumps(
            {"format": FORMAT, "acct": asdict(self.acct), "maps": dict(self.maps)}, sort_keys=True
        )

    @classmethod
    def parse(cls, text: str) -> Record:
        """ValueError, a sentence's end, if it is not one that can be believed."""
        try:
            tree = json.loads(text)
            if tree["format"] != FORMAT:
                raise ValueError(f"its record is of format {tree['format']!a}, and {FORMAT} is known here")
            shape = dict(tree["acct"])
            kinds = tuple(str(kind) for kind in shape.pop("kinds"))
            if any(type(number) is not int for number in shape.values()):
                raise ValueError("its record has something else than a number")
            return cls(Shape(kinds=kinds, **shape), {str(k): str(v) for k, v in dict(tree["maps"]).items()})
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"its record is not one: {error!r}") from error

    @property
    def folder(self) -> str:
        return f"{FOLDER}{hashlib.sha256(self.dump().encode()).hexdigest()[:8]}"


FOLDER = "layout-"
_KINDS = tuple(kind.name.lower() for kind in TrafficKind)

OURS = Record(
    Shape(
        classes=layout.CLASSES,
        kinds=_KINDS,
        first_at=0,
        cell_bytes=layout.CELL_BYTES,
        bytes_at=0,
        packets_at=8,
        value_bytes=layout.VALUE_BYTES,
    ),
    {
        "classes": f"{layout.CLASSES_FORMAT} of {layout.CLASSES_BYTES}",
        "rules": f"{layout.RULES_FORMAT} of {layout.RULES_BYTES}",
        "police": f"{layout.POLICE_FORMAT} of {layout.POLICE_BYTES}",
    },
)

WITHOUT_RECORD: Mapping[str, Record] = {
    "v1": Record(
        Shape(
            classes=8,
            kinds=("other", "ip", "tcp", "roce"),
            first_at=0,
            cell_bytes=16,
            bytes_at=0,
            packets_at=8,
            value_bytes=1024,
        ),
        {"classes": "1 of 76", "rules": "1 of 128", "police": "1 of 112"},
    )
}
"""Folders of versions that wrote none, and what they would have said."""
