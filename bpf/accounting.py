"""The maps that hold the counts, pinned so that they outlive the agent.

Invariant: the pinned maps have exactly the layout of bpf.layout, or nothing is opened. Counts only grow until
a slot is zeroed. Who owns which slot is the caller's to know: zero a slot before its programs are attached,
read it after they are off.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from bpf import layout, loaded, selftest, sys
from bpf.errors import BpffsMissing, CallRefused, LayoutMismatch
from bpf.layout import Cell, Slot, TrafficKind
from bpf.limits import NO_RULES, Limits, Rules
from bpf.loaded import Place
from bpf.program import CompiledPrograms

DEFAULT_SLOTS = 512
BATCH_BYTES = 4 << 20
"""Most that one batch call copies: one call for 512 slots on 8 possible CPUs."""

_KEY = struct.Struct("=I")
_FIRST = Slot(0)
_LANES = struct.Struct(f"={layout.VALUE_BYTES // 8}Q")
_ZEROS = bytes(layout.VALUE_BYTES)
_DSCP_DEFAULT = tuple(dscp >> 3 for dscp in range(layout.DSCPS))
_PCP_DEFAULT = tuple(range(layout.PCPS))


class Accounting:
    """Open maps and the programs that write them. Safe to use from several threads. limits is what these
    programs do beside counting.

    The kernel memory behind it is 1 KiB per slot and possible CPU.
    """

    def __init__(
        self,
        *,
        counters: sys.MapFd,
        classes: sys.MapFd,
        limits: Limits,
        programs: CompiledPrograms,
        capacity: int,
    ) -> None:
        self._counters = counters
        self._classes = classes
        self.limits = limits
        self._programs = programs
        self._capacity = capacity
        self._cpus = sys.possible_cpus()

    @classmethod
    def open(cls, pins: Path, programs: CompiledPrograms, *, slots: int = DEFAULT_SLOTS) -> Accounting:
        """Reopen the maps pinned under pins, or make and pin them.

        slots counts for new maps only: pinned ones keep their size, see capacity. BpffsMissing if pins is not
        on a bpffs, LayoutMismatch if what is pinned there is not ours, CallRefused; BpfError if the programs
        do not count what they should on this kernel.
        """
        make_pin_directory(pins)
        _try_out(programs)
        with contextlib.ExitStack() as stack:
            counters = stack.enter_context(
                _reopen(pins / "acct", sys.MapType.PERCPU_ARRAY, layout.VALUE_BYTES)
                or _pinned(pins / "acct", lambda: _make_counters(slots))
            )
            classes = stack.enter_context(
                _reopen(pins / "classes", sys.MapType.ARRAY, layout.CLASSES_BYTES)
                or _pinned(pins / "classes", _make_classes)
            )
            capacity = sys.map_info(counters).max_entries
            limits = stack.enter_context(contextlib.closing(_open_limits(pins, capacity)))
            opened = cls(
                counters=counters, classes=classes, limits=limits, programs=programs, capacity=capacity
            )
            stack.pop_all()
            return opened

    def close(self) -> None:
        """Close the descriptors; the pinned maps and what is attached go on counting."""
        self._counters.close()
        self._classes.close()
        self.limits.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def capacity(self) -> int:
        """How many slots there are, from 0 on."""
        return self._capacity

    def zero(self, slot: Slot) -> None:
        """Set every count of a slot to 0, and take its rules away. Only while nothing passes its programs."""
        self.forget(slot)
        self.limits.set(slot, NO_RULES)

    def forget(self, slot: Slot) -> None:
        """Set every count of a slot to 0, those of what was dropped included; its rules stay. As zero."""
        self._check(slot)
        self.limits.forget(slot)
        sys.map_update_elem(self._counters, _KEY.pack(slot), bytes(layout.VALUE_BYTES * self._cpus))

    def read(self, slot: Slot) -> tuple[Cell, ...]:
        """The cells of a slot that are not zero, summed over the CPUs."""
        self._check(slot)
        values = bytearray(layout.VALUE_BYTES * self._cpus)
        sys.map_lookup_elem(self._counters, _KEY.pack(slot), values)
        return _cells(values, 0, self._cpus)

    def read_slots(self, slots: Collection[Slot]) -> dict[Slot, tuple[Cell, ...]]:
        """Like read for many slots, in as few calls as the kernel needs: one on all but very large nodes."""
        for slot in slots:
            self._check(slot)
        size = layout.VALUE_BYTES * self._cpus
        found: dict[Slot, tuple[Cell, ...]] = {}
        for run in batches(slots, max(1, BATCH_BYTES // size)):
            count = run[-1] - run[0] + 1
            values = bytearray(size * count)
            sys.map_lookup_batch(self._counters, run[0] - 1 if run[0] else None, count, values)
            for slot in run:
                found[slot] = _cells(values, (slot - run[0]) * size, self._cpus)
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
        value = _pack_classes(dscp, pcp, layout.PCP_WINS if pcp_wins else 0)
        sys.map_update_elem(self._classes, _KEY.pack(0), value)

    def load(self, slot: Slot, direction: int) -> sys.ProgramFd:
        """Load a copy that counts into slot. direction 0 egress, 1 ingress, as the pod sees it.

        The caller owns the descriptor: pass its fd to LINK_CREATE or, as a clsact filter, to netlink; when
        that has succeeded the hook keeps the program and the descriptor is to be closed.
        """
        self._check(slot)
        return _load(self._programs, slot, direction, self._counters, self._classes, self.limits)

    def _check(self, slot: Slot) -> None:
        if not 0 <= slot < self._capacity:
            raise ValueError(f"slot {slot} is outside 0..{self._capacity - 1}")


def _load(
    programs: CompiledPrograms,
    slot: Slot,
    direction: int,
    counters: sys.MapFd,
    classes: sys.MapFd,
    limits: Limits,
) -> sys.ProgramFd:
    maps: Mapping[str, int] = {"acct": counters.fd, "classes": classes.fd, **limits.fds}
    code = programs.programs[direction].specialise(slot, maps)
    return sys.prog_load(sys.ProgramType.SCHED_CLS, code, name=loaded.name_of(Place(slot, direction)))


@dataclass(frozen=True, slots=True)
class Scratch:
    """Both programs on maps of their own, in the directions' order: no device is touched, no pod's count."""

    programs: tuple[sys.ProgramFd, ...]
    _counters: sys.MapFd
    _limits: Limits

    def set_rules(self, rules: Rules) -> None:
        self._limits.set(_FIRST, rules)

    def counts(self) -> tuple[Cell, ...]:
        """Since they were asked for last."""
        values = bytearray(layout.VALUE_BYTES * sys.possible_cpus())
        sys.map_lookup_elem(self._counters, _KEY.pack(_FIRST), values)
        sys.map_update_elem(self._counters, _KEY.pack(_FIRST), bytes(len(values)))
        return _cells(values, 0, sys.possible_cpus())


@contextlib.contextmanager
def scratch(programs: CompiledPrograms) -> Iterator[Scratch]:
    """Loaded for the time of the context: a few milliseconds. CallRefused with the verifier's reason."""
    with contextlib.ExitStack() as stack:
        counters = stack.enter_context(_make_counters(1))
        classes = stack.enter_context(_make_classes())
        limits = stack.enter_context(contextlib.closing(Limits(_make_rules(1), _make_police(1))))
        tried = tuple(
            stack.enter_context(_load(programs, _FIRST, direction, counters, classes, limits))
            for direction in range(layout.DIRECTIONS)
        )
        yield Scratch(tried, counters, limits)


