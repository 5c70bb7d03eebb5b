"""Room that is kept for opening the records, so that an agent can start on a full disk.

Invariant: given back before the records are opened and taken again right after, so that the room serves
nobody else for longer. An agent that cannot open its records can neither let a pod go nor say why.
"""

from __future__ import annotations

import contextlib
import os
import types
from pathlib import Path
from typing import Self

RESERVE_BYTES = 256 << 10
"""SQLite's shared memory is 32 KiB per file; the rest is for a first few changes in their logs."""
_BLOCK = bytes(4096)


class Reserve:
    """A context manager around the opening of the records at path's folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            self._path.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        """As much as there is; less than the whole is no error."""
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with os.fdopen(os.open(self._path, flags, 0o600), "wb", buffering=0) as file:
                for _ in range(RESERVE_BYTES // len(_BLOCK)):
                    file.write(_BLOCK)
