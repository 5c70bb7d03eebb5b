"""The maps: their layout, their pins, and reading many slots at once."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bpf import accounting as accounting_module
from bpf import layout, source, sys
from bpf.accounting import Accounting
from bpf.cache import ProgramCache
from bpf.errors import BpfError, BpffsMissing, CallRefused, CompileFailed, LayoutMismatch
from bpf.layout import Cell, Slot, TrafficKind
from bpf.pins import make_pin_directory
from bpf.program import CompiledPrograms
from bpf.record import OURS
from tests.bpf import frames as f
from tests.bpf.bpffs import mounted_bpffs

FRAME = f.ethernet(f.IPV4, f.ipv4(f.TCP, f.tcp(bytes(10)), dscp=46))
VERIFIED_INSTRUCTIONS_AT = 216
"""In struct bpf_prog_info, since Linux 5.16."""
CELL = Cell(1, 5, TrafficKind.TCP, len(FRAME), 1)


@pytest.fixture
def pins() -> Iterator[Path]:
    with mounted_bpffs() as path:
        yield path / "knd/v1"


def count(accounting: Accounting, slot: int, times: int = 1, direction: int = 1) -> None:
    with accounting.load(Slot(slot), direction) as program:
        sys.prog_test_run(program, FRAME, repeat=times)


def test_a_cell_lies_where_layout_says(pins: Path, programs: CompiledPrograms) -> None:
    with (
        Accounting.open(pins, programs, slots=2) as opened,
        sys.obj_get_map(pins / OURS.folder / "acct") as raw,
    ):
        count(opened, 1, direction=1)
        values = bytearray(layout.VALUE_BYTES * sys.possible_cpus())
        sys.map_lookup_elem(raw, (1).to_bytes(4, "little"), values)
    at = ((1 * layout.CLASSES + 5) * layout.KINDS + TrafficKind.TCP) * layout.CELL_BYTES
    filled = {n % layout.VALUE_BYTES for n in range(0, len(values), 8) if any(values[n : n + 8])}
    assert filled == {at, at + 8}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("u64 packets;", "u64 packets, drops;"),
        ("u8 dscp[64];", "u8 dscp[63];"),
        ("KIND_TCP, KIND_ROCE", "KIND_ROCE, KIND_TCP"),
    ],
)
def test_a_layout_that_differs_from_python_does_not_compile(tmp_path: Path, before: str, after: str) -> None:
    shutil.copytree(source.DIRECTORY, tmp_path / "c")
    header = tmp_path / "c/acct.h"
    text = header.read_text()
    assert before in text
    header.write_text(text.replace(before, after))
    with pytest.raises(CompileFailed, match=r"differs? from bpf/layout.py"):
        ProgramCache(tmp_path / "cache", sources=tmp_path / "c").ensure()


def test_a_copy_counts_in_its_own_slot_only(pins: Path, programs: CompiledPrograms) -> None:
    with Accounting.open(pins, programs, slots=300) as opened:
        for slot, times in ((0, 1), (7, 2), (299, 3)):
            count(opened, slot, times)
        found = opened.read_slots([Slot(n) for n in range(300)])
        assert {slot: cells for slot, cells in found.items() if cells} == {
            Slot(slot): (Cell(1, 5, TrafficKind.TCP, times * len(FRAME), times),)
            for slot, times in ((0, 1), (7, 2), (299, 3))
        }
        assert opened.read(Slot(7)) == found[Slot(7)]


def test_reading_slots_gives_the_same_in_one_call_or_in_many(
    pins: Path, programs: CompiledPrograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [Slot(n) for n in (0, 1, 2, 30, 31, 62, 63)]
    with Accounting.open(pins, programs, slots=64) as opened:
        for slot in wanted:
            count(opened, slot, slot + 1)
        whole = opened.read_slots(wanted)
        monkeypatch.setattr(accounting_module, "BATCH_BYTES", 2 * layout.VALUE_BYTES * sys.possible_cpus())
        assert opened.read_slots(wanted) == whole
        assert {slot: cells[0].packets for slot, cells in whole.items()} == {n: n + 1 for n in wanted}
        assert opened.read_slots([]) == {}


def test_slots_are_read_as_they_are_now_whatever_they_were(pins: Path, programs: CompiledPrograms) -> None:
    slots = [Slot(0), Slot(1)]
    with Accounting.open(pins, programs, slots=2) as opened:
        count(opened, 0)
        first = opened.read_slots(slots)
        assert opened.read_slots(slots)[Slot(0)] is first[Slot(0)], "nothing was counted"
        count(opened, 0)
        count(opened, 1)
        assert [opened.read_slots(slots)[slot][0].packets for slot in slots] == [2, 1]
        opened.zero(Slot(0))
        assert opened.read_slots(slots) == {0: (), 1: (CELL,)}
        count(opened, 0, direction=0)
        (cell,) = opened.read_slots(slots)[Slot(0)]
        assert (cell.direction, cell.packets) == (0, 1)


def test_zeroing_a_slot_leaves_its_neighbours(pins: Path, programs: CompiledPrograms) -> None:
    with Accounting.open(pins, programs, slots=3) as opened:
        for slot in range(3):
            count(opened, slot)
        opened.zero(Slot(1))
        assert opened.read_slots([Slot(n) for n in range(3)]) == {0: (CELL,), 1: (), 2: (CELL,)}


def test_counts_and_classes_outlive_the_agent(pins: Path, programs: CompiledPrograms) -> None:
    with Accounting.open(pins, programs, slots=4) as first:
        first.set_classes([1] * 64, range(8))
        count(first, 2)
    with Accounting.open(pins, programs, slots=99) as second:
        assert second.capacity == 4, "a pinned map keeps its size"
        count(second, 2)
        assert second.read(Slot(2)) == (Cell(1, 1, TrafficKind.TCP, 2 * len(FRAME), 2),)


@pytest.mark.parametrize("name", ["acct", "classes", "rules", "police"])
def test_a_map_that_somebody_else_pinned_in_our_place_is_refused_and_left_alone(
    pins: Path, programs: CompiledPrograms, name: str
) -> None:
    pins = pins / OURS.folder
    make_pin_directory(pins)
    with sys.map_create(sys.MapType.ARRAY, key_size=4, value_size=8, max_entries=1, name="old") as old:
        sys.obj_pin(old, pins / name)
    with pytest.raises(LayoutMismatch, match=f"{pins / name} has type 2.*8 bytes.*remove it"):
        Accounting.open(pins.parent, programs)
    assert (pins / name).exists()


def test_a_pin_that_is_no_map_is_refused(pins: Path, programs: CompiledPrograms) -> None:
    with Accounting.open(pins, programs) as opened, opened.load(Slot(0), 0) as program:
        (pins / OURS.folder / "acct").unlink()
        sys.obj_pin(program, pins / OURS.folder / "acct")
    with pytest.raises((LayoutMismatch, CallRefused), match="acct"):
        Accounting.open(pins, programs)


def test_without_a_bpffs_nothing_is_made(tmp_path: Path, programs: CompiledPrograms) -> None:
    with pytest.raises(BpffsMissing, match=f"{tmp_path / 'sys/fs/bpf/knd/v1'} is not on a BPF filesystem"):
        Accounting.open(tmp_path / "sys/fs/bpf/knd/v1", programs)
    assert not any(tmp_path.iterdir())


def test_pins_are_roots_alone(pins: Path, programs: CompiledPrograms) -> None:
    with Accounting.open(pins, programs):
        assert {oct(path.stat().st_mode & 0o77) for path in (pins, *pins.rglob("*"))} == {"0o0"}


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_outside_the_map_is_refused(pins: Path, programs: CompiledPrograms, slot: int) -> None:
    with Accounting.open(pins, programs, slots=4) as opened:
        for use in (opened.zero, opened.read, lambda s: opened.read_slots([s]), lambda s: opened.load(s, 0)):
            with pytest.raises(ValueError, match=f"slot {slot} is outside 0..3"):
                use(Slot(slot))


@pytest.mark.parametrize(
    ("dscp", "pcp", "complaint"),
    [
        ([0] * 63, [0] * 8, "DSCP map has 63 entries instead of 64"),
        ([0] * 64, [0] * 9, "PCP map has 9 entries instead of 8"),
        ([8] * 64, [0] * 8, "DSCP map names a class outside 0..7"),
        ([0] * 64, [-1] * 8, "PCP map names a class outside 0..7"),
    ],
)
def test_a_class_map_that_makes_no_sense_changes_nothing(
    accounting: Accounting, dscp: list[int], pcp: list[int], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        accounting.set_classes(dscp, pcp)
    accounting.zero(Slot(9))
    count(accounting, 9)
    assert accounting.read(Slot(9)) == (CELL,)


def test_a_closed_accounting_says_so(pins: Path, programs: CompiledPrograms) -> None:
    with Accounting.open(pins, programs) as opened:
        pass
    opened.close()
    with pytest.raises(ValueError, match="closed"):
        opened.read(Slot(0))


def test_a_refused_program_shows_the_end_of_the_verifiers_log() -> None:
    endless = bytes.fromhex("05 00 ff ff 00 00 00 00".replace(" ", ""))
    with pytest.raises(CallRefused, match="loading BPF program knd_bad: EINVAL") as refused:
        sys.prog_load(sys.ProgramType.SCHED_CLS, endless, name="knd_bad")
    assert refused.value.log
    assert refused.value.log[-50:] in str(refused.value)


def test_programs_load_fast_enough_for_a_pod(accounting: Accounting) -> None:
    """The verifier's work, not the clock's: a change that makes it explode fails here on any machine.

    Kernel 6.1 forgets more where paths meet, and looks at up to three times as many instructions as later
    ones, which look at 8 000.
    """
    with accounting.load(Slot(0), 0) as program:
        verified = struct.unpack_from("=I", sys.prog_info(program), VERIFIED_INSTRUCTIONS_AT)[0]
    assert 100 < verified < 40_000


def test_programs_that_miscount_are_found_before_anything_is_pinned(
    pins: Path, programs: CompiledPrograms
) -> None:
    swapped = replace(programs, programs=programs.programs[::-1])
    with pytest.raises(BpfError, match=r"the count of RoCEv2 over IPv4 is \(Cell\(direction=1"):
        Accounting.open(pins, swapped)
    assert not any(pins.rglob("acct"))
