"""What the agent tells other commands of itself: which policy is in force, and how it counts.

Invariant: a projection, in the run folder: written by the one agent, never read by it; what cannot be read is
as if no agent had run since the node was booted.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from driver.errors import DriverError
from driver.paths import Paths
from driver.policy import NodePolicy, PolicyFile, load_policy
from driver.whole_file import replace_whole

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """policy is the text of the policy in force, which may be older than the file: "" for none."""

    pid: int
    node: str
    hook: str
    policy_file: str = ""
    policy: str = ""
    policy_problem: str = ""
    """Why the file is not in force."""
    has_counters: bool | None = None
    """Whether the API server keeps shared counters; None: it was not asked."""
    has_shares: bool | None = None
    """Whether it lets several claims have one device; None: it was not asked."""


def write(paths: Paths, running: Running) -> None:
    """In place of what was there. Nothing depends on it, so that a full disk is only told."""
    path = paths.running
    try:
        replace_whole(path, json.dumps(asdict(running)), 0o600)
    except OSError as error:
        log.warning("%s cannot be written, and other commands will not know the policy: %s", path, error)


def read(paths: Paths) -> Running | None:
    """Of the agent that runs here, or ran last; None if there is none to be known of."""
    try:
        tree = json.loads(paths.running.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            return None
        known = {name: tree[name] for name in Running.__slots__ if name in tree}
        return Running(**known)
    except (OSError, ValueError, TypeError):
        return None


def policy_in_force(paths: Paths, given: Path | None) -> NodePolicy:
    """As the file says, or as the agent here has it; the default where none has run. DriverError if it cannot
    be understood: the file is bad, or another release wrote it."""
    if given is not None:
        file = PolicyFile(given)
        if file.problem:
            raise DriverError(file.problem)
        return file.current
    found = read(paths)
    return load_policy(found.policy, str(paths.running)) if found and found.policy else NodePolicy()
