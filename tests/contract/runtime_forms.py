"""Container runtimes, simulated or real, as the cases see them: pods, containers, NRI's socket, a restart.

Invariant: a real one is asked as kubelet asks it, with kubelet itself stopped, so nobody else touches its
pods; what a case left is removed after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kndsim.runtime import (
    ContainerFailed,
    PodSpec,
    Runtime,
    RuntimeMode,
    SandboxFailed,
    SimSandbox,
)
from tests.contract.cri_client import Cri, CriError

if TYPE_CHECKING:
    from kndsim.cluster import Node

PAUSE = "localhost/pause:1"
NAMESPACE = "contract"
READY = 0


class Refused(Exception):
    """The runtime did not do it; the text is what kubelet would show."""


@dataclass(frozen=True, slots=True)
class Pod:
    id: str
    name: str
    uid: str


class RuntimePeer(Protocol):
    """pod_calls: whether it knows NRI's own calls for pods, or tells of them by StateChange alone."""

    pod_calls: bool
    version: str

    @property
    def socket(self) -> Path: ...

    @property
    def cdi(self) -> Path: ...

    def hook_path(self, path: Path) -> str:
        """Where the runtime finds an executable of this machine."""
        ...

    def netns_there(self, path: str) -> bool: ...

    async def run(self, name: str) -> Pod:
        """As kubelet does: a name whose last sandbox is still known gets the next attempt's number."""
        ...

    async def stop(self, pod: Pod) -> None: ...
    async def remove(self, pod: Pod) -> None: ...
    async def container(self, pod: Pod, name: str, cdi_ids: Sequence[str] = ()) -> str: ...
    async def restart(self) -> None: ...
    async def pods(self) -> set[str]:
        """Those that are ready. containerd may keep a refused one that it could not take apart, unready."""
        ...


@dataclass
class SimulatedRuntime:
    runtime: Runtime
    pod_calls: bool
    version: str = "simulated"
    _sandboxes: dict[str, SimSandbox] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.runtime.socket

    @property
    def cdi(self) -> Path:
        folder = self.runtime.root / "var/run/cdi"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def hook_path(self, path: Path) -> str:
        return str(path)

    def netns_there(self, path: str) -> bool:
        return Path(path).exists()

    async def run(self, name: str) -> Pod:
        uid = f"uid-{name}"
        try:
            made = await self.runtime.run_pod(PodSpec(namespace=NAMESPACE, name=name, uid=uid))
        except SandboxFailed as error:
            raise Refused(str(error)) from error
        self._sandboxes[made.id] = made
        return Pod(made.id, name, uid)

    async def stop(self, pod: Pod) -> None:
        await self.runtime.stop_pod(self._sandboxes[pod.id])

    async def remove(self, pod: Pod) -> None:
        await self.runtime.remove_pod(self._sandboxes[pod.id])

    async def container(self, pod: Pod, name: str, cdi_ids: Sequence[str] = ()) -> str:
        try:
            made = await self.runtime.create_container(self._sandboxes[pod.id], name, cdi_ids)
        except ContainerFailed as error:
            raise Refused(str(error)) from error
        return made.id

    async def restart(self) -> None:
        await self.runtime.restart()

    async def pods(self) -> set[str]:
        return {each.id for each in self.runtime.sandboxes}


@asynccontextmanager
async def simulated_runtime(root: Path, mode: RuntimeMode) -> AsyncIterator[SimulatedRuntime]:
    async with Runtime(root, mode) as runtime:
        yield SimulatedRuntime(runtime, pod_calls=mode is RuntimeMode.POD_RPC)


