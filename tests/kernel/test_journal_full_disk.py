"""On a file system that is really full nothing is half written, and all works again when there is room.

The file system is a tmpfs in a mount namespace of the child's own: the machine sees nothing of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = ("unshare", "--mount", "--propagation", "private")

PREAMBLE = """
import os, subprocess, sys
from pathlib import Path
from bpf.layout import Cell, TrafficKind
from driver.journal import Journal, JournalUnusable, JournalWriteFailed, StepPhase
from driver.journal.ledger import Ledger, LedgerUnusable, LedgerWriteFailed, UsageOwner
from tests.unit.journal_values import BOOT, attachment, preparation

disk, mirror = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=768k,mode=0700", "knd-test", str(disk)], check=True)
filler = disk / "filler"

def fill():
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

def fails(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} expected")

def journal():
    return Journal.open(disk / "journal.sqlite", mirror=mirror, boot_id=BOOT)
"""

WRITES = """
with journal() as held:
    held.put_attachment(attachment(0))
    fill()
    number, failed = 1, ""
    while not failed:
        before = held.state()
        try:
            held.put_preparation(preparation(number), durable=True)
            number += 1
        except JournalWriteFailed as error:
            failed = str(error)
    assert "make room on its file system" in failed, failed
    assert held.state() is before
    fails(JournalWriteFailed, lambda: held.drop_attachment(attachment(0).id))
    filler.unlink()
    held.put_preparation(preparation(number), durable=True)
    held.step("owner", 1, "move", StepPhase.DONE)
    after = held.state()
with journal() as held:
    assert held.state().recovery == ""
    assert set(held.state().attachments) == {attachment(0)}
    assert len(held.state().preparations) == len(after.preparations) == number
"""

OPENING = """
with journal() as held:
    held.put_attachment(attachment(0))
(disk / "journal.sqlite").unlink()
fill()
assert "cannot be opened" in fails(JournalUnusable, journal)
filler.unlink()
with journal() as held:
    assert "is missing" in held.state().recovery
    assert held.state().attachments == (attachment(0),)
    held.recovery_done()
    held.put_attachment(attachment(1))
bad = b"rubbish" * 5000
(disk / "journal.sqlite").write_bytes(bad)
fill()
fails(JournalUnusable, journal)
filler.unlink()
with journal() as held:
    assert held.state().recovery
    assert set(held.state().attachments) == {attachment(0), attachment(1)}
assert [file.read_bytes() for file in disk.glob("*.bad-*")] == [bad]
"""

LEDGER = """
def account(number):
    held, made = attachment(number), preparation(number)
    return UsageOwner(attachment=held.id, pod=held.pod, claim=made.claim, device=made.key.device,
                      interface=made.ifname, sandbox=held.sandbox, started=0.0)

def fold(ledger, number, packets):
    cells = tuple(Cell(0, index, TrafficKind.TCP, packets, packets) for index in range(8))
    ledger.fold(account(number).attachment, cells, source="tcx", class_names=(), ended=1.0)

with Ledger.open(disk / "ledger.sqlite") as ledger:
    for number in range(50):
        ledger.begin(account(number))
    fill()
    for number in range(50):
        try:
            fold(ledger, number, 7)
        except LedgerWriteFailed as error:
            assert "make room" in str(error), error
            break
    else:
        raise AssertionError("the disk took 50 folds")
    assert [a.ended for a in ledger.accounts() if a.owner == account(number)] == [None]
    assert ledger.usage(pod=f"train-{number}") == ()
    filler.unlink()
    fold(ledger, number, 7)
with Ledger.open(disk / "ledger.sqlite") as ledger:
    assert ledger.lost == ""
    assert len(ledger.usage()) == 8 * (number + 1)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount the tmpfs that is to be full")
@pytest.mark.parametrize("script", [WRITES, OPENING, LEDGER], ids=["writes", "opening", "ledger"])
def test_a_full_file_system_costs_only_the_change_that_met_it(tmp_path: Path, script: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [*PRIVATE, sys.executable, "-c", PREAMBLE + script, str(disk), str(tmp_path / "mirror")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not any(disk.iterdir())
