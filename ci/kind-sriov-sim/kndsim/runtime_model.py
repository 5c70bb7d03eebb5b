"""The words of the simulated container runtime: modes, pods, containers, what it saw, how it fails.

Invariant: values only; every record is frozen once made.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class RuntimeMode(enum.StrEnum):
    STATE_CHANGE = "state-change"
    """containerd 2.1 and 2.2, with NRI before 0.12: pod events as StateChange."""
    POD_RPC = "pod-rpc"
    """containerd with NRI from 0.12: a call per event, StateChange if the plugin does not have it."""
    CRIO = "crio"
    """CRI-O: the netns is gone before Stop, Stop may repeat and may fail the stop, there is no pause."""


class HookOutcome(enum.StrEnum):
    OK = "ok"
    ERROR = "error"
    """The plugin said no in time; the operation failed, where it can."""
    TIMEOUT_OPEN = "timeout-open"
    """The plugin was too late and is dropped; the operation went on without it."""
    ABSENT = "absent"
    """No plugin, or it went away in the middle; the operation went on without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookRecord:
    """One event as the runtime saw it. started is on time.monotonic's clock; seconds is from the write of
    the request to the read of the last plugin's answer."""

    event: str
    sandbox: str
    started: float
    seconds: float
    outcome: HookOutcome
    detail: str = ""
    cgroup: Mapping[str, str] = field(default_factory=dict)
    """Of CreateContainer: the files of the container's cgroup that plugins set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSpec:
    namespace: str
    name: str
    uid: str
    host_network: bool = False
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSandbox:
    """netns_path is None where the pod uses the host's and the runtime does not pin it. pid is the pause
    process, 0 where there is none."""

    id: str
    pod: PodSpec
    netns_path: Path | None
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SimContainer:
    """devices are the device nodes' paths inside the container; cgroup is what its cgroup files are given."""

    id: str
    name: str
    sandbox: str
    pid: int
    env: Mapping[str, str]
    devices: tuple[str, ...]
    cgroup: Mapping[str, str] = field(default_factory=dict)


class SandboxFailed(Exception):
    """RunPodSandbox failed; nothing of the sandbox is left. The text is what kubelet would show."""


class StopFailed(Exception):
    """StopPodSandbox failed (CRI-O only); kubelet would ask again."""


class ContainerFailed(Exception):
    """reason is kubelet's: CreateContainerError or StartError."""

    def __init__(self, reason: str, text: str) -> None:
        self.reason = reason
        self.text = text
        super().__init__(f"{reason}: {text}")
