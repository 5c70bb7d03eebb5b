"""The maps that hold the counts, pinned so that they outlive the agent.

Invariant: a slot's count is what every version of the agent counted into it that is still pinned; this
version's maps have exactly the layout of bpf.layout. Counts only grow until a slot is zeroed. Who owns which
slot is the caller's to know: zero a slot before its programs are attached, read it after they are off.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from bpf import earlier, layout, loaded, selftest, sys
from bpf.earlier import Others
from bpf.errors import CallRefused
from bpf.layout import Cell, Framing, Slot, TrafficKind
from bpf.limits import NO_RULES, Rules
from bpf.loaded import Place
from bpf.maps import (
    COUNTS,
    KEY,
    Maps,
    make_classes,
    make_counters,
    make_police,
    make_rules,
    open_maps,
    pack_classes,
)
from bpf.pins import make_pin_directory
from bpf.program import CompiledPrograms

DEFAULT_SLOTS = 512
BATCH_BYTES = 4 << 20
"""Most that one batch call copies: one call for 512 slots on 8 possible CPUs."""

_FIRST = Slot(0)
_LANES = struct.Struct(f"={layout.VALUE_BYTES // 8}Q")
_ZEROS = bytes(layout.VALUE_BYTES)
_CELLS = range(layout.DIRECTIONS * layout.CLASSES * layout.KINDS)
_PLACES = tuple(itertools.product(range(layout.DIRECTIONS), range(layout.CLASSES), TrafficKind))
"""Direction, class and kind of each cell, in the order of a record."""


class Accounting:
    """Open maps and the programs that write them. Safe to use from several threads. limits is what these
    programs do beside counting, others what other versions counted before this one came.

    The kernel memory behind it is 1 KiB per slot and possible CPU.
    """

    def __init__(self, maps: Maps, others: Others, programs: CompiledPrograms) -> None:
        self._maps = maps
        self.limits = maps.limits
        self.others = others
        self._programs = programs
        self._cpus = sys.possible_cpus()
        self._known: dict[Slot, tuple[int, tuple[Cell, ...]]] = {}
        """By slot what its record added up to last, and what that is in cells: a slot in which nothing was
        counted since is taken apart once."""

    @classmethod
    def open(cls, pins: Path, programs: CompiledPrograms, *, slots: int = DEFAULT_SLOTS) -> Accounting:
        """Reopen the maps pinned under pins, take over those of another version, or make and pin them.

        slots counts for new maps only: pinned ones keep their size, see capacity. BpffsMissing if pins is not
        on a bpffs, LayoutMismatch if what is pinned there is not ours, CallRefused; BpfError if the programs
        do not count what they should on this kernel.
        """
        make_pin_directory(pins)
        _try_out(programs)
        folders, unreadable = earlier.find(pins)
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(contextlib.closing(open_maps(pins, folders, slots=slots)))
            others = earlier.open_others(folders, unreadable, sys.map_info(opened.counters).id)
            stack.pop_all()
            return cls(opened, others, programs)

    def close(self) -> None:
        """Close the descriptors; the pinned maps and what is attached go on counting."""
        self._maps.close()
        self.others.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def capacity(self) -> int:
        """How many slots there are, from 0 on."""
        return self._maps.capacity

    def zero(self, slot: Slot) -> None:
        """Set every count of a slot to 0, and take its rules away. Only while nothing passes its programs."""
        self.forget(slot)
        self.limits.set(slot, NO_RULES)

    def forget(self, slot: Slot) -> None:
        """Set every count of a slot to 0, those of what was dropped included; its rules stay. As zero."""
        self._check(slot)
        self.limits.forget(slot)
        sys.map_update_elem(self._maps.counters, KEY.pack(slot), bytes(layout.VALUE_BYTES * self._cpus))
        self.others.zero(slot)

    def read(self, slot: Slot) -> tuple[Cell, ...]:
        """The cells of a slot that are not zero, summed over the CPUs."""
        self._check(slot)
        values = bytearray(layout.VALUE_BYTES * self._cpus)
        sys.map_lookup_elem(self._maps.counters, KEY.pack(slot), values)
        return self._with_others(slot, _cells(_total(values, 0, self._cpus)))

    def _with_others(self, slot: Slot, cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
        counted_before = self.others.cells(slot)
        if not counted_before:
            return cells
        found: dict[tuple[int, int, TrafficKind], Cell] = {}
        for cell in (*cells, *counted_before):
            key = (cell.direction, cell.traffic_class, cell.kind)
            known = found.get(key)
            if known is not None:
                cell = Cell(*key, known.bytes + cell.bytes, known.packets + cell.packets)
            found[key] = cell
        return tuple(found[key] for key in sorted(found))

    def read_slots(self, slots: Collection[Slot]) -> dict[Slot, tuple[Cell, ...]]:
        """Like read for many slots, in as few calls as the kernel needs: one on all but very large nodes."""
        for slot in slots:
            self._check(slot)
        size = layout.VALUE_BYTES * self._cpus
        found: dict[Slot, tuple[Cell, ...]] = {}
        for run in batches(slots, max(1, BATCH_BYTES // size)):
            count = run[-1] - run[0] + 1
            values = bytearray(size * count)
            sys.map_lookup_batch(self._maps.counters, run[0] - 1 if run[0] else None, count, values)
            for slot in run:
                total = _total(values, (slot - run[0]) * size, self._cpus)
                known = self._known.get(slot)
                if known is None or known[0] != total:
                    known = self._known[slot] = (total, _cells(total))
                found[slot] = self._with_others(slot, known[1])
        return found

    @staticmethod
    def busy_slots() -> frozenset[Slot]:
        """Slots that any living program counts into, whoever has it attached; also those of another agent
        on this machine, which does no harm."""
        return frozenset(place.slot for place, _ in loaded.programs())

    def set_classes(self, dscp: Sequence[int], pcp: Sequence[int], *, pcp_wins: bool = True) -> None:
        """Which class each DSCP (64) and VLAN priority (8) is counted in; counts already made stay.

        pcp_wins False: a tagged packet's DSCP decides too. ValueError on a wrong length or class.
        """
        value = pack_classes(dscp, pcp, layout.PCP_WINS if pcp_wins else 0)
        sys.map_update_elem(self._maps.classes, KEY.pack(0), value)

    def load(self, slot: Slot, direction: int, framing: Framing = Framing.ETHERNET) -> sys.ProgramFd:
        """Load a copy that counts into slot. direction 0 egress, 1 ingress, as the pod sees it.

        The caller owns the descriptor: pass its fd to LINK_CREATE or, as a clsact filter, to netlink; when
        that has succeeded the hook keeps the program and the descriptor is to be closed.
        """
        self._check(slot)
        return _load(self._programs, Place(slot, direction, framing), self._maps)

    def _check(self, slot: Slot) -> None:
        if not 0 <= slot < self.capacity:
            raise ValueError(f"slot {slot} is outside 0..{self.capacity - 1}")


def _load(programs: CompiledPrograms, place: Place, maps: Maps) -> sys.ProgramFd:
    fds: Mapping[str, int] = {"acct": maps.counters.fd, "classes": maps.classes.fd, **maps.limits.fds}
    code = programs.programs[place.direction].specialise(place.slot, fds, place.framing)
    return sys.prog_load(sys.ProgramType.SCHED_CLS, code, name=loaded.name_of(place))


@dataclass(frozen=True, slots=True)
class Scratch:
    """Both programs on maps of their own, in the directions' order: no device is touched, no pod's count."""

    programs: tuple[sys.ProgramFd, ...]
    _maps: Maps

    def set_rules(self, rules: Rules) -> None:
        self._maps.limits.set(_FIRST, rules)

    def counts(self) -> tuple[Cell, ...]:
        """Since they were asked for last."""
        values = bytearray(layout.VALUE_BYTES * sys.possible_cpus())
        sys.map_lookup_elem(self._maps.counters, KEY.pack(_FIRST), values)
        sys.map_update_elem(self._maps.counters, KEY.pack(_FIRST), bytes(len(values)))
        return _cells(_total(values, 0, sys.possible_cpus()))


@contextlib.contextmanager
def scratch(programs: CompiledPrograms) -> Iterator[Scratch]:
    """Loaded for the time of the context: a few milliseconds. CallRefused with the verifier's reason."""
    with contextlib.ExitStack() as stack:
        made = (make_counters(1), make_classes(), make_rules(1), make_police(1))
        maps = stack.enter_context(contextlib.closing(Maps(*made, capacity=1)))
        tried = tuple(
            stack.enter_context(_load(programs, Place(_FIRST, direction), maps))
            for direction in range(layout.DIRECTIONS)
        )
        yield Scratch(tried, maps)


