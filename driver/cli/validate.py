"""`knd validate FILE`: claim configs and node policies, held against this version of the driver.

Invariant: what it calls valid the agent takes, as far as it can be told without a node; every problem is
told with its line and field.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from driver import claimconfig
from driver.cli.output import printable
from driver.errors import ConfigError, DriverError, FieldProblem
from driver.policy import load_policy
from driver.policy.load import KIND as POLICY
from driver.policy.yaml_tree import MAX_CHARACTERS, parse_yaml
from driver.strict import Node, Problems


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "validate",
        help="check a node policy, a claim config, or manifests with claim configs in them",
        description="YAML or JSON; of DeviceClasses, ResourceClaims and their templates the configs of "
        "this driver are checked.",
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--driver", default="knd.internal", help="DRA driver name (default %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    file = arguments.file
    try:
        valid = check(_read(file), str(file), arguments.driver)
    except ConfigError as error:
        for problem in error.problems:
            print(printable(str(problem)))
        return 1
    kinds = " and ".join(f"{count} {kind}" for kind, count in sorted(valid.items()))
    print(printable(f"{file}: {kinds}, valid"))
    return 0


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as stream:
            return stream.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError:
        raise DriverError(f"{file} is not text in UTF-8") from None


def check(text: str, source: str, driver: str) -> Counter[str]:
    """How many documents of each kind of ours there are. ConfigError with every problem, or if none is."""
    valid: Counter[str] = Counter()
    found: list[FieldProblem] = []
    for document in _documents(text):
        problems = Problems()
        root = parse_yaml(document, problems)
        if root is not None and _word(root, "kind") == POLICY:
            try:
                load_policy(document, source)
            except ConfigError as error:
                found += error.problems
            valid[POLICY] += 1
            continue
        for config in _ours(root, driver) if root is not None else ():
            claimconfig.decode_tree(config, problems)
            valid[claimconfig.KIND] += 1
        found += [
            FieldProblem(": ".join(filter(None, (f"{source}:{each.line or 1}", each.path))), each.message)
            for each in problems
        ]
    if not found and not valid:
        found.append(
            FieldProblem(
                source,
                f"holds no {POLICY}, no {claimconfig.KIND}, and no object with one for driver {driver}",
            )
        )
    if found:
        raise ConfigError(found)
    return valid


def _documents(text: str) -> Iterator[str]:
    """Each document on the lines it has in the whole text. A marker is one only at a line's start."""
    begun, lines = 0, text.split("\n")
    for number, line in enumerate([*lines, "---"]):
        if line.rstrip() == "---" or line.startswith("--- "):
            inner = lines[begun:number]
            if any(each.strip() and not each.lstrip().startswith("#") for each in inner):
                yield "\n" * begun + "\n".join(inner)
            begun = number + 1


def _ours(root: Node, driver: str) -> Iterator[Node]:
    """The document itself, or what an object of the resource API has for this driver."""
    return iter([root]) if _word(root, "kind") == claimconfig.KIND else _configs(root, driver)


def _configs(node: Node, driver: str) -> Iterator[Node]:
    children = node.value
    if isinstance(children, Mapping):
        if "parameters" in children and _word(node, "driver") == driver:
            yield children["parameters"]
            return
        for child in children.values():
            yield from _configs(child, driver)
    elif isinstance(children, tuple):
        for child in children:
            yield from _configs(child, driver)


def _word(node: Node, key: str) -> object:
    child = node.value.get(key) if isinstance(node.value, Mapping) else None
    return child.value if child is not None else None
