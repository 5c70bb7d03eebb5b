"""A plugin whose every answer can be bent, served to the simulated kubelet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import grpc.aio

from driver.pb.dra.v1 import api_pb2 as v1
from driver.pb.dra.v1 import api_pb2_grpc as v1_grpc
from driver.pb.dra.v1beta1 import api_pb2 as v1beta1
from driver.pb.dra.v1beta1 import api_pb2_grpc as v1beta1_grpc
from driver.pb.drahealth.v1 import api_pb2 as health
from driver.pb.drahealth.v1 import api_pb2_grpc as health_grpc
from driver.pb.drahealth.v1alpha1 import api_pb2_grpc as health_alpha_grpc
from driver.pb.pluginregistration.v1 import api_pb2 as registration
from driver.pb.pluginregistration.v1 import api_pb2_grpc as registration_grpc
from kndsim.kubelet import (
    KubeletEvent,
    KubeletTiming,
    SimClaim,
    SimKubelet,
)

DRIVER = "sim.example"
FAST = KubeletTiming(scale=0.02)
"""Real deadlines, but back-off from 10 ms and a slice grace of 0.6 s."""

C1 = SimClaim("ns", "one", "u1")
C2 = SimClaim("ns", "two", "u2")


def device(uid: str, **changes: Any) -> v1.Device:
    fields: dict[str, Any] = {
        "request_names": ["nic"],
        "pool_name": "node-a",
        "device_name": "nic-0",
        "cdi_device_ids": [f"{DRIVER}/nic={uid}-nic-0"],
    }
    return v1.Device(**(fields | changes))


def good(uid: str) -> v1.NodePrepareResourceResponse:
    return v1.NodePrepareResourceResponse(devices=[device(uid)])


def bad(uid: str, **changes: Any) -> v1.NodePrepareResourceResponse:
    return v1.NodePrepareResourceResponse(devices=[device(uid, **changes)])


def told(status: str, *, seconds: int = 0, message: str = "") -> health.NodeWatchResourcesResponse:
    """A list with the health of the one device. seconds: until kubelet takes it for old."""
    named = health.DeviceIdentifier(pool_name="node-a", device_name="nic-0")
    return health.NodeWatchResourcesResponse(
        devices=[
            health.DeviceHealth(
                device=named, health=status, health_check_timeout_seconds=seconds, message=message
            )
        ]
    )


Respond = Callable[[list[str]], dict[str, v1.NodePrepareResourceResponse]]


@dataclass
class FakePlugin:
    """A plugin whose every answer can be bent; by default it is a good one."""

    info: dict[str, Any] = field(default_factory=dict)
    respond: Respond = lambda uids: {uid: good(uid) for uid in uids}
    unprepare_error: str = ""
    info_gate: asyncio.Event | None = None
    prepare_gate: asyncio.Event | None = None
    notify_fails: int = 0
    told: list[tuple[bool, str]] = field(default_factory=list)
    infos: list[float] = field(default_factory=list)
    prepares: list[tuple[str, list[str]]] = field(default_factory=list)
    unprepares: list[list[str]] = field(default_factory=list)
    endpoint: str = ""
    lists: asyncio.Queue[health.NodeWatchResourcesResponse] = field(default_factory=asyncio.Queue)
    """Of devices' health, sent as they come."""
    watched: list[str] = field(default_factory=list)
    """The packages of the health services that were asked for."""

    async def NodeWatchResources(
        self, request: object, context: object
    ) -> AsyncIterator[health.NodeWatchResourcesResponse]:
        self.watched.append("v1" if isinstance(request, health.NodeWatchResourcesRequest) else "v1alpha1")
        while True:
            yield await self.lists.get()

    async def GetInfo(self, request: object, context: object) -> registration.PluginInfo:
        self.infos.append(time.monotonic())
        if self.info_gate is not None:
            await self.info_gate.wait()
        fields = {
            "type": "DRAPlugin",
            "name": DRIVER,
            "endpoint": self.endpoint,
            "supported_versions": ["v1.DRAPlugin", "v1beta1.DRAPlugin"],
        }
        return registration.PluginInfo(**(fields | self.info))

    async def NotifyRegistrationStatus(
        self, status: registration.RegistrationStatus, context: Any
    ) -> registration.RegistrationStatusResponse:
        self.told.append((status.plugin_registered, status.error))
        if len(self.told) <= self.notify_fails:
            await context.abort(grpc.StatusCode.INTERNAL, "not now")
        return registration.RegistrationStatusResponse()

    async def NodePrepareResources(
        self, request: v1.NodePrepareResourcesRequest, context: object
    ) -> v1.NodePrepareResourcesResponse:
        # The beta servicer's request and reply types differ only in name; bytes are what counts.
        version = "v1" if isinstance(request, v1.NodePrepareResourcesRequest) else "v1beta1"
        uids = [claim.uid for claim in request.claims]
        self.prepares.append((version, uids))
        if self.prepare_gate is not None:
            await self.prepare_gate.wait()
        response = v1.NodePrepareResourcesResponse()
        for uid, entry in self.respond(uids).items():
            response.claims[uid].CopyFrom(entry)
        if version == "v1":
            return response
        return v1beta1.NodePrepareResourcesResponse.FromString(response.SerializeToString())

    async def NodeUnprepareResources(
        self, request: v1.NodeUnprepareResourcesRequest, context: object
    ) -> v1.NodeUnprepareResourcesResponse:
        uids = [claim.uid for claim in request.claims]
        self.unprepares.append(uids)
        entry = v1.NodeUnprepareResourceResponse(error=self.unprepare_error)
        return v1.NodeUnprepareResourcesResponse(claims=dict.fromkeys(uids, entry))


@asynccontextmanager
async def serving(kubelet: SimKubelet, plugin: FakePlugin, name: str = "sim") -> AsyncIterator[None]:
    """The plugin on one socket for both services, in the kubelet's registry."""
    path = kubelet.registry / f"{name}-reg.sock"
    plugin.endpoint = plugin.endpoint or str(path)
    server = grpc.aio.server()
    v1_grpc.add_DRAPluginServicer_to_server(plugin, server)
    v1beta1_grpc.add_DRAPluginServicer_to_server(plugin, server)
    registration_grpc.add_RegistrationServicer_to_server(plugin, server)
    health_grpc.add_DRAResourceHealthServicer_to_server(plugin, server)
    health_alpha_grpc.add_DRAResourceHealthServicer_to_server(plugin, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


@asynccontextmanager
async def kubelet_with(
    root: Path,
    plugin: FakePlugin,
    timing: KubeletTiming = FAST,
    prefer: Literal["v1", "v1beta1"] | None = None,
) -> AsyncIterator[SimKubelet]:
    kubelet = SimKubelet(root, node="node-a", timing=timing, prefer=prefer)
    async with kubelet, serving(kubelet, plugin):
        await kubelet.wait_registered(DRIVER)
        yield kubelet


def events(kubelet: SimKubelet) -> list[KubeletEvent]:
    return [entry.event for entry in kubelet.log]
