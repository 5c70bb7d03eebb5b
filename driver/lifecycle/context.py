"""What the parts of the lifecycle share. Made once, by the composition root.

Invariant: the ports are plugged in here and nowhere else; no part of the lifecycle constructs one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from bpf.accounting import Accounting
from bpf.attach import TcxPrograms
from bpf.layout import Hook
from driver.cdi import CdiProjection, LiveFiles
from driver.clock import Clock
from driver.execute.engine import Engine
from driver.execute.foreign import Foreign
from driver.execute.shape import Shaper
from driver.execute.target import Target
from driver.journal.ledger import Ledger
from driver.lifecycle.book import Book
from driver.lifecycle.devices import Devices
from driver.lifecycle.ports import ClaimReader, EventSink, PodDirectory, SlicePublisher, StatusWriter
from driver.lifecycle.rdma import NodeRdma
from driver.lifecycle.workers import DeviceWorkers
from driver.model import BootId, PoolName
from driver.paths import Paths
from driver.policy import NodePolicy
from driver.provision.carry_out import Provision
from hw.netns import NetnsHandle


class Telemetry(Protocol):
    """Counts that only the lifecycle can make."""

    def ran_bare(self, containers: int) -> None:
        """Containers of a pod with a claim of ours that ran without its devices."""

    def refused(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One per agent. host_netns is the agent's own network namespace, where devices are at home."""

    driver: str
    pool: PoolName
    boot_id: BootId
    paths: Paths
    clock: Clock
    hook: Hook
    policy: Callable[[], NodePolicy]
    host_netns: NetnsHandle
    book: Book
    ledger: Ledger
    engine: Engine[Target]
    shaper: Shaper
    foreign: Foreign
    workers: DeviceWorkers
    devices: Devices
    rdma: NodeRdma
    provision: Provision
    accounting: Accounting
    programs: TcxPrograms | None
    cdi: CdiProjection
    live: LiveFiles
    claims: ClaimReader
    pods: PodDirectory
    statuses: StatusWriter
    events: EventSink
    slices: SlicePublisher
    telemetry: Telemetry
