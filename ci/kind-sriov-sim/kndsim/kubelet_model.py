"""What the simulated kubelet speaks of: claims, devices, plugins, its log and its errors.

Invariant: frozen values without I/O. PrepareFailed is what a user would see as a pod event;
ContractBroken is a fault of the driver that a real kubelet might let pass.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class ClaimLike(Protocol):
    """Anything that names a ResourceClaim."""

    @property
    def namespace(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def uid(self) -> str: ...


class SliceWiper(Protocol):
    """The API server, as far as kubelet deletes ResourceSlices there."""

    def wipe_slices(self, node: str, driver: str | None) -> None:
        """Delete all slices of the node: one driver's (it was away too long), or all (kubelet start)."""


class Version(enum.StrEnum):
    """DRA services by the name that plugins advertise."""

    V1 = "v1.DRAPlugin"
    V1BETA1 = "v1beta1.DRAPlugin"


@dataclass(frozen=True, slots=True)
class SimClaim:
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SimDevice:
    """A device as the driver described it. No requests: it serves every request of the claim."""

    requests: tuple[str, ...]
    pool: str
    device: str
    cdi_ids: tuple[str, ...]
    share_id: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One entry of a response. An empty error is success."""

    error: str
    devices: tuple[SimDevice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeletTiming:
    """Seconds. scale multiplies what a test should not have to wait for: back-off and slice grace."""

    dial: float = 10.0
    get_info: float = 1.0
    notify: float = 5.0
    call: float = 45.0
    first_back_off: float = 0.5
    last_back_off: float = 122.0
    slice_grace: float = 30.0
    poll: float = 0.02
    scale: float = 1.0

    def back_off(self, failures: int) -> float:
        """The wait after that many failures in a row, from 1."""
        doubled = self.first_back_off * 2.0 ** min(failures - 1, 16)
        return self.scale * min(doubled, self.last_back_off)


class KubeletEvent(enum.StrEnum):
    STARTED = "started"
    SOCKET_SEEN = "socket seen"
    SOCKET_GONE = "socket gone"
    REGISTERED = "registered"
    REGISTRATION_FAILED = "registration failed"
    DEREGISTERED = "deregistered"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    HEALTH_ENDED = "health stream ended"
    SLICES_WIPED = "slices wiped"
    PREPARED = "prepared"
    PREPARE_SKIPPED = "prepare skipped"
    PREPARE_FAILED = "prepare failed"
    UNPREPARED = "unprepared"
    UNPREPARE_SKIPPED = "unprepare skipped"
    UNPREPARE_FAILED = "unprepare failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """at is time.monotonic(); subject a driver name, or a socket's path while its driver is unknown."""

    at: float
    event: KubeletEvent
    subject: str
    detail: str = ""
    claims: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """A plugin's answer to GetInfo, checked."""

    driver: str
    socket: Path
    endpoint: Path
    version: Version
    offered: tuple[str, ...] = ()
    """All the services that it says it serves."""


class KubeletError(Exception):
    """Base of what the simulated kubelet raises on purpose."""


class RegistrationFailed(KubeletError):
    """tell: whether the plugin is told (kubelet tells it of refusals, not of silence)."""

    def __init__(self, text: str, *, tell: bool) -> None:
        self.tell = tell
        super().__init__(text)


class PrepareFailed(KubeletError):
    """The pod cannot start for now; kubelet would try again."""


class UnprepareFailed(KubeletError):
    """The pod stays Terminating for now; kubelet would try again."""


class ContractBroken(PrepareFailed, UnprepareFailed):
    """The driver's answer is not what kubelet or the runtime need; trying again is pointless."""


class ImpossibleUse(KubeletError):
    """A test asked for what a kubelet never does."""