def _try_out(programs: CompiledPrograms) -> None:
    """Before any pod depends on them."""
    with scratch(programs) as tried:
        selftest.check(
            lambda direction, frame: sys.prog_test_run(tried.programs[direction], frame),
            tried.set_rules,
            tried.counts,
        )


def pinned_counters(pins: Path) -> frozenset[sys.MapId]:
    """The maps that programs of this node count into; empty where there are none."""
    found = _reopen(pins / "acct", sys.MapType.PERCPU_ARRAY, layout.VALUE_BYTES)
    if found is None:
        return frozenset()
    with found:
        return frozenset({sys.map_info(found).id})


def make_pin_directory(path: Path) -> None:
    """Make path, root only, if it is on a bpffs; BpffsMissing before anything is made on another one."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not sys.is_bpffs(nearest):
        raise BpffsMissing(path)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


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


def _cells(values: bytearray, start: int, cpus: int) -> tuple[Cell, ...]:
    """Sum one slot's records, which lie one behind the other.

    A record is added as one big number: its 64-bit lanes cannot overflow into each other before a slot has
    counted 2**64 bytes, and the sum costs one operation per CPU instead of 128.
    """
    total = 0
    for at in range(start, start + cpus * layout.VALUE_BYTES, layout.VALUE_BYTES):
        record = values[at : at + layout.VALUE_BYTES]
        if record != _ZEROS:
            total += int.from_bytes(record, "little")
    if not total:
        return ()
    lanes = _LANES.unpack(total.to_bytes(layout.VALUE_BYTES, "little"))
    return tuple(_cell(at, lanes) for at in range(len(lanes) // 2) if lanes[2 * at + 1])


def _cell(at: int, lanes: tuple[int, ...]) -> Cell:
    rest, kind = divmod(at, layout.KINDS)
    direction, traffic_class = divmod(rest, layout.CLASSES)
    return Cell(direction, traffic_class, TrafficKind(kind), lanes[2 * at], lanes[2 * at + 1])


def _pack_classes(dscp: Sequence[int], pcp: Sequence[int], flags: int) -> bytes:
    for what, values, length in (("DSCP", dscp, layout.DSCPS), ("PCP", pcp, layout.PCPS)):
        if len(values) != length:
            raise ValueError(f"the {what} map has {len(values)} entries instead of {length}")
        if any(not 0 <= value < layout.CLASSES for value in values):
            raise ValueError(f"the {what} map names a class outside 0..{layout.CLASSES - 1}")
    return bytes(dscp) + bytes(pcp) + _KEY.pack(flags)


def _make_counters(slots: int) -> sys.MapFd:
    return sys.map_create(
        sys.MapType.PERCPU_ARRAY,
        key_size=_KEY.size,
        value_size=layout.VALUE_BYTES,
        max_entries=slots,
        name="knd_acct",
    )


def _open_limits(pins: Path, slots: int) -> Limits:
    with contextlib.ExitStack() as stack:
        rules = stack.enter_context(
            _reopen_or_forget(pins / "rules", layout.RULES_BYTES)
            or _pinned(pins / "rules", lambda: _make_rules(slots))
        )
        police = stack.enter_context(
            _reopen_or_forget(pins / "police", layout.POLICE_BYTES)
            or _pinned(pins / "police", lambda: _make_police(slots))
        )
        stack.pop_all()
        return Limits(rules, police)


def _reopen_or_forget(path: Path, value_size: int) -> sys.MapFd | None:
    """A map without counts is made anew where another version made it: the programs that use the old one have
    it until they are loaded anew, as an agent does when it starts."""
    try:
        return _reopen(path, sys.MapType.ARRAY, value_size)
    except LayoutMismatch:
        path.unlink()
        return None


def _make_rules(slots: int) -> sys.MapFd:
    return sys.map_create(
        sys.MapType.ARRAY,
        key_size=_KEY.size,
        value_size=layout.RULES_BYTES,
        max_entries=slots,
        flags=sys.BPF_F_RDONLY_PROG,
        name="knd_rules",
    )


def _make_police(slots: int) -> sys.MapFd:
    return sys.map_create(
        sys.MapType.ARRAY,
        key_size=_KEY.size,
        value_size=layout.POLICE_BYTES,
        max_entries=slots,
        name="knd_police",
    )


def _make_classes() -> sys.MapFd:
    """With the default classes in it, so that a map that gets pinned is never an empty one."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(
            sys.map_create(
                sys.MapType.ARRAY,
                key_size=_KEY.size,
                value_size=layout.CLASSES_BYTES,
                max_entries=1,
                flags=sys.BPF_F_RDONLY_PROG,
                name="knd_classes",
            )
        )
        sys.map_update_elem(made, _KEY.pack(0), _pack_classes(_DSCP_DEFAULT, _PCP_DEFAULT, layout.PCP_WINS))
        stack.pop_all()
        return made


def _pinned(path: Path, make: Callable[[], sys.MapFd]) -> sys.MapFd:
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(make())
        sys.obj_pin(made, path)
        stack.pop_all()
        return made


def _reopen(path: Path, kind: sys.MapType, value_size: int) -> sys.MapFd | None:
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
        if (info.type, info.key_size, info.value_size) != (kind, _KEY.size, value_size):
            raise _mismatch(
                path, f"has type {info.type}, keys of {info.key_size} and values of {info.value_size} bytes"
            )
        stack.pop_all()
        return found


def _mismatch(path: Path, what: str) -> LayoutMismatch:
    return LayoutMismatch(
        f"{path} {what} and is not a map of this version of the agent: detach the pods' devices and run "
        "`knd cleanup`, or go back to the version that made it"
    )
