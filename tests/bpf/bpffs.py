"""A BPF filesystem of a test's own, so that nothing is pinned in the machine's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


@contextlib.contextmanager
def mounted_bpffs() -> Iterator[Path]:
    """Mounted on a new directory, with everything pinned there gone at the end."""
    with tempfile.TemporaryDirectory(prefix="knd-bpffs-") as folder:
        _check(_libc.mount(b"bpf", folder.encode(), b"bpf", 0, None), "mounting a bpffs")
        try:
            yield Path(folder)
        finally:
            _check(_libc.umount2(folder.encode(), _MNT_DETACH), "unmounting a bpffs")
