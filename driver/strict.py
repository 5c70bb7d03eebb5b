"""Strict decoding of text that people write: claim configuration (JSON) and node policy (YAML).

Invariant: a document is taken whole or not at all. Every problem of it is found in one pass, each with
the path of its field (and its line, where the text has lines); an unknown key, a duplicate key, a wrong
type and a wrong value are all problems. What is accepted is declared once, as a Key on the fields of
frozen dataclasses; the JSON Schema comes from the same declarations.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar, cast, get_type_hints

T = TypeVar("T")
R = TypeVar("R")
E = TypeVar("E", bound=enum.StrEnum)
H = TypeVar("H", bound=Hashable)

JsonSchema = Mapping[str, object]

MAX_DEPTH = 32
MAX_JSON_CHARACTERS = 64 * 1024
"""The API server takes 10 KiB of opaque parameters; more is not a config."""
_SHOWN = 60
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a document with its place in it. line counts from 1; None: the text has no lines."""

    value: bool | int | float | str | tuple[Node, ...] | Mapping[str, Node] | None
    path: str = ""
    line: int | None = None

    def describe(self) -> str:
        """The value as a problem's text shows it: short, with control characters escaped."""
        match self.value:
            case None:
                return "null"
            case bool():
                return "true" if self.value else "false"
            case tuple():
                return "a list"
            case Mapping():
                return "an object"
            case _:
                return shown(self.value)


def shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def child_path(path: str, key: str | int) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    if not _PLAIN_KEY.fullmatch(key):
        return f"{path}[{shown(key)}]"
    return f"{path}.{key}" if path else key


@dataclass(frozen=True, slots=True)
class Problem:
    path: str
    message: str
    line: int | None = None


