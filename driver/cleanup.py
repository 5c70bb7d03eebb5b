"""Bringing every device of the node home without an agent: what `knd cleanup` does.

Invariant: never beside a living agent; and a pod that still lives keeps its devices unless forced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from driver.assembly import Assembly, Outside, assemble, make_folders
from driver.clock import SystemClock
from driver.errors import NotNow, Refusal
from driver.execute.engine import Point
from driver.kubelet.plugin import make_plugin_dir
from driver.kubelet.takeover import TakeoverLock
from driver.model import (
    Claim,
    ClaimRef,
    DeviceStatus,
    DriverEvent,
    OfferedDevice,
    PodRef,
    PodUid,
)
from driver.policy import PolicyFile
from driver.settings import Settings

log = logging.getLogger(__name__)


class Nobody:
    """No cluster: the node is brought home from its records and the kernel alone."""

    async def read_claim(self, ref: ClaimRef) -> Claim:
        raise NotNow("cleanup asks no API server")

    def claims_of(self, uid: PodUid) -> frozenset[str] | None:
        return None

    def labels_of(self, uid: PodUid) -> Mapping[str, str]:
        return {}

    async def look_up(self, pod: PodRef, deadline: float) -> None:
        pass

    def write_status(self, claim: ClaimRef, statuses: Sequence[DeviceStatus]) -> None:
        pass

    def emit(self, event: DriverEvent) -> None:
        log.warning("%s: %s", event.reason, event.message)

    def offer(self, devices: Sequence[OfferedDevice]) -> None:
        pass

    def ran_bare(self, containers: int) -> None:
        pass

    def refused(self, reason: str) -> None:
        pass

    def at(self, point: Point, owner: str, act: str) -> None:
        pass

    def step_done(self, step: str, seconds: float, outcome: str) -> None:
        pass


def clean_up(settings: Settings, *, force: bool) -> tuple[str, ...]:
    """Home with everything, and the VFs that were made here gone; returns what did not come, a sentence each.

    Refusal: an agent is running, or a living pod has devices and force was not given.
    """
    clock = SystemClock()
    make_folders(settings)
    make_plugin_dir(settings.paths)
    nobody = Nobody()
    outside = Outside(
        claims=nobody,
        pods=nobody,
        statuses=nobody,
        events=nobody,
        slices=nobody,
        telemetry=nobody,
        observer=nobody,
    )
    with TakeoverLock(settings.paths, clock) as lock, ExitStack() as stack:
        if not lock.try_acquire():
            raise Refusal("AgentRunning", f"an agent is running ({lock.holder()}): stop it first")
        made = assemble(stack, settings, PolicyFile(settings.policy), clock, outside)
        return asyncio.run(_bring_home(made, force=force))


async def _bring_home(made: Assembly, *, force: bool) -> tuple[str, ...]:
    lifecycle = made.lifecycle
    if lifecycle.gate.recovery and not force:
        raise Refusal("Recovery", f"{lifecycle.gate.recovery}; --force goes on with what records there are")
    lifecycle.gate.recovery = ""
    try:
        await lifecycle.start(make_vfs=False)
        living = lifecycle.attached_pods()
        if living and not force:
            raise Refusal("PodsAttached", f"pods have devices of this node: {', '.join(living)}; see --force")
        left = await lifecycle.release_all()
        return (*left, *await lifecycle.remove_vfs())
    finally:
        await lifecycle.stop(SystemClock().monotonic() + 10.0)
