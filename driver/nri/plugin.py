"""The NRI plugin: always connected to the runtime, or on its way there.

Invariant: run() ends only by cancellation. Losing the runtime, being refused by it or never finding it is
answered with a wait and another try, with the whole handshake done anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path

from driver.lifecycle.ports import Clock, SandboxHandler
from driver.nri.hooks import HookObserver, HookRunner
from driver.nri.mux import WireError
from driver.nri.session import RegistrationRefused, Session

log = logging.getLogger(__name__)

SETTLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Seconds between tries: first, doubled each time up to most, each shortened by up to a half at random
    so that agents do not knock in step. A connection that held for stable seconds starts from first again.
    """

    first: float = 0.1
    most: float = 5.0
    refused: float = 60.0
    """After a refused registration, which someone has to mend."""
    stable: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.most or self.refused <= 0 or self.stable < 0:
            raise ValueError(f"{self} is no sequence of waits: 0 < first <= most, refused > 0, stable >= 0")

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many tries without a stable connection, the last included."""
        doublings = min(max(failures - 1, 0), 30)
        return min(self.first * 2.0**doublings, self.most) * _jitter()


class NriPlugin:
    """handler is told of sandboxes; observer, where given, of every hook's time and outcome."""

    def __init__(
        self,
        *,
        socket: Path,
        handler: SandboxHandler,
        clock: Clock,
        name: str = "knd",
        index: str = "10",
        observer: HookObserver | None = None,
        backoff: Backoff = Backoff(),
    ) -> None:
        if not re.fullmatch(r"[0-9]{2}", index):
            raise ValueError(f"an NRI plugin's index is two digits, not {index!r}")
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name):
            raise ValueError(f"an NRI plugin's name is of letters, digits and '_.+-', not {name!r}")
        self._socket = socket
        self._handler = handler
        self._clock = clock
        self._name = name
        self._index = index
        self._backoff = backoff
        self._hooks = HookRunner(clock, observer)
        self._session: Session | None = None

    @property
    def connected(self) -> bool:
        """The handshake is done, the last part of Synchronize was answered, the connection stands."""
        return self._session is not None and self._session.connected

    async def run(self) -> None:
        """Serve the runtime for ever. Cancelled: answers what is being served, then closes."""
        failures = 0
        said = ""
        try:
            while True:
                began = self._clock.monotonic()
                session = Session(self._handler, self._hooks, self._clock)
                level, why, refused = await self._try(session)
                if session.synchronized and self._clock.monotonic() - began >= self._backoff.stable:
                    failures = 0
                failures += 1
                wait = self._backoff.refused * _jitter() if refused else self._backoff.wait(failures)
                # The same reason again and again is news only once.
                log.log(logging.DEBUG if why == said else level, "%s; trying again in %.2f s", why, wait)
                said = why
                await asyncio.sleep(wait)
        finally:
            await self._hooks.settle(SETTLE_SECONDS)

    async def _try(self, session: Session) -> tuple[int, str, bool]:
        """Connect and serve until it ends: log level, why it ended, was the registration refused."""
        self._session = session
        try:
            await session.run(self._socket, self._name, self._index)
        except RegistrationRefused as error:
            return logging.ERROR, f"{error}. Give the plugin another name or index", True
        except WireError as error:
            return logging.WARNING, f"lost the runtime: {error}", False
        except OSError as error:
            why = error.strerror or str(error)
            return logging.WARNING, f"no container runtime with NRI at {self._socket}: {why}", False
        finally:
            self._session = None
        return logging.WARNING, "the runtime closed the connection", False


def _jitter() -> float:
    return 0.5 + random.SystemRandom().random() / 2
