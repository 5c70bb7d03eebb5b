"""The journal's witness: its records as files on a tmpfs, in the same words.

Invariant: a file is whole or absent, and the count in witness.json is written last, so it never claims
a change whose files are not there. The mirror is written only after the journal; it may be behind by
what a crash cut off, and never ahead of an honest journal.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from driver.journal import codec, database
from driver.journal.records import Record, RecordKind
from driver.journal.schema import Meta

_WITNESS = "witness.json"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Testimony:
    """What the mirror says. counter None: there is no witness, as after a reboot.

    unreadable: files that are not what they should be. settled: witness and records are of one commit.
    """

    uuid: str = ""
    counter: int | None = None
    boot: str = ""
    records: tuple[Record, ...] = ()
    unreadable: tuple[Path, ...] = ()
    settled: bool = False

    @property
    def empty(self) -> bool:
        return self.counter is None and not self.records and not self.unreadable


@dataclass(frozen=True, slots=True)
class _Entry:
    uuid: str
    counter: int
    record: Record


class Mirror:
    """The folder. Calls come one at a time, under the journal's lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        database.make_private_directory(self._folder)

    def read(self) -> Testimony:
        """OSError only if the folder itself cannot be read."""
        entries: list[_Entry] = []
        unreadable: list[Path] = []
        for path in sorted(self._folder.glob("*.json")):
            if path.name == _WITNESS:
                continue
            try:
                entries.append(_read_entry(path))
            except _UNREADABLE:
                unreadable.append(path)
        uuid, counter, boot = "", None, ""
        witness = self._folder / _WITNESS
        if witness.exists():
            try:
                uuid, counter, boot = _read_witness(witness)
            except _UNREADABLE:
                unreadable.append(witness)
        # A file written just before a crash counts more than the witness, which would have come last.
        newest = max(entries, key=lambda entry: entry.counter, default=None)
        settled = counter is not None and (newest is None or newest.counter <= counter) and not unreadable
        if newest is not None and (counter is None or newest.counter > counter):
            uuid, counter = uuid or newest.uuid, newest.counter
        return Testimony(
            uuid=uuid,
            counter=counter,
            boot=boot,
            records=tuple(entry.record for entry in entries),
            unreadable=tuple(unreadable),
            settled=settled,
        )

    def apply(self, meta: Meta, put: Iterable[Record], dropped: Iterable[tuple[RecordKind, str]]) -> None:
        """Follow one commit. OSError: the mirror is behind and must be replaced."""
        for record in put:
            self._write(_file_name(record.kind, record.key), _entry_tree(meta, record))
        for kind, key in dropped:
            (self._folder / _file_name(kind, key)).unlink(missing_ok=True)
        self._write_witness(meta)

    def replace(self, meta: Meta, records: Iterable[Record]) -> None:
        """Make the mirror say what the journal says, whatever it said before."""
        self.prepare()
        wanted = {_file_name(record.kind, record.key): record for record in records}
        for name, record in wanted.items():
            self._write(name, _entry_tree(meta, record))
        for pattern in ("*.json", "*.json.new"):
            for path in self._folder.glob(pattern):
                if path.name not in wanted and path.name != _WITNESS:
                    path.unlink(missing_ok=True)
        self._write_witness(meta)

    def path_of(self, record: Record) -> Path:
        return self._folder / _file_name(record.kind, record.key)

    def set_aside(self, paths: Iterable[Path], stamp: int) -> None:
        for path in paths:
            path.rename(path.with_name(f"{path.name}.bad-{stamp}"))

    def _write_witness(self, meta: Meta) -> None:
        self._write(_WITNESS, {"uuid": meta.uuid, "counter": meta.counter, "boot": meta.boot})

    def _write(self, name: str, tree: dict[str, object]) -> None:
        path = f"{self._folder}/{name}"
        data = codec.canonical(tree).encode("ascii")
        # Plain calls: this is in the way of every commit, and pathlib and buffers double its cost.
        fd = os.open(f"{path}.new", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)
        os.rename(f"{path}.new", path)


def _file_name(kind: RecordKind, key: str) -> str:
    """Keys hold names that others chose, so they do not become part of a path."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return f"{kind.value}-{digest}.json"


def _entry_tree(meta: Meta, record: Record) -> dict[str, object]:
    return {
        "uuid": meta.uuid,
        "counter": meta.counter,
        "kind": record.kind.value,
        "key": record.key,
        "body": json.loads(record.body),
    }


def _read_entry(path: Path) -> _Entry:
    tree = json.loads(path.read_text(encoding="ascii"))
    record = Record(RecordKind(tree["kind"]), str(tree["key"]), codec.canonical(tree["body"]))
    if _file_name(record.kind, record.key) != path.name:
        raise ValueError("filed under a name that is not its own")
    return _Entry(str(tree["uuid"]), int(tree["counter"]), record)


def _read_witness(path: Path) -> tuple[str, int, str]:
    tree = json.loads(path.read_text(encoding="ascii"))
    return str(tree["uuid"]), int(tree["counter"]), str(tree["boot"])
