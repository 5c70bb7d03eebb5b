"""What the programs cost per packet: by a trial without a device, and of the traffic that passes them.

Invariant: the kernel times programs only while the descriptor that has it on is open, so it is off again
however its process ends. Timing costs every program of the machine some tens of nanoseconds a run, and is in
what is measured; how much that is, is measured too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from bpf import loaded, sys
from bpf.accounting import scratch
from bpf.attach import RETURN_UNSPEC
from bpf.errors import BpfError
from bpf.loaded import Place
from bpf.program import CompiledPrograms
from bpf.selftest import GOLDEN

_REPEATS = 20_000
"""Runs of one trial: a millisecond, while the kernel's clock tells nanoseconds."""
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Trial:
    """Nanoseconds a run, of both directions and all golden packets, and of a program that does nothing.
    jited: they run as machine code."""

    counting: float
    empty: float
    jited: bool


@dataclass(frozen=True, slots=True)
class Runs:
    """Of one program, while the kernel timed them; nanoseconds of all together."""

    count: int
    nanoseconds: int


@dataclass(frozen=True, slots=True)
class Timed:
    """What passed one program while it was timed. A run is a packet as the kernel hands it over: one that
    stands for many segments is one."""

    place: Place
    runs: int
    nanoseconds: int


@dataclass(frozen=True, slots=True)
class Measured:
    """timing: nanoseconds of a run that are the timing's own, as a program that does nothing shows them."""

    timing: float
    programs: tuple[Timed, ...]


def trial(programs: CompiledPrograms) -> Trial:
    """On maps of its own, some tens of milliseconds. CallRefused."""
    with scratch(programs) as tried, _empty() as empty:
        counting = [_fastest(program, golden.frame) for golden in GOLDEN for program in tried.programs]
        jited = all(is_jited(program) for program in tried.programs)
        return Trial(sum(counting) / len(counting), _fastest(empty, GOLDEN[0].frame), jited)


def measure(counters: frozenset[sys.MapId], wait: Callable[[], None]) -> Measured:
    """Time every loaded program that counts into one of these maps until wait returns.

    CallRefused (EPERM: no CAP_SYS_ADMIN; EINVAL: a kernel before 5.8); BpfError where there is none.
    """
    with loaded.kept(counters) as found, _empty() as empty, sys.enable_stats():
        if not found:
            raise BpfError("no program of this node's agent is loaded: no device is prepared")
        timing = _timing(empty)
        before = [runs_of(program) for _, program in found]
        wait()
        after = [runs_of(program) for _, program in found]
    timed = (
        Timed(place, last.count - first.count, last.nanoseconds - first.nanoseconds)
        for (place, _), first, last in zip(found, before, after, strict=True)
    )
    return Measured(timing, tuple(sorted(timed, key=lambda each: (each.place.slot, each.place.direction))))


def runs_of(program: sys.ProgramFd) -> Runs:
    """Since it was loaded; only what ran while somebody had statistics enabled."""
    nanoseconds, count = struct.unpack_from("=QQ", sys.prog_info(program), 192)
    return Runs(count, nanoseconds)


def is_jited(program: sys.ProgramFd) -> bool:
    """Whether it runs as machine code; else the kernel interprets it."""
    return bool(struct.unpack_from("=I", sys.prog_info(program), 16)[0])


def _empty() -> sys.ProgramFd:
    return sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="knd_empty")


def _fastest(program: sys.ProgramFd, frame: bytes) -> float:
    return min(sys.prog_test_run(program, frame, repeat=_REPEATS).nanoseconds for _ in range(_ROUNDS))


def _timing(empty: sys.ProgramFd) -> float:
    """The median of several: an interrupt is in the one or other."""
    costs = []
    for _ in range(_ROUNDS):
        before = runs_of(empty)
        sys.prog_test_run(empty, GOLDEN[0].frame, repeat=_REPEATS)
        after = runs_of(empty)
        costs.append((after.nanoseconds - before.nanoseconds) / max(after.count - before.count, 1))
    return median(costs)
