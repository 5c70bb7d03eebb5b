"""Another release of this agent: the same code with another layout of its counts.

Invariant: it runs in processes of its own, so nothing of it is ever imported here; and it differs where its
makers would have changed it, so what it writes is what such a release would write.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("bpf", "driver", "hw")
CLASSES, CELL_BYTES = 16, 24

Changes = Mapping[str, tuple[tuple[str, str], ...]]

WIDER: Changes = {
    "bpf/layout.py": (
        ("\nCLASSES = 8\n", f"\nCLASSES = {CLASSES}\n"),
        ("\nCELL_BYTES = 16\n", f"\nCELL_BYTES = {CELL_BYTES}\n"),
        ("\nRULES_BYTES = 192\n", "\nRULES_BYTES = 328\n"),
        ("\nPOLICE_BYTES = 176\n", "\nPOLICE_BYTES = 304\n"),
    ),
    "bpf/record.py": (
        (
            "bytes_at=0,\n        packets_at=8,\n        value",
            "bytes_at=8,\n        packets_at=16,\n        value",
        ),
    ),
    "bpf/limits.py": (('"=IIIIII8s20Q"', '"=IIIIII16s36Q"'), ('"=22Q"', '"=38Q"')),
    "bpf/accounting.py": (
        ("(_CELLS, lanes[1::2])", "(_CELLS, lanes[2::3])"),
        ("lanes[2 * at : 2 * at + 2]", "lanes[3 * at + 1 : 3 * at + 3]"),
    ),
    "bpf/c/acct.h": (
        ("struct cell {\n", "struct cell {\n\tu64 runs;\n"),
        ("KND_CLASSES == 8 &&", "KND_CLASSES == 16 &&"),
        ("\tcell->bytes +=", "\tcell->runs += 1;\n\tcell->bytes +="),
    ),
    "bpf/c/limit.h": (
        ("(counted->class, 7)", "(counted->class, 15)"),
        ("class_of(&f), 7)", "class_of(&f), 15)"),
    ),
}
"""Twice as many classes, and a number more in front of each cell's."""
UNREADABLE: Changes = {
    **WIDER,
    "bpf/record.py": (*WIDER["bpf/record.py"], ("\nFORMAT = 1\n", "\nFORMAT = 2\n")),
}
"""And a record that no other release can read."""


@dataclass(frozen=True, slots=True)
class Release:
    folder: Path

    def command(self, *arguments: str) -> list[str]:
        """Of a Python that has this release's packages and no other's."""
        return ["env", "-C", str(self.folder), f"PYTHONPATH={self.folder}", sys.executable, *arguments]

    def run(self, script: str, *arguments: str) -> str:
        """The script's output. CalledProcessError if it fails."""
        done = subprocess.run(
            self.command("-c", script, *arguments), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def make_release(folder: Path, changes: Changes = WIDER) -> Release:
    """With its programs compiled, as an image has them."""
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__", "prebuilt")
        shutil.copytree(REPOSITORY / package, folder / package, ignore=ignore)
    for name, edits in changes.items():
        path = folder / name
        text = path.read_text()
        for before, after in edits:
            assert before in text, f"{name} has no {before!r} any more"
            text = text.replace(before, after)
        path.write_text(text)
    release = Release(folder)
    compiled = release.run("import sys; from bpf import compile; sys.exit(compile.main())")
    (folder / "bpf/prebuilt").mkdir()
    (folder / "bpf/prebuilt/acct.json").write_text(compiled)
    return release
