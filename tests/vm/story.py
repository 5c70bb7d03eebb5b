"""What every story inside a guest has: a node, and what was seen of it, which the tests outside judge."""

from __future__ import annotations

import sys
import time
from typing import Any

from kndsim.node import SimNode


class Told:
    def __init__(self, node: SimNode) -> None:
        self.node = node
        self.seen: dict[str, Any] = {}

    def note(self, key: str, value: Any) -> None:
        self.seen[key] = value
        print(f"{time.monotonic():.1f} {key}", file=sys.stderr, flush=True)
