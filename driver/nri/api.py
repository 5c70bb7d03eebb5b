"""The NRI calls by name, and the runtime's words for a sandbox turned into ours.

Invariant: protobuf types end here. A field that is missing or makes no sense becomes None or an empty
value, never an exception: runtimes differ in what they fill in, most of all when a pod stops.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path

from driver.model import Adjustment, Container, PodRef, PodUid, Sandbox, SandboxId
from driver.pb.nri.v1 import api_pb2 as pb

PLUGIN_SERVICE = "nri.pkg.api.v1alpha1.Plugin"
RUNTIME_SERVICE = "nri.pkg.api.v1alpha1.Runtime"

EVENT_MASK = 0xF
"""RunPodSandbox, StopPodSandbox, RemovePodSandbox, CreateContainer: valid for every NRI release. A bit that
a runtime does not know makes it drop the plugin, and 0 would ask for all events."""

NETWORK_NAMESPACE = "network"
POD_SOURCE = "kubernetes.io/config.source"
"""Where kubelet has a pod from. It sets this on every pod it runs, over whatever the pod says itself."""
STATIC_SOURCES = frozenset({"file", "http"})


class Hook(enum.StrEnum):
    """What the driver acts on."""

    RUN = "RunPodSandbox"
    STOP = "StopPodSandbox"
    REMOVE = "RemovePodSandbox"
    CREATE = "CreateContainer"


HOOK_OF_EVENT = {
    int(pb.RUN_POD_SANDBOX): Hook.RUN,
    int(pb.STOP_POD_SANDBOX): Hook.STOP,
    int(pb.REMOVE_POD_SANDBOX): Hook.REMOVE,
}
"""Pod events as StateChange carries them. Every other event in a StateChange is nothing to this driver."""

EMPTY_METHODS = frozenset(
    {
        "UpdatePodSandbox",
        "PostUpdatePodSandbox",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "UpdateContainer",
        "PostUpdateContainer",
        "StopContainer",
        "RemoveContainer",
        "ValidateContainerAdjustment",
    }
)
"""Not subscribed to, yet answered: one UNIMPLEMENTED makes a runtime change how it sends all pod events."""


def netns_path(pod: pb.PodSandbox) -> Path | None:
    """Where the runtime says the pod's network namespace is; None where it does not say it."""
    for namespace in pod.linux.namespaces:
        if namespace.type == NETWORK_NAMESPACE:
            path = namespace.path
            return Path(path) if path.startswith("/") and "\0" not in path else None
    return None


def sandbox_of(pod: pb.PodSandbox) -> Sandbox | None:
    """None for a sandbox without an id: nothing could ever be matched with it."""
    if not pod.id:
        return None
    return Sandbox(
        id=SandboxId(pod.id),
        pod=PodRef(pod.namespace, pod.name, PodUid(pod.uid)),
        netns_path=netns_path(pod),
        pid=pod.pid,
        static=pod.annotations.get(POD_SOURCE) in STATIC_SOURCES,
    )


def container_of(container: pb.Container) -> Container:
    pairs = (entry.partition("=") for entry in container.env)
    return Container(name=container.name, env={name: value for name, _, value in pairs})


def answer_with(adjustment: Adjustment) -> bytes:
    """An answer to CreateContainer; empty where nothing is to be changed."""
    answer = pb.CreateContainerResponse()
    if adjustment.cgroup:
        answer.adjust.linux.resources.unified.update(adjustment.cgroup)
    return answer.SerializeToString()


LIVE_STATES = frozenset({pb.CONTAINER_CREATED, pb.CONTAINER_RUNNING, pb.CONTAINER_PAUSED})
"""A created container has its namespaces already and starts without another word to plugins."""


@dataclass(slots=True)
class Inventory:
    """What the runtime has, gathered from the parts of a Synchronize."""

    sandboxes: list[Sandbox] = field(default_factory=list)
    """In the runtime's order, stopped ones included; without those that have no id."""
    containers: dict[SandboxId, list[str]] = field(default_factory=dict)
    """Names of the live containers."""

    def add(self, message: pb.SynchronizeRequest) -> None:
        self.sandboxes += [sandbox for pod in message.pods if (sandbox := sandbox_of(pod)) is not None]
        for container in message.containers:
            if container.state in LIVE_STATES:
                self.containers.setdefault(SandboxId(container.pod_sandbox_id), []).append(container.name)
