"""Archives the kernel unpacks as its first root file system.

Invariant: the bytes depend on the given files alone. Archives may be written one after the other: the kernel
unpacks all of them. Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """A file by its path without a leading slash. Folders above it are made by pack()."""

    path: str
    data: bytes
    mode: int = 0o644


def pack(entries: Iterable[Entry]) -> bytes:
    files = list(entries)
    folders: dict[str, None] = {}
    for entry in files:
        parts = entry.path.split("/")[:-1]
        folders.update({"/".join(parts[: depth + 1]): None for depth in range(len(parts))})
    pieces = [_record(path, stat.S_IFDIR | 0o755, b"", number) for number, path in enumerate(folders, 1)]
    pieces += [
        _record(entry.path, stat.S_IFREG | entry.mode, entry.data, number)
        for number, entry in enumerate(files, len(folders) + 1)
    ]
    pieces.append(_record("TRAILER!!!", 0, b"", 0))
    whole = b"".join(pieces)
    return whole + bytes(-len(whole) % 512)


def _record(path: str, mode: int, data: bytes, inode: int) -> bytes:
    name = path.encode() + b"\0"
    fields = (inode, mode, 0, 0, 2 if stat.S_ISDIR(mode) else 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
