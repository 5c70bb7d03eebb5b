"""Agents that are broken on purpose: the demo must notice each. Run as `... sabotage HOW agent FLAGS`.

Only the demo's own test runs these; the product has no switch for any of it.
"""

from __future__ import annotations

import enum
import sys


class Sabotage(enum.StrEnum):
    DROP_ONE = "drop-one"
    """One frame is said to be sent and is not: done in the generator's word, not here."""
    SKIP_RESTORE = "skip-restore"
    """Devices come home as the pod left them."""
    FIXED_COUNTER = "fixed-counter"
    """The agent reports a number it did not read."""


def main() -> int:
    how, *rest = sys.argv[1:]
    if how == Sabotage.SKIP_RESTORE:
        _skip_restore()
    elif how == Sabotage.FIXED_COUNTER:
        _fix_counters()
    from driver.cli.main import main as knd

    return knd(rest)


def _skip_restore() -> None:
    from driver.execute.actions import NodeActs
    from driver.execute.target import Target

    def nothing(self: NodeActs, target: Target) -> None:
        del self, target

    NodeActs.restore = nothing  # type: ignore[method-assign]
    NodeActs.verify = nothing  # type: ignore[method-assign]


def _fix_counters() -> None:
    from bpf.accounting import Accounting
    from bpf.layout import Cell, Slot, TrafficKind

    def fixed(self: Accounting, slot: Slot) -> tuple[Cell, ...]:
        del self, slot
        return (Cell(0, 0, TrafficKind.IP, 123456, 100),)

    Accounting.read = fixed  # type: ignore[method-assign]


if __name__ == "__main__":
    raise SystemExit(main())
