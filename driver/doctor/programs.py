"""The BPF programs: whether they can be had without delay, where they are pinned, how they run and what they
cost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bpf import cost, earlier
from bpf.cache import ProgramCache
from bpf.cost import Trial
from bpf.errors import BpfError
from bpf.pins import is_bpffs
from bpf.program import CompiledPrograms
from bpf.source import compiler_version
from driver import running
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
    hook: str
    """Where the agent that runs or ran here counts; "" if none did."""
    trial: Trial | None
    trial_error: str
    """Why compiled programs could not be tried."""
    others: tuple[str, ...]
    """Folders of versions whose counters are laid out otherwise."""
    unreadable: tuple[str, ...]
    """Those that cannot be read here, each with the reason."""


def look(place: Place) -> Programs:
    bpffs = place.paths.bpffs
    there = bpffs.is_dir()
    compiled = ProgramCache(place.paths.program_cache).find()
    trial, trial_error = _try(compiled)
    agent = running.read(place.paths)
    others, unreadable = earlier.look(place.paths.pins)
    return Programs(
        bpffs=bpffs,
        there=there,
        is_bpffs=there and is_bpffs(bpffs),
        writable=os.access(bpffs, os.W_OK),
        compiled=compiled is not None,
        compiler=compiler_version(),
        hook=agent.hook if agent is not None else "",
        trial=trial,
        trial_error=trial_error,
        others=tuple(folder.path.name for folder in others),
        unreadable=tuple(f"{each.path.name}: {each.why}" for each in unreadable),
    )


def _try(compiled: CompiledPrograms | None) -> tuple[Trial | None, str]:
    if compiled is None:
        return None, ""
    try:
        return cost.trial(compiled), ""
    except (BpfError, OSError) as error:
        return None, str(error)


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
    yield from _how_they_run(programs)

    yield from _versions(programs)


def _versions(programs: Programs) -> Iterator[Finding]:
    if programs.others:
        yield ok("versions", f"counts of another version are read as well: {', '.join(programs.others)}")
    if programs.unreadable:
        yield warn(
            "versions",
            f"counts of another version cannot be read here: {'; '.join(programs.unreadable)}",
            "go on with the version that made them until its pods are gone, or have a gap in their usage",
        )


def _how_they_run(programs: Programs) -> Iterator[Finding]:
    if programs.hook:
        yield ok("hook", f"the agent counts at {programs.hook}")
    if programs.trial_error:
        yield fail(
            "mode",
            f"they cannot be loaded: {programs.trial_error}",
            "run as root with CAP_BPF and CAP_NET_ADMIN; what the kernel says of a program is for its makers",
        )
    if programs.trial is None:
        return
    if programs.trial.jited:
        yield ok("mode", "they run as machine code")
    else:
        yield warn(
            "mode",
            "the kernel interprets them, which costs several times as much per packet",
            "switch its compiler on: sysctl net.core.bpf_jit_enable=1, then start the agent anew",
        )
    yield ok(
        "cost",
        f"a packet costs {programs.trial.counting:.0f} ns in a trial, where a program that does nothing "
        f"costs {programs.trial.empty:.0f}; `knd doctor --measure` tells it of the traffic that pods have",
    )


SUBJECT = Subject("programs", look, judge)
