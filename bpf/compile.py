"""Compile the programs with bcc and print them: `python -I -m bpf.compile [SOURCE_DIRECTORY]`.

Invariant: only ever the main module of a process of its own, and the only importer of bcc, which brings a
compiler of 120 MB along. It loads nothing, creates no map and needs no privilege: an image build can run it.
The output is the text form of bpf.program on stdout; complaints go to stderr with status 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bpf import layout, program, source


def compile_programs(directory: Path) -> program.CompiledPrograms:
    """Compile directory/acct.bpf.c against directory/include. What bcc or find_places raises."""
    # Read by bcc when it compiles: a tree of our own instead of the running kernel's headers.
    os.environ["BCC_KERNEL_SOURCE"] = str(directory)
    import bcc

    module = bcc.BPF(text=(directory / source.MAIN).read_text(), cflags=_flags(directory))
    programs = tuple(
        program.find_places(bytes(module.dump_func(name.encode()))) for name in program.PROGRAM_NAMES
    )
    return program.CompiledPrograms(
        source_key=source.key(directory), compiler=source.compiler_version() or "", programs=programs
    )


def _flags(directory: Path) -> list[str]:
    constants = {
        "DIRECTIONS": layout.DIRECTIONS,
        "CLASSES": layout.CLASSES,
        "KINDS": layout.KINDS,
        "KIND_ROCE": layout.TrafficKind.ROCE.value,
        "CELL_BYTES": layout.CELL_BYTES,
        "VALUE_BYTES": layout.VALUE_BYTES,
        "DSCPS": layout.DSCPS,
        "PCP_WINS": layout.PCP_WINS,
        "CLASSES_BYTES": layout.CLASSES_BYTES,
        "RULES_BYTES": layout.RULES_BYTES,
        "POLICE_BYTES": layout.POLICE_BYTES,
        "RULES_ONE_CLASS": layout.RULES_ONE_CLASS,
        "RULES_MARK": layout.RULES_MARK,
        "RULES_DEPART": layout.RULES_DEPART,
        "LEAF": layout.LEAF,
        "IPOIB": layout.Framing.IPOIB.value,
        "SLOT_SENTINEL": program.SLOT_SENTINEL,
        "PSEUDO_MAP_FD": program.PSEUDO_MAP_FD,
        "PSEUDO_MAP_VALUE": program.PSEUDO_MAP_VALUE,
    }
    constants |= {f"MAP_{name.upper()}": value for name, value in program.MAP_SENTINELS.items()}
    return [f"-I{directory}", *(f"-DKND_{name}={value}" for name, value in constants.items())]


def main() -> int:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else source.DIRECTORY
    try:
        compiled = compile_programs(directory)
    except Exception as error:  # noqa: BLE001 - bcc raises bare Exception; the text goes to the parent
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - the child's only output
        return 1
    print(compiled.dump())  # noqa: T201 - the child's only output
    return 0


if __name__ == "__main__":
    sys.exit(main())