class Problems:
    """All that is wrong with one document, in the order it was found."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def add(self, node: Node, message: str) -> None:
        self._found.append(Problem(node.path, message, node.line))

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._found)


# --- JSON -------------------------------------------------------------------------------------------


class _Pairs(list[tuple[str, object]]):
    """A JSON object before its duplicate keys are looked for."""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def parse_json(text: str, problems: Problems) -> Node | None:
    """The document as Nodes; None where it is not JSON at all. Problems hold what was wrong."""
    root = Node(None)
    if len(text) > MAX_JSON_CHARACTERS:
        problems.add(root, f"is {len(text)} characters long; at most {MAX_JSON_CHARACTERS} are read")
        return None
    try:
        raw = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_no_constant)
    except RecursionError:
        problems.add(root, f"is nested more than {MAX_DEPTH} levels deep")
        return None
    except ValueError as error:
        problems.add(root, f"is not JSON: {error}")
        return None
    return _json_node(raw, "", problems, 0)


def _json_node(raw: object, path: str, problems: Problems, depth: int) -> Node:
    if depth > MAX_DEPTH:
        problems.add(Node(None, path), f"is nested more than {MAX_DEPTH} levels deep")
        return Node(None, path)
    if isinstance(raw, _Pairs):
        children: dict[str, Node] = {}
        for key, value in raw:
            child = _json_node(value, child_path(path, key), problems, depth + 1)
            if key in children:
                problems.add(child, "is given twice")
            children[key] = child
        return Node(children, path)
    if isinstance(raw, list):
        return Node(
            tuple(
                _json_node(item, child_path(path, index), problems, depth + 1)
                for index, item in enumerate(raw)
            ),
            path,
        )
    return Node(cast("bool | int | float | str | None", raw), path)


# --- kinds of values --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """How one kind of value is read. decode returns None exactly where it has added a problem."""

    decode: Callable[[Node, Problems], T | None]
    schema: JsonSchema


def boolean() -> Kind[bool]:
    def decode(node: Node, problems: Problems) -> bool | None:
        if isinstance(node.value, bool):
            return node.value
        problems.add(node, f"must be true or false, not {node.describe()}")
        return None

    return Kind(decode, {"type": "boolean"})


def integer(minimum: int, maximum: int) -> Kind[int]:
    """A whole number in minimum..maximum. 1500.0 is one too, as in JSON Schema."""

    def decode(node: Node, problems: Problems) -> int | None:
        value = node.value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            problems.add(node, f"must be an integer, not {node.describe()}")
        elif not minimum <= value <= maximum:
            problems.add(node, f"must be {minimum} to {maximum}, not {shown(value)}")
        else:
            return value
        return None

    return Kind(decode, {"type": "integer", "minimum": minimum, "maximum": maximum})


def text(parse: Callable[[str], T], schema: JsonSchema) -> Kind[T]:
    """A string that parse turns into a value; the message of its ValueError becomes the problem."""

    def decode(node: Node, problems: Problems) -> T | None:
        if not isinstance(node.value, str):
            problems.add(node, f"must be a string, not {node.describe()}")
            return None
        try:
            return parse(node.value)
        except ValueError as error:
            problems.add(node, str(error))
            return None

    return Kind(decode, {"type": "string", **schema})


def choice(members: type[E]) -> Kind[E]:
    """One of the values of a StrEnum."""
    values = [member.value for member in members]

    def parse(value: str) -> E:
        if value not in values:
            raise ValueError(f"must be one of {', '.join(values)}, not {shown(value)}")
        return members(value)

    return text(parse, {"enum": values})


def listing(item: Kind[H], *, minimum: int = 0, maximum: int) -> Kind[tuple[H, ...]]:
    """A list of distinct values, minimum..maximum of them."""

    def decode(node: Node, problems: Problems) -> tuple[H, ...] | None:
        if not isinstance(node.value, tuple):
            problems.add(node, f"must be a list, not {node.describe()}")
            return None
        before = len(problems)
        if not minimum <= len(node.value) <= maximum:
            problems.add(node, f"must have {minimum} to {maximum} entries, not {len(node.value)}")
            return None
        seen: dict[H, Node] = {}
        for child in node.value:
            value = item.decode(child, problems)
            if value is None:
                continue
            first = seen.setdefault(value, child)
            if first is not child:
                problems.add(child, f"is the same as {first.path}")
        return None if len(problems) > before else tuple(seen)

    schema: dict[str, object] = {"type": "array", "items": item.schema, "maxItems": maximum}
    if minimum:
        schema["minItems"] = minimum
    return Kind(decode, schema | {"uniqueItems": True})


def converted(kind: Kind[T], convert: Callable[[T], R]) -> Kind[R]:
    """What kind reads, as another type. convert cannot fail."""

    def decode(node: Node, problems: Problems) -> R | None:
        value = kind.decode(node, problems)
        return None if value is None else convert(value)

    return Kind(decode, kind.schema)


# --- records ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key(Generic[T]):
    """Annotation that makes a dataclass field a key of the document: `Annotated[int, Key("mtu", ...)]`.

    A field without a default is required. guarded: it could hurt others; who reads the document decides.
    harmless: values of a guarded field that hurt nobody.
    """

    name: str
    kind: Kind[T]
    doc: str
    guarded: bool = False
    harmless: tuple[T, ...] = ()


def keys_of(cls: Callable[..., object]) -> Mapping[str, Key[Any]]:
    """Attribute name to declaration, in order."""
    return {
        attribute: extra
        for attribute, hint in get_type_hints(cls, include_extras=True).items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Key)
    }


def _required(cls: Callable[..., object]) -> frozenset[str]:
    fields = dataclasses.fields(cast(Any, cls))
    missing = dataclasses.MISSING
    return frozenset(
        field.name for field in fields if field.default is missing and field.default_factory is missing
    )


def record(
    cls: Callable[..., T],
    *,
    header: Mapping[str, str] | None = None,
    later: Collection[str] = (),
) -> Kind[T]:
    """An object whose keys are those declared on the dataclass cls, and no others.

    header: required keys with one legal value (apiVersion, kind). later: keys that are ours but that
    this version cannot do, so that the answer is not "unknown". A ValueError of cls's own checks
    becomes a problem of the object.
    """
    constants = header or {}
    keys = {key.name: (attribute, key) for attribute, key in keys_of(cls).items()}
    required = [*constants, *(name for name, (attribute, _) in keys.items() if attribute in _required(cls))]

    def read_value(name: str, child: Node, problems: Problems) -> object:
        if name in keys:
            return keys[name][1].kind.decode(child, problems)
        if name in later:
            problems.add(child, "is not supported by this version")
        elif name not in constants:
            problems.add(child, _unknown(name, [*constants, *keys]))
        elif child.value != constants[name]:
            problems.add(child, f"must be {constants[name]!r}, not {child.describe()}")
        return None

    def decode(node: Node, problems: Problems) -> T | None:
        if not isinstance(node.value, Mapping):
            problems.add(node, f"must be an object, not {node.describe()}")
            return None
        before = len(problems)
        found = {name: read_value(name, child, problems) for name, child in node.value.items()}
        for name in required:
            if name not in found:
                problems.add(node, f"needs {name}" + (f": {constants[name]}" if name in constants else ""))
        if len(problems) > before:
            return None
        try:
            return cls(**{keys[name][0]: value for name, value in found.items() if name in keys})
        except ValueError as error:
            problems.add(node, str(error))
            return None

    return Kind(decode, _record_schema(constants, [key for _, key in keys.values()], required))


def _record_schema(
    constants: Mapping[str, str], keys: Sequence[Key[Any]], required: Sequence[str]
) -> JsonSchema:
    properties: dict[str, object] = {name: {"const": value} for name, value in constants.items()}
    properties |= {key.name: {"description": key.doc, **key.kind.schema} for key in keys}
    schema: dict[str, object] = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": list(required)} if required else {})


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"is not a known field; did you mean {near[0]}?" if near else "is not a known field"
