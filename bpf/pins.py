"""Where things are pinned: a folder of this agent's own on a BPF filesystem.

Invariant: nothing is made on another filesystem, and what is made is root's alone.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from bpf.errors import BpffsMissing

_BPF_FS_MAGIC = 0xCAFE4A11
_libc = ctypes.CDLL(None, use_errno=True)


def is_bpffs(path: Path) -> bool:
    """Whether path, which exists, lies on a BPF filesystem. OSError if it cannot be asked."""
    answer = ctypes.create_string_buffer(256)
    if _libc.statfs(bytes(path), answer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    kind: int = struct.unpack_from("=q", answer.raw)[0]
    return kind == _BPF_FS_MAGIC


def make_pin_directory(path: Path) -> None:
    """Make path, root only, if it is on a bpffs; BpffsMissing before anything is made on another one."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not is_bpffs(nearest):
        raise BpffsMissing(path)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
