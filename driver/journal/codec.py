"""Model values to JSON text and back.

Invariant: decode(T, encode(value)) == value for every value of the model, and the text is canonical:
equal values give equal text. What is read is checked as strictly as if it came from a stranger, except
that unknown keys are skipped and absent ones take the field's default: that is how a release reads
what the next one wrote.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import ipaddress
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_Decoder = Callable[[Any, str], Any]

_TAG = "is"
"""Key that names the dataclass where a field may hold one of several."""
_TEXT_TYPES = (
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    Path,
)


class CodecError(ValueError):
    """JSON that is not a value of the expected type; the text gives the path to the field."""


def encode(value: object) -> str:
    """Return value as canonical ASCII JSON; TypeError for a type the model does not use."""
    return canonical(_encode(value))


def canonical(tree: object) -> str:
    """Return a JSON tree as the one text that stands for it."""
    return json.dumps(tree, ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def decode(kind: type[T], text: str) -> T:
    """Return text as a value of the dataclass kind; CodecError says where it is not one."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"not JSON: {error}") from error
    target: Any = kind
    decoded = _decoder(target)(tree, kind.__name__)
    assert isinstance(decoded, kind)
    return decoded


def _encode(value: object) -> object:
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, _TEXT_TYPES):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted((_encode(item) for item in value), key=canonical)
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _encode_dataclass(value)
    raise TypeError(f"the journal does not store {type(value).__name__}")


def _encode_dataclass(value: Any) -> dict[str, object]:
    tree: dict[str, object] = {_TAG: type(value).__name__}
    for field in dataclasses.fields(value):
        tree[field.name] = _encode(getattr(value, field.name))
    return tree


@functools.cache
def _decoder(kind: Any) -> _Decoder:
    """The decoder of one type, built once from its annotations."""
    if isinstance(kind, typing.NewType):
        return _decoder(kind.__supertype__)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments)
    if origin is tuple:
        return _tuple(arguments)
    if origin is frozenset:
        return _frozenset(arguments)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(arguments)
    if kind in _TEXT_TYPES:
        return functools.partial(_text, kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return functools.partial(_enum, kind)
    if kind in (bool, int, float, str, type(None)):
        return functools.partial(_primitive, kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    raise TypeError(f"the journal does not store {kind}")


def _primitive(kind: type, tree: Any, path: str) -> Any:
    if kind is float and type(tree) is int:
        return float(tree)
    # bool is an int to isinstance, and must not pass for one.
    if type(tree) is not kind:
        raise CodecError(f"{path}: {_shown(tree)} is not of type {kind.__name__}")
    return tree


def _text(kind: Callable[[str], Any], tree: Any, path: str) -> Any:
    if not isinstance(tree, str):
        raise CodecError(f"{path}: {_shown(tree)} is not text")
    try:
        return kind(tree)
    except ValueError as error:
        raise CodecError(f"{path}: {error}") from error


def _enum(kind: type[enum.Enum], tree: Any, path: str) -> Any:
    try:
        return kind(tree)
    except ValueError as error:
        raise CodecError(f"{path}: {_shown(tree)} is not a {kind.__name__}") from error


def _union(members: tuple[Any, ...]) -> _Decoder:
    decoders = [_decoder(member) for member in members]

    def decode_union(tree: Any, path: str) -> Any:
        problems = []
        for decoder in decoders:
            try:
                return decoder(tree, path)
            except CodecError as error:
                problems.append(str(error))
        raise CodecError("; ".join(problems))

    return decode_union


def _list(tree: Any, path: str) -> list[Any]:
    if not isinstance(tree, list):
        raise CodecError(f"{path}: {_shown(tree)} is not a list")
    return tree


def _tuple(arguments: tuple[Any, ...]) -> _Decoder:
    if len(arguments) != 2 or arguments[1] is not Ellipsis:
        raise TypeError("the journal stores tuples of one type and any length only")
    item = _decoder(arguments[0])
    return lambda tree, path: tuple(
        item(entry, f"{path}[{index}]") for index, entry in enumerate(_list(tree, path))
    )


def _frozenset(arguments: tuple[Any, ...]) -> _Decoder:
    item = _decoder(arguments[0])
    return lambda tree, path: frozenset(item(entry, path) for entry in _list(tree, path))


def _mapping(arguments: tuple[Any, ...]) -> _Decoder:
    item = _decoder(arguments[1])

    def decode_mapping(tree: Any, path: str) -> dict[str, Any]:
        if not isinstance(tree, dict):
            raise CodecError(f"{path}: {_shown(tree)} is not an object")
        return {key: item(entry, f"{path}.{key}") for key, entry in tree.items()}

    return decode_mapping


def _dataclass(kind: Any) -> _Decoder:
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    decoders = {name: _decoder(hints[name]) for name in fields}

    def decode_dataclass(tree: Any, path: str) -> Any:
        if not isinstance(tree, dict) or tree.get(_TAG) != kind.__name__:
            raise CodecError(f"{path}: not a {kind.__name__}")
        given = {
            name: decoder(tree[name], f"{path}.{name}") for name, decoder in decoders.items() if name in tree
        }
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in given:
                raise CodecError(f"{path}.{name}: missing")
        try:
            return kind(**given)
        except ValueError as error:
            raise CodecError(f"{path}: {error}") from error

    return decode_dataclass


def _shown(tree: object) -> str:
    text = repr(tree)
    return text if len(text) <= 60 else f"{text[:60]}..."
