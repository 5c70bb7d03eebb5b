"""A plugin with a runtime at its other end: the simulated one, or one that is played by hand.

Invariant: what is made here ends with its context.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from driver.model import PodRef, PodUid, Sandbox, SandboxId
from driver.nri import api
from driver.nri.plugin import NriPlugin
from driver.nri.ttrpc import Request, Response
from driver.pb.nri.v1 import api_pb2 as pb
from kndsim.runtime import PodSpec, Runtime, RuntimeMode, SimSandbox
from tests.unit.nri_support import (
    FAST,
    BareEnd,
    RecordingHandler,
    RecordingObserver,
    SystemClock,
    bare_runtime,
    running,
    until,
)

MODES = list(RuntimeMode)


def plugin_for(socket: Path, handler: RecordingHandler, **options: object) -> NriPlugin:
    return NriPlugin(socket=socket, handler=handler, clock=SystemClock(), **{"backoff": FAST, **options})


def sim_sandbox(name: str = "p", id_: str = "sb1", netns: str | None = "/run/netns/x") -> SimSandbox:
    pod = PodSpec(namespace="ns", name=name, uid=f"uid-{name}")
    return SimSandbox(id=id_, pod=pod, netns_path=Path(netns) if netns else None, pid=42)


def sandbox(name: str = "p", id_: str = "sb1", netns: str | None = "/run/netns/x", pid: int = 42) -> Sandbox:
    return Sandbox(
        id=SandboxId(id_),
        pod=PodRef("ns", name, PodUid(f"uid-{name}")),
        netns_path=Path(netns) if netns else None,
        pid=pid,
    )


@dataclass
class World:
    runtime: Runtime
    plugin: NriPlugin
    handler: RecordingHandler
    observer: RecordingObserver


@contextlib.asynccontextmanager
async def world(
    root: Path, mode: RuntimeMode = RuntimeMode.POD_RPC, **options: float
) -> AsyncIterator[World]:
    """A plugin that is connected to a simulated runtime."""
    handler, observer = RecordingHandler(), RecordingObserver()
    async with Runtime(root, mode, **options) as runtime:  # type: ignore[arg-type]
        plugin = plugin_for(runtime.socket, handler, observer=observer)
        async with running(plugin):
            await runtime.wait_plugin()
            await until(lambda: plugin.connected)
            yield World(runtime, plugin, handler, observer)
        assert runtime.violations == ()


@dataclass
class Hand:
    plugin: NriPlugin
    handler: RecordingHandler
    arrivals: asyncio.Queue[BareEnd]


@contextlib.asynccontextmanager
async def by_hand(root: Path, **options: object) -> AsyncIterator[Hand]:
    """A plugin, and what it connects to as bytes."""
    handler = RecordingHandler()
    plugin = plugin_for(root / "nri.sock", handler, **options)
    async with bare_runtime(root / "nri.sock") as arrivals, running(plugin):
        yield Hand(plugin, handler, arrivals)


def configure(**fields: int | str) -> Request:
    message = pb.ConfigureRequest(**fields)  # type: ignore[arg-type]
    return Request(service=api.PLUGIN_SERVICE, method="Configure", payload=message.SerializeToString())


def synchronize(*pods: pb.PodSandbox, more: bool = False) -> Request:
    message = pb.SynchronizeRequest(pods=pods, more=more)
    return Request(service=api.PLUGIN_SERVICE, method="Synchronize", payload=message.SerializeToString())


async def shake_hands(end: BareEnd, **fields: int | str) -> None:
    await end.request()
    end.answer(1)
    end.call(1, configure(**fields))
    await end.response()
    end.call(3, synchronize())
    assert await end.response() == (3, Response())


def call(method: str, message: pb.RunPodSandboxRequest | pb.StateChangeEvent, nano: int = 0) -> Request:
    payload = message.SerializeToString()
    return Request(service=api.PLUGIN_SERVICE, method=method, payload=payload, timeout_nano=nano)
