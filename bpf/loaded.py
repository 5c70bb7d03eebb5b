"""Programs of ours that the kernel has loaded, whoever loaded them and wherever they are attached.

Invariant: what is said of a program is the kernel's own word: its name, and which maps it uses.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bpf import sys
from bpf.errors import CallRefused
from bpf.layout import Framing, Slot

NAMES = ("knd_eg", "knd_in")
"""As the kernel shows them, per direction, followed by `_`, the slot and what is read if not Ethernet: who
counts where can be told from the kernel alone."""
_MARKS = {Framing.ETHERNET: "", Framing.IPOIB: "i"}
_NAME = re.compile(rf"({'|'.join(NAMES)})_([0-9]{{1,5}})({'|'.join(_MARKS.values())})")


@dataclass(frozen=True, slots=True)
class Place:
    """What a program counts: a slot, and of it direction 0 egress or 1 ingress, as the pod sees it; and what
    packets it reads."""

    slot: Slot
    direction: int
    framing: Framing = Framing.ETHERNET


def name_of(place: Place) -> str:
    return f"{NAMES[place.direction]}_{place.slot}{_MARKS[place.framing]}"


def place_of(program: sys.ProgramFd) -> Place | None:
    """None for a program of others."""
    found = _NAME.fullmatch(sys.prog_name(program))
    if found is None:
        return None
    framing = next(framing for framing, mark in _MARKS.items() if mark == found[3])
    return Place(Slot(int(found[2])), NAMES.index(found[1]), framing)


def programs() -> Iterator[tuple[Place, sys.ProgramFd]]:
    """Each with its place, open until the next one is asked for. Also those of another agent on this machine:
    ask for their maps where that matters. CallRefused without CAP_SYS_ADMIN."""
    number = sys.prog_get_next_id(0)
    while number is not None:
        with ExitStack() as stack:
            try:
                program = stack.enter_context(sys.prog_get_fd_by_id(number))
                place = place_of(program)
            except CallRefused as error:
                # Gone meanwhile.
                if error.errno != errno.ENOENT:
                    raise
            else:
                if place is not None:
                    yield place, program
        number = sys.prog_get_next_id(number)


@contextmanager
def kept(uses: frozenset[sys.MapId]) -> Iterator[list[tuple[Place, sys.ProgramFd]]]:
    """Those that use one of these maps, open for the time of the context."""
    with ExitStack() as stack:
        found = []
        for place, program in programs():
            if sys.prog_maps(program) & uses:
                found.append((place, stack.enter_context(sys.prog_get_fd_by_id(sys.prog_id(program)))))
        yield found