def _try_out(programs: CompiledPrograms) -> None:
    """Before any pod depends on them."""
    with scratch(programs) as tried:
        selftest.check(
            lambda direction, frame: sys.prog_test_run(tried.programs[direction], frame),
            tried.set_rules,
            tried.counts,
        )


def pinned_counters(pins: Path) -> frozenset[sys.MapId]:
    """The maps that programs of this node count into, whichever version's; empty where there are none."""
    found = set()
    for path in pins.glob(f"*/{COUNTS}"):
        with contextlib.suppress(CallRefused), sys.obj_get_map(path) as counters:
            found.add(sys.map_info(counters).id)
    return frozenset(found)


def batches(slots: Collection[Slot], most: int) -> Iterator[list[Slot]]:
    """Slots in rising order, cut into runs that span at most `most` consecutive numbers."""
    run: list[Slot] = []
    for slot in sorted(set(slots)):
        if run and slot - run[0] >= most:
            yield run
            run = []
        run.append(slot)
    if run:
        yield run


def _total(values: bytearray, start: int, cpus: int) -> int:
    """The sum of one slot's records, which lie one behind the other.

    A record is added as one big number: its 64-bit lanes cannot overflow into each other before a slot has
    counted 2**64 bytes, and the sum costs one operation per CPU instead of 128.
    """
    total = 0
    for at in range(start, start + cpus * layout.VALUE_BYTES, layout.VALUE_BYTES):
        record = values[at : at + layout.VALUE_BYTES]
        if record != _ZEROS:
            total += int.from_bytes(record, "little")
    return total


def _cells(total: int) -> tuple[Cell, ...]:
    """Those of a sum of records that are not zero."""
    if not total:
        return ()
    lanes = _LANES.unpack(total.to_bytes(layout.VALUE_BYTES, "little"))
    # Not by Cell's own constructor, which takes as long again.
    new = tuple.__new__
    return tuple(
        [
            new(Cell, _PLACES[at] + lanes[2 * at : 2 * at + 2])
            for at in itertools.compress(_CELLS, lanes[1::2])
        ]
    )
