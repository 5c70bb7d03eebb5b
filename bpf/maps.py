"""The maps of one version: made, found again where they are pinned, or taken over from another version.

Invariant: what is opened has exactly the shape of bpf.layout. A folder has its record before it has counts,
so whoever finds counts can read them or knows that it cannot. A map that another version has in the same
shape is used on, not copied: its programs and ours count into one.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpf import layout, sys
from bpf.errors import CallRefused, LayoutMismatch
from bpf.limits import Limits
from bpf.pins import make_pin_directory
from bpf.record import MAPS_WITHOUT_COUNTS, OURS, RECORD_BYTES, WITHOUT_RECORD, Record

KEY = struct.Struct("=I")
COUNTS = "acct"
RECORD = "layout"
LINKS = "links"
"""Beside the versions' folders: the links on devices are every version's in turn."""
_DSCP_DEFAULT = tuple(dscp >> 3 for dscp in range(layout.DSCPS))
_PCP_DEFAULT = tuple(range(layout.PCPS))
_SIZES = {
    COUNTS: (sys.MapType.PERCPU_ARRAY, layout.VALUE_BYTES),
    "classes": (sys.MapType.ARRAY, layout.CLASSES_BYTES),
    "rules": (sys.MapType.ARRAY, layout.RULES_BYTES),
    "police": (sys.MapType.ARRAY, layout.POLICE_BYTES),
}


@dataclass(frozen=True, slots=True)
class Maps:
    """Open. A context manager that closes the descriptors; the pinned maps live on."""

    counters: sys.MapFd
    classes: sys.MapFd
    rules: sys.MapFd
    police: sys.MapFd
    capacity: int

    @property
    def limits(self) -> Limits:
        return Limits(self.rules, self.police)

    def close(self) -> None:
        for each in (self.counters, self.classes, self.rules, self.police):
            each.close()


@dataclass(frozen=True, slots=True)
class Folder:
    """Of another version: where its maps are pinned, and what it says of them."""

    path: Path
    record: Record


def open_maps(pins: Path, others: Sequence[Folder], *, slots: int) -> Maps:
    """This version's, under pins. slots counts where there are none yet, and none in this shape at others'.

    LayoutMismatch if what is pinned there is not ours, CallRefused.
    """
    folder = pins / OURS.folder
    make_pin_directory(folder)
    with contextlib.ExitStack() as stack:
        if (found := read_record(folder)) is None:
            _pinned(folder / RECORD, lambda: _make_record(OURS)).close()
        elif found != OURS:
            raise LayoutMismatch(
                f"{folder / RECORD} was changed by somebody: remove {folder}, which loses its counts"
            )
        donors = [other.path for other in others if other.record.acct == OURS.acct]
        _wake(folder / COUNTS)
        counters = stack.enter_context(
            _open_or_adopt(folder / COUNTS, donors, None)
            or _pinned(folder / COUNTS, lambda: make_counters(max([slots, *_capacities(others)])))
        )
        capacity = sys.map_info(counters).max_entries
        makers: dict[str, Callable[[], sys.MapFd]] = {
            "classes": make_classes,
            "rules": lambda: make_rules(capacity),
            "police": lambda: make_police(capacity),
        }
        rest = {}
        for name in MAPS_WITHOUT_COUNTS:
            entries = 1 if name == "classes" else capacity
            donors = [other.path for other in others if other.record.maps.get(name) == OURS.maps[name]]
            path = folder / name
            found_map = _open_or_adopt(path, donors, entries) or _pinned(path, makers[name])
            rest[name] = stack.enter_context(found_map)
        stack.pop_all()
        return Maps(counters, **rest, capacity=capacity)


def _open_or_adopt(path: Path, donors: Iterable[Path], entries: int | None) -> sys.MapFd | None:
    """The map pinned at path, or another version's, which is pinned there too then. entries: how many it is
    to have; None: any."""
    kind, size = _SIZES[path.name]
    found = reopen(path, [kind], size)
    if found is not None:
        return found
    for donor in donors:
        with contextlib.ExitStack() as stack:
            try:
                other = reopen(donor / path.name, [kind], size)
            except LayoutMismatch:
                # Counts at rest are not counted into, and what is not as it says is nobody's.
                continue
            if other is None:
                continue
            stack.enter_context(other)
            if entries in (None, sys.map_info(other).max_entries):
                sys.obj_pin(other, path)
                stack.pop_all()
                return other
    return None


def _wake(path: Path) -> None:
    """Counts of this version that another one has put to rest, having come in between (bpf.earlier): they get
    a value per CPU again, of which the first is what there was."""
    with contextlib.suppress(LayoutMismatch):
        resting = reopen(path, [sys.MapType.ARRAY], layout.VALUE_BYTES)
        if resting is None:
            return
        with resting, make_counters(sys.map_info(resting).max_entries) as counters:
            value, others = (
                bytearray(layout.VALUE_BYTES),
                bytes(layout.VALUE_BYTES * (sys.possible_cpus() - 1)),
            )
            for slot in range(sys.map_info(resting).max_entries):
                sys.map_lookup_elem(resting, KEY.pack(slot), value)
                if any(value):
                    sys.map_update_elem(counters, KEY.pack(slot), bytes(value) + others)
            replace_pin(counters, path)


def replace_pin(thing: sys.MapFd, path: Path) -> None:
    """Whoever opens path finds the one or the other."""
    new = path.with_name(f"{path.name}-new")
    new.unlink(missing_ok=True)
    sys.obj_pin(thing, new)
    new.rename(path)


def _capacities(others: Iterable[Folder]) -> list[int]:
    """Slots that have holders must stay slots."""
    found = []
    for other in others:
        kinds = [sys.MapType.PERCPU_ARRAY, sys.MapType.ARRAY]
        with contextlib.suppress(LayoutMismatch):
            counts = reopen(other.path / COUNTS, kinds, other.record.acct.value_bytes)
            if counts is not None:
                with counts:
                    found.append(sys.map_info(counts).max_entries)
    return found


def read_record(folder: Path) -> Record | None:
    """None where there is none. ValueError, the end of a sentence, if it makes no sense; CallRefused."""
    if folder.name in WITHOUT_RECORD:
        return WITHOUT_RECORD[folder.name]
    try:
        found = reopen(folder / RECORD, [sys.MapType.ARRAY], RECORD_BYTES)
    except LayoutMismatch as error:
        raise ValueError(f"its record is not one: {error}") from error
    if found is None:
        return None
    value = bytearray(RECORD_BYTES)
    with found:
        sys.map_lookup_elem(found, KEY.pack(0), value)
    return Record.parse(bytes(value).rstrip(b"\0").decode())


def _make_record(record: Record) -> sys.MapFd:
    text = record.dump().encode()
    return _filled("knd_layout", RECORD_BYTES, text.ljust(RECORD_BYTES, b"\0"))


def make_counters(slots: int) -> sys.MapFd:
    kind, size = _SIZES[COUNTS]
    return sys.map_create(kind, value_size=size, max_entries=slots, name="knd_acct")


def make_rules(slots: int) -> sys.MapFd:
    kind, size = _SIZES["rules"]
    flags = sys.BPF_F_RDONLY_PROG
    return sys.map_create(kind, value_size=size, max_entries=slots, flags=flags, name="knd_rules")


def make_police(slots: int) -> sys.MapFd:
    kind, size = _SIZES["police"]
    return sys.map_create(kind, value_size=size, max_entries=slots, name="knd_police")


def make_classes() -> sys.MapFd:
    """With the default classes in it."""
    value = pack_classes(_DSCP_DEFAULT, _PCP_DEFAULT, layout.PCP_WINS)
    return _filled("knd_classes", layout.CLASSES_BYTES, value)


def pack_classes(dscp: Sequence[int], pcp: Sequence[int], flags: int) -> bytes:
    """As struct classes. ValueError on a wrong length or class."""
    for what, values, length in (("DSCP", dscp, layout.DSCPS), ("PCP", pcp, layout.PCPS)):
        if len(values) != length:
            raise ValueError(f"the {what} map has {len(values)} entries instead of {length}")
        if any(not 0 <= value < layout.CLASSES for value in values):
            raise ValueError(f"the {what} map names a class outside 0..{layout.CLASSES - 1}")
    return bytes(dscp) + bytes(pcp) + KEY.pack(flags)


def _filled(name: str, size: int, value: bytes) -> sys.MapFd:
    """Of one entry, written before anybody can pin it: a map that is pinned is never an empty one."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(
            sys.map_create(
                sys.MapType.ARRAY, value_size=size, max_entries=1, flags=sys.BPF_F_RDONLY_PROG, name=name
            )
        )
        sys.map_update_elem(made, KEY.pack(0), value)
        stack.pop_all()
        return made


