"""A ledger whose writer is killed has each fold wholly or not at all, and every one that was answered."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from driver.journal.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]

WRITER = """
import sys
from pathlib import Path
from bpf.layout import Cell, TrafficKind
from driver.journal.ledger import Ledger, UsageOwner
from tests.unit.journal_values import attachment, preparation

with Ledger.open(Path(sys.argv[1])) as ledger:
    for number in range(1_000_000):
        held, made = attachment(number), preparation(number)
        ledger.begin(UsageOwner(attachment=held.id, pod=held.pod, claim=made.claim, device=made.key.device,
                                interface=made.ifname, sandbox=held.sandbox, started=float(number)))
        cells = tuple(Cell(0, index, TrafficKind.TCP, 100, number + 1) for index in range(8))
        ledger.fold(held.id, cells, source="tcx", class_names=(), ended=float(number))
        print(number, flush=True)
"""


def test_a_killed_writer_leaves_no_half_fold_and_loses_none_it_answered(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger.sqlite"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert writer.stdout is not None
    answers: list[str] = []
    try:
        answers.extend(writer.stdout.readline() for _ in range(random.Random(7).randint(20, 120)))
    finally:
        writer.kill()
        rest = writer.stdout.read()
        writer.wait()
        writer.stdout.close()
    told = int(("".join(answers) + rest).rpartition("\n")[0].splitlines()[-1])
    with Ledger.open(path) as ledger:
        accounts = ledger.accounts()
        rows = ledger.usage()
    closed = [account for account in accounts if account.ended is not None]
    assert told + 1 <= len(closed) <= len(accounts) <= told + 2
    assert len(rows) == 8 * len(closed)
    assert all(row.packets == int(row.owner.started) + 1 for row in rows)
