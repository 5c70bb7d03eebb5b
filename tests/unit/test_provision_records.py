"""What this driver made is known from whole records alone, and generated addresses are one's own for good."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.errors import NotNow
from driver.policy.sriov import PfRule
from driver.provision.macs import Source, generate
from driver.provision.records import Makings
from hw.model import MacAddress, NsimName, PciAddress, parse_mac
from tests.unit.provision_world import PF, making

FOUR = PfRule(vfs=4)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    makings = Makings(tmp_path / "sriov")
    assert makings.read() == ({}, ())
    makings.write(making(FOUR, done=False))
    makings.write(making(FOUR))
    assert makings.read() == ({PF: making(FOUR)}, ())
    assert [path.name for path in (tmp_path / "sriov").iterdir()] == [f"{PF}.json"]
    makings.forget(PF)
    makings.forget(PF)
    assert makings.read() == ({}, ())


def good() -> dict[str, object]:
    return {"version": 1, **asdict(making(FOUR))}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "\x00" * 100,
        "[" * 20_000,
        json.dumps(good() | {"version": 2}),
        json.dumps(good() | {"vfs": "4"}),
        json.dumps(good() | {"vfs": True}),
        json.dumps(good() | {"vfs": -1}),
        json.dumps(good() | {"more": 1}),
        json.dumps(good() | {"address": "0000:22:00.0"}),
        json.dumps({"version": 1}),
    ],
)
def test_what_is_not_a_record_counts_as_none_and_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{PF}.json").write_text(text)
    found, problems = Makings(tmp_path).read()
    assert found == {}
    assert len(problems) == 1
    assert "counts as none" in problems[0]


@given(st.binary(max_size=400))
def test_no_file_can_break_the_reading(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("records")
    (folder / f"{PF}.json").write_bytes(data)
    (folder / "0000:22:00.0.json").mkdir()
    (folder / "0000:23:00.0.json").symlink_to("/dev/zero")
    found, problems = Makings(folder).read()
    assert not found
    assert len(problems) == 3


def test_what_cannot_be_recorded_is_not_begun(tmp_path: Path) -> None:
    (tmp_path / "sriov").write_text("in the way")
    with pytest.raises(NotNow, match="no VFs are made"):
        Makings(tmp_path / "sriov").write(making(FOUR))


CARD = MacAddress("52:54:00:00:00:10")


def test_a_vf_keeps_its_address_whatever_number_there_are() -> None:
    few = generate([Source(address=PF, mac=CARD, count=2)])[PF]
    many = generate([Source(address=PF, mac=CARD, count=7)])[PF]
    assert few == many[:2]
    assert few == ("da:c2:ff:98:78:19", "a6:4f:46:96:4f:44")


def test_cards_at_one_place_of_two_nodes_have_other_addresses() -> None:
    here = generate([Source(address=PF, mac=CARD, count=4)])[PF]
    there = generate([Source(address=PF, mac=MacAddress("52:54:00:00:00:11"), count=4)])[PF]
    assert not set(here) & set(there)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_no_two_vfs_share_an_address_and_each_is_a_local_one(counts: list[int]) -> None:
    sources = [
        Source(address=PciAddress(f"0000:{20 + bus}:00.0"), mac=CARD, count=count)
        for bus, count in enumerate(counts)
    ]
    first = generate(sources)
    every = [mac for macs in first.values() for mac in macs]
    assert len(set(every)) == sum(counts)
    for mac in every:
        assert parse_mac(mac) == mac
        assert int(mac[:2], 16) & 2
    again = generate(sources, taken=every)
    assert not set(every) & {mac for macs in again.values() for mac in macs}


def test_a_record_of_an_earlier_version_left_the_mode_as_it_was(tmp_path: Path) -> None:
    makings = Makings(tmp_path)
    makings.write(making(FOUR))
    path = next(tmp_path.glob("*.json"))
    tree = json.loads(path.read_text())
    del tree["mode"]
    path.write_text(json.dumps(tree))
    assert makings.read() == ({PF: making(FOUR)}, ())


@pytest.mark.parametrize("mode", ["bridge", 1, None])
def test_a_record_with_a_mode_that_there_is_not_is_none(tmp_path: Path, mode: object) -> None:
    makings = Makings(tmp_path)
    makings.write(making(FOUR))
    path = next(tmp_path.glob("*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "mode": mode}))
    assert makings.read()[0] == {}


def test_a_simulated_card_has_a_record_too(tmp_path: Path) -> None:
    makings = Makings(tmp_path)
    made = replace(making(FOUR), address=NsimName("netdevsim10"), mode="legacy")
    makings.write(made)
    assert makings.read() == ({made.address: made}, ())
