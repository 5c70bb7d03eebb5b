"""Model values survive the way to JSON and back, and what is no such value is refused with its place."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.journal import Quarantine
from driver.journal.codec import CodecError, canonical, decode, encode
from driver.journal.records import Record, RecordKind, from_record, to_record
from driver.model import Attachment, DeviceName, NicConfig, Preparation
from driver.rdma import RdmaBinding, RdmaInPod
from hw.model import LinkSettings, VfSettings
from tests.unit.journal_values import IDENTITIES, attachment, preparation


@pytest.mark.parametrize("number", range(len(IDENTITIES)))
def test_a_preparation_comes_back_equal_whatever_its_identity(number: int) -> None:
    value = preparation(number, share="s1", alias='quote " newline \n and a stray byte \udc80')
    assert decode(Preparation, encode(value)) == value


def test_an_attachment_comes_back_equal_with_a_cookie_beyond_63_bits() -> None:
    assert decode(Attachment, encode(attachment(1))) == attachment(1)


@given(st.builds(Quarantine, st.text().map(DeviceName), st.text(), st.floats(allow_nan=False)))
def test_any_quarantine_comes_back_equal(value: Quarantine) -> None:
    assert decode(Quarantine, encode(value)) == value


@given(st.from_type(LinkSettings))
def test_any_link_settings_come_back_equal_and_as_ascii(value: LinkSettings) -> None:
    text = encode(value)
    assert decode(LinkSettings, text) == value
    assert text.isascii()


@given(st.from_type(VfSettings))
def test_any_settings_of_a_vf_come_back_equal(value: VfSettings) -> None:
    made = replace(preparation(0), vf_baseline=value)
    assert decode(Preparation, encode(made)) == made


def test_a_record_from_before_pfs_were_asked_has_no_baseline_of_one() -> None:
    tree = json.loads(encode(preparation(0)))
    del tree["vf_baseline"]
    del tree["config"]["vf"]["vlan"]
    assert decode(Preparation, json.dumps(tree)).vf_baseline is None


@given(st.from_type(RdmaBinding), st.from_type(RdmaInPod))
def test_what_was_given_of_rdma_comes_back_equal(binding: RdmaBinding, given: RdmaInPod) -> None:
    made = replace(preparation(0), rdma=binding)
    assert decode(Preparation, encode(made)) == made
    attached = replace(attachment(0), rdma=given)
    assert decode(Attachment, encode(attached)) == attached


def test_records_from_before_rdma_was_given_have_none() -> None:
    prepared, attached = (json.loads(encode(each)) for each in (preparation(0), attachment(0)))
    for tree in (prepared, attached, prepared["config"]):
        del tree["rdma"]
    assert decode(Preparation, json.dumps(prepared)) == preparation(0)
    assert decode(Attachment, json.dumps(attached)) == attachment(0)


def test_equal_values_have_one_text() -> None:
    one, two = preparation(1), preparation(1)
    assert encode(one) == encode(two)
    assert canonical(json.loads(encode(one))) == encode(one)


def test_unknown_keys_are_skipped_and_absent_ones_take_their_default() -> None:
    tree = {"is": "NicConfig", "interface": {"is": "InterfaceConfig", "mtu": 9000}, "of_tomorrow": [1]}
    value = decode(NicConfig, json.dumps(tree))
    assert value.interface.mtu == 9000
    assert value.interface.name is None


def changed(path: list[str], value: object) -> str:
    tree = json.loads(encode(preparation(0)))
    place = tree
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["generation"], True),
        (["generation"], "1"),
        (["dies_with_netns"], 1),
        (["state"], "prepping"),
        (["kind"], None),
        (["baseline", "mtu"], 1500.0),
        (["baseline", "altnames"], "enp1"),
        (["config", "interface", "addresses"], ["10.0.0.1/99"]),
        (["attributes"], []),
        (["attributes", "numaNode"], [1]),
        (["identity", "is"], "UsbIdentity"),
        (["reserved_for"], [7]),
    ],
)
def test_a_wrong_field_is_refused_and_named(path: list[str], value: object) -> None:
    named = [name for name in path if name != "is"][-1]
    with pytest.raises(CodecError, match=named):
        decode(Preparation, changed(path, value))


def test_a_missing_field_is_refused_and_named() -> None:
    tree = json.loads(encode(preparation(0)))
    del tree["slot"]
    with pytest.raises(CodecError, match=r"Preparation\.slot: missing"):
        decode(Preparation, json.dumps(tree))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "1", '{"is":"Attachment"}', "[" * 100_000, "\x00"])
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(CodecError):
        decode(Preparation, text)


@given(st.text())
def test_arbitrary_text_never_raises_anything_else(text: str) -> None:
    with pytest.raises(CodecError):
        decode(Preparation, text)


def test_a_record_under_a_key_not_its_own_is_refused() -> None:
    body = to_record(attachment(1)).body
    with pytest.raises(CodecError, match="not its own"):
        from_record(Record(RecordKind.ATTACHMENT, "attachment-2", body))


def test_what_the_model_does_not_use_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="set"):
        encode({"a": {1, 2}})
