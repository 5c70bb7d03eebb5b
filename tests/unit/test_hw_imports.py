"""The layering of hw that keeps its promises: who may load what, and what is never used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = sorted(path for folder in ("hw", "driver", "bpf") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_only_netlink_imports_pyroute2_and_only_its_message_classes() -> None:
    """pyroute2's own sockets act in the namespace of the thread that uses them: none is ever made."""
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in PRODUCT
        for name in imports(path)
        if name.split(".")[0] == "pyroute2"
    }
    assert {path for path, _ in found} == {"hw/netlink.py"}
    assert all(name.startswith("pyroute2.netlink.rtnl.") and name.endswith("msg") for _, name in found)


def test_only_verbs_names_pyverbs() -> None:
    named = {path.relative_to(ROOT).as_posix() for path in PRODUCT if '"pyverbs' in path.read_text()}
    imported = {
        path.relative_to(ROOT).as_posix()
        for path in PRODUCT
        if any(name.startswith("pyverbs") for name in imports(path))
    }
    assert named | imported == {"hw/rdma/verbs.py"}


@pytest.mark.parametrize("module", ["hw.scan", "hw.monitor", "hw.rdma.verbs", "driver.inventory"])
def test_reading_needs_neither_pyroute2_nor_pyverbs(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('pyroute2', 'pyverbs', 'bcc') if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
