"""Compiled programs as plain values: instructions with the places that are filled in before loading.

Invariant: instructions with places still open never reach the kernel. Specialising returns bytes in which
the slot and every map are set, or raises. The text form is what the cache keeps and what the compiling
child prints; it carries a digest, so that a damaged file is recognised.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from bpf.layout import Framing, Slot

FORMAT = 1
"""Raised when the text form or the meaning of the places changes."""
INSTRUCTION_BYTES = 8
SLOT_SENTINEL = 0x5EED0001
MAP_SENTINELS: Mapping[str, int] = {
    "acct": 0x5EED0010,
    "classes": 0x5EED0011,
    "rules": 0x5EED0012,
    "police": 0x5EED0013,
}
"""Stand for map file descriptors in the source. No map exists when the programs are compiled, so that
compiling needs no privilege."""
PROGRAM_NAMES = ("egress", "ingress")
"""Functions in the source; the position is the direction's number."""

LD_IMM64 = 0x18
PSEUDO_MAP_FD = 1
PSEUDO_MAP_VALUE = 2
_MOV_IMM = (0xB4, 0xB7)
"""32-bit and 64-bit `register = constant`."""


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """slot_at and map_at are indexes of instructions whose constant is to be replaced."""

    instructions: bytes
    slot_at: tuple[int, ...]
    map_at: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        count, rest = divmod(len(self.instructions), INSTRUCTION_BYTES)
        places = [*self.slot_at, *(at for ats in self.map_at.values() for at in ats)]
        if rest or not count or not self.slot_at or not self.map_at.get("acct"):
            raise ValueError("not a counting program: no instructions, no slot or no counters in it")
        if any(not 0 <= at < count for at in places):
            raise ValueError("a place to fill in lies outside the program")

    def specialise(
        self, slot: Slot, map_fds: Mapping[str, int], framing: Framing = Framing.ETHERNET
    ) -> bytes:
        """The instructions for one slot and the open maps. KeyError if a map is not given."""
        code = bytearray(self.instructions)
        for at in self.slot_at:
            _set_constant(code, at, slot | framing)
        for name, ats in self.map_at.items():
            for at in ats:
                _set_constant(code, at, map_fds[name])
        return bytes(code)


def _set_constant(code: bytearray, at: int, value: int) -> None:
    struct.pack_into("<i", code, at * INSTRUCTION_BYTES + 4, value)


def find_places(instructions: bytes) -> CompiledProgram:
    """Find the sentinels in what the compiler made; ValueError if one is missing or cannot be set."""
    slot_at: list[int] = []
    map_at: dict[str, list[int]] = {name: [] for name in MAP_SENTINELS}
    names = {sentinel: name for name, sentinel in MAP_SENTINELS.items()}
    wide = False
    for at, (code, registers, _, constant) in enumerate(struct.iter_unpack("<BBhi", instructions)):
        if wide:
            wide = False
            continue
        wide = code == LD_IMM64
        if constant in names:
            if code != LD_IMM64 or registers >> 4 not in (PSEUDO_MAP_FD, PSEUDO_MAP_VALUE):
                raise ValueError(f"instruction {at} uses map {names[constant]} in an unknown way")
            map_at[names[constant]].append(at)
        elif constant == SLOT_SENTINEL:
            if code not in _MOV_IMM:
                raise ValueError(f"instruction {at} uses the slot in an unknown way")
            slot_at.append(at)
    return CompiledProgram(
        instructions, tuple(slot_at), {name: tuple(ats) for name, ats in map_at.items() if ats}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPrograms:
    """What was made from one state of the source. programs are in the directions' order."""

    source_key: str
    """sha256 over source, header tree, format and architecture."""
    compiler: str
    """bcc's version."""
    programs: tuple[CompiledProgram, ...]

    def __post_init__(self) -> None:
        if len(self.programs) != len(PROGRAM_NAMES):
            raise ValueError(f"{len(self.programs)} programs instead of {len(PROGRAM_NAMES)}")

    def dump(self) -> str:
        """As JSON text."""
        body = {
            "format": FORMAT,
            "source_key": self.source_key,
            "compiler": self.compiler,
            "programs": [
                {
                    "instructions": base64.b64encode(program.instructions).decode(),
                    "slot_at": program.slot_at,
                    "map_at": program.map_at,
                }
                for program in self.programs
            ],
        }
        return json.dumps({"digest": _digest(body), "body": body}, sort_keys=True, indent=1)

    @classmethod
    def parse(cls, text: str) -> CompiledPrograms:
        """From JSON text; ValueError if it is damaged or of another format."""
        try:
            outer = json.loads(text)
            body = outer["body"]
            if outer["digest"] != _digest(body):
                raise ValueError("the digest does not match")
            if body["format"] != FORMAT:
                raise ValueError(f"format {body['format']} instead of {FORMAT}")
            programs = tuple(
                CompiledProgram(
                    base64.b64decode(entry["instructions"], validate=True),
                    tuple(entry["slot_at"]),
                    {name: tuple(ats) for name, ats in entry["map_at"].items()},
                )
                for entry in body["programs"]
            )
            return cls(source_key=body["source_key"], compiler=body["compiler"], programs=programs)
        except (KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise ValueError(f"not a file of compiled programs: {error!r}") from error


def _digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
