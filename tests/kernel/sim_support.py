"""A plugin under the simulated runtime, and what the tests look at on the machine.

Invariant: what is made here ends with its context.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driver.model import AS_IT_IS, Adjustment, Container, Sandbox, SandboxId
from driver.nri.plugin import NriPlugin
from kndsim import netns
from kndsim.runtime import (
    PodSpec,
    Runtime,
    RuntimeMode,
    SimSandbox,
)
from tests.unit.nri_support import FAST, SystemClock, running

MODES = list(RuntimeMode)
CONTAINERD = [RuntimeMode.STATE_CHANGE, RuntimeMode.POD_RPC]
POD = PodSpec(namespace="ns", name="p", uid="u1", annotations={"a": "b"})


def network_id(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def own_links() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def mounts_below(root: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(root) in line]


def ipv6_knobs() -> list[str]:
    folder = Path("/proc/sys/net/ipv6/conf")
    return [(folder / name / "disable_ipv6").read_text() for name in ("all", "default") if folder.exists()]


@dataclass
class Handler:
    """What the plugin under the runtime answers, and what it saw; look is called at every event."""

    seen: list[tuple[str, Sandbox]] = field(default_factory=list)
    refuse: dict[str, Exception] = field(default_factory=dict)
    synchronized: list[tuple[list[Sandbox], dict[str, list[str]]]] = field(default_factory=list)
    look: Callable[[str, Sandbox], None] = lambda kind, sandbox: None
    adjustments: dict[str, Adjustment] = field(default_factory=dict)
    """By the container's name."""

    def runtime_connected(self, name: str, version: str) -> None: ...

    def runtime_lost(self) -> None: ...

    async def synchronize(
        self, sandboxes: Sequence[Sandbox], containers: Mapping[SandboxId, Sequence[str]]
    ) -> None:
        self.synchronized.append((list(sandboxes), {k: list(v) for k, v in containers.items()}))

    async def run_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._event("run", sandbox)

    async def stop_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._event("stop", sandbox)

    async def remove_sandbox(self, sandbox: Sandbox, deadline: float) -> None:
        await self._event("remove", sandbox)

    async def create_container(self, sandbox: Sandbox, container: Container, deadline: float) -> Adjustment:
        await self._event(f"create {container.name}", sandbox)
        return self.adjustments.get(container.name, AS_IT_IS)

    async def _event(self, kind: str, sandbox: Sandbox) -> None:
        self.seen.append((kind, sandbox))
        self.look(kind, sandbox)
        if kind in self.refuse:
            raise self.refuse[kind]


@contextlib.asynccontextmanager
async def node(root: Path, mode: RuntimeMode, **options: Any) -> AsyncIterator[tuple[Runtime, Handler]]:
    handler = Handler()
    async with Runtime(root, mode, **options) as runtime:
        plugin = NriPlugin(socket=runtime.socket, handler=handler, clock=SystemClock(), backoff=FAST)
        async with running(plugin):
            await runtime.wait_plugin()
            yield runtime, handler
        assert runtime.violations == ()


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def in_pod(sandbox: SimSandbox, work: Callable[[], Any]) -> Any:
    assert sandbox.netns_path is not None
    return netns.in_netns(sandbox.netns_path, work)


@contextlib.contextmanager
def machine_unchanged(root: Path) -> Iterator[None]:
    """The test's own namespace and links are as before, and no mount below root is left."""
    before = (network_id("/proc/self/ns/net"), own_links(), ipv6_knobs())
    yield
    assert (network_id("/proc/self/ns/net"), own_links(), ipv6_knobs()) == before
    assert mounts_below(root) == []
    assert list((root / "var/run/netns").glob("*")) == []
