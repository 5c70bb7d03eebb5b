"""Kubelet's end of a driver's device health stream.

Invariant: what it holds is the last whole list of a stream that lives; a device that was not in a list for as
long as the list said is Unknown, and nothing is known when the stream ends. What a driver sends is checked
more strictly than a real kubelet would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from driver.pb.drahealth.v1 import api_pb2 as v1
from kndsim.kubelet_model import ContractBroken
from kndsim.kubelet_wire import CallFailed, Connection

SERVICES = ("v1.DRAResourceHealth", "v1alpha1.DRAResourceHealth")
"""As a kubelet prefers them; the messages are the same on the wire."""
METHOD = "NodeWatchResources"
RETRY_SECONDS = 5.0
DEFAULT_TIMEOUT = 30.0
MESSAGE_BYTES = 1024

Key = tuple[str, str]
"""Pool and device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    status: str
    """Healthy, Unhealthy or Unknown, as in a pod's status."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class _Heard:
    health: Health
    until: float


def choose_health(offered: Iterable[str], known: Iterable[str]) -> str:
    """The best service that both have, or ""."""
    has = set(offered)
    return next((service for service in known if service in has), "")


class HealthWatch:
    """Keeps a stream open and remembers what it said. `run` is a task."""

    def __init__(
        self, connection: Connection, service: str, *, retry: float, told: Callable[[str], None]
    ) -> None:
        self._connection = connection
        self._service = service
        self._retry = retry
        self._told = told
        self._heard: Mapping[Key, _Heard] = {}
        self.messages = 0

    def now(self) -> Mapping[Key, Health]:
        at = time.monotonic()
        unknown = Health(status="Unknown")
        return {key: each.health if at < each.until else unknown for key, each in self._heard.items()}

    async def run(self) -> None:
        while True:
            try:
                async for raw in self._connection.stream(self._service, METHOD, b""):
                    self._heard = read_list(raw, time.monotonic())
                    self.messages += 1
            except (CallFailed, ContractBroken) as error:
                self._told(str(error))
            self._heard = {}
            await asyncio.sleep(self._retry)


def read_list(raw: bytes, now: float) -> Mapping[Key, _Heard]:
    heard: dict[Key, _Heard] = {}
    for each in v1.NodeWatchResourcesResponse.FromString(raw).devices:
        key = (each.device.pool_name, each.device.device_name)
        if not all(key):
            raise ContractBroken(f"a device's health without its pool or name: {key}")
        if key in heard:
            raise ContractBroken(f"the health of {key} is told twice in one list")
        if each.health not in (v1.HealthStatus.HEALTHY, v1.HealthStatus.UNHEALTHY):
            raise ContractBroken(f"the health of {key} is {each.health}, which says nothing")
        if len(each.message.encode()) > MESSAGE_BYTES or not each.message.isprintable():
            raise ContractBroken(f"the message about {key} is no line of at most {MESSAGE_BYTES} bytes")
        status = "Healthy" if each.health == v1.HealthStatus.HEALTHY else "Unhealthy"
        timeout = float(each.health_check_timeout_seconds)
        until = now + (timeout if timeout > 0 else DEFAULT_TIMEOUT)
        heard[key] = _Heard(Health(status=status, message=each.message), until)
    return heard
