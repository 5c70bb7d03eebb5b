"""Files that others read while they are replaced.

Invariant: whoever opens the file finds the old text or the new one, never a part. The new one is built beside
it under a name that starts with a dot and ends with .new: runtimes and network managers read files by their
suffix, so not this one.
"""

from __future__ import annotations

import os
from pathlib import Path


def beside(path: Path) -> Path:
    """Where the next content is made, in the same folder."""
    return path.with_name(f".{path.name}.new")


def replace_whole(path: Path, text: str, mode: int) -> None:
    """OSError if it cannot be done: then the file is as it was. text is ASCII. Nothing is flushed to disk:
    what is written so is made anew after a reboot."""
    new = beside(path)
    # Left by a crash, it could have another mode or owner.
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="ascii") as stream:
        stream.write(text)
        os.fchmod(stream.fileno(), mode)
    new.replace(path)
