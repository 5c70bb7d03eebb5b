"""A BPF filesystem of a test's own, so that nothing is pinned in the machine's.

Invariant: it is mounted nowhere. The mount is an open file of this process and goes with it, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
# The same numbers on x86_64 and aarch64.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6


def _call(what: str, number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


@contextlib.contextmanager
def mounted_bpffs() -> Iterator[Path]:
    """An empty bpffs, by a path that only this process can follow."""
    context = _call("opening a bpffs", _FSOPEN, b"bpf", _CLOEXEC)
    try:
        _call("making a bpffs", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _call("mounting a bpffs", _FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{mount}")
    finally:
        os.close(mount)
