"""What every BPF test needs: compiled programs, open maps, and a way to run one packet."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bpf import sys
from bpf.accounting import Accounting
from bpf.cache import ProgramCache
from bpf.layout import Cell, Slot
from bpf.program import CompiledPrograms
from tests.bpf.bpffs import mounted_bpffs

Run = Callable[..., Cell]
SLOT = Slot(5)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> CompiledPrograms:
    """Compiled from the source as it is now, whatever is shipped prebuilt."""
    folder = tmp_path_factory.mktemp("programs")
    return ProgramCache(folder, prebuilt=folder / "none").ensure()


@pytest.fixture(scope="session")
def bpffs() -> Iterator[Path]:
    with mounted_bpffs() as path:
        yield path


@pytest.fixture(scope="session")
def accounting(bpffs: Path, programs: CompiledPrograms) -> Iterator[Accounting]:
    with Accounting.open(bpffs / "knd/v1", programs, slots=16) as opened:
        yield opened


def context(gso_segs: int = 0, gso_size: int = 0) -> bytes:
    """A struct __sk_buff with the two fields a test may set."""
    skb = bytearray(184)
    struct.pack_into("=I", skb, 164, gso_segs)
    struct.pack_into("=I", skb, 176, gso_size)
    return bytes(skb)


@pytest.fixture
def run(accounting: Accounting) -> Iterator[Run]:
    """Run one frame through the program of a direction and give the one cell that it was counted in."""
    loaded = [accounting.load(SLOT, direction) for direction in (0, 1)]

    def once(frame: bytes, *, direction: int = 0, gso_segs: int = 0, gso_size: int = 0) -> Cell:
        accounting.zero(SLOT)
        ran = sys.prog_test_run(loaded[direction], frame, context=context(gso_segs, gso_size))
        assert ran.result == -1, "the program must leave a packet's fate to others"
        (cell,) = accounting.read(SLOT)
        return cell

    yield once
    for program in loaded:
        program.close()
