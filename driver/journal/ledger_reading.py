"""What the ledger can tell, to the agent that writes it and to a command beside it.

Invariant: nothing is written here. A file that cannot be read is LedgerUnusable with the reason.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from driver.errors import DriverError
from driver.journal import buckets, database
from driver.journal.accounts import (
    Account,
    ClockStep,
    Selection,
    UsageGap,
    UsageRow,
    read_accounts,
    read_clock_steps,
    read_gaps,
    read_period,
    read_restarts,
    read_usage,
)
from driver.journal.meters import CounterRow, read_counters


class LedgerUnusable(DriverError):
    """The ledger can neither be opened nor replaced; the text says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What was used in a period, and everything that makes it less than certain."""

    period: buckets.Period
    rows: tuple[UsageRow, ...]
    gaps: tuple[UsageGap, ...]
    late: tuple[buckets.LateReading, ...]
    clock_steps: tuple[ClockStep, ...]
    restarts: tuple[float, ...]


class Reading(database.Closes):
    """What both the writer and the command line's reader can tell."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._lock = threading.Lock()

    def usage(
        self,
        since: float | None = None,
        until: float | None = None,
        namespace: str | None = None,
        pod: str | None = None,
    ) -> tuple[UsageRow, ...]:
        """Totals of the attachments that lived in [since, until), seconds since the epoch.

        An attachment counts with its whole life: absolute totals cannot be cut at a time.
        """
        selection = Selection(since=since, until=until, namespace=namespace, pod=pod)
        with self._reading():
            return read_usage(self._connection, selection)

    def counters(
        self,
        since: float | None = None,
        until: float | None = None,
        namespace: str | None = None,
        pod: str | None = None,
    ) -> tuple[CounterRow, ...]:
        """What devices counted themselves, by whom it belongs to; selected like usage. Of a device that
        several attachments had together what was read in that time, where no pod is asked for."""
        selection = Selection(since=since, until=until, namespace=namespace, pod=pod)
        with self._reading():
            return read_counters(self._connection, selection)

    def accounts(
        self,
        since: float | None = None,
        until: float | None = None,
        namespace: str | None = None,
        pod: str | None = None,
    ) -> tuple[Account, ...]:
        """The attachments themselves, those without traffic included; selected like usage."""
        selection = Selection(since=since, until=until, namespace=namespace, pod=pod)
        with self._reading():
            return read_accounts(self._connection, selection)

    def gaps(
        self,
        since: float | None = None,
        until: float | None = None,
        namespace: str | None = None,
        pod: str | None = None,
    ) -> tuple[UsageGap, ...]:
        """What was not counted of these attachments, and of all of them."""
        selection = Selection(since=since, until=until, namespace=namespace, pod=pod)
        with self._reading():
            return read_gaps(self._connection, selection)

    def bill(
        self,
        since: float | None = None,
        until: float | None = None,
        namespace: str | None = None,
        pod: str | None = None,
    ) -> Bill:
        """What was read in [since, until), widened to whole buckets: also of attachments that lived on."""
        period = buckets.widened(since, until, time.time())
        selection = Selection(since=period.start, until=period.end, namespace=namespace, pod=pod)
        with self._reading():
            return Bill(
                period=period,
                rows=read_period(self._connection, selection, period),
                gaps=read_gaps(self._connection, selection),
                late=buckets.read_late(self._connection, period, namespace=namespace, pod=pod),
                clock_steps=read_clock_steps(self._connection, period),
                restarts=read_restarts(self._connection, period),
            )

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except database.Damaged as error:
            raise LedgerUnusable(f"the usage ledger {self._path} {error}") from error
        except sqlite3.Error as error:
            raise LedgerUnusable(
                f"the usage ledger {self._path} cannot be read: {database.explain(error)}"
            ) from error


class LedgerReader(Reading):
    """Another process's ledger, read afresh by each call. Made by Ledger.open_read_only."""
