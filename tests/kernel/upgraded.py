"""One life of a release on a device: `python upgraded.py PINS CACHE HOOK IFINDEX SLOT DYING_AT [CLASS]`.

It does to maps and programs what an agent does when it starts. Run with the packages of the release that is
meant. DYING_AT: the process kills itself before its so manieth call of the kernel; 0: it lives, and says what
it found. CLASS: what everything is counted as.
"""

from __future__ import annotations

import json
import os
import signal
import sys as python
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bpf.accounting
from bpf import sys
from bpf.accounting import Accounting
from bpf.attach import TcxPrograms
from bpf.cache import ProgramCache
from bpf.layout import Slot
from hw.model import Direction, IfIndex
from hw.netlink import LinkSocket

NAME = "dev"


def die_at(number: int) -> None:
    left = [number]

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    sys._bpf = dying(sys._bpf)
    for name in ("unlink", "rename", "rmdir", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))


def take_over(accounting: Accounting, pins: Path, hook: str, ifindex: int, slot: Slot) -> None:
    if hook == "tcx":
        programs = TcxPrograms(pins, accounting)
        if programs.repoint_all({NAME: slot}):
            programs.attach(NAME, ifindex, slot)
        return
    with LinkSocket(None) as links:
        links.add_clsact(IfIndex(ifindex))
        for direction in Direction:
            with accounting.load(slot, int(direction)) as program:
                links.add_bpf_filter(IfIndex(ifindex), direction, program.fd, "knd")


def main() -> None:
    pins, cache, hook = Path(python.argv[1]), Path(python.argv[2]), python.argv[3]
    ifindex, slot, dying_at = int(python.argv[4]), Slot(int(python.argv[5])), int(python.argv[6])
    programs = ProgramCache(cache).ensure()
    # It touches nothing that is pinned, and is most of the calls.
    bpf.accounting._try_out = lambda programs: None  # type: ignore[assignment]
    die_at(dying_at)
    with Accounting.open(pins, programs, slots=4) as accounting:
        if len(python.argv) > 7:
            accounting.set_classes([int(python.argv[7])] * 64, range(8))
        take_over(accounting, pins, hook, ifindex, slot)
        gone = accounting.others.settle({slot})
        cells = [tuple(cell) for cell in accounting.read(slot)]
        print(json.dumps({"gone": [path.name for path in gone], "cells": cells}))


if __name__ == "__main__":
    main()
