"""A scripted claim handler, and kubelet's ends of the services by the generated stubs.

The stubs are an independent view of the wire: neither the product nor the simulated kubelet uses them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from driver.kubelet.plugin import KubeletPlugin
from driver.lifecycle.health import HealthFeed
from driver.lifecycle.ports import ClaimFailed
from driver.model import ClaimRef, ClaimUid, DeviceName, PoolName, PreparedDevice, ShareId
from driver.paths import Paths
from driver.pb.dra.v1 import api_pb2 as v1
from driver.pb.dra.v1 import api_pb2_grpc as v1_grpc
from driver.pb.dra.v1beta1 import api_pb2_grpc as v1beta1_grpc
from driver.pb.pluginregistration.v1 import api_pb2_grpc as registration_grpc


class RealClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


def prepared(uid: str, *, share_id: str | None = None, request: str = "nic") -> PreparedDevice:
    return PreparedDevice(
        request=request,
        pool=PoolName("node-a"),
        device=DeviceName("pci-0000-3b-00-2"),
        share_id=None if share_id is None else ShareId(share_id),
        cdi_ids=(f"knd.internal/nic={uid}-pci-0000-3b-00-2",),
    )


@dataclass
class ScriptedHandler:
    """Answers as told. gate: calls wait until it is set. script: answers by UID, else one device."""

    script: dict[str, tuple[PreparedDevice, ...] | ClaimFailed] = field(default_factory=dict)
    raises: BaseException | None = None
    drops: frozenset[str] = frozenset()
    adds: dict[str, tuple[PreparedDevice, ...] | ClaimFailed] = field(default_factory=dict)
    gate: asyncio.Event | None = None
    calls: list[tuple[str, tuple[ClaimRef, ...], float]] = field(default_factory=list)
    running: int = 0
    finished: int = 0
    cancelled: int = 0

    async def prepare(
        self, claims: Sequence[ClaimRef], deadline: float
    ) -> Mapping[ClaimUid, tuple[PreparedDevice, ...] | ClaimFailed]:
        await self._pass("prepare", claims, deadline)
        answers = {
            claim.uid: self.script.get(claim.uid, (prepared(claim.uid),))
            for claim in claims
            if claim.uid not in self.drops
        }
        return answers | {ClaimUid(uid): answer for uid, answer in self.adds.items()}

    async def unprepare(
        self, claims: Sequence[ClaimRef], deadline: float
    ) -> Mapping[ClaimUid, ClaimFailed | None]:
        await self._pass("unprepare", claims, deadline)
        answers: dict[ClaimUid, ClaimFailed | None] = {}
        for claim in claims:
            scripted = self.script.get(claim.uid)
            answers[claim.uid] = scripted if isinstance(scripted, ClaimFailed) else None
        return answers

    async def _pass(self, method: str, claims: Sequence[ClaimRef], deadline: float) -> None:
        self.calls.append((method, tuple(claims), deadline))
        self.running += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.raises is not None:
                raise self.raises
            self.finished += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


@dataclass
class Seen:
    """A CallObserver that remembers."""

    calls: list[tuple[str, str]] = field(default_factory=list)

    def call_done(self, method: str, seconds: float, outcome: str) -> None:
        assert seconds >= 0
        self.calls.append((method, outcome))


def plugin_at(
    root: Path,
    handler: ScriptedHandler,
    observer: Seen | None = None,
    health: HealthFeed | None = None,
) -> KubeletPlugin:
    return KubeletPlugin(
        paths=Paths(root=root),
        handler=handler,
        health=health or HealthFeed(PoolName("node-a")),
        clock=RealClock(),
        observer=observer,
    )


@asynccontextmanager
async def channel_to(socket: Path) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=options) as channel:
        yield channel


@dataclass
class Stubs:
    v1: Any
    v1beta1: Any
    registration: Any


@asynccontextmanager
async def kubelet_ends(root: Path) -> AsyncIterator[Stubs]:
    paths = Paths(root=root)
    async with channel_to(paths.dra_socket) as dra, channel_to(paths.registration_socket) as registry:
        yield Stubs(
            v1_grpc.DRAPluginStub(dra),
            v1beta1_grpc.DRAPluginStub(dra),
            registration_grpc.RegistrationStub(registry),
        )


def claim(uid: str) -> v1.Claim:
    return v1.Claim(namespace="ns", uid=uid, name=f"claim-{uid}")
