"""Patterns and ids that rules of the node policy match hardware by.

Invariant: what a pattern may hold is closed, so that one cannot match by accident; no pattern at all matches
anything, an absent value too.
"""

from __future__ import annotations

import fnmatch
import re

from driver.strict import Kind, listing, shown, text


def _glob(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:*?\[\]!-]{1,64}", value):
        raise ValueError(
            f"{shown(value)} is not a pattern: 1 to 64 of letters, digits, '_.:-' and the wildcards *?[]!"
        )
    return value


def _hex_id(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{4}", value):
        raise ValueError(f"{shown(value)} is not four hex digits, like 15b3 (quote it if it is all digits)")
    return value.lower()


GLOBS: Kind[tuple[str, ...]] = listing(text(_glob, {"minLength": 1, "maxLength": 64}), minimum=1, maximum=64)
IDS: Kind[tuple[str, ...]] = listing(text(_hex_id, {"pattern": "^[0-9a-fA-F]{4}$"}), minimum=1, maximum=64)


def matches(patterns: tuple[str, ...], value: str | None) -> bool:
    """Whether value fits one of the patterns; no patterns: anything does, an absent value too."""
    if not patterns:
        return True
    return value is not None and any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns)
