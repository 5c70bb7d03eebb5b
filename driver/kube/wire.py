"""Typed reading of the API server's JSON.

Invariant: whatever the server sends, readers here return a value of the promised type or raise Malformed
with the path of the field; nothing below assumes a shape that was not checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from driver.errors import DriverError

JsonObject = dict[str, Any]
"""A decoded JSON object. Values are looked at only through the readers below."""


class Malformed(DriverError):
    """An answer that is not what the API promises. The text names the field."""


class RepeatedKeys(dict[str, Any]):
    """An object in which a key occurred more than once. Reads as usual (the last one counts), but is
    encoded as it was: what a user wrote twice is for the strict config decoder to refuse."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self._pairs = pairs

    def items(self) -> Any:
        return self._pairs


def _exact_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    plain = dict(pairs)
    return plain if len(plain) == len(pairs) else RepeatedKeys(pairs)


def decode(data: bytes, what: str, *, exact: bool = False) -> JsonObject:
    """The JSON object in data; Malformed if it is none. exact: keep RepeatedKeys."""
    try:
        value = json.loads(data, object_pairs_hook=_exact_object if exact else None)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what}: the answer is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise Malformed(f"{what}: the answer is a JSON {type(value).__name__}, not an object")
    return value


def child(obj: Mapping[str, Any], key: str) -> JsonObject:
    """The object under key; an absent or null one reads as empty."""
    value = obj.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Malformed(f"{key} is a {type(value).__name__}, not an object")
    return value


def children(obj: Mapping[str, Any], key: str) -> Iterator[JsonObject]:
    """The objects of the list under key; an absent or null one reads as empty."""
    value = obj.get(key)
    if value is None:
        return
    if not isinstance(value, list):
        raise Malformed(f"{key} is a {type(value).__name__}, not a list")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise Malformed(f"{key}[{index}] is a {type(item).__name__}, not an object")
        yield item


def texts(obj: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The strings of the list under key."""
    value = obj.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Malformed(f"{key} is not a list of strings")
    return tuple(value)


def text(obj: Mapping[str, Any], key: str) -> str:
    """The string under key; absent or null reads as ""."""
    value = obj.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"{key} is a {type(value).__name__}, not a string")
    return value


def needed_text(obj: Mapping[str, Any], key: str) -> str:
    """The string under key; Malformed if absent or empty."""
    value = text(obj, key)
    if not value:
        raise Malformed(f"{key} is missing")
    return value


def number(obj: Mapping[str, Any], key: str, default: int = 0) -> int:
    value = obj.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise Malformed(f"{key} is not a whole number")
    return value


def flag(obj: Mapping[str, Any], key: str) -> bool:
    """The boolean under key; absent or null reads as False."""
    value = obj.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise Malformed(f"{key} is not true or false")
    return value


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as the API's metav1.Time: UTC, whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def clamp(value: str, limit: int) -> str:
    """The longest prefix of value that is at most limit bytes of UTF-8, never half a character.

    Text that is not Unicode (undecodable bytes of sysfs) has those bytes replaced by U+FFFD.
    """
    data = value.encode("utf-8", "surrogateescape")
    shown = data.decode("utf-8", "replace").encode("utf-8")
    return shown[:limit].decode("utf-8", "ignore")
