"""What a process costs, from /proc.

Invariant: only reads.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

_CPUCLOCK_SCHED = 2
"""As clock_getcpuclockid() makes a process's clock: what /proc shows of threads ends with each."""
_UNWANTED = re.compile(r"bcc|LLVM|clang", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB. pss shares what is shared among its users; anonymous is what is this process's alone."""

    pss: float
    anonymous: float


def memory(pid: int) -> Memory:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {key: int(number) for key, number in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return Memory(kib["Pss"] / 1024, kib["Pss_Anon"] / 1024)


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads so far, to the nanosecond, and of those that ended by now."""
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


def mapped_compiler(pid: int) -> frozenset[str]:
    """Mapped files of a compiler; there should be none."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    paths = (line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and "/" in line)
    return frozenset(path for path in paths if _UNWANTED.search(path))


def bpf_map_bytes(pid: int) -> int:
    """What the kernel charges for the BPF maps a process holds, each once."""
    found: dict[str, int] = {}
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = entry.read_text()
        except FileNotFoundError:
            # Closed since: maps are held all the time.
            continue
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if "map_id" in fields:
            found[fields["map_id"].strip()] = int(fields["memlock"])
    return sum(found.values())


def possible_cpus() -> int:
    total = 0
    for part in Path("/sys/devices/system/cpu/possible").read_text().strip().split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total
