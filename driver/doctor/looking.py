"""What several subjects look at: files that may be absent, file systems, listening sockets.

Invariant: reads only, and opens no connection: whoever listens never learns of it.
"""

from __future__ import annotations

import os
from pathlib import Path

_LISTENING = 0x10000
"""__SO_ACCEPTCON in the flags of /proc/net/unix."""


def read_if_there(path: Path) -> str | None:
    """None where it is not there, or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def listening(proc: Path) -> frozenset[Path]:
    """Where somebody listens on a unix socket, in this network namespace or that of process 1."""
    found = set()
    tables = [read_if_there(proc / place) for place in ("net/unix", "1/net/unix")]
    for line in "\n".join(filter(None, tables)).splitlines():
        # Num RefCount Protocol Flags Type St Inode Path
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7].startswith("/") and _is_listening(fields[3]):
            found.add(Path(os.path.realpath(fields[7])))
    return frozenset(found)


def _is_listening(flags: str) -> bool:
    try:
        return bool(int(flags, 16) & _LISTENING)
    except ValueError:
        return False


def listens(path: Path, sockets: frozenset[Path]) -> bool:
    return Path(os.path.realpath(path)) in sockets


def is_locked(proc: Path, path: Path) -> bool:
    """Whether a process that can be seen from here holds a flock of the file; taking it oneself would tell as
    much, and keep an agent from starting."""
    try:
        inode = path.stat().st_ino
    except OSError:
        return False
    # 1: FLOCK  ADVISORY  WRITE 4711 fd:01:1234 0 EOF
    rows = (line.split() for line in (read_if_there(proc / "locks") or "").splitlines())
    return any(len(row) > 5 and row[1] == "FLOCK" and row[5].rpartition(":")[2] == str(inode) for row in rows)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
