"""What the kubelet adapter tells about its calls, for metrics.

Invariant: outcomes are a closed set, so that they can be label values.
"""

from __future__ import annotations

import enum
from typing import Protocol


class Outcome(enum.StrEnum):
    OK = "ok"
    FAILED = "failed"
    """At least one claim failed, the request made no sense, or kubelet refused the registration."""
    LATE = "late"
    """Answered at the deadline while the work goes on."""
    CANCELLED = "cancelled"
    """Kubelet gave up before there was an answer; the work goes on."""


class CallObserver(Protocol):
    def call_done(self, method: str, seconds: float, outcome: str) -> None:
        """method is the gRPC method's name, outcome an Outcome. Must not block or raise."""


class Unobserved:
    """A CallObserver that drops everything."""

    def call_done(self, method: str, seconds: float, outcome: str) -> None:
        del method, seconds, outcome
