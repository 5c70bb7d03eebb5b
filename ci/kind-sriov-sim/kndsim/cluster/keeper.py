"""Ends what a cluster started, however the process that drives it ended.

Invariant: when standard input closes, every process named on it is dead, every cgroup named on it is gone,
and every folder named on it is removed; then, and not before, this process ends. There is no other way by
which a cluster is taken down, so the way that is taken after a crash is the one that is always taken.
Standard library alone: it runs as `python -I keeper.py`, in a session of its own, with no signal but KILL
that stops it.

Lines: "process PID", "cgroup PATH", "folder PATH".
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

_PATIENCE = 20.0


def _end(process: int) -> None:
    """Kill and wait for its end. The first process of a pid namespace takes all others of it along."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [], _PATIENCE)
    os.close(process)


def _again(step: object, what: str) -> None:
    print(f"keeper: {what}: {step}", file=sys.stderr, flush=True)


def _remove_cgroup(path: Path) -> None:
    """Folders from the inside out; a cgroup whose last process has just ended is busy for a moment."""
    deadline = time.monotonic() + _PATIENCE
    while path.exists():
        try:
            for folder, _, _ in os.walk(path, topdown=False):
                os.rmdir(folder)
        except OSError as error:
            if time.monotonic() > deadline:
                _again(error, f"{path} stays")
                return
            time.sleep(0.02)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    processes: list[int] = []
    cgroups: list[Path] = []
    folders: list[Path] = []
    for line in sys.stdin:
        kind, _, value = line.rstrip("\n").partition(" ")
        if kind == "process":
            with contextlib.suppress(ProcessLookupError):
                # Opened now, while the number is surely this process's.
                processes.append(os.pidfd_open(int(value)))
        elif kind == "cgroup":
            cgroups.append(Path(value))
        elif kind == "folder":
            folders.append(Path(value))
        print("kept", flush=True)
    for process in processes:
        _end(process)
    for cgroup in cgroups:
        _remove_cgroup(cgroup)
    for folder in folders:
        shutil.rmtree(folder, onerror=lambda _, path, error: _again(error[1], f"removing {path}"))


if __name__ == "__main__":
    main()
