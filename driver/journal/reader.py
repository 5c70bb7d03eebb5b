"""Reading a journal that another process writes.

Invariant: nothing is written, not even a repair; every call reads one moment, afresh.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from driver.journal import database
from driver.journal.records import JournalState, JournalUnusable, StepRecord, collect
from driver.journal.schema import JOURNAL, read_contents, read_steps
from driver.model import BootId


class JournalReader(database.Closes):
    """Another process's journal, read afresh by each call. A context manager."""

    def __init__(self, path: Path, boot_id: BootId | None = None) -> None:
        """boot_id: what boot_changed is told against; None leaves it False."""
        self._path = path
        self._boot_id = boot_id
        with self._reading():
            if not path.exists():
                raise JournalUnusable(f"there is no journal at {path}: no agent has run here yet")
            connection = database.connect(path, read_only=True)
            try:
                database.check(connection, JOURNAL)
            except BaseException:
                connection.close()
                raise
        self._connection = connection

    def state(self) -> JournalState:
        with self._reading():
            contents = read_contents(self._connection)
        return collect(
            tuple(value for _, value in contents.records),
            boot_changed=self._boot_id not in (None, contents.meta.boot),
            recovery=contents.meta.recovery,
        )

    def steps(self, owner: str) -> tuple[StepRecord, ...]:
        with self._reading():
            return read_steps(self._connection, owner)

    def close(self) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (database.Damaged, database.TooNew) as error:
            raise JournalUnusable(f"the journal {self._path} {error}") from error
        except (OSError, sqlite3.Error) as error:
            raise JournalUnusable(
                f"the journal {self._path} cannot be read: {database.explain(error)}"
            ) from error
