"""The agent's records: whether they can be written and read, and outlive a reboot."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from driver.assembly import read_boot_id
from driver.doctor.looking import existing
from driver.doctor.model import Finding, Place, Subject, fail, ok, warn
from driver.errors import DriverError
from driver.journal import Journal

FEW_BYTES = 64 << 20
NO_BYTES = 1 << 20
_EARLY = 1_577_836_800.0
"""2020: a clock before it was never set."""
_FLEETING = {0x01021994: "tmpfs", 0x794C7630: "overlay"}
_REMOTE = {0x6969: "nfs", 0xFF534D42: "cifs"}
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """kind: of the file system, as statfs(2) numbers it. preparations None: problem says why."""

    folder: Path
    there: bool
    writable: bool
    mode: int
    kind: int
    free_bytes: int
    preparations: int | None
    quarantined: int
    recovery: str
    problem: str
    boot_id: str
    wall: float


def look(place: Place) -> Records:
    folder = place.paths.state
    nearest = existing(folder)
    preparations, quarantined, recovery, problem = _journal(place)
    return Records(
        folder=folder,
        there=folder.is_dir(),
        writable=os.access(nearest, os.W_OK),
        mode=stat.S_IMODE(nearest.stat().st_mode),
        kind=_kind(nearest),
        free_bytes=shutil.disk_usage(nearest).free,
        preparations=preparations,
        quarantined=quarantined,
        recovery=recovery,
        problem=problem,
        boot_id=read_boot_id(place.paths.proc),
        wall=time.time(),
    )


def _journal(place: Place) -> tuple[int | None, int, str, str]:
    path = place.paths.journal
    if not path.exists():
        return None, 0, "", ""
    try:
        with Journal.open_read_only(path) as journal:
            state = journal.state()
    except DriverError as error:
        return None, 0, "", str(error)
    return len(state.preparations), len(state.quarantines), state.recovery, ""


def _kind(path: Path) -> int:
    answer = ctypes.create_string_buffer(256)
    if _libc.statfs(bytes(path), answer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    kind: int = struct.unpack_from("=q", answer.raw)[0]
    return kind


def judge(records: Records) -> Iterator[Finding]:
    yield from _folder(records)
    if records.problem:
        yield fail("journal", records.problem, "start the agent: it keeps a damaged journal and compares")
    elif records.recovery:
        yield fail(
            "journal",
            f"the agent compares the node with its records first: {records.recovery}",
            "wait until the runtime is connected; the agent's log says what is missing",
        )
    elif records.preparations is None:
        yield ok("journal", "no agent has run here yet")
    elif records.quarantined:
        yield warn(
            "journal",
            f"{records.preparations} devices are prepared and {records.quarantined} withheld until clean",
            "see `knd devices` for the reason",
        )
    else:
        yield ok("journal", f"{records.preparations} devices are prepared, none is withheld")
    if records.wall < _EARLY:
        yield warn("clock", "the clock was never set", "set it: certificates and the ledger depend on it")
    else:
        yield ok("clock", f"boot {records.boot_id}")


def _folder(records: Records) -> Iterator[Finding]:
    folder = records.folder
    if not records.writable:
        yield fail("state", f"{folder} cannot be written", "mount it writable, as deploy/manifests does")
    elif records.kind in _FLEETING:
        yield warn(
            "state",
            f"{folder} is on {_FLEETING[records.kind]}: who had what will be forgotten",
            "put it on a disk of the node",
        )
    elif records.kind in _REMOTE:
        yield warn(
            "state", f"{folder} is on {_REMOTE[records.kind]}, where locks may fail", "put it on a local disk"
        )
    elif records.there and records.mode & 0o077:
        yield warn("state", f"{folder} is open to others than root", f"chmod 700 {folder}")
    else:
        yield ok("state", f"{folder} {'is' if records.there else 'will be'} on a disk")
    free = f"{records.free_bytes >> 20} MiB are free for {folder}"
    if records.free_bytes < NO_BYTES:
        yield fail("space", free, "make room: nothing new is given away without a journal")
    elif records.free_bytes < FEW_BYTES:
        yield warn("space", free, "make room before the journal cannot be written")
    else:
        yield ok("space", free)


SUBJECT = Subject("records", look, judge)
