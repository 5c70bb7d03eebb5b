"""The real agent with a witness: every point it passes is written down, and at an ordered one it dies.

Invariant: what the agent does between the points is the product's own; nothing here is in the product.
Run as `python -m tests.node.crash_entry FOLDER FLAGS`. FOLDER holds, all read and written at any time:

    visited   a line for every point passed: TAB-separated plan, act, point, and who asked for it
    planned   a line for every act of every plan begun: plan and act, TAB-separated
    kill      such a line of visited: the process dies there, and the file is gone then
    fail      the name of an act: it raises once, after its work, and the file is gone then
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import kubernetes.client  # noqa: F401 - before the fork, since it takes longest

from driver.app import App
from driver.errors import NotNow
from driver.execute.actions import NodeActs
from driver.execute.engine import Engine, Point
from driver.journal.ledger import Ledger
from driver.lifecycle.book import Book
from driver.model import AttachmentState, PreparationState
from driver.plan import Act, Plan
from driver.settings import parse

RECORDS = {Book: ("open_", "advance_", "close_"), Ledger: ("begin", "fold")}
"""Changes of a record, by what their methods' names begin with, each with a point before and one after:
what lies between plans."""


_PR_SET_PDEATHSIG = 1


class Witness:
    """An Observer that writes down, kills and makes fail."""

    def __init__(self, folder: Path) -> None:
        self._kill = folder / "kill"
        self._fail = folder / "fail"
        self._visited = os.open(folder / "visited", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._planned = os.open(folder / "planned", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def at(self, point: Point, owner: str, act: str) -> None:
        self.visit(_plan_under_way() or "projection", act, point)

    def step_done(self, step: str, seconds: float, outcome: str) -> None:
        pass

    def visit(self, plan: str, act: str, point: str) -> None:
        line = "\t".join((plan, act, point, _who_asked()))
        os.write(self._visited, line.encode() + b"\n")
        if _take(self._kill, line):
            os.kill(os.getpid(), signal.SIGKILL)

    def begun(self, plan: Plan) -> None:
        name = name_of(plan)
        lines = [f"{name}\t{step.act}\n" for step in plan.steps]
        lines += [f"{name}-undo\t{act}\n" for step in plan.steps for act in step.undo]
        os.write(self._planned, "".join(lines).encode())

    def check_failure(self, act: Act) -> None:
        if _take(self._fail, act):
            raise NotNow(f"{act} was made to fail")


def _take(order: Path, wanted: str) -> bool:
    """Whether this is what was ordered; the order is gone then, so it is carried out once."""
    try:
        found = order.read_text() == wanted
    except FileNotFoundError:
        return False
    if found:
        with contextlib.suppress(FileNotFoundError):
            order.unlink()
            return True
    return False


def name_of(plan: Plan) -> str:
    """attach, detach, prepare, unprepare, tidy or remake: told by what only that plan begins with."""
    first = plan.steps[0].act
    names = {
        Act.ZERO_SLOT: "attach",
        Act.DOWN: "detach",
        Act.NOTE_FOREIGN: "prepare",
        # Of a device given by its files, which nobody has programs on.
        Act.TIDY: "prepare",
        Act.DISARM: "unprepare",
        Act.UNBIND: "unprepare",
        Act.RESTORE: "tidy",
        Act.SHARE_MAKE: "remake" if plan.homeward else "prepare",
        Act.SHARE_REMOVE: "unprepare",
    }
    return names[first]


def _frames() -> list[FrameType]:
    frames = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _plan_under_way() -> str:
    """The plan that the calling thread's engine is at, "-undo" added where it goes backwards."""
    inside = [f for f in _frames() if f.f_code.co_filename.endswith("driver/execute/engine.py")]
    plans = [f.f_locals["plan"] for f in inside if isinstance(f.f_locals.get("plan"), Plan)]
    if not plans:
        return ""
    undoing = any(frame.f_code.co_name == "_undo" for frame in inside)
    return name_of(plans[-1]) + ("-undo" if undoing else "")


def _who_asked() -> str:
    """The outermost function of driver.lifecycle in this thread: the same act may serve many ends."""
    for frame in reversed(_frames()):
        folder, name = os.path.split(frame.f_code.co_filename)
        if folder.endswith("driver/lifecycle") and name not in ("workers.py", "core.py"):
            return frame.f_code.co_qualname
    return ""


def watch_records(witness: Witness) -> None:
    for owner, beginnings in RECORDS.items():
        for name, change in list(vars(owner).items()):
            if name.startswith(beginnings):
                setattr(owner, name, _watched(witness, name, change))


def _watched(witness: Witness, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(change)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        words = [str(arg) for arg in args if isinstance(arg, PreparationState | AttachmentState)]
        label = " ".join((name, *words))
        witness.visit("record", label, "before-change")
        result = change(*args, **kwargs)
        witness.visit("record", label, "after-change")
        return result

    return wrapped


def watch_acts(witness: Witness) -> None:
    """An act that is ordered to fail does so after it has done its work: the worst moment."""
    table = NodeActs.table

    def watched(self: NodeActs) -> dict[Act, Callable[..., None]]:
        return {act: failing(act, function) for act, function in table(self).items()}

    def failing(act: Act, function: Callable[..., None]) -> Callable[..., None]:
        def wrapped(target: Any) -> None:
            function(target)
            witness.check_failure(act)

        return wrapped

    NodeActs.table = watched  # type: ignore[method-assign]


def watch_plans(witness: Witness) -> None:
    for method in ("run", "bring_home", "undo"):
        original = getattr(Engine, method)

        def wrapped(self: Engine[Any], plan: Plan, *args: Any, original: Any = original) -> Any:
            witness.begun(plan)
            return original(self, plan, *args)

        setattr(Engine, method, wrapped)


def run(folder: Path, flags: Sequence[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    witness = Witness(folder)
    watch_records(witness)
    watch_acts(witness)
    watch_plans(witness)
    asyncio.run(App(parse(flags), observer=witness).run())


def main() -> None:
    """For every connection to FOLDER/nursery a new agent, whose process id is the answer.

    An agent is forked off here, where everything is imported and nothing is running: it begins as a new
    process would, a third of a second sooner.
    """
    folder, *flags = sys.argv[1:]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as nursery:
        nursery.bind(f"{folder}/.nursery")
        nursery.listen()
        # There only once it answers: whoever waits for it connects at once.
        os.rename(f"{folder}/.nursery", f"{folder}/nursery")
        while True:
            connection, _ = nursery.accept()
            with connection:
                assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be there after the fork"
                pid = os.fork()
                if pid:
                    connection.sendall(str(pid).encode())
                    continue
            nursery.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            run(Path(folder), flags)
            return


if __name__ == "__main__":
    main()
