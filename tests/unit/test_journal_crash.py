"""A writer that is killed at any point loses nothing it was told is written."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from driver.journal import Journal
from tests.unit.journal_values import BOOT, attachment, preparation

ROOT = Path(__file__).resolve().parents[2]

WRITER = """
import sys
from pathlib import Path
from driver.journal import Journal, StepPhase
from tests.unit.journal_values import BOOT, attachment, preparation

with Journal.open(Path(sys.argv[1]), mirror=Path(sys.argv[2]), boot_id=BOOT) as journal:
    for number in range(int(sys.argv[3]), 1_000_000):
        journal.step("owner", number, "move", StepPhase.INTENT)
        with journal.transaction(durable=number % 7 == 0):
            journal.put_attachment(attachment(number))
            journal.put_preparation(preparation(number))
            journal.drop_attachment(attachment(number - 3).id)
        print(number, flush=True)
"""


def write_until_killed(path: Path, mirror: Path, first: int, lines: int) -> int:
    """Run a writer from `first`; kill it after so many answers. Returns the last number it gave."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(mirror), str(first)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert writer.stdout is not None
    answers: list[str] = []
    try:
        answers.extend(writer.stdout.readline() for _ in range(lines))
    finally:
        writer.kill()
        rest = writer.stdout.read()
        writer.wait()
        writer.stdout.close()
    # A kill may cut the last line.
    complete = ("".join(answers) + rest).rpartition("\n")[0]
    return int(complete.splitlines()[-1])


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_writer_loses_nothing_it_was_told_is_written(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path, mirror = tmp_path / "state" / "journal.sqlite", tmp_path / "mirror"
    first = 0
    for _ in range(3):
        told = write_until_killed(path, mirror, first, chance.randint(1, 60))
        with Journal.open(path, mirror=mirror, boot_id=BOOT) as journal:
            state = journal.state()
            steps = journal.steps("owner")
        written = max(p.slot for p in state.preparations)
        assert state.recovery == ""
        assert told <= written <= told + 1
        assert len(state.preparations) == written + 1
        assert set(state.attachments) == {attachment(n) for n in range(max(0, written - 2), written + 1)}
        assert {p.key for p in state.preparations} == {preparation(n).key for n in range(written + 1)}
        assert steps[0].generation in (written, written + 1)
        first = written + 1
