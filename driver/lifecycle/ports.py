"""What the life of a claim needs from outside, and what it offers to the adapters.

Invariant: adapters (driver.kubelet, driver.nri, driver.kube) translate and call; they decide nothing.
Deadlines are absolute, in seconds of the Clock's monotonic time. Methods without `async` never block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from driver.clock import Clock as Clock
from driver.model import (
    Adjustment,
    Claim,
    ClaimRef,
    ClaimUid,
    Container,
    DeviceStatus,
    DriverEvent,
    OfferedDevice,
    PodRef,
    PodUid,
    PoolName,
    PreparedDevice,
    Sandbox,
    SandboxId,
)
from driver.troubles import DeviceHealth

# --- needed -----------------------------------------------------------------------------------------


class ClaimReader(Protocol):
    async def read_claim(self, ref: ClaimRef) -> Claim:
        """Read fresh from the API server. NotNow if it cannot be asked, Refusal if the claim is gone or
        has another UID. devices and configs hold only this driver's entries."""


class PodDirectory(Protocol):
    """Which claims a pod of this node names: from one watch, with a look-up for unknown pods."""

    def claims_of(self, uid: PodUid) -> frozenset[str] | None:
        """Names of its ResourceClaims (in the pod's namespace, template-made ones resolved); None: not
        known, or not all of them have been made yet."""

    def labels_of(self, uid: PodUid) -> Mapping[str, str]:
        """The pod's labels; empty while it is not known."""

    async def look_up(self, pod: PodRef, deadline: float) -> None:
        """Ask the API server for this pod, so that claims_of knows it. Returns quietly when it cannot."""


class StatusWriter(Protocol):
    def write_status(self, claim: ClaimRef, statuses: Sequence[DeviceStatus]) -> None:
        """Queue the whole of this driver's status.devices of the claim; an empty sequence drops it from
        the queue. Later calls for one claim replace earlier ones. Retried, never raises."""


class EventSink(Protocol):
    def emit(self, event: DriverEvent) -> None:
        """Queue an event; equal ones are folded. Never raises."""


class SlicePublisher(Protocol):
    def offer(self, devices: Sequence[OfferedDevice]) -> None:
        """Replace what this node should offer. Written only when it differs from the cluster's state."""


# --- offered ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClaimFailed:
    """Why one claim could not be prepared or unprepared; shown to the user by kubelet."""

    message: str


class ClaimHandler(Protocol):
    """What the kubelet adapter calls. Calls may repeat, overlap and be cancelled."""

    async def prepare(
        self, claims: Sequence[ClaimRef], deadline: float
    ) -> Mapping[ClaimUid, tuple[PreparedDevice, ...] | ClaimFailed]:
        """One entry per claim; one bad claim does not fail the others."""

    async def unprepare(
        self, claims: Sequence[ClaimRef], deadline: float
    ) -> Mapping[ClaimUid, ClaimFailed | None]: ...


class HealthSource(Protocol):
    """The health of every device that is offered or held. For use within the agent's event loop."""

    @property
    def pool(self) -> PoolName: ...

    @property
    def version(self) -> int:
        """Another number whenever devices has changed."""

    @property
    def devices(self) -> Sequence[DeviceHealth]: ...

    async def newer_than(self, version: int, seconds: float) -> None:
        """Returns when there is another version, or after that many seconds."""


class SandboxHandler(Protocol):
    """What the runtime adapter calls. Every method answers before its deadline or raises."""

    def runtime_connected(self, name: str, version: str) -> None: ...

    def runtime_lost(self) -> None: ...

    async def synchronize(
        self, sandboxes: Sequence[Sandbox], containers: Mapping[SandboxId, Sequence[str]]
    ) -> None:
        """All sandboxes the runtime has, stopped ones included, and the names of the running containers
        of each. Copies and returns; work is queued."""

    async def run_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        """NotNow: fail the hook, the runtime's retry may mend it. Returns for a lasting refusal: the
        sandbox lives, unattached, and its containers are refused."""

    async def stop_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        """Never fails; what is not done by the deadline goes on."""

    async def remove_sandbox(self, sandbox: Sandbox, deadline: float) -> None: ...

    async def create_container(self, sandbox: Sandbox, container: Container, deadline: float) -> Adjustment:
        """Refusal or NotNow if a container of this pod must not start now."""
