"""What the programs do to a slot's packets beside counting them: the maps `rules` and `police`.

Invariant: a slot without rules is only counted. The programs read rules and write police; rules can be
changed at any time, and what was dropped until then stays counted. Safe to use from several threads.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from bpf import layout, sys
from bpf.errors import CallRefused
from bpf.layout import Slot

NO_MARK = 0xFF
"""In place of a DSCP: as the pod had it."""
COST_SHIFT = 20
"""Costs are in 2**-20 ns per byte, as in c/limit.h."""
CREDIT_SHIFT = 12
"""A credit is in 2**12 ns there: a GiB at 1 Mbit/s fits in 32 bits."""
_RULES = struct.Struct("=IIIIII8s20Q")
_QUEUES = struct.Struct("=8xII")
_NO_QUEUES = (0, 0)
_FLAGS = struct.Struct("=I")
_POLICE = struct.Struct("=22Q")
_KEY = struct.Struct("=I")
_NS = 1_000_000_000
_DEFAULT_MARKS = (NO_MARK,) * layout.CLASSES
_NOTHING = ((0,) * layout.CLASSES,) * layout.DIRECTIONS


def _cost(rate: int) -> int:
    return max((_NS << COST_SHIFT) // rate, 1)


@dataclass(frozen=True, slots=True)
class Police:
    """Packets above a rate, in bytes per second, are dropped when burst bytes have gone before them."""

    rate: int
    burst: int

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.burst <= 0:
            raise ValueError(f"a limit of {self.rate} bytes per second with a burst of {self.burst}")

    @property
    def cost(self) -> int:
        return _cost(self.rate)

    @property
    def ahead_ns(self) -> int:
        return self.burst * _NS // self.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Of one slot. queues are handles of HTBs by direction, 0 for none; detour the ifindex of an ifb in the
    device's netns, 0 for none; marks the DSCP each class leaves with, or NO_MARK; guaranteed what the police
    lets each class have whatever the others do, by direction and class in bytes per second.

    credit: packets that leave are told when, for a queue that waits until then and is full at the police's
    burst; it is what may leave at once after a pause, in bytes of that. None: they are told nothing."""

    one_class: int | None = None
    queues: tuple[int, int] = (0, 0)
    detour: int = 0
    marks: tuple[int, ...] = _DEFAULT_MARKS
    police: tuple[Police | None, Police | None] = (None, None)
    guaranteed: tuple[tuple[int, ...], ...] = _NOTHING
    credit: int | None = None

    def __post_init__(self) -> None:
        out = self.police[0]
        if self.credit is not None and (out is None or self.credit >= out.burst):
            raise ValueError("times of departure need a rate, and a burst above the credit")

    @property
    def _credit(self) -> int:
        out = self.police[0]
        return self.credit * _NS // out.rate >> CREDIT_SHIFT if self.credit and out is not None else 0

    def pack(self) -> bytes:
        """As struct rules."""
        if self == NO_RULES:
            return bytes(_RULES.size)
        flags = layout.RULES_ANY
        flags |= 0 if self.one_class is None else layout.RULES_ONE_CLASS
        flags |= 0 if self.marks == _DEFAULT_MARKS else layout.RULES_MARK
        costs = (each.cost if each else 0 for each in self.police)
        bursts = (each.ahead_ns if each else 0 for each in self.police)
        flags |= 0 if self.credit is None else layout.RULES_DEPART
        shares = (_cost(each) if each else 0 for way in self.guaranteed for each in way)
        told = (flags, self.one_class or 0, *self.queues, self.detour, self._credit, bytes(self.marks))
        return _RULES.pack(*told, *costs, *bursts, *shares)


NO_RULES = Rules()


@dataclass(frozen=True, slots=True)
class Dropped:
    """By the police of one slot, since that was forgotten; by direction."""

    bytes: tuple[int, int]
    packets: tuple[int, int]


