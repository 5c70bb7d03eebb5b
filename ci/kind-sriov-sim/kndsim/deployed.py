"""The agents in a cluster, deployed as a user deploys them: by `kubectl apply -k`.

Invariant: what tests run against is deploy/manifests, changed only by an overlay of a few lines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kndsim.agent_image import REPOSITORY, agent_image
from kndsim.place import CommandFailed, Done

NAMESPACE = "knd-system"
DAEMONSET = "knd-agent"
MANIFESTS = REPOSITORY / "deploy/manifests"
OVERLAY = REPOSITORY / "ci/kind-sriov-sim/overlays/test"
GUEST_OVERLAY = REPOSITORY / "ci/kind-sriov-sim/overlays/guest"
READY_WITHIN = 120.0


class Cluster(Protocol):
    """What is needed of one: kndsim.cluster's, a guest's, or kind's."""

    def load_image(self, tar: Path) -> None: ...

    def kubectl(self, *args: str, stdin: str = "", check: bool = True, timeout: float = 60.0) -> Done: ...


class NotReady(Exception):
    """The agents did not become ready in time: how the pods stand, their events, the end of their logs."""


def built_image() -> Path:
    """The agent's tar: what KND_AGENT_IMAGE names, as a machine that has a container engine makes it; else
    it is made here."""
    told = os.environ.get("KND_AGENT_IMAGE")
    return Path(told) if told else agent_image()


def deploy_agent(
    cluster: Cluster, overlay: Path = OVERLAY, *, within: float = READY_WITHIN, image: Path | None = None
) -> None:
    """Put the image on every node, apply the overlay, and wait until an agent is ready on each. May be
    repeated, with another image too: then the agents are replaced. image: a tar, else built_image()."""
    cluster.load_image(image or built_image())
    cluster.kubectl("apply", "-k", str(overlay))
    wait_ready(cluster, within=within)


def wait_ready(cluster: Cluster, *, within: float = READY_WITHIN) -> None:
    watch = ("rollout", "status", f"daemonset/{DAEMONSET}", f"--timeout={within:.0f}s")
    try:
        _in_namespace(cluster, watch, timeout=within + 10)
    except CommandFailed as failed:
        raise NotReady(f"{failed}\n{describe(cluster)}") from failed


def restart_agents(cluster: Cluster, *, within: float = READY_WITHIN) -> None:
    """One node after the other, as an upgrade does."""
    _in_namespace(cluster, ("rollout", "restart", f"daemonset/{DAEMONSET}"))
    wait_ready(cluster, within=within)


def remove_agent(cluster: Cluster, overlay: Path = OVERLAY) -> None:
    """All of it, the namespace too. What the agents had given away stays where it is: see deploy/cleanup."""
    cluster.kubectl("delete", "-k", str(overlay), "--ignore-not-found", "--wait", timeout=120)


def describe(cluster: Cluster) -> str:
    """For whoever looks for the reason."""
    questions = (
        ("get", "pods", "-o", "wide"),
        ("get", "events", "--sort-by=.lastTimestamp"),
        ("logs", f"daemonset/{DAEMONSET}", "--all-pods", "--all-containers", "--tail=40", "--prefix"),
    )
    answers = [_in_namespace(cluster, question, check=False) for question in questions]
    return "\n".join((answer.out or answer.err).strip() for answer in answers)


def _in_namespace(
    cluster: Cluster, args: Sequence[str], *, check: bool = True, timeout: float = 60.0
) -> Done:
    return cluster.kubectl("--namespace", NAMESPACE, *args, check=check, timeout=timeout)
