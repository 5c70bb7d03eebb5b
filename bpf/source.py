"""Which source the programs are made from, and by which compiler, as keys for the cache.

Invariant: nothing here imports bcc; its version is read from its files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from pathlib import Path

from bpf import layout, program

DIRECTORY = Path(__file__).parent / "c"
MAIN = "acct.bpf.c"


def files(directory: Path) -> tuple[Path, ...]:
    """Every C file under directory, sorted. FileNotFoundError if the main one is absent."""
    if not (directory / MAIN).is_file():
        raise FileNotFoundError(f"{directory / MAIN} does not exist: the installation is incomplete")
    return tuple(sorted(path for path in directory.rglob("*.[ch]") if path.is_file()))


def key(directory: Path) -> str:
    """sha256 over everything but the compiler that decides what comes out."""
    digest = hashlib.sha256()
    facts = (program.FORMAT, os.uname().machine, layout.VALUE_BYTES, layout.LEAF, program.SLOT_SENTINEL)
    framings = tuple(layout.Framing)
    digest.update(repr((facts, framings, sorted(program.MAP_SENTINELS.items()))).encode())
    for path in files(directory):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(directory)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def compiler_version() -> str | None:
    """The version of the bcc that a child would import, without importing it; None if there is none."""
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"""__version__\s*=\s*['"]([^'"]+)""", text)
    return found[1] if found else None