@dataclass
class RealRuntime:
    node: Node
    cri: Cri
    pod_calls: bool
    version: str
    _configs: dict[str, Any] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.node.root / "var/run/nri/nri.sock"

    @property
    def cdi(self) -> Path:
        folder = self.node.root / "var/run/cdi"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def hook_path(self, path: Path) -> str:
        folder = self.node.root / "run/contract"
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.name)
        return f"/run/contract/{path.name}"

    def netns_there(self, path: str) -> bool:
        """A path that is there and is no mount any more is an ordinary file."""
        with contextlib.suppress(OSError):
            return (
                os.stat(self.node.root / path.lstrip("/")).st_dev
                != os.stat((self.node.root / path.lstrip("/")).parent).st_dev
            )
        return False

    def _config(self, name: str, attempt: int) -> dict[str, Any]:
        folder = f"/var/log/pods/{NAMESPACE}_{name}"
        (self.node.root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        return {
            "metadata": {"name": name, "uid": f"uid-{name}", "namespace": NAMESPACE, "attempt": attempt},
            "hostname": name,
            "log_directory": folder,
            "linux": {"cgroup_parent": f"{self.node.conf.cgroup_root}/contract", "security_context": {}},
        }

    async def run(self, name: str) -> Pod:
        known = [each.metadata for each in await self._listed() if each.metadata.name == name]
        config = self._config(name, max((each.attempt + 1 for each in known), default=0))
        made = await self._ask("RunPodSandbox", config=config)
        self._configs[made.pod_sandbox_id] = config
        return Pod(made.pod_sandbox_id, name, f"uid-{name}")

    async def stop(self, pod: Pod) -> None:
        await self._ask("StopPodSandbox", pod_sandbox_id=pod.id)

    async def remove(self, pod: Pod) -> None:
        await self._ask("RemovePodSandbox", pod_sandbox_id=pod.id)

    async def container(self, pod: Pod, name: str, cdi_ids: Sequence[str] = ()) -> str:
        config = {
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": PAUSE},
            "log_path": f"{name}.log",
            "CDI_devices": [{"name": each} for each in cdi_ids],
        }
        made = await self._ask(
            "CreateContainer", pod_sandbox_id=pod.id, config=config, sandbox_config=self._configs[pod.id]
        )
        try:
            await self._ask("StartContainer", container_id=made.container_id)
        except Refused:
            await self._ask("RemoveContainer", container_id=made.container_id)
            raise
        container: str = made.container_id
        return container

    async def restart(self) -> None:
        await asyncio.to_thread(self.node.restart, "containerd")
        deadline = time.monotonic() + 30.0
        while True:
            try:
                await self._listed()
            except Refused as error:
                # It answers before it has taken up what it left behind.
                if "not initialized" not in str(error) or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)
            else:
                return

    async def pods(self) -> set[str]:
        return {each.id for each in await self._listed() if each.state == READY}

    async def _listed(self) -> Sequence[Any]:
        items: Sequence[Any] = (await self._ask("ListPodSandbox")).items
        return items

    async def _ask(self, method: str, **fields: Any) -> Any:
        try:
            return await self.cri.call(method, **fields)
        except CriError as error:
            raise Refused(str(error)) from error

    async def clear(self) -> None:
        for each in await self._listed():
            await self._ask("StopPodSandbox", pod_sandbox_id=each.id)
            await self._ask("RemovePodSandbox", pod_sandbox_id=each.id)


@asynccontextmanager
async def real_runtime(node: Node) -> AsyncIterator[RealRuntime]:
    """Kubelet must not be running there."""
    async with Cri(node.root / "run/containerd/containerd.sock") as cri:
        said = await cri.call("Version")
        peer = RealRuntime(node, cri, _knows_pod_calls(said.runtime_version), said.runtime_version)
        await peer.clear()
        try:
            yield peer
        finally:
            await peer.clear()


def _knows_pod_calls(version: str) -> bool:
    """containerd from 2.3 on has NRI 0.12, which has them."""
    major, minor = version.removeprefix("v").split(".")[:2]
    return (int(major), int(minor)) >= (2, 3)


def new_name() -> str:
    return f"pod-{uuid.uuid4().hex[:8]}"
