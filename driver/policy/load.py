"""Reading a node policy.

Invariant: a policy is taken whole or not at all. Each problem names file, line and field, and all of
them are found in one pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from driver.errors import ConfigError, FieldProblem
from driver.policy.bandwidth import bandwidth_problems
from driver.policy.rules import NodePolicy
from driver.policy.shared import shared_problems
from driver.policy.yaml_tree import parse_yaml
from driver.qos import class_problems, shaper_problems
from driver.strict import Kind, Node, Problem, Problems, record

API_VERSION = "knd.internal/v1alpha1"
KIND = "NodePolicy"

_POLICY: Kind[NodePolicy] = record(NodePolicy, header={"apiVersion": API_VERSION, "kind": KIND})


def load_policy(text: str, source: str) -> NodePolicy:
    """The policy in text (YAML). source names it in problems, usually the file.

    Raises ConfigError; each problem's path is like `policy.yaml:12: devices[0].offer`.
    """
    problems = Problems()
    root = parse_yaml(text, problems)
    policy = _POLICY.decode(root, problems) if root is not None else None
    found = list(problems)
    if policy is not None and root is not None and not found:
        together = (
            *class_problems(policy.classes),
            *shaper_problems(policy.classes, policy.shaper),
            *bandwidth_problems(policy.port_bandwidth),
            *shared_problems(policy.shared),
        )
        found += [_placed(root, problem) for problem in together]
    if policy is None or found:
        found.sort(key=lambda problem: problem.line or 0)
        raise ConfigError([_outward(problem, source) for problem in found])
    return policy


def _placed(root: Node, problem: FieldProblem) -> Problem:
    """The problem with the line of the nearest field that the text has."""
    lines = {node.path: node.line for node in _walk(root)}
    path = problem.path
    while path and path not in lines:
        path = re.sub(r"(\.?[^.\[\]]+|\[[^\]]*\])$", "", path)
    return Problem(problem.path, problem.message, lines.get(path))


def _walk(node: Node) -> Iterator[Node]:
    yield node
    if isinstance(node.value, Mapping):
        for child in node.value.values():
            yield from _walk(child)
    elif isinstance(node.value, tuple):
        for child in node.value:
            yield from _walk(child)


def _outward(problem: Problem, source: str) -> FieldProblem:
    place = source if problem.line is None else f"{source}:{problem.line}"
    return FieldProblem(f"{place}: {problem.path}" if problem.path else place, problem.message)


def policy_schema() -> dict[str, object]:
    """JSON Schema (draft 2020-12) of a node policy."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": KIND,
        "description": "What a node offers, and what users may do with it.",
        **_POLICY.schema,
    }
