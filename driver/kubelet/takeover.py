"""One agent per node: the lock under which sockets, pins and journal may be touched.

Invariant: at most one process holds the lock of a plugin folder, and it is the file now at the path
that is locked, not one that was removed meanwhile. The kernel lets go of it when the holder ends,
however it ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from driver.errors import DriverError, NotNow
from driver.lifecycle.ports import Clock
from driver.paths import Paths

_POLL_SECONDS = 0.05
_HOLDER_BYTES = 200


class TakeoverLock:
    """`with TakeoverLock(paths, clock) as lock: await lock.acquire(deadline)`; let go of at exit.

    Entering takes nothing. The folder must exist (make_plugin_dir).
    """

    def __init__(self, paths: Paths, clock: Clock) -> None:
        self._path = paths.takeover_lock
        self._clock = clock
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def __enter__(self) -> TakeoverLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    async def acquire(self, deadline: float) -> None:
        """Wait for the lock until deadline. NotNow, naming the holder, when it cannot be had by then;
        DriverError when the file cannot be used."""
        while not self.try_acquire():
            left = deadline - self._clock.monotonic()
            if left <= 0:
                raise NotNow(
                    f"{self._path} is held by {self.holder() or 'a process that left no name'}: "
                    "one agent per node may run, stop that one first"
                )
            await asyncio.sleep(min(_POLL_SECONDS, left))

    def try_acquire(self) -> bool:
        """Take the lock if it is free; True also when it is already held here."""
        if self._fd is not None:
            return True
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(fd, self._path):
                os.close(fd)
                return self.try_acquire()
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError as error:
            os.close(fd)
            raise self._unusable(error) from error
        self._fd = fd
        return True

    def release(self) -> None:
        """Let go of the lock. The file stays: removing it would let two processes lock two files."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.ftruncate(fd, 0)
            # A child between fork and exec still has the file open; closing alone would not free it.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def holder(self) -> str:
        """Who wrote its name into the lock, as one printable line, or "". Says nothing of being alive."""
        try:
            with self._path.open("rb") as file:
                raw = file.read(_HOLDER_BYTES)
        except OSError:
            return ""
        text = raw.decode(errors="replace")
        return "".join(c for c in text if c.isprintable()).strip()

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> DriverError:
        return DriverError(
            f"the lock {self._path} cannot be used ({error.strerror}): "
            "check that kubelet's root is mounted there and writable"
        )


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)
