"""Compiled programs on disk, so that a node compiles once.

Invariant: what ensure() returns was made from exactly this source on this architecture, and by the installed
bcc unless it was shipped prebuilt. A file appears whole or not at all, so agents that start at the same time
do not disturb each other; a damaged file counts as absent.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bpf import source
from bpf.errors import LOG_TAIL, CompileFailed, CompilerMissing
from bpf.program import CompiledPrograms

PREBUILT = Path(__file__).parent / "prebuilt"
"""Where a wheel or an image may put `acct.json`, the output of `python -I -m bpf.compile`."""
PREBUILT_NAME = "acct.json"
COMPILE_SECONDS = 120


class ProgramCache:
    """The cache in one directory, made when needed and readable by its owner only."""

    def __init__(
        self, directory: Path, *, sources: Path = source.DIRECTORY, prebuilt: Path = PREBUILT
    ) -> None:
        self._directory = directory
        self._sources = sources
        self._prebuilt = prebuilt

    def find(self) -> CompiledPrograms | None:
        """Prebuilt, else cached; None where they would have to be compiled."""
        key = source.key(self._sources)
        shipped = _read(self._prebuilt / PREBUILT_NAME)
        if shipped is not None and shipped.source_key == key:
            return shipped
        compiler = source.compiler_version()
        if compiler is None:
            return None
        cached = _read(self._path(key, compiler))
        usable = cached is not None and (cached.source_key, cached.compiler) == (key, compiler)
        return cached if usable else None

    def _path(self, key: str, compiler: str) -> Path:
        return self._directory / f"acct-{os.uname().machine}-{key[:16]}-{compiler}.json"

    def ensure(self) -> CompiledPrograms:
        """Prebuilt, else cached, else compiled now: about half a second and 125 MB in a child that ends.

        CompilerMissing or CompileFailed when there is no way; OSError if the directory cannot be written.
        """
        found = self.find()
        if found is not None:
            return found
        compiler = source.compiler_version()
        if compiler is None:
            raise CompilerMissing(
                "the BPF programs must be compiled and bcc is not installed for this Python "
                f"({sys.executable}): install the Debian package python3-bpfcc"
            )
        path = self._path(source.key(self._sources), compiler)
        compiled = self._compile()
        self._write(path, compiled)
        return compiled

    def _compile(self) -> CompiledPrograms:
        command = [sys.executable, "-I", "-m", "bpf.compile", str(self._sources.absolute())]
        try:
            done = subprocess.run(  # noqa: S603 - our own module, no shell
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMPILE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CompileFailed(f"bcc did not compile {self._sources} within {COMPILE_SECONDS} s") from None
        if done.returncode != 0:
            why = done.stderr.strip()[-LOG_TAIL:] or f"it ended with status {done.returncode}"
            raise CompileFailed(f"bcc could not compile {self._sources / source.MAIN}: {why}")
        try:
            return CompiledPrograms.parse(done.stdout)
        except ValueError as error:
            raise CompileFailed(
                f"bcc's output for {self._sources / source.MAIN} is useless: {error}"
            ) from error

    def _write(self, path: Path, compiled: CompiledPrograms) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            fd, name = tempfile.mkstemp(prefix=".new-", dir=self._directory)
            temporary = Path(name)
            stack.callback(temporary.unlink, missing_ok=True)
            with os.fdopen(fd, "w") as file:
                file.write(compiled.dump())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        self._sweep(keep=path)

    def _sweep(self, keep: Path) -> None:
        for old in self._directory.glob("acct-*.json"):
            if old != keep:
                old.unlink(missing_ok=True)


def _read(path: Path) -> CompiledPrograms | None:
    try:
        return CompiledPrograms.parse(path.read_text())
    except (OSError, ValueError):
        # Absent or damaged: either way it is made anew.
        return None
