"""The record of a version's maps: it says what they are, and one that makes no sense is not half believed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf import layout
from bpf.record import OURS, RECORD_BYTES, WITHOUT_RECORD, Record, Shape

WRITTEN = (
    '{"acct": {"bytes_at": 0, "cell_bytes": 16, "classes": 8, "first_at": 0, "kinds": ["other", "ip", "tcp",'
    ' "roce"], "packets_at": 8, "value_bytes": 1024}, "format": 1, "maps": {"classes": "1 of 76",'
    ' "police": "1 of 176", "rules": "2 of 192"}}'
)
"""Pinned on nodes. When this differs, a map has another shape or meaning, and that is right: say so here."""


def test_what_is_pinned_on_nodes_is_this() -> None:
    assert OURS.dump() == WRITTEN
    assert Record.parse(WRITTEN) == OURS
    assert len(WRITTEN) < RECORD_BYTES


def test_the_release_that_wrote_no_record_is_known_by_its_folder() -> None:
    (before,) = WITHOUT_RECORD.values()
    assert before.acct == Record.parse(WRITTEN).acct
    assert before.maps == {"classes": "1 of 76", "rules": "1 of 128", "police": "1 of 112"}


def test_other_maps_are_in_another_folder() -> None:
    wider = replace(OURS, acct=replace(OURS.acct, classes=4))
    other_rules = replace(OURS, maps={**OURS.maps, "rules": "2 of 128"})
    assert len({each.folder for each in (OURS, wider, other_rules)}) == 3


def spoilt(**changes: Any) -> str:
    tree = json.loads(WRITTEN)
    for name, value in changes.items():
        tree["acct"][name] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (WRITTEN.replace('"format": 1', '"format": 2'), "format 2, and 1 is known here"),
        (WRITTEN[:-1], "Expecting"),
        ("[]", "is not one"),
        (spoilt(classes="8"), "something else than a number"),
        (spoilt(classes=True), "something else than a number"),
        (spoilt(classes=0), "no classes or kinds"),
        (spoilt(kinds=["ip", "ip"]), "no classes or kinds"),
        (spoilt(classes=9), "no room for its cells"),
        (spoilt(bytes_at=4), "not one of a 64-bit number"),
        (spoilt(bytes_at=-8), "not one of a 64-bit number"),
        (spoilt(packets_at=16), "no room for its numbers"),
        (spoilt(packets_at=0), "no room for its numbers"),
        (spoilt(value_bytes=1 << 40), "not one of a 64-bit number"),
        (spoilt(more=1), "is not one"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused_with_its_reason(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Record.parse(text)


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_a_record_or_a_refusal(text: str) -> None:
    try:
        record = Record.parse(text)
    except ValueError:
        return
    assert isinstance(record.acct, Shape)


def test_a_cell_is_where_the_programs_put_it() -> None:
    shape = OURS.acct
    assert shape.cells * shape.cell_bytes == shape.value_bytes == layout.VALUE_BYTES
