"""The only reader and writer of /sys.

Invariant: a path is relative to the root and stays below it. What is absent, or what a device will not
say in its present state, is None; what is there but is not what it should be is an HwError that names
the file. Nothing is cached: each call reads.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hw.errors import HwError, refusal
from hw.limited import in_time

WRITE_TIMEOUT = 30.0
"""Seconds. Making VFs or binding a driver takes the kernel seconds; firmware can hang it for good."""
_LIMIT = 64 * 1024
_ABSENT = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENODEV,
        errno.ENXIO,
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.ENETDOWN,
        errno.ELOOP,
    }
)
"""EINVAL and its kin: a link that is down does not say its speed, a port without a parent no switch."""


class Sysfs:
    """Typed access below one root."""

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root)

    @property
    def root(self) -> Path:
        return Path(self._root)

    def text(self, path: str) -> str | None:
        """A file's contents without surrounding white space. May hold surrogates: escape to show it."""
        try:
            fd = os.open(self._absolute(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                data = os.read(fd, _LIMIT)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise HwError(f"cannot read {self._absolute(path)}: {error.strerror}") from error
        return data.decode("utf-8", "surrogateescape").strip()

    def integer(self, path: str, *, base: int = 10) -> int | None:
        """A file's contents as a number; base 16 takes "0x8086" and "8086"."""
        value = self.text(path)
        if value is None:
            return None
        try:
            return int(value, base)
        except ValueError:
            raise HwError(
                f"{self._absolute(path)} holds {value[:64]!a} where a number was expected"
            ) from None

    def target(self, path: str) -> str | None:
        """Where a link points, as written; None too if it is not a link."""
        try:
            return os.readlink(self._absolute(path))
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise HwError(f"cannot read {self._absolute(path)}: {error.strerror}") from error

    def target_name(self, path: str) -> str | None:
        """The last part of where a link points: a driver's name, an IOMMU group's number."""
        found = self.target(path)
        return found.rpartition("/")[2] if found else None

    def names(self, path: str) -> tuple[str, ...] | None:
        """What a folder holds, sorted; None if there is no such folder."""
        try:
            return tuple(sorted(os.listdir(self._absolute(path))))
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise HwError(f"cannot list {self._absolute(path)}: {error.strerror}") from error

    def instance(self, path: str) -> int | None:
        """A number that this file or folder shares with no earlier one of its name: sysfs gives each object
        that it makes another inode (kernfs ids are handed out in turn). None if it is not there."""
        try:
            return os.stat(self._absolute(path)).st_ino
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise HwError(f"cannot look at {self._absolute(path)}: {error.strerror}") from error

    def write(self, path: str, value: str, *, timeout: float = WRITE_TIMEOUT) -> None:
        """Write a file in one go. NotFound, Refused or Busy (ETIMEDOUT) where it does not take it in time.

        After ETIMEDOUT the kernel may still be at it: look before writing again.
        """
        absolute = self._absolute(path)
        what = f"write {value[:64]!a} to {absolute}"

        def body() -> None:
            fd = os.open(absolute, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode("utf-8", "surrogateescape"))
            finally:
                os.close(fd)

        try:
            in_time(what, body, timeout)
        except OSError as error:
            code = error.errno or errno.EIO
            raise refusal(what, errno.ENODEV if code == errno.ENOENT else code) from error

    def _absolute(self, path: str) -> str:
        if path.startswith("/") or (".." in path and ".." in path.split("/")):
            raise ValueError(f"{path!r} is not a path below {self._root}")
        return f"{self._root}/{path}"
