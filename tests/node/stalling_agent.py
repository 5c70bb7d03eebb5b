"""An agent whose acts can be held: `python -m tests.node.stalling_agent agent FLAGS`.

While ROOT/stall/NAME exists, an act of that name does not begin (a journal write: `put-attachment`); it
says so by ROOT/stall/NAME.reached. With `NAME.after` it has been done and does not return. Only the tests
run this; the product has no switch for any of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from driver.cli.main import main as knd
from driver.execute.actions import NodeActs
from driver.execute.target import Target
from driver.journal.store import Journal
from driver.model import Attachment
from driver.plan import Act

_never = threading.Event()


class Stalls:
    """The folder by which a test holds and releases."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def hold(self, name: str) -> None:
        file = self._folder / name
        while file.exists():
            file.with_name(f"{name}.reached").touch()
            _never.wait(0.01)

    def around(self, act: Act, do: Callable[[Target], None]) -> Callable[[Target], None]:
        def held(target: Target) -> None:
            self.hold(act.value)
            do(target)
            self.hold(f"{act.value}.after")

        return held


def install(stalls: Stalls) -> None:
    table, put = NodeActs.table, Journal.put_attachment

    def held_table(self: NodeActs) -> dict[Act, Callable[[Target], None]]:
        return {act: stalls.around(act, do) for act, do in table(self).items()}

    def held_put(self: Journal, attachment: Attachment) -> None:
        stalls.hold("put-attachment")
        put(self, attachment)

    NodeActs.table = held_table  # type: ignore[method-assign]
    Journal.put_attachment = held_put  # type: ignore[method-assign]


def main() -> int:
    arguments = sys.argv[1:]
    (root,) = (each.partition("=")[2] for each in arguments if each.startswith("--root="))
    install(Stalls(Path(root) / "stall"))
    return knd(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
