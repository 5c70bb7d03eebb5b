"""`knd validate FILE`: a claim's NetworkDeviceConfig or a node policy, held against this version."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from driver import claimconfig
from driver.errors import ConfigError
from driver.policy import load_policy


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("validate", help="check a claim config or a node policy")
    parser.add_argument("file", type=Path)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    text = arguments.file.read_text(encoding="utf-8")
    try:
        kind = check(text, str(arguments.file))
    except ConfigError as error:
        for problem in error.problems:
            print(problem)
        return 1
    print(f"{arguments.file}: a valid {kind}")
    return 0


def check(text: str, source: str) -> str:
    """The kind of a valid document. ConfigError with every problem."""
    if "kind: NodePolicy" in text:
        load_policy(text, source)
        return "NodePolicy"
    if not text.lstrip().startswith("{"):
        text = json.dumps(yaml.safe_load(text))
    claimconfig.decode(text)
    return claimconfig.KIND
