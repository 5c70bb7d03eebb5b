"""Counts of other versions of this agent, older or newer, in maps of another shape.

Invariant: nothing is moved, so nothing is lost or counted twice, wherever a process ends: as long as another
version's counts are pinned, a slot's count is the sum over all versions. They are let go when no program
counts into them and no slot in them has both counts and a holder. What cannot be read is never guessed: it is
named, and kept until it is on record as a gap.
"""

from __future__ import annotations

import contextlib
import re
import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpf import layout, loaded, sys
from bpf.errors import LayoutMismatch
from bpf.layout import Cell, Slot, TrafficKind
from bpf.maps import COUNTS, KEY, LINKS, Folder, read_record, reopen, replace_pin, wait_for_programs
from bpf.pins import make_pin_directory
from bpf.record import FOLDER, OURS, WITHOUT_RECORD, Shape

_FOLDER = re.compile(rf"{FOLDER}[0-9a-f]{{8}}|{'|'.join(WITHOUT_RECORD)}")
_LANE = struct.Struct("=Q")
_KINDS = {kind.name.lower(): kind for kind in TrafficKind}


@dataclass(frozen=True, slots=True)
class Unplaced:
    """What another version counted in classes or kinds that this one does not have."""

    bytes: int
    packets: int


@dataclass(frozen=True, slots=True)
class Unreadable:
    """why: the rest of a sentence that begins with the folder."""

    path: Path
    why: str


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of one slot, by cell: bytes and packets."""

    shape: Shape
    cells: tuple[tuple[int, int], ...]

    def placed(self) -> tuple[Cell, ...]:
        return tuple(
            Cell(direction, traffic_class, _KINDS[kind], *self.cells[at])
            for at, direction, traffic_class, kind in _places(self.shape)
            if self.cells[at][1] and _is_known(traffic_class, kind)
        )

    def unplaced(self) -> Unplaced | None:
        found = [
            self.cells[at]
            for at, _, traffic_class, kind in _places(self.shape)
            if self.cells[at][1] and not _is_known(traffic_class, kind)
        ]
        return (
            Unplaced(sum(size for size, _ in found), sum(packets for _, packets in found)) if found else None
        )

    def pack(self) -> bytes:
        """As one CPU would have counted it."""
        value, shape = bytearray(self.shape.value_bytes), self.shape
        for at, (size, packets) in enumerate(self.cells):
            cell = shape.first_at + at * shape.cell_bytes
            _LANE.pack_into(value, cell + shape.bytes_at, size)
            _LANE.pack_into(value, cell + shape.packets_at, packets)
        return bytes(value)


def _is_known(traffic_class: int, kind: str) -> bool:
    return traffic_class < layout.CLASSES and kind in _KINDS


def _places(shape: Shape) -> Iterator[tuple[int, int, int, str]]:
    """Number of a cell, direction, class, kind."""
    for at in range(shape.cells):
        rest, kind = divmod(at, len(shape.kinds))
        direction, traffic_class = divmod(rest, shape.classes)
        yield at, direction, traffic_class, shape.kinds[kind]


class _Counts:
    """One version's, open. At rest they have one value a slot instead of one per CPU."""

    def __init__(self, path: Path, shape: Shape, counters: sys.MapFd) -> None:
        info = sys.map_info(counters)
        self.path = path
        self.id = info.id
        self.at_rest = info.type == sys.MapType.ARRAY
        self._shape = shape
        self._counters = counters
        self._capacity = info.max_entries
        self._values = 1 if self.at_rest else sys.possible_cpus()

    def close(self) -> None:
        self._counters.close()

    def sums(self, slot: Slot) -> _Sums | None:
        """None where nothing was counted, or there is no such slot."""
        if slot >= self._capacity:
            return None
        size = self._shape.value_bytes
        values = bytearray(size * self._values)
        sys.map_lookup_elem(self._counters, KEY.pack(slot), values)
        found = [(0, 0)] * self._shape.cells
        for start in range(0, len(values), size):
            if values.count(0, start, start + size) != size:
                more = self._cells(values, start)
                found = [(b + b2, p + p2) for (b, p), (b2, p2) in zip(found, more, strict=True)]
        return _Sums(self._shape, tuple(found)) if any(packets for _, packets in found) else None

    def _cells(self, values: bytearray, start: int) -> Iterator[tuple[int, int]]:
        shape = self._shape
        for at in range(shape.cells):
            cell = start + shape.first_at + at * shape.cell_bytes
            (size,) = _LANE.unpack_from(values, cell + shape.bytes_at)
            (packets,) = _LANE.unpack_from(values, cell + shape.packets_at)
            yield size, packets

    def zero(self, slot: Slot) -> None:
        if slot < self._capacity:
            sys.map_update_elem(self._counters, KEY.pack(slot), bytes(self._shape.value_bytes * self._values))

    def zero_all_but(self, held: Collection[Slot]) -> bool:
        """Whether any slot still has counts."""
        left = False
        for number in range(self._capacity):
            slot = Slot(number)
            if slot in held:
                left = left or self.sums(slot) is not None
            else:
                self.zero(slot)
        return left

    def put_to_rest(self) -> _Counts:
        """The same counts in a map that has one value a slot instead of one per CPU; this one is closed."""
        with contextlib.ExitStack() as stack:
            size, entries = self._shape.value_bytes, self._capacity
            rest = stack.enter_context(
                sys.map_create(sys.MapType.ARRAY, value_size=size, max_entries=entries, name="knd_rest")
            )
            for number in range(entries):
                if (found := self.sums(Slot(number))) is not None:
                    sys.map_update_elem(rest, KEY.pack(number), found.pack())
            replace_pin(rest, self.path / COUNTS)
            stack.pop_all()
        self.close()
        return _Counts(self.path, self._shape, rest)


