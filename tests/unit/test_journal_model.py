"""Any sequence of writers, reopenings and crashes tells what a plain dict tells."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from driver.journal import Journal, Quarantine
from driver.journal.mirror import Mirror
from driver.model import AttachmentState, DeviceName
from tests.unit.journal_values import BOOT, attachment, key, preparation


def mirrored(mirror: Path) -> int:
    return len([name for name in os.listdir(mirror) if name != "witness.json"])


numbers = st.integers(0, 4)


class AgainstModel(RuleBasedStateMachine):
    """Any sequence of writers, reopenings and crashes: the journal, its file and its mirror agree."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.journal = self.open()
        self.records: dict[object, object] = {}

    def open(self) -> Journal:
        return Journal.open(self.root / "journal.sqlite", mirror=self.root / "mirror", boot_id=BOOT)

    @rule(number=numbers, generation=numbers, durable=st.booleans())
    def put_preparation(self, number: int, generation: int, durable: bool) -> None:
        value = preparation(number, generation=generation)
        self.journal.put_preparation(value, durable=durable)
        self.records[value.key] = value

    @rule(number=numbers)
    def drop_preparation(self, number: int) -> None:
        self.journal.drop_preparation(key(number))
        self.records.pop(key(number), None)

    @rule(number=numbers, state=st.sampled_from(AttachmentState))
    def put_attachment(self, number: int, state: AttachmentState) -> None:
        value = attachment(number, state=state)
        self.journal.put_attachment(value)
        self.records[value.id] = value

    @rule(number=numbers)
    def drop_attachment(self, number: int) -> None:
        self.journal.drop_attachment(attachment(number).id)
        self.records.pop(attachment(number).id, None)

    @rule(number=numbers, reason=st.text(max_size=3))
    def put_quarantine(self, number: int, reason: str) -> None:
        value = Quarantine(DeviceName(f"quarantined-{number}"), reason, float(number))
        self.journal.put_quarantine(value)
        self.records[value.device] = value

    @rule(drop=numbers, put=numbers, fails=st.booleans())
    def exchange(self, drop: int, put: int, fails: bool) -> None:
        try:
            with self.journal.transaction():
                self.journal.drop_attachment(attachment(drop).id)
                self.journal.put_attachment(attachment(put))
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            return
        self.records.pop(attachment(drop).id, None)
        self.records[attachment(put).id] = attachment(put)

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.journal = self.open()

    @rule()
    def crash(self) -> None:
        """What is on disk at this moment is all that the next agent has."""
        copy = Path(tempfile.mkdtemp())
        shutil.copytree(self.root, copy, dirs_exist_ok=True)
        self.journal.close()
        shutil.rmtree(self.root)
        self.root = copy
        self.journal = self.open()

    @invariant()
    def tells_what_was_written(self) -> None:
        state = self.journal.state()
        told = [*state.preparations, *state.attachments, *state.quarantines]
        assert len(told) == len(self.records)
        assert all(value in told for value in self.records.values())
        assert state.recovery == ""
        assert mirrored(self.root / "mirror") == len(self.records)

    def teardown(self) -> None:
        self.journal.close()
        testimony = Mirror(self.root / "mirror").read()
        assert testimony.settled
        assert len(testimony.records) == len(self.records)
        shutil.rmtree(self.root)


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