class Limits:
    """The open maps of one node, made and closed with the accounting that they belong to."""

    def __init__(self, rules: sys.MapFd, police: sys.MapFd) -> None:
        self._rules = rules
        self._police = police
        self.state: object = object()
        """Another one whenever the rules of a slot were set."""

    @property
    def fds(self) -> Mapping[str, int]:
        """For the programs, by the maps' names in the source."""
        return {"rules": self._rules.fd, "police": self._police.fd}

    def set(self, slot: Slot, rules: Rules) -> None:
        """In force with the next packet."""
        sys.map_update_elem(self._rules, _KEY.pack(slot), rules.pack())
        self.state = object()

    def departing(self, slots: Collection[Slot]) -> frozenset[Slot]:
        """Those whose rules tell packets when to leave, by one call for all. A slot that there is not has no
        rules."""
        rules = _read(self._rules, _RULES.size, slots)
        return frozenset(
            slot for slot, value in rules.items() if _FLAGS.unpack_from(value)[0] & layout.RULES_DEPART
        )

    def dropped_without_queues(self, slots: Collection[Slot]) -> dict[Slot, Dropped]:
        """As dropped, by one call for each map, of those whose rules name no queue that drops as well."""
        rules = _read(self._rules, _RULES.size, slots)
        police = _read(self._police, _POLICE.size, slots)
        return {
            slot: _dropped(police[slot])
            for slot, value in rules.items()
            if _QUEUES.unpack_from(value) == _NO_QUEUES
        }

    def detour(self, slot: Slot) -> int:
        """The ifb that the slot's rules name, as an ifindex of the device's netns; 0 for none."""
        return self._fields(slot)[4]

    def queues(self, slot: Slot) -> tuple[int, int]:
        """The handles of the queues that the slot's rules name, by direction; 0 for none."""
        _, _, out, into, _ = self._fields(slot)
        return out, into

    def departs(self, slot: Slot) -> bool:
        """Whether the slot's rules tell packets when to leave."""
        return bool(self._fields(slot)[0] & layout.RULES_DEPART)

    def _fields(self, slot: Slot) -> tuple[int, int, int, int, int]:
        """Flags, class, queues and detour."""
        value = bytearray(_RULES.size)
        sys.map_lookup_elem(self._rules, _KEY.pack(slot), value)
        flags, one_class, out, into, detour, *_ = _RULES.unpack(value)
        return int(flags), int(one_class), int(out), int(into), int(detour)

    def waiting(self, slot: Slot) -> float | None:
        """Seconds until what the slot's pod sends now would leave; None where it is not told when."""
        rules, police = bytearray(_RULES.size), bytearray(_POLICE.size)
        sys.map_lookup_elem(self._rules, _KEY.pack(slot), rules)
        flags, _, _, _, _, credit, *_ = _RULES.unpack(rules)
        if not flags & layout.RULES_DEPART:
            return None
        sys.map_lookup_elem(self._police, _KEY.pack(slot), police)
        due, *_ = _POLICE.unpack(police)
        ahead = int(due) - time.monotonic_ns() - (int(credit) << CREDIT_SHIFT)
        return max(ahead, 0) / _NS

    def forget(self, slot: Slot) -> None:
        """Nothing was dropped; the rules stay."""
        sys.map_update_elem(self._police, _KEY.pack(slot), bytes(_POLICE.size))

    def dropped(self, slots: Collection[Slot]) -> dict[Slot, Dropped]:
        """Of each slot. A slot that there is not is left out."""
        found: dict[Slot, Dropped] = {}
        value = bytearray(_POLICE.size)
        for slot in slots:
            try:
                sys.map_lookup_elem(self._police, _KEY.pack(slot), value)
            except CallRefused as error:
                if error.errno != errno.ENOENT:
                    raise
                continue
            found[slot] = _dropped(value)
        return found

    def close(self) -> None:
        self._rules.close()
        self._police.close()


def _dropped(police: bytes | bytearray) -> Dropped:
    _, _, out_bytes, in_bytes, out_packets, in_packets, *_ = _POLICE.unpack(police)
    return Dropped((out_bytes, in_bytes), (out_packets, in_packets))


def _read(map_fd: sys.MapFd, size: int, slots: Collection[Slot]) -> dict[Slot, bytes]:
    """The values of slots, zeros of one that there is not, by one call."""
    if not slots:
        return {}
    first, count = min(slots), max(slots) - min(slots) + 1
    values = bytearray(size * count)
    sys.map_lookup_batch(map_fd, first - 1 if first else None, count, values)
    return {slot: bytes(values[(slot - first) * size : (slot - first + 1) * size]) for slot in slots}
