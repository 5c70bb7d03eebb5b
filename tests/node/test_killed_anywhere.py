"""Wherever the agent is killed, the next one brings the node to where it should be.

A clean run writes down every point that the agent passes; then the same is played once for each of them,
with a SIGKILL there. So a step that is added to a plan is killed at too, without a change here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.node.crash_stage import Stage, Story, devices_that_survive, find, killed, point_of, stage
from tests.node.node_stage import devices
from tests.node.test_shared_uplink import SHARED

pytestmark = pytest.mark.timeout(200)

POINTS = ("before-intent", "after-intent", "after-act", "after-record")
PROJECTIONS = ("write-live-file", "write-cdi-spec", "remove-cdi-spec", "remove-live-file")
Body = Callable[[Stage], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class Matrix:
    """What was passed in runs without a death, and where there was one."""

    on: Stage
    passed: set[str] = field(default_factory=set)
    covered: set[str] = field(default_factory=set)

    async def scene(
        self,
        story: Story,
        *before: str,
        fail: str = "",
        where: Callable[[str], bool] = lambda line: True,
    ) -> list[str]:
        """Die at every point of the story that no earlier scene died at. before: deaths that come first."""
        lines = [line for line in await killed(self.on, story, *before, fail=fail) if where(line)]
        self.passed.update(lines)
        for line in dict.fromkeys(lines):
            if line not in self.covered:
                await killed(self.on, story, *before, line, fail=fail)
                self.covered.add(line)
        return lines


def played(
    monkeypatch: pytest.MonkeyPatch,
    control: Path,
    hook: str,
    body: Body,
    *,
    mortal: int = 0,
    parts: str = "",
) -> None:
    """The body on a stage with one device; or with so many more, which die with the netns they are in. parts:
    the policy's words about a device that is given out in such."""

    async def run() -> None:
        async with stage(replace(made, policy=made.policy + parts), hook, control) as on:
            on.mortal, on.parts = mortal > 0 or bool(parts), bool(parts)
            await body(on)

    immortal = devices_that_survive(monkeypatch) if not (mortal or parts) else contextlib.nullcontext()
    with devices(1 + mortal) as made, immortal:
        asyncio.run(run())


def is_recovery(line: str) -> bool:
    return line.rpartition("\t")[2].startswith("Reconcile.")


@pytest.mark.parametrize("hook", ["tcx", "clsact"])
def test_a_kill_at_any_point_of_any_plan_converges(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path, hook: str
) -> None:
    async def body(on: Stage) -> None:
        matrix = Matrix(on)
        lines = await matrix.scene(on.life)
        await matrix.scene(on.life, fail="link-up", where=lambda line: "undo" in line or "close_" in line)
        await matrix.scene(on.life, fail="arm-programs" if hook == "tcx" else "put-in-order")
        # The next agent undoes the whole of the plan, and may be killed at that too.
        await matrix.scene(on.life, find(lines, "attach", "link-up", "after-act"), where=is_recovery)
        assert matrix.covered == matrix.passed
        points = {point_of(line) for line in matrix.covered}
        planned = {tuple(line.split("\t")) for line in on.planned()}
        assert {(plan, act, point) for plan, act in planned for point in POINTS} <= points
        assert {
            ("projection", act, point) for act in PROJECTIONS for point in ("before-intent", "after-act")
        } <= points
        print(f"{hook}: {len(matrix.covered)} points, {on.deaths} deaths")

    played(monkeypatch, short_tmp, hook, body)


def is_of_a_share(line: str) -> bool:
    """Where a share is not like any other device."""
    return line.partition("\t")[0] in ("prepare", "unprepare", "remake")


def test_a_kill_at_any_point_at_which_a_share_is_made_or_ended_converges(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    async def body(on: Stage) -> None:
        matrix = Matrix(on)
        lines = await killed(on, on.life)
        await matrix.scene(on.life, where=is_of_a_share)
        await matrix.scene(on.life, fail="arm-programs", where=is_of_a_share)
        for first in (("prepare", "make-share", "after-act"), ("attach", "link-up", "after-act")):
            await matrix.scene(on.life, find(lines, *first), where=is_recovery)
        assert matrix.covered == matrix.passed
        points = {point_of(line) for line in matrix.covered}
        assert {("unprepare", "remove-share", point) for point in POINTS} <= points
        print(f"{len(matrix.covered)} points, {on.deaths} deaths")

    played(monkeypatch, short_tmp, "tcx", body, parts=SHARED)


def test_a_kill_while_recovering_from_a_kill_converges(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    async def body(on: Stage) -> None:
        matrix = Matrix(on)
        lines = await killed(on, on.life)
        for first in (
            ("prepare", "arm-programs", "after-act"),
            ("projection", "write-cdi-spec", "after-act"),
            ("detach", "link-down", "after-act"),
            ("unprepare", "disarm-programs", "after-act"),
        ):
            recovery = await matrix.scene(on.life, find(lines, *first), where=is_recovery)
            assert recovery, f"nothing to recover from after {first}"
        assert matrix.covered == matrix.passed
        print(f"{len(matrix.covered)} points, {on.deaths} deaths")

    played(monkeypatch, short_tmp, "tcx", body)


def test_a_pod_that_ends_while_the_agent_is_away_is_charged_nothing_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    async def body(on: Stage) -> None:
        lines = await killed(on, on.life)
        attaching = [
            line
            for line in dict.fromkeys(lines)
            if "Sandboxes._attach" in line and not line.split("\t")[2].startswith("before")
        ]
        assert len(attaching) > 10
        for line in attaching:
            # What the slot's last holder sent would be there to be booked.
            await killed(on, on.life)
            await killed(on, on.short_life, line)

    played(monkeypatch, short_tmp, "tcx", body)


def test_a_device_that_dies_with_its_pod_while_the_agent_is_away_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    deaths = (
        ("attach", "move-in", "after-act"),
        ("attach", "link-up", "after-record"),
        ("record", "advance_attachments attached", "after-change"),
        ("projection", "write-cdi-spec", "after-act"),
    )

    async def body(on: Stage) -> None:
        lines = await killed(on, on.life)
        for point in deaths:
            await killed(on, on.short_life, find(lines, *point))
        await killed(on, on.life)

    played(monkeypatch, short_tmp, "tcx", body, mortal=len(deaths))
