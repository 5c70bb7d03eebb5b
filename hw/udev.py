"""Whether udev is done with a new netdev: it gives it a name and more names, after the kernel has made it.

Invariant: reads only, and where no udev is to be seen everything is done.
"""

from __future__ import annotations

from pathlib import Path

from hw.model import IfIndex


class Udev:
    """By its folder in /run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def is_done(self, ifindex: IfIndex) -> bool:
        """It writes a record of a link when it has named it."""
        return not (self._folder / "control").exists() or (self._folder / f"data/n{ifindex}").exists()
