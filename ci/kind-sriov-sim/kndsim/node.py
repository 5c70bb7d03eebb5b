"""A whole simulated node: API server, kubelet, container runtime and the real agent, in a private root.

Invariant: the peers speak the real protocols and do what the real ones do, in their order; the agent
is a process that knows nothing of the simulation. Nothing is left when the node is left.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from kndsim.agent import AGENT, AgentProcess
from kndsim.api import SimApi
from kndsim.compiled import kept_programs, put_netns_check
from kndsim.kubelet import SimKubelet
from kndsim.kubelet_model import PrepareFailed, SimClaim, SimDevice
from kndsim.runtime import (
    ContainerFailed,
    PodSpec,
    Runtime,
    RuntimeMode,
    SandboxFailed,
    SimContainer,
    SimSandbox,
)

REPOSITORY = Path(__file__).resolve().parents[3]
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)

Predicate = Callable[[Mapping[str, Any]], bool]


def any_device(device: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimSpec:
    """A claim to be made for a pod. requests: name to what the published device must satisfy; parameters:
    NetworkDeviceConfig by request name, "" for all; amounts: of capacities, by request name; tolerate: all
    taints."""

    name: str
    requests: Mapping[str, Predicate] = field(default_factory=lambda: {"net": any_device})
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    amounts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    tolerate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SimPod:
    """A pod that was scheduled to the node, and what was made for it."""

    spec: PodSpec
    claims: tuple[SimClaim, ...]
    devices: Mapping[str, tuple[SimDevice, ...]] = field(default_factory=dict)
    sandbox: SimSandbox | None = None
    containers: tuple[SimContainer, ...] = ()

    @property
    def cdi_ids(self) -> tuple[str, ...]:
        return tuple(cdi for devices in self.devices.values() for device in devices for cdi in device.cdi_ids)


def interface(**fields: Any) -> dict[str, Any]:
    """A NetworkDeviceConfig with one interface section."""
    return {
        "apiVersion": "knd.internal/v1alpha1",
        "kind": "NetworkDeviceConfig",
        "interface": fields,
    }


class SimNode:
    """`async with SimNode(...) as node`. The agent is started by start_agent()."""

    driver = "knd.internal"

    def __init__(
        self,
        *,
        mode: RuntimeMode,
        policy: str,
        hook: str = "auto",
        name: str = "sim-node",
        entry: Sequence[str] | None = None,
        agent_flags: Sequence[str] = (),
        request_timeout: float = 2.0,
        udev: bool = False,
        state: Path | None = None,
    ) -> None:
        """udev: the agent sees what the machine's udev says of links: they are the machine's own.

        state: the folder for what the agent keeps, so that it outlives this node; else nothing does.
        """
        self.name = name
        self._udev = udev
        self._state = state
        self.mode = mode
        self._policy = policy
        self._hook = hook
        self._entry = entry
        self._agent_flags = agent_flags
        self._request_timeout = request_timeout
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> SimNode:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _open(self) -> None:
        stack = self._stack
        self.root = Path(tempfile.mkdtemp(prefix="knd-", dir="/tmp"))
        stack.callback(shutil.rmtree, self.root, ignore_errors=True)
        self.bpffs = self.root / "sys/fs/bpf"
        self.bpffs.mkdir(parents=True)
        mount_bpffs(self.bpffs)
        stack.callback(unmount, self.bpffs)
        if self._udev:
            (self.root / "run/udev").mkdir(parents=True)
            for name in ("control", "data"):
                (self.root / "run/udev" / name).symlink_to(f"/run/udev/{name}")
        if self._state:
            (self.root / "var/lib").mkdir(parents=True)
            (self.root / "var/lib/knd").symlink_to(self._state)
        stack.enter_context(kept_programs(self.root / "var/lib/knd/programs"))
        put_netns_check(self.root / "var/lib/knd/bin/knd-netns-check")
        self.policy_file = self.root / "policy.yaml"
        self.policy_file.write_text(self._policy)
        self.api = stack.enter_context(SimApi())
        self.api.add_node(self.name)
        self.kubelet = await stack.enter_async_context(SimKubelet(self.root, node=self.name))
        self.runtime = await stack.enter_async_context(
            Runtime(self.root, self.mode, request_timeout=self._request_timeout)
        )
        self.agent = AgentProcess(
            self.root,
            node=self.name,
            kubeconfig=self.api.kubeconfig(self.root / "kubeconfig"),
            policy=self.policy_file,
            hook=self._hook,
            extra=self._agent_flags,
            entry=self._entry or AGENT,
        )
        stack.callback(self.agent.kill)

    # --- agent --------------------------------------------------------------------------------------

    async def start_agent(self, entry: Sequence[str] | None = None, *, seconds: float = 30.0) -> None:
        self.agent.start(entry)
        await asyncio.to_thread(self.agent.wait_ready, seconds)

    async def kill_agent(self) -> None:
        await asyncio.to_thread(self.agent.kill)

    async def stop_agent(self) -> int:
        return await asyncio.to_thread(self.agent.stop)

    # --- pods, as scheduler and kubelet start them ----------------------------------------------------

    def schedule(self, name: str, claims: Sequence[ClaimSpec], *, namespace: str = "default") -> SimPod:
        """Make the claims, allocate them from the published slices, make the pod, reserve them for it."""
        made = []
        for claim in claims:
            uid = self.api.add_claim(namespace, claim.name)
            requests = dict(claim.requests)
            self.api.allocate(
                namespace,
                claim.name,
                self.driver,
                self.name,
                requests,
                amounts=claim.amounts,
                tolerate=claim.tolerate,
            )
            if claim.parameters:
                self.configure(namespace, claim)
            made.append(SimClaim(namespace, claim.name, uid))
        return self.add_pod(name, made, namespace=namespace)

    def add_pod(
        self,
        name: str,
        claims: Sequence[SimClaim],
        *,
        namespace: str = "default",
        host_network: bool = False,
    ) -> SimPod:
        """A pod that names claims that exist; they are reserved for it beside those they were for."""
        named = {f"claim-{number}": claim.name for number, claim in enumerate(claims)}
        uid = self.api.add_pod(namespace, name, node=self.name, claims=named, host_network=host_network)
        for claim in claims:
            reserved = self.api.claim(namespace, claim.name).get("status", {}).get("reservedFor", [])
            self.api.reserve(namespace, claim.name, [*(each["uid"] for each in reserved), uid])
        spec = PodSpec(namespace=namespace, name=name, uid=uid, host_network=host_network)
        return SimPod(spec=spec, claims=tuple(claims))

    def configure(self, namespace: str, claim: ClaimSpec) -> None:
        """Put the claim's config where the scheduler copies it to."""
        entries = [
            {
                "source": "FromClaim",
                "requests": [request] if request else [],
                "opaque": {"driver": self.driver, "parameters": dict(parameters)},
            }
            for request, parameters in claim.parameters.items()
        ]

        def change(obj: dict[str, Any]) -> dict[str, Any]:
            obj["status"]["allocation"]["devices"]["config"] = entries
            return obj

        self.api.edit("resourceclaims", claim.name, change, namespace)

    async def prepare(self, pod: SimPod) -> SimPod:
        devices = await self.kubelet.prepare(self.driver, pod.claims, pod=pod.spec.uid)
        return replace(pod, devices=devices)

    async def run_sandbox(self, pod: SimPod) -> SimPod:
        return replace(pod, sandbox=await self.runtime.run_pod(pod.spec))

    async def create_container(self, pod: SimPod, name: str = "main", *, with_claims: bool = True) -> SimPod:
        assert pod.sandbox is not None
        cdi_ids = pod.cdi_ids if with_claims else ()
        container = await self.runtime.create_container(pod.sandbox, name, cdi_ids)
        return replace(pod, containers=(*pod.containers, container))

    async def start_pod(
        self, pod: SimPod, *, containers: Sequence[str] = ("main",), every: float = 0.2, seconds: float = 30.0
    ) -> SimPod:
        """Prepare, sandbox, containers; each repeated as kubelet repeats it, only faster."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            try:
                if not pod.devices:
                    pod = await self.prepare(pod)
                if pod.sandbox is None:
                    pod = await self.run_sandbox(pod)
                for name in containers[len(pod.containers) :]:
                    pod = await self.create_container(pod, name)
                return pod
            except (PrepareFailed, SandboxFailed, ContainerFailed):
                if loop.time() + every > deadline:
                    raise
                await asyncio.sleep(every)

    async def delete_pod(self, pod: SimPod, *, keep_claims: bool = False) -> None:
        """As kubelet ends a pod: sandbox stopped, claims let go of, sandbox removed, objects deleted."""
        if pod.sandbox is not None:
            await self.runtime.stop_pod(pod.sandbox)
        if pod.devices:
            await self.kubelet.unprepare(self.driver, pod.claims, pod=pod.spec.uid)
        if pod.sandbox is not None:
            await self.runtime.remove_pod(pod.sandbox)
        self.api.delete("pods", pod.spec.name, pod.spec.namespace)
        if not keep_claims:
            for claim in pod.claims:
                self.api.delete("resourceclaims", claim.name, claim.namespace)

    def knd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another `knd` command against this node's root."""
        command, *rest = arguments
        flags = [f"--root={self.root}", f"--driver={self.driver}"]
        return subprocess.run(
            [*AGENT[:-1], command, *flags, *rest],
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )


def mount_bpffs(path: Path) -> None:
    _check(_libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700"), f"mounting a bpffs at {path}")


def unmount(path: Path) -> None:
    _check(_libc.umount2(os.fsencode(path), _MNT_DETACH), f"unmounting {path}")


def private_mounts() -> None:
    """Give this process mounts of its own, which end with it. To be called before any thread is made."""
    clone_newns, rec_private = 0x20000, 0x44000
    _check(_libc.unshare(clone_newns), "unshare(CLONE_NEWNS)")
    _check(_libc.mount(b"none", b"/", None, rec_private, None), "making mounts private")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
