"""What kind is told: its cluster config, for each Kubernetes version that the project's own clusters have.

Invariant: pure. Feature gates and served APIs are those of kndsim.cluster, so that a case that holds on this
machine's cluster meets the same API here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kndsim.cluster.conf import GATES, api_server_flags

IMAGES: Mapping[str, str] = {
    "1.34": "kindest/node:v1.34.8@sha256:02722c2dedddcfc00febf5d27fbeb9b7b2c14294c82109ff4a85d89ac9ba3256",
    "1.37": "kindest/node:v1.37.0@sha256:a1ed56cfb0e7b93589bdf97c8cd566405a265939e3620fc4f5de89adff580ae5",
}
"""kind's node images, as its releases 0.32 and 0.33 name them. A kubelet before 1.34.2 hangs on an idle DRA
connection."""

_CDI_FOLDERS = ["/etc/cdi", "/var/run/cdi"]
# kind takes the patch whose version its node image's configuration has, and leaves out the other.
_CONTAINERD = """\
version = {version}
[plugins."io.containerd.nri.v1.nri"]
disable = false
disable_connections = false
[plugins."{runtime}"]
enable_cdi = true
cdi_spec_dirs = {folders}
"""
_CONTAINERD_RUNTIMES = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
# As on a cluster of this machine, the first node takes pods too.
_UNTAINTED = """\
kind: InitConfiguration
nodeRegistration:
  taints: []
"""


class BadSpec(Exception):
    """A sentence for the reader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindSpec:
    """What is asked for. image: another node image than the version's own."""

    kubernetes: str = "1.37"
    workers: int = 2
    name: str = "knd"
    image: str = ""

    def __post_init__(self) -> None:
        if self.kubernetes not in GATES:
            raise BadSpec(f"Kubernetes {self.kubernetes} is not known: choose from {', '.join(GATES)}")
        if not 1 <= self.workers <= 8:
            raise BadSpec(f"{self.workers} workers: choose from 1 to 8")

    @property
    def nodes(self) -> tuple[str, ...]:
        """As kind names its containers, and Kubernetes its nodes; the control plane first."""
        workers = (
            f"{self.name}-worker{number if number > 1 else ''}" for number in range(1, self.workers + 1)
        )
        return (f"{self.name}-control-plane", *workers)


def cluster_config(spec: KindSpec) -> dict[str, Any]:
    """A document of kind.x-k8s.io/v1alpha4."""
    image = spec.image or IMAGES[spec.kubernetes]
    return {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "name": spec.name,
        "featureGates": dict.fromkeys(GATES[spec.kubernetes], True),
        "runtimeConfig": served(spec.kubernetes),
        "containerdConfigPatches": [containerd_patch(version) for version in _CONTAINERD_RUNTIMES],
        "nodes": [
            {"role": "control-plane", "image": image, "kubeadmConfigPatches": [_UNTAINTED]},
            *({"role": "worker", "image": image} for _ in range(spec.workers)),
        ],
    }


def served(kubernetes: str) -> dict[str, str]:
    """The API versions that a server of this machine's cluster is told to serve, as kind takes them."""
    prefix = "--runtime-config="
    (flag,) = (flag for flag in api_server_flags(kubernetes, "") if flag.startswith(prefix))
    pairs = (pair.partition("=") for pair in flag.removeprefix(prefix).split(","))
    return {version: value for version, _, value in pairs}


def containerd_patch(version: int) -> str:
    return _CONTAINERD.format(
        version=version, runtime=_CONTAINERD_RUNTIMES[version], folders=json.dumps(_CDI_FOLDERS)
    )
