"""The one real cluster of a test session, for tests/e2e and tests/contract: which, and the fixture.

Invariant: KND_CLUSTER alone decides; a run that names none gets the default and says so. The cluster is
started when the first test asks for it and is gone when the session ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kndsim.cluster import Cluster
    from kndsim.cluster.kind import KindCluster

VARIABLE = "KND_CLUSTER"
NODES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """pace: how many times longer than on the machine's own cluster things may take."""

    name: str
    kubernetes: str
    containerd: str
    pace: float = 1.0
    nodes: int = NODES

    @property
    def version(self) -> tuple[int, int]:
        major, minor = self.kubernetes.split(".")
        return int(major), int(minor)


CHOICES = {
    each.name: each
    for each in (
        Choice(name="machine-1.37", kubernetes="1.37", containerd="2.4"),
        Choice(name="machine-1.34", kubernetes="1.34", containerd="2.1"),
        # Its processors are emulated.
        Choice(name="guest", kubernetes="1.37", containerd="2.4", pace=8.0, nodes=1),
    )
}
GUEST = "guest"
KIND = "kind"
DEFAULT = "machine-1.37"


def chosen() -> Choice:
    """UsageError for a name that is not there."""
    name = os.environ.get(VARIABLE) or DEFAULT
    if name == KIND:
        return _kind()
    if name not in CHOICES:
        raise pytest.UsageError(f"{VARIABLE}={name} is no cluster: choose from {', '.join((*CHOICES, KIND))}")
    return CHOICES[name]


def _kind() -> Choice:
    """That which `make kind-up` made; UsageError if there is none."""
    from kndsim.cluster import NotUp
    from kndsim.cluster.kind import read_description
    from kndsim.kind.up import FOLDER

    try:
        made = read_description(FOLDER)
    except NotUp as error:
        raise pytest.UsageError(f"{VARIABLE}={KIND}: {error}") from error
    # Node containers share a machine with their images' downloads and each other's programs.
    return Choice(name=KIND, kubernetes=made.kubernetes, containerd="of the node image", pace=2.0)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster | KindCluster]:
    from kndsim.cluster import ClusterSpec
    from kndsim.cluster import cluster as on_this_machine
    from kndsim.cluster.in_guest import guest_cluster
    from kndsim.cluster.kind import running as running_kind
    from kndsim.deployed import built_image
    from kndsim.kind.up import FOLDER

    choice = chosen()
    if choice.name == KIND:
        with running_kind(FOLDER) as running:
            yield running
        return
    spec = ClusterSpec(kubernetes=choice.kubernetes, containerd=choice.containerd, nodes=choice.nodes)
    if choice.name == GUEST:
        # Unpacked on this machine: there it takes minutes.
        opened = guest_cluster(replace(spec, images=(built_image(),)))
    else:
        opened = on_this_machine(spec)
    with opened as running:
        yield running
