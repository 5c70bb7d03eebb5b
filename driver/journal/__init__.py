"""What this node did and who used its devices: the journal and the usage ledger."""

from driver.journal.reader import JournalReader
from driver.journal.records import (
    JournalState,
    JournalUnusable,
    JournalWriteFailed,
    Quarantine,
    StepPhase,
    StepRecord,
)
from driver.journal.store import Journal

__all__ = [
    "Journal",
    "JournalReader",
    "JournalState",
    "JournalUnusable",
    "JournalWriteFailed",
    "Quarantine",
    "StepPhase",
    "StepRecord",
]
