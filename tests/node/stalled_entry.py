"""The real agent with one act that waits: `python -m tests.node.stalled_entry FOLDER FLAGS`.

While FOLDER has a file `stall` with a point and an act in it, the agent writes `stalled` there and waits at
that point of that act until `stall` is gone. Nothing of this is in the product.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from pathlib import Path

from driver.app import App
from driver.execute.engine import Point
from driver.settings import parse


class Stall:
    """An Observer that waits where it is told to."""

    def __init__(self, folder: Path) -> None:
        self._order = folder / "stall"
        self._there = folder / "stalled"

    def at(self, point: Point, owner: str, act: str) -> None:
        if self._ordered() == f"{point} {act}":
            self._there.touch()
            while self._ordered():
                time.sleep(0.005)  # in the product's place: this is what stalls

    def step_done(self, step: str, seconds: float, outcome: str) -> None:
        pass

    def _ordered(self) -> str:
        try:
            return self._order.read_text()
        except FileNotFoundError:
            return ""


def main() -> None:
    folder, *flags = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(App(parse(flags), observer=Stall(Path(folder))).run())


if __name__ == "__main__":
    main()
