"""The policy's section `usage`: what the ledger keeps of a pod, and for how long."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from driver.strict import Key, integer, listing, shown, text

_LABEL = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_MAX_LABELS = 16
DEFAULT_KEEP_DAYS = 400
"""A year and a month: the longest that a bill is disputed."""


def _label(value: str) -> str:
    if not _LABEL.fullmatch(value):
        raise ValueError(f"{shown(value)} is not the name of a pod label, like app.kubernetes.io/name")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class UsagePolicy:
    pod_labels: Annotated[
        tuple[str, ...],
        Key(
            "podLabels",
            listing(text(_label, {"pattern": f"^{_LABEL.pattern}$"}), maximum=_MAX_LABELS),
            "Pod labels that are kept with what the pod used.",
        ),
    ] = ()
    keep_days: Annotated[
        int, Key("keepDays", integer(1, 3650), "How long the usage of pods that are gone is kept.")
    ] = DEFAULT_KEEP_DAYS


DEFAULT_USAGE = UsagePolicy()
