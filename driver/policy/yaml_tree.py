"""YAML text as Nodes with lines, for strict decoding.

Invariant: what a plain word means does not surprise. Of YAML's implicit types only null, true, false,
decimal integers and decimals are known (YAML 1.2's core): `no`, `0x10`, `1:30` and dates are strings, so
a MAC address stays one. Tags, anchors, aliases, merge keys and second documents are refused: a policy
is read the way it looks.
"""

from __future__ import annotations

import re

import yaml

from driver.strict import MAX_DEPTH, Node, Problems, child_path, shown

MAX_CHARACTERS = 1 << 20
"""As much as a ConfigMap can hold."""
_MAX_DIGITS = 20
_CORE = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """Knows no implicit types but those added below."""


_CoreLoader.yaml_implicit_resolvers = {}
_CoreLoader.add_implicit_resolver(f"{_CORE}null", re.compile(r"(null|~|)$"), ["n", "~", ""])
_CoreLoader.add_implicit_resolver(f"{_CORE}bool", re.compile(r"(true|false)$"), ["t", "f"])
_CoreLoader.add_implicit_resolver(
    f"{_CORE}int", re.compile(rf"-?(0|[1-9][0-9]{{0,{_MAX_DIGITS - 1}}})$"), list("-0123456789")
)
_CoreLoader.add_implicit_resolver(
    f"{_CORE}float", re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+$"), list("-0123456789")
)


def parse_yaml(text: str, problems: Problems) -> Node | None:
    """The one document of text; None where it cannot be read. Problems hold what was wrong."""
    if len(text) > MAX_CHARACTERS:
        problems.add(Node(None), f"is {len(text)} characters long; at most {MAX_CHARACTERS} are read")
        return None
    try:
        if not _is_plain(text, problems):
            return None
        root = yaml.compose(text, Loader=_CoreLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.add(Node(None, "", line), f"is not YAML: character {error.character:#x} is not allowed")
        return None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        problems.add(Node(None, "", mark.line + 1 if mark else None), f"is not YAML: {what}")
        return None
    if root is None:
        problems.add(Node(None, "", 1), "is empty")
        return None
    return _node(root, "", problems)


def _is_plain(text: str, problems: Problems) -> bool:
    """Whether text has no aliases and no great depth. Looks at it as a stream: making the tree of a
    text that is nested too deeply takes time that grows with the square of the depth."""
    before = len(problems)
    depth = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        place = Node(None, "", event.start_mark.line + 1 if event.start_mark else None)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            problems.add(place, f"is nested more than {MAX_DEPTH} levels deep")
            break
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            problems.add(place, f"uses an anchor or alias ({shown(event.anchor)}); write the value out")
    return len(problems) == before


def _node(raw: yaml.Node, path: str, problems: Problems) -> Node:
    place = Node(None, path, raw.start_mark.line + 1)
    if isinstance(raw, yaml.MappingNode) and raw.tag == f"{_CORE}map":
        return _mapping(raw, place, problems)
    elif isinstance(raw, yaml.SequenceNode) and raw.tag == f"{_CORE}seq":
        items = enumerate(raw.value)
        return Node(
            tuple(_node(item, child_path(path, index), problems) for index, item in items),
            path,
            place.line,
        )
    elif isinstance(raw, yaml.ScalarNode) and raw.tag.removeprefix(_CORE) in _SCALARS:
        return Node(_scalar(raw), path, place.line)
    else:
        problems.add(place, f"has the tag {shown(raw.tag)}; tags are not allowed")
    return place


def _mapping(raw: yaml.MappingNode, place: Node, problems: Problems) -> Node:
    children: dict[str, Node] = {}
    for key, value in raw.value:
        if not isinstance(key, yaml.ScalarNode):
            problems.add(Node(None, place.path, key.start_mark.line + 1), "has a key that is not a word")
            continue
        path = child_path(place.path, key.value)
        if key.value in children:
            first = children[key.value].line
            problems.add(Node(None, path, key.start_mark.line + 1), f"is given twice (first in line {first})")
        child = _node(value, path, problems)
        # A problem of the value is best looked for at its key.
        children[key.value] = Node(child.value, path, key.start_mark.line + 1)
    return Node(children, place.path, place.line)


_SCALARS = frozenset({"null", "bool", "int", "float", "str"})


def _scalar(raw: yaml.ScalarNode) -> bool | int | float | str | None:
    match raw.tag.removeprefix(_CORE):
        case "null":
            return None
        case "bool":
            return str(raw.value) == "true"
        case "int":
            return int(raw.value)
        case "float":
            return float(raw.value)
        case _:
            return str(raw.value)
