"""The BPF programs: whether they can be had without delay, and where they are pinned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bpf.cache import ProgramCache
from bpf.source import compiler_version
from bpf.sys import is_bpffs
from driver.doctor.model import Finding, Place, Subject, fail, ok, warn


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    bpffs: Path
    there: bool
    is_bpffs: bool
    writable: bool
    compiled: bool
    compiler: str | None
    """bcc's version."""


def look(place: Place) -> Programs:
    bpffs = place.paths.bpffs
    there = bpffs.is_dir()
    return Programs(
        bpffs=bpffs,
        there=there,
        is_bpffs=there and is_bpffs(bpffs),
        writable=os.access(bpffs, os.W_OK),
        compiled=ProgramCache(place.paths.program_cache).find() is not None,
        compiler=compiler_version(),
    )


def judge(programs: Programs) -> Iterator[Finding]:
    mount = f"mount the host's there: mount -t bpf bpf {programs.bpffs}"
    if not programs.is_bpffs:
        what = "is no BPF file system" if programs.there else "is not there"
        yield fail("bpffs", f"{programs.bpffs} {what}", mount)
    elif not programs.writable:
        yield fail("bpffs", f"{programs.bpffs} cannot be written", "mount it writable into the container")
    else:
        yield ok("bpffs", f"{programs.bpffs} is a BPF file system")
    if programs.compiled:
        yield ok("programs", "are compiled")
    elif programs.compiler is not None:
        yield warn(
            "programs",
            f"are not compiled yet: the agent does it when it starts, with bcc {programs.compiler}",
            "start the agent once",
        )
    else:
        yield fail(
            "programs",
            "are not compiled, and there is no bcc to do it with",
            "use the image that has them, or install the Debian package python3-bpfcc",
        )


SUBJECT = Subject("programs", look, judge)
