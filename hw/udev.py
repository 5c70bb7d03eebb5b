"""Whether udev is done with a netdev that is new in its namespace: made by a driver, or come home from a pod.

Invariant: reads only, and where no udev is to be seen everything is done. udev gives such a netdev a name and
more names, one of which may be made from its address; what it has not given yet cannot be taken off.
"""

from __future__ import annotations

import time
from pathlib import Path

from hw.model import IfIndex

PATIENCE = 3.0
"""Seconds; it takes some hundredths. What it does later than that is mended when it is seen."""
_PAUSE = 0.01


class Udev:
    """By its folder in /run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def is_done(self, ifindex: IfIndex) -> bool:
        """It writes a record of a link when it has named it, and takes it away when the link leaves."""
        return not (self._folder / "control").exists() or (self._folder / f"data/n{ifindex}").exists()

    def wait(self, ifindex: IfIndex) -> None:
        """Until it is done, or patience is over."""
        give_up = time.monotonic() + PATIENCE
        while not self.is_done(ifindex) and time.monotonic() < give_up:
            time.sleep(_PAUSE)
