"""Compiled programs as values: what is filled in where, and what a damaged file is."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf import program as p
from bpf.accounting import batches
from bpf.errors import CallRefused
from bpf.layout import Framing, Slot


def instruction(code: int, constant: int, registers: int = 0) -> bytes:
    return struct.pack("<BBhi", code, registers, 0, constant)


def map_use(sentinel: int, pseudo: int = p.PSEUDO_MAP_FD) -> bytes:
    return instruction(p.LD_IMM64, sentinel, pseudo << 4 | 1) + instruction(0, 0)


EXIT = instruction(0x95, 0)
CODE = instruction(0xB7, p.SLOT_SENTINEL) + map_use(p.MAP_SENTINELS["acct"]) + EXIT
WITH_CLASSES = CODE[:-8] + map_use(p.MAP_SENTINELS["classes"], p.PSEUDO_MAP_VALUE) + EXIT


def made(code: bytes = WITH_CLASSES) -> p.CompiledPrograms:
    program = p.find_places(code)
    return p.CompiledPrograms(source_key="k", compiler="1", programs=(program, program))


def test_every_place_is_found_and_filled() -> None:
    program = p.find_places(WITH_CLASSES)
    assert (program.slot_at, program.map_at) == ((0,), {"acct": (1,), "classes": (3,)})
    framed = struct.unpack("<i", program.specialise(Slot(77), {"acct": 5, "classes": 6}, Framing.IPOIB)[4:8])
    assert framed == (77 | Framing.IPOIB,)
    code = program.specialise(Slot(77), {"acct": 5, "classes": 6})
    assert code == (instruction(0xB7, 77) + map_use(5) + map_use(6, p.PSEUDO_MAP_VALUE) + EXIT), (
        "nothing but the constants differs"
    )
    sentinels = [p.SLOT_SENTINEL, *p.MAP_SENTINELS.values()]
    assert not any(sentinel.to_bytes(4, "little") in code for sentinel in sentinels)


def test_a_map_that_is_not_given_is_an_error() -> None:
    with pytest.raises(KeyError, match="classes"):
        p.find_places(WITH_CLASSES).specialise(Slot(1), {"acct": 5})


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (map_use(p.MAP_SENTINELS["acct"]) + EXIT, "no slot"),
        (instruction(0xB7, p.SLOT_SENTINEL) + EXIT, "no counters"),
        (instruction(0x07, p.SLOT_SENTINEL) + CODE, "instruction 0 uses the slot in an unknown way"),
        (instruction(0xB7, p.MAP_SENTINELS["acct"]) + CODE, "uses map acct in an unknown way"),
        (map_use(p.MAP_SENTINELS["classes"], 4) + CODE, "uses map classes in an unknown way"),
        (b"", "no instructions"),
    ],
)
def test_code_whose_places_cannot_all_be_set_is_refused(code: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        p.find_places(code)


def test_the_second_half_of_a_wide_constant_is_not_taken_for_an_instruction() -> None:
    wide = instruction(p.LD_IMM64, 1) + instruction(0, p.SLOT_SENTINEL)
    assert p.find_places(wide + CODE).slot_at == (2,)


def test_the_text_form_gives_the_same_programs_back() -> None:
    assert p.CompiledPrograms.parse(made().dump()) == made()


@given(at=st.integers(0, 10_000), value=st.integers(32, 126))
def test_a_changed_character_is_noticed(at: int, value: int) -> None:
    text = made().dump()
    at %= len(text)
    damaged = text[:at] + chr(value) + text[at + 1 :]
    try:
        same = json.loads(damaged) == json.loads(text)
    except ValueError:
        same = False
    if same:
        assert p.CompiledPrograms.parse(damaged) == made()
    else:
        with pytest.raises(ValueError):
            p.CompiledPrograms.parse(damaged)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '"x"', '{"digest": 1, "body": []}', '{"digest": "", "body": {}}']
)
def test_what_is_no_program_file_is_one_kind_of_error(text: str) -> None:
    with pytest.raises(ValueError):
        p.CompiledPrograms.parse(text)


def test_a_cut_file_is_an_error_at_every_length() -> None:
    text = made().dump()
    for length in range(0, len(text) - 1, 7):
        with pytest.raises(ValueError):
            p.CompiledPrograms.parse(text[:length])


def test_places_outside_the_program_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        p.CompiledProgram(CODE, (0,), {"acct": (4,)})
    with pytest.raises(ValueError, match="1 programs instead of 2"):
        p.CompiledPrograms(source_key="k", compiler="1", programs=made().programs[:1])


@given(slots=st.sets(st.integers(0, 3000)), most=st.integers(1, 600))
def test_batches_hold_every_slot_once_and_span_no_more_than_allowed(slots: set[int], most: int) -> None:
    runs = list(batches([Slot(n) for n in slots], most))
    assert [slot for run in runs for slot in run] == sorted(slots)
    assert all(run[-1] - run[0] < most for run in runs)


def test_a_refused_call_says_what_and_what_to_do() -> None:
    error = CallRefused("loading BPF program knd_eg", 1, "x" * 5000 + "the end")
    assert str(error).startswith("loading BPF program knd_eg: EPERM (Operation not permitted)")
    assert "CAP_BPF" in str(error)
    assert str(error).endswith("the end")
    assert len(str(error)) < 2500


def test_a_program_that_the_verifier_refuses_is_told_by_its_reason_not_by_its_figures() -> None:
    log = "648: (0f) r0 += r9\nmath with unbounded min value is not allowed\nprocessed 246 insns\n"
    first = str(CallRefused("loading BPF program knd_eg", 22, log)).splitlines()[0]
    assert first == (
        "loading BPF program knd_eg: EINVAL (Invalid argument); math with unbounded min value is not allowed"
    )
