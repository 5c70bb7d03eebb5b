"""Kubelet's device health service, both versions from one implementation.

Invariant: every message is the whole list, sent when a stream begins, when something changes, and in good
time before kubelet would take what it knows for old. A stream ends when kubelet wants no more or `close` was
called, and holds up nobody's stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio

from driver.kubelet.batch import one_line
from driver.lifecycle.ports import HealthSource
from driver.model import PoolName
from driver.pb.drahealth.v1 import api_pb2 as v1
from driver.pb.drahealth.v1alpha1 import api_pb2 as v1alpha1
from driver.troubles import DeviceHealth

WATCH = "NodeWatchResources"
SERVICES = tuple(
    module.DESCRIPTOR.services_by_name["DRAResourceHealth"].full_name for module in (v1, v1alpha1)
)
"""Best first, and as they are advertised. Their messages are the same on the wire."""
TIMEOUT_SECONDS = 60
"""After so long without a word kubelet calls a device's health unknown."""
REPEAT_SECONDS = 20.0

_Context = grpc.aio.ServicerContext[Any, Any]


class HealthService:
    def __init__(self, source: HealthSource) -> None:
        self._source = source
        self._closing = asyncio.Event()
        self._written: tuple[int, bytes] = (-1, b"")

    def handlers(self) -> tuple[grpc.GenericRpcHandler[Any, Any], ...]:
        method = grpc.unary_stream_rpc_method_handler(
            self._watch,
            # It says nothing, and what a later kubelet may say with it is not understood here.
            request_deserializer=None,
            response_serializer=None,
        )
        return tuple(grpc.method_handlers_generic_handler(service, {WATCH: method}) for service in SERVICES)

    def close(self) -> None:
        """End every stream: a server that stops would wait for them."""
        self._closing.set()

    async def _watch(self, request: bytes, context: _Context) -> AsyncIterator[bytes]:
        del request, context
        while not self._closing.is_set():
            version = self._source.version
            yield self._message(version)
            await self._next(version)

    async def _next(self, version: int) -> None:
        """Returns when there is something to send, the time has come to send it again, or none is to be."""
        tasks = (
            asyncio.create_task(self._source.newer_than(version, REPEAT_SECONDS)),
            asyncio.create_task(self._closing.wait()),
        )
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _message(self, version: int) -> bytes:
        """Written once for all streams and repeats."""
        if self._written[0] != version:
            self._written = (version, write_health(self._source.pool, self._source.devices))
        return self._written[1]


def write_health(pool: PoolName, devices: Sequence[DeviceHealth]) -> bytes:
    response = v1.NodeWatchResourcesResponse()
    for told in devices:
        entry = response.devices.add()
        entry.device.pool_name = pool
        entry.device.device_name = told.device
        entry.health = v1.HealthStatus.HEALTHY if told.healthy else v1.HealthStatus.UNHEALTHY
        entry.last_updated_time = int(told.since)
        entry.health_check_timeout_seconds = TIMEOUT_SECONDS
        entry.message = one_line(told.message)
    return response.SerializeToString()
