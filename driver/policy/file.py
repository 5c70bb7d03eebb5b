"""The policy file, which may change or break at any time.

Invariant: the policy in force is always one that was read whole. A bad or missing file leaves the last
good one in force, and says so until a good one is there.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from driver.errors import ConfigError
from driver.policy.load import load_policy
from driver.policy.rules import NodePolicy
from driver.policy.yaml_tree import MAX_CHARACTERS

_UTF8_MAX = 4
_SETTLED = 5.0
"""Seconds after which a file's times tell of every later change: so coarse are those of some file systems."""

_Version = tuple[int, int, int, int, int]
"""Of a file, by its status: another one once it was changed or something else is in its place."""


class PolicyFile:
    """A policy file and the policy last read from it: read when made, and again by reload, which costs a
    look at the file's status as long as that is the same. Not thread-safe.

    A ConfigMap's files are links through `..data`, which is renamed over when the content changes: what
    tells of a change is the folder, `watched`, not the file.
    """

    def __init__(self, path: Path | None) -> None:
        """path None: there is no policy, and the default one is in force for good. A file that is bad
        from the start leaves the default one in force too, with its problem told."""
        self._path = path
        self._text: str | None = None
        self._version: _Version | None = None
        """Of what was read last, whether it was good or not; None where there is none to go by."""
        self.current = NodePolicy()
        self.problem = ""
        """Why the file is not in force, for the reader; "" while it is. Until then: not ready."""
        self.reload()

    @property
    def text(self) -> str:
        """Of the policy in force; "" where that is the default one."""
        return self._text or ""

    @property
    def path(self) -> Path | None:
        return self._path

    @property
    def watched(self) -> Path | None:
        return self._path.parent if self._path else None

    def reload(self) -> NodePolicy | None:
        """The policy if the file has changed and is good, else None."""
        if self._path is None:
            return None
        try:
            # Before the text: what changes in between is another version next time.
            version = _version(self._path)
            if version is not None and version == self._version:
                return None
            self._version = None
            text = _read(self._path)
            self._version = version
            if text == self._text:
                self.problem = ""
                return None
            policy = load_policy(text, str(self._path))
        except (OSError, ValueError) as error:
            self.problem = f"{self._path} cannot be read: {error}"
            return None
        except ConfigError as error:
            self.problem = str(error)
            return None
        self.problem = ""
        self._text = text
        self.current = policy
        return policy


def _version(path: Path) -> _Version | None:
    """None where a change could leave it the same, as one within the grain of the file's times. OSError."""
    found = path.stat()
    if not 0 <= found.st_ctime < time.time() - _SETTLED:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> str:
    """The file's text. OSError or ValueError (not UTF-8, not a file, too large) where there is none."""
    # O_NONBLOCK: a FIFO in its place must not hang the agent.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = stream.read(_UTF8_MAX * MAX_CHARACTERS + 1)
    if len(content) > _UTF8_MAX * MAX_CHARACTERS:
        raise ValueError("it is too large")
    return content.decode()
