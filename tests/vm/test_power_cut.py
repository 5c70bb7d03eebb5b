"""A node whose power is cut: what was counted is there afterwards, and what is missing is named.

Two guests, one after the other, on one disk (tests.vm.power_cut_story); each test is something promised.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from driver.lifecycle.core import CHECKPOINT_EVERY
from kndsim.guest import Disk, Guest, Image, guest
from kndsim.progress import Progress
from kndsim.waiting import wait_until
from tests.vm.power_cut_story import AFTER, READ, UNREAD, YOUNG, sent

LIMIT = 1200.0
pytestmark = pytest.mark.timeout(LIMIT)
Seen = dict[str, Any]
STORY = "story"
SLACK = 20.0
"""Seconds that a checkpoint may be late on a processor that is emulated."""


def _play(vm: Guest, what: str) -> Seen:
    """The first line that it tells, as soon as it does."""
    command = f"cd /srv/knd && exec python -m tests.vm.power_cut_story {what}"
    vm.start(STORY, ["sh", "-c", command])

    def told() -> Seen | None:
        lines = vm.log(STORY).splitlines()
        found = next((json.loads(line) for line in lines if line.startswith("{")), None)
        if found is None and not vm.alive(STORY):
            pytest.fail(vm.log(STORY)[-8000:])
        return found

    return wait_until(told, LIMIT / 2 - 60, f"the story {what} the power cut")


@pytest.fixture(scope="module")
def seen(made: Image, progress: Progress, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    file = tmp_path_factory.mktemp("disk") / "records.img"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(file), "64M"], check=True)
    disks = [Disk(file, kept=True)]
    found: Seen = {}
    for what in ("before", "after"):
        with (
            progress.phase(f"a node {what} its power is cut"),
            guest(name=what, memory=3072, disks=disks, made=made) as vm,
        ):
            found |= _play(vm, what)
    return found


def test_what_was_read_before_the_cut_is_in_the_ledger(seen: Seen) -> None:
    assert READ <= sent(seen["found"], "old") <= READ + UNREAD
    assert sent(seen["later"], "old") == sent(seen["found"], "old")
    assert sent(seen["found"], "young") <= YOUNG


def test_what_is_missing_is_named_and_is_one_interval_at_most(seen: Seen) -> None:
    (old,) = {row["attachment"] for row in seen["found"]["rows"] if row["pod"] == "old"}
    gaps = [gap for gap in seen["found"]["gaps"] if "the machine restarted" in gap["reason"]]
    # The other pod began after the last reading, and its account may not have reached the disk.
    assert {old, None} <= {gap["attachment"] for gap in gaps}
    for gap in gaps:
        assert seen["cut"] - gap["from"] <= CHECKPOINT_EVERY + SLACK
        assert seen["cut"] <= gap["to"] <= seen["up"]


def test_a_device_of_before_is_offered_again_and_counted_from_zero(seen: Seen) -> None:
    assert sent(seen["later"], "after") == AFTER