class Others:
    """The counts of other versions on this node. Safe to use from several threads."""

    def __init__(self, counts: Sequence[_Counts], unreadable: Sequence[Unreadable]) -> None:
        self._counts = tuple(counts)
        self._unreadable = tuple(unreadable)
        self._lock = threading.Lock()

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """Whose counts nobody here can tell: put it on record, then forget them."""
        return self._unreadable

    @property
    def folders(self) -> tuple[Path, ...]:
        """Whose counts are part of what is read here."""
        return tuple(each.path for each in self._counts)

    def cells(self, slot: Slot) -> tuple[Cell, ...]:
        return tuple(cell for sums in self._sums(slot) for cell in sums.placed())

    def unplaced(self, slot: Slot) -> Unplaced | None:
        """What was counted of a slot in classes or kinds that there are not here, and is in no cell."""
        found = [lost for sums in self._sums(slot) if (lost := sums.unplaced()) is not None]
        if not found:
            return None
        return Unplaced(sum(each.bytes for each in found), sum(each.packets for each in found))

    def _sums(self, slot: Slot) -> list[_Sums]:
        if not self._counts:
            return []
        with self._lock:
            return [sums for each in self._counts if (sums := each.sums(slot)) is not None]

    def zero(self, slot: Slot) -> None:
        with self._lock:
            for each in self._counts:
                each.zero(slot)

    def settle(self, held: Collection[Slot]) -> tuple[Path, ...]:
        """Let go of what nobody needs: counts of slots that have no holder, versions without counts, and what
        memory can be had back of the others. Returns the folders that are gone.

        Nothing happens to a version that programs still count into. May be repeated.
        """
        with self._lock:
            busy = self._busy()
            gone, left = [], []
            for each in self._counts:
                if each.id in busy:
                    left.append(each)
                elif each.zero_all_but(held):
                    left.append(each if each.at_rest else each.put_to_rest())
                else:
                    each.close()
                    remove(each.path)
                    gone.append(each.path)
            self._counts = tuple(left)
            return tuple(gone)

    def _busy(self) -> frozenset[sys.MapId]:
        """The maps that loaded programs use; what others left is final by then."""
        moving = frozenset(each.id for each in self._counts if not each.at_rest)
        if not moving:
            return moving
        used = frozenset(id for _, program in loaded.programs() for id in sys.prog_maps(program))
        wait_for_programs()
        return moving & used

    def forget_unreadable(self) -> None:
        with self._lock:
            for each in self._unreadable:
                remove(each.path)
            self._unreadable = ()

    def close(self) -> None:
        with self._lock:
            for each in self._counts:
                each.close()
            self._counts = ()


def find(pins: Path) -> tuple[tuple[Folder, ...], tuple[Unreadable, ...]]:
    """Every other version that has maps under pins. What a crash left of one without any is removed, and its
    devices' links are put where this version has them. What has another name is somebody else's."""
    for path in _paths(pins):
        move_links(path / LINKS, pins / LINKS)
        if not (path / COUNTS).exists():
            remove(path)
    return look(pins)


def look(pins: Path) -> tuple[tuple[Folder, ...], tuple[Unreadable, ...]]:
    """As find, and changes nothing."""
    folders, unreadable = [], []
    for path in _paths(pins):
        if not (path / COUNTS).exists():
            continue
        try:
            record = read_record(path)
        except ValueError as error:
            unreadable.append(Unreadable(path, str(error)))
        else:
            if record is not None:
                folders.append(Folder(path, record))
            else:
                unreadable.append(Unreadable(path, "it has no record"))
    return tuple(folders), tuple(unreadable)


def _paths(pins: Path) -> list[Path]:
    found = sorted(pins.iterdir()) if pins.is_dir() else []
    return [p for p in found if _FOLDER.fullmatch(p.name) and p.name != OURS.folder and p.is_dir()]


def open_others(folders: Sequence[Folder], unreadable: Sequence[Unreadable], ours: sys.MapId) -> Others:
    """ours: the map of this version's counts, which may have been another's."""
    counts, odd = [], list(unreadable)
    with contextlib.ExitStack() as stack:
        for folder in folders:
            shape = folder.record.acct
            kinds = [sys.MapType.PERCPU_ARRAY, sys.MapType.ARRAY]
            try:
                counters = reopen(folder.path / COUNTS, kinds, shape.value_bytes)
            except LayoutMismatch as error:
                odd.append(Unreadable(folder.path, f"it is not as it says of itself: {error}"))
                continue
            if counters is None or sys.map_info(counters).id == ours:
                if counters is not None:
                    counters.close()
                remove(folder.path)
                continue
            counts.append(_Counts(folder.path, shape, stack.enter_context(counters)))
        stack.pop_all()
    return Others(counts, odd)


def move_links(old: Path, new: Path) -> None:
    """Links know their devices wherever they are pinned. Where there is one already, this is a second pair,
    which would count everything twice."""
    if not old.is_dir():
        return
    make_pin_directory(new)
    for pin in old.iterdir():
        if (new / pin.name).exists():
            pin.unlink()
        else:
            pin.rename(new / pin.name)
    old.rmdir()


def remove(folder: Path) -> None:
    """The counts first: without them nothing is left that could be read. A folder that somebody else made in
    it stays."""
    (folder / COUNTS).unlink(missing_ok=True)
    for pin in folder.iterdir():
        if not pin.is_dir():
            pin.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