def _pinned(path: Path, make: Callable[[], sys.MapFd]) -> sys.MapFd:
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(make())
        sys.obj_pin(made, path)
        stack.pop_all()
        return made


def reopen(path: Path, kinds: Sequence[sys.MapType], value_size: int) -> sys.MapFd | None:
    """None where there is no pin. LayoutMismatch if it is something else."""
    try:
        found = sys.obj_get_map(path)
    except CallRefused as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    with contextlib.ExitStack() as stack:
        stack.enter_context(found)
        try:
            info = sys.map_info(found)
        except CallRefused:
            raise _mismatch(path, "is not readable as a map") from None
        if info.type not in kinds or (info.key_size, info.value_size) != (KEY.size, value_size):
            raise _mismatch(
                path, f"has type {info.type}, keys of {info.key_size} and values of {info.value_size} bytes"
            )
        stack.pop_all()
        return found


def _mismatch(path: Path, what: str) -> LayoutMismatch:
    return LayoutMismatch(
        f"{path} {what} and is not a map of this version of the agent: somebody else pinned it there; remove "
        "it, which loses what it counted, and start the agent again"
    )


def wait_for_programs() -> None:
    """Until every run of a program that began before is over: what was taken off writes no more.

    The kernel promises it to whoever changes a map of maps, since a program may hold the one before.
    """
    with (
        sys.map_create(sys.MapType.ARRAY, value_size=4, max_entries=1, name="knd_inner") as inner,
        sys.map_create(
            sys.MapType.ARRAY_OF_MAPS, value_size=4, max_entries=1, inner=inner, name="knd_wait"
        ) as outer,
    ):
        sys.map_update_elem(outer, KEY.pack(0), KEY.pack(inner.fd))
