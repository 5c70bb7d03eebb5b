"""ARCHITECTURE.md names modules and functions; each must exist, so that a reader finds what it says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
DOTTED = sorted(set(re.findall(r"`((?:driver|hw|bpf|kndsim)(?:\.\w+)+)`", TEXT)))
FILES = sorted(set(re.findall(r"`((?:driver|hw|bpf|deploy|tests|ci)/[\w./-]+)`", TEXT)))
ALLOWED_ABSENT = {"bpf.compile"}
"""Imports bcc, which only its child process may."""


def resolve(name: str) -> object:
    """The module, class or function of that dotted name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise LookupError(name)


def test_the_document_names_what_there_is_to_name() -> None:
    assert len(DOTTED) > 30


@pytest.mark.parametrize("name", DOTTED)
def test_a_named_module_or_function_exists(name: str) -> None:
    if name in ALLOWED_ABSENT:
        assert (ROOT / (name.replace(".", "/") + ".py")).exists()
        return
    resolve(name)


@pytest.mark.parametrize("path", FILES)
def test_a_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_a_name_that_is_not_there_is_noticed() -> None:
    with pytest.raises((LookupError, AttributeError)):
        resolve("driver.lifecycle.nowhere")
