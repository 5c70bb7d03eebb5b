"""What can be wrong with a device, and what is: the words for it.

Invariant: frozen values. A trouble's value is written to the cluster (taints) and to metrics, so it stays.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from driver.model import DeviceName


class Trouble(enum.StrEnum):
    """What can be wrong with a device that is offered or in a pod. The value is the name of its taint and a
    label of metrics."""

    NO_CARRIER = "no-carrier"
    """Its physical port has none."""
    SLOW_LINK = "slow-link"
    """Its port is slower than what the claim was promised."""
    NO_DRIVER = "no-driver"
    """Nothing that makes a netdev of it drives it, or something else does."""
    GONE = "gone"
    """The function is no more."""
    RESET = "reset"
    """What was given to the pod is no more; the function may be there, made anew."""
    FIRMWARE = "firmware"
    """A devlink health reporter says error."""
    QUARANTINED = "quarantined"
    """Withheld until it is clean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One trouble of a device. text: for the reader, with what to do where that is known."""

    trouble: Trouble
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceHealth:
    """A device, offered or held, and what is wrong with it. since: when that became so, as seconds since the
    epoch."""

    device: DeviceName
    findings: tuple[Finding, ...] = ()
    since: float = 0.0

    @property
    def healthy(self) -> bool:
        return not self.findings

    @property
    def message(self) -> str:
        return "; ".join(finding.text for finding in self.findings)
