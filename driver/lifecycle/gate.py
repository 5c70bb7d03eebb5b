"""Whether the agent may take on anything new, and why not.

Invariant: nothing is prepared that could then start without its device: no runtime, no prepare. Going
home is never refused, save while the journal cannot be trusted and nothing was compared yet.
"""

from __future__ import annotations

from driver.errors import NotNow, RecoveryMode


class Gate:
    """Read on the event loop; set by whoever learns of the change."""

    def __init__(self, recovery: str) -> None:
        self.recovery = recovery
        """Why the journal is not trusted, or ""."""
        self.runtime = False
        self.settled = False
        """What an earlier agent left half done has been finished or undone."""
        self.policy_problem = ""

    def check_prepare(self) -> None:
        """NotNow or RecoveryMode with the first reason against preparing."""
        self.check_unprepare()
        if not self.settled:
            raise NotNow("the agent is still finishing what it was doing before it was restarted")
        if not self.runtime:
            raise NotNow(
                "the agent is not registered with the container runtime, so no pod could be given a device"
            )
        if self.policy_problem:
            raise NotNow(f"the node policy is not valid: {self.policy_problem}")

    def check_unprepare(self) -> None:
        if self.recovery:
            raise RecoveryMode(f"the agent compares the node with its records first: {self.recovery}")
