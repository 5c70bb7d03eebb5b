"""What takes long to make, made once: folders outside the repository, named by what went into them.

Invariant: a folder that Cache.folder returns is whole and was made from exactly the given inputs; an
interrupted make leaves nothing that looks finished. Two processes that want the same folder make it once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT = 2
"""Folders of one kind that stay: the one in use, and the one of the branch you came from."""


def cache_root() -> Path:
    """$KND_CACHE, else knd below $XDG_CACHE_HOME or ~/.cache."""
    if told := os.environ.get("KND_CACHE"):
        return Path(told).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knd"


def digest(parts: Iterable[str | bytes | Path]) -> str:
    """16 hex digits of all parts in order; a Path stands for the file's bytes, or all files below it."""
    total = hashlib.sha256()
    for part in parts:
        for piece in _pieces(part):
            total.update(f"{len(piece)}:".encode())
            total.update(piece)
    return total.hexdigest()[:16]


def _pieces(part: str | bytes | Path) -> Iterator[bytes]:
    if isinstance(part, str):
        yield part.encode()
    elif isinstance(part, bytes):
        yield part
    elif part.is_dir():
        for path in sorted(part.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(part)).encode()
                yield path.read_bytes()
    else:
        yield part.name.encode()
        yield part.read_bytes()


class Cache:
    """Folders by kind ("guest", "kubernetes-1.37") and key."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_root()

    def folder(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        """The folder for kind and key; make(path) fills an empty one if there is none yet.

        Whatever make raises is passed on, and what it had made is removed.
        """
        home = self.root / f"{kind}-{key}"
        self.root.mkdir(parents=True, exist_ok=True)
        with self._locked(kind):
            if not home.exists():
                part = self.root / f".{kind}-{key}.part"
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                try:
                    make(part)
                except BaseException:
                    shutil.rmtree(part, ignore_errors=True)
                    raise
                part.rename(home)
            os.utime(home)
            self._sweep(kind, home)
        return home

    @contextmanager
    def _locked(self, kind: str) -> Iterator[None]:
        with (self.root / f".{kind}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _sweep(self, kind: str, used: Path) -> None:
        """Remove all but the KEPT folders of this kind that were used last."""
        of_kind = [
            path
            for path in self.root.iterdir()
            if path.name[:-17] == kind and path.name[-17:-16] == "-" and path.is_dir()
        ]
        newest_first = sorted(of_kind, key=lambda path: path.stat().st_mtime, reverse=True)
        for old in newest_first[KEPT:]:
            if old != used:
                shutil.rmtree(old, ignore_errors=True)
