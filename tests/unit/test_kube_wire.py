"""What the server sends is read with its types checked; failures say who must act and are retried at a
bounded rate; quantities are numbers."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.kube import failures
from driver.kube.failures import (
    ApiFailure,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    Throttled,
    Unavailable,
)
from driver.kube.retry import BackOff, wait_after, worth_an_immediate_repeat
from driver.kube.wire import Malformed, child, children, clamp, decode, flag, number, text, texts, timestamp
from driver.quantity import parse_quantity


@given(st.text(), st.integers(0, 70))
def test_a_clamped_string_is_a_prefix_that_fits_and_is_valid_utf8(value: str, limit: int) -> None:
    cut = clamp(value, limit)
    assert len(cut.encode()) <= limit
    assert value.startswith(cut)
    rest = value[len(cut) :]
    assert not rest or len((cut + rest[0]).encode()) > limit, "nothing was cut without need"


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert clamp("a\udcffb", 64) == "a\ufffdb"


@pytest.mark.parametrize("data", [b"", b"[1]", b"null", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        decode(data, "get x")


@pytest.mark.parametrize(
    ("read", "obj"),
    [
        (child, {"f": [1]}),
        (lambda obj, key: list(children(obj, key)), {"f": [{}, 3]}),
        (lambda obj, key: list(children(obj, key)), {"f": {}}),
        (text, {"f": 5}),
        (texts, {"f": ["a", 5]}),
        (flag, {"f": "true"}),
        (number, {"f": True}),
        (number, {"f": "1"}),
    ],
)
def test_a_field_of_another_type_is_malformed_and_named(read, obj) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Malformed, match="f"):
        read(obj, "f")


def test_absent_and_null_fields_read_as_empty() -> None:
    for obj in ({}, {"f": None}):
        assert child(obj, "f") == {}
        assert list(children(obj, "f")) == []
        assert text(obj, "f") == ""
        assert texts(obj, "f") == ()
        assert flag(obj, "f") is False
        assert number(obj, "f", 7) == 7


def test_a_key_written_twice_survives_exact_reading() -> None:
    raw = b'{"parameters": {"mtu": 1500, "nested": {"a": 1, "a": 2}, "mtu": 9000}}'
    exact = child(decode(raw, "x", exact=True), "parameters")
    assert exact["mtu"] == 9000
    assert json.dumps(exact) == '{"mtu": 1500, "nested": {"a": 1, "a": 2}, "mtu": 9000}'
    assert json.dumps(child(decode(raw, "x"), "parameters")) == '{"mtu": 9000, "nested": {"a": 2}}'


def test_times_are_whole_seconds_in_utc() -> None:
    assert timestamp(0.9) == "1970-01-01T00:00:00Z"


# --- failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, Unavailable),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (410, Gone),
        (422, Invalid),
        (400, Invalid),
        (429, Throttled),
        (500, Unavailable),
        (301, Unavailable),
        (418, Unavailable),
    ],
)
def test_each_status_has_its_failure_with_the_servers_own_words(status: int, kind: type[ApiFailure]) -> None:
    body = json.dumps({"kind": "Status", "message": 'pods "x" says "no"'}).encode()
    failure = failures.from_answer("get pods d/x", status, None, body)
    assert type(failure) is kind
    assert 'pods "x" says "no"' in str(failure)
    assert "get pods d/x" in str(failure)


@pytest.mark.parametrize("body", [b"", b"<html>bad gateway</html>", b'{"message": 5}', b'{"details": []}'])
def test_an_error_in_no_known_form_is_still_a_failure_of_its_status(body: bytes) -> None:
    assert type(failures.from_answer("get x", 502, None, body)) is Unavailable


def test_an_invalid_object_names_its_fields() -> None:
    causes = [{"field": "spec.devices[3].name", "message": "bad"}, {"field": "spec.pool"}]
    body = json.dumps({"message": "no", "details": {"causes": causes}}).encode()
    failure = failures.from_answer("create x", 422, None, body)
    assert isinstance(failure, Invalid)
    assert failure.fields == ("spec.devices[3].name", "spec.pool")


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("0", 0.0), ("99999999999", 3600.0)])
def test_retry_after_is_read_and_bounded(header: str, seconds: float) -> None:
    for status in (429, 503):
        failure = failures.from_answer("get x", status, header, b"")
        assert isinstance(failure, Throttled)
        assert failure.retry_after == seconds


@pytest.mark.parametrize("header", ["-1", "soon", "Wed, 21 Oct 2026 07:28:00 GMT", "²"])
def test_a_retry_after_that_is_no_number_is_ignored(header: str) -> None:
    assert type(failures.from_answer("get x", 503, header, b"")) is Unavailable


# --- when to try again ------------------------------------------------------------------------------


@given(st.integers(1, 10_000), st.floats(0, 0.999))
def test_delays_never_exceed_the_cap_nor_fall_below_half_of_it_late(attempt: int, dice: float) -> None:
    back_off = BackOff(first=0.5, cap=60.0)
    delay = back_off.delay(attempt, lambda: dice)
    assert 0.25 <= delay <= 60.0
    if attempt > 10:
        assert delay >= 30.0


def test_retry_after_is_a_lower_bound() -> None:
    wait = wait_after(Throttled("x", 429, "m", 42.0), 1, BackOff(), lambda: 0.0)
    assert wait is not None
    assert wait >= 42.0


def test_what_is_gone_is_not_asked_for_again_and_what_a_human_must_mend_is_asked_slowly() -> None:
    assert wait_after(NotFound("x", 404, "m"), 1, BackOff(), lambda: 0.0) is None
    for failure in (Forbidden("x", 403, "m"), Invalid("x", 422, "m")):
        wait = wait_after(failure, 1, BackOff(), lambda: 0.0)
        assert wait is not None
        assert wait >= 15.0


def test_only_a_read_on_a_dropped_connection_is_repeated_at_once() -> None:
    dropped = Unavailable("x", 0, "m", dropped=True)
    assert worth_an_immediate_repeat(dropped, safe=True)
    assert not worth_an_immediate_repeat(dropped, safe=False)
    assert not worth_an_immediate_repeat(Unavailable("x", 0, "m"), safe=True)


# --- quantities -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1G", "1000M"),
        ("6G", "5859375Ki"),
        ("0.5", "500m"),
        ("1Gi", "1024Mi"),
        ("2e3", "2k"),
        ("1.5G", "1500M"),
    ],
)
def test_quantities_are_equal_by_value(one: str, other: str) -> None:
    assert parse_quantity(one) == parse_quantity(other)


def test_quantities_of_every_suffix() -> None:
    assert parse_quantity("3Ei") == 3 * Decimal(2) ** 60
    assert parse_quantity("-7n") == Decimal("-7e-9")


@pytest.mark.parametrize(
    "text_", ["", "G", "1 G", "1K", "0x10", "1e", "1e999", "nan", "\u0661", "1" * 40, "1Gi5"]
)
def test_what_is_no_quantity_is_refused(text_: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        parse_quantity(text_)
