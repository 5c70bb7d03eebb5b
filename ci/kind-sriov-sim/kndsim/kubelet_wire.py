"""Kubelet's ends of the registration and DRA services, over real gRPC on unix sockets.

Invariant: protobuf and gRPC types end here. Every connection is its own (no shared sub-channels), so
one peer's restart or back-off never shows on another's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

import grpc
import grpc.aio

from driver.pb.dra.v1 import api_pb2 as v1
from driver.pb.dra.v1beta1 import api_pb2 as v1beta1
from driver.pb.pluginregistration.v1 import api_pb2 as registration
from kndsim.kubelet_check import check_plugin, choose_version
from kndsim.kubelet_model import (
    Answer,
    ClaimLike,
    ContractBroken,
    PluginInfo,
    RegistrationFailed,
    SimDevice,
    Version,
)

_POLL = 0.01
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
PREPARE = "NodePrepareResources"
UNPREPARE = "NodeUnprepareResources"

_SERVICES = {
    Version.V1: v1.DESCRIPTOR.services_by_name["DRAPlugin"].full_name,
    Version.V1BETA1: v1beta1.DESCRIPTOR.services_by_name["DRAPlugin"].full_name,
}
_REGISTRATION = registration.DESCRIPTOR.services_by_name["Registration"].full_name


class CallFailed(Exception):
    """The RPC itself failed; the text is the one kubelet would log."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"rpc error: code = {code} desc = {details}")


class Connection:
    """A channel to one socket, closed at exit."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        self._closed = False

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self._closed = True
        await self._channel.close(None)

    def _is_closed(self) -> bool:
        return self._closed

    async def dial(self, timeout: float) -> None:
        """TimeoutError if nothing accepts in time."""
        deadline = time.monotonic() + timeout
        while not self._up():
            if time.monotonic() >= deadline:
                raise TimeoutError
            await asyncio.sleep(_POLL)

    async def call(self, service: str, method: str, request: bytes, timeout: float) -> bytes:
        """Request and reply as bytes; CallFailed if there is no reply."""
        closing = CallFailed("CANCELLED", "grpc: the client connection is closing")
        if self._is_closed():
            raise closing
        invoke = self._channel.unary_unary(f"/{service}/{method}", _same, _same)
        try:
            reply: bytes = await invoke(request, timeout=timeout)
            return reply
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code().name, str(error.details())) from error
        except asyncio.CancelledError:
            # gRPC also says so of a call whose channel was closed, which cancelled nobody here.
            task = asyncio.current_task()
            if not self._is_closed() or (task is not None and task.cancelling()):
                raise
            raise closing from None

    async def stream(self, service: str, method: str, request: bytes) -> AsyncIterator[bytes]:
        """The messages of a stream until the server ends it; CallFailed if it ends otherwise."""
        if self._is_closed():
            raise CallFailed("CANCELLED", "grpc: the client connection is closing")
        call = self._channel.unary_stream(f"/{service}/{method}", _same, _same)(request)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code().name, str(error.details())) from error
        finally:
            call.cancel()

    async def watch(self, changed: Callable[[bool], None]) -> None:
        """Keep the connection up and tell of every change between connected and not; never returns."""
        connected = False
        while True:
            if self._up() != connected:
                connected = not connected
                changed(connected)
            await asyncio.sleep(_POLL)

    def _up(self) -> bool:
        # Polled: gRPC's own wait leaves, when cancelled, a completion that outlives the event loop.
        state = self._channel.get_state(try_to_connect=True)
        return state is grpc.ChannelConnectivity.READY


def _same(raw: bytes) -> bytes:
    return raw


async def get_info(
    connection: Connection, socket: Path, known: Iterable[Version], timeout: float
) -> PluginInfo:
    """Ask the plugin who it is. RegistrationFailed if it does not say in time or kubelet refuses it."""
    request = registration.InfoRequest().SerializeToString()
    try:
        raw = await connection.call(_REGISTRATION, "GetInfo", request, timeout)
    except CallFailed as error:
        raise RegistrationFailed(f"GetInfo failed: {error}", tell=False) from error
    info = registration.PluginInfo.FromString(raw)
    if info.type != "DRAPlugin":
        raise RegistrationFailed(f"no handler for plugin type {info.type!r}", tell=True)
    plugin = PluginInfo(
        driver=info.name,
        socket=socket,
        endpoint=Path(info.endpoint) if info.endpoint else socket,
        version=choose_version(list(info.supported_versions), known),
        offered=tuple(info.supported_versions),
    )
    check_plugin(plugin)
    return plugin


async def notify(connection: Connection, refusal: str, timeout: float) -> None:
    """Tell the plugin of its registration ("") or why not. RegistrationFailed if it cannot be told."""
    status = registration.RegistrationStatus(plugin_registered=not refusal, error=refusal)
    try:
        await connection.call(_REGISTRATION, "NotifyRegistrationStatus", status.SerializeToString(), timeout)
    except CallFailed as error:
        raise RegistrationFailed(f"NotifyRegistrationStatus failed: {error}", tell=False) from error


class DraClient:
    """The DRA service of one plugin, in the version that was agreed on.

    v1beta1 is read with v1's messages, of which it is a subset: so a share id, which v1beta1 has not,
    is seen and refused rather than skipped.
    """

    def __init__(self, connection: Connection, version: Version) -> None:
        self._connection = connection
        self._version = version
        self._service = _SERVICES[version]

    async def prepare(self, claims: Sequence[ClaimLike], timeout: float) -> dict[str, Answer]:
        """CallFailed if the RPC failed; ContractBroken if v1beta1 carried a share id."""
        request = v1.NodePrepareResourcesRequest(claims=_wire(claims))
        raw = await self._connection.call(self._service, PREPARE, request.SerializeToString(), timeout)
        answers = {}
        for uid, entry in v1.NodePrepareResourcesResponse.FromString(raw).claims.items():
            devices = tuple(self._device(device) for device in entry.devices)
            answers[uid] = Answer(entry.error, devices)
        return answers

    async def unprepare(self, claims: Sequence[ClaimLike], timeout: float) -> dict[str, Answer]:
        """CallFailed if the RPC failed."""
        request = v1.NodeUnprepareResourcesRequest(claims=_wire(claims))
        raw = await self._connection.call(self._service, UNPREPARE, request.SerializeToString(), timeout)
        response = v1.NodeUnprepareResourcesResponse.FromString(raw)
        return {uid: Answer(entry.error) for uid, entry in response.claims.items()}

    def _device(self, device: v1.Device) -> SimDevice:
        has_share = device.HasField("share_id")
        if has_share and self._version is Version.V1BETA1:
            raise ContractBroken(f"v1beta1 has no share id, but {device.device_name} carries one")
        return SimDevice(
            requests=tuple(device.request_names),
            pool=device.pool_name,
            device=device.device_name,
            cdi_ids=tuple(device.cdi_device_ids),
            share_id=device.share_id if has_share else None,
        )


def _wire(claims: Sequence[ClaimLike]) -> list[v1.Claim]:
    return [v1.Claim(namespace=claim.namespace, uid=claim.uid, name=claim.name) for claim in claims]
