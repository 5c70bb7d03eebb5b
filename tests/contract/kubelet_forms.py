"""Kubelets, simulated or real, as the cases see them: a registry of plugins, pods with claims, a restart.

Invariant: a pod is started once and tried again by the kubelet alone, at its own pace; what a case left is
deleted after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kndsim.kubelet import PrepareFailed, SimClaim, SimKubelet, UnprepareFailed
from kndsim.waiting import wait_until_async
from tests.contract.api_peer import RESOURCE, Http
from tests.unit.sim_kubelet_fakes import DRIVER, FAST

if TYPE_CHECKING:
    from kndsim.cluster import Node

PAUSE = "localhost/pause:1"
RETRIES = 0.1
"""Seconds between two tries of the simulated kubelet's pods."""


@dataclass(frozen=True, slots=True)
class Claim:
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Pod:
    name: str
    uid: str
    claims: tuple[Claim, ...]


class KubeletPeer(Protocol):
    registry: Path
    """As this machine reaches it."""

    def seen(self, path: Path) -> str:
        """A path in the registry, as kubelet names it."""
        ...

    async def claim(self) -> Claim: ...
    async def start(self, *claims: Claim, named: bool = False) -> Pod:
        """named: its container names the claims, so their CDI devices must exist, if there are any."""
        ...

    async def running(self, pod: Pod) -> bool: ...

    async def complaints(self, pod: Pod) -> list[str]:
        """What the pod's events say of its claims."""
        ...

    async def health(self, pod: Pod) -> str:
        """What the pod's status says of its device's health, "" if it says nothing."""
        ...

    async def delete(self, pod: Pod, *, force: bool = False) -> None: ...
    async def restart(self) -> None: ...


@dataclass
class SimulatedKubelet:
    kubelet: SimKubelet
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _said: dict[str, list[str]] = field(default_factory=dict)

    @property
    def registry(self) -> Path:
        return self.kubelet.registry

    def seen(self, path: Path) -> str:
        return str(path)

    async def claim(self) -> Claim:
        return Claim("contract", f"claim-{uuid.uuid4().hex[:8]}", str(uuid.uuid4()))

    async def start(self, *claims: Claim, named: bool = False) -> Pod:
        del named
        pod = Pod(f"pod-{uuid.uuid4().hex[:8]}", str(uuid.uuid4()), claims)
        self._said[pod.uid] = []
        self._tasks[pod.uid] = asyncio.create_task(self._keep_trying(pod))
        return pod

    async def _keep_trying(self, pod: Pod) -> None:
        while True:
            try:
                await self.kubelet.prepare(DRIVER, _sim(pod.claims), pod=pod.uid)
                return
            except PrepareFailed as error:
                self._said[pod.uid].append(f"Failed to prepare dynamic resources: {error}")
            await asyncio.sleep(RETRIES)

    async def running(self, pod: Pod) -> bool:
        return self._tasks[pod.uid].done()

    async def complaints(self, pod: Pod) -> list[str]:
        return self._said[pod.uid]

    async def health(self, pod: Pod) -> str:
        known = self.kubelet.health(DRIVER).get(("node-a", "nic-0"))
        return known.status if known is not None else "Unknown"

    async def delete(self, pod: Pod, *, force: bool = False) -> None:
        await self._stop(pod.uid)
        held = [claim for claim in pod.claims if self.kubelet.holds(claim.uid)]
        if held:
            await self.kubelet.unprepare(DRIVER, _sim(held), pod=pod.uid)

    async def restart(self) -> None:
        await self.kubelet.restart()

    async def _stop(self, uid: str) -> None:
        self._tasks[uid].cancel()
        await asyncio.gather(self._tasks[uid], return_exceptions=True)

    async def clear(self) -> None:
        for uid in self._tasks:
            await self._stop(uid)


def _sim(claims: Sequence[Claim]) -> list[SimClaim]:
    return [SimClaim(each.namespace, each.name, each.uid) for each in claims]


@asynccontextmanager
async def simulated_kubelet(root: Path) -> AsyncIterator[SimulatedKubelet]:
    async with SimKubelet(root, node="node-a", timing=FAST) as kubelet:
        peer = SimulatedKubelet(kubelet)
        try:
            yield peer
        finally:
            with contextlib.suppress(UnprepareFailed):
                await peer.clear()


@dataclass
class RealKubelet:
    node: Node
    http: Http
    namespace: str

    @property
    def registry(self) -> Path:
        return self.node.root / "var/lib/kubelet/plugins_registry"

    def seen(self, path: Path) -> str:
        return f"/{path.relative_to(self.node.root)}"

    @property
    def _claims(self) -> str:
        return f"{RESOURCE}/namespaces/{self.namespace}/resourceclaims"

    @property
    def _pods(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    def _ask(self, code: int, method: str, path: str, body: Any = None, **query: str) -> dict[str, Any]:
        answer = self.http(method, path, body, **query)
        assert answer.code == code, answer.said
        return answer.body

    async def claim(self) -> Claim:
        name = f"claim-{uuid.uuid4().hex[:8]}"
        spec = {"devices": {"requests": [{"name": "nic", "exactly": {"deviceClassName": "contract"}}]}}
        made = self._ask(201, "POST", self._claims, {"metadata": {"name": name}, "spec": spec})
        result = {"request": "nic", "driver": DRIVER, "pool": "node-a", "device": "nic-0"}
        status = {"allocation": {"devices": {"results": [result]}}}
        self._ask(200, "PUT", f"{self._claims}/{name}/status", {**made, "status": status})
        return Claim(self.namespace, name, made["metadata"]["uid"])

    async def start(self, *claims: Claim, named: bool = False) -> Pod:
        name = f"pod-{uuid.uuid4().hex[:8]}"
        spec = {
            "nodeName": self.node.name,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "main",
                    "image": PAUSE,
                    "imagePullPolicy": "Never",
                    "resources": {
                        "claims": [{"name": f"c{number}"} for number in range(len(claims) if named else 0)]
                    },
                }
            ],
            "resourceClaims": [
                {"name": f"c{number}", "resourceClaimName": claim.name} for number, claim in enumerate(claims)
            ],
        }
        # Bound by hand, and its claims reserved before kubelet sees it: nobody schedules it.
        uid = self._made_pod(name, spec, claims)
        return Pod(name, uid, claims)

    def _made_pod(self, name: str, spec: dict[str, Any], claims: Sequence[Claim]) -> str:
        waiting = {**spec, "schedulerName": "nobody"}
        del waiting["nodeName"]
        body = {"metadata": {"name": name}, "spec": waiting}
        uid: str = self._ask(201, "POST", self._pods, body)["metadata"]["uid"]
        for claim in claims:
            path = f"{self._claims}/{claim.name}"
            have = self._ask(200, "GET", path)
            user = {"resource": "pods", "name": name, "uid": uid}
            have["status"]["reservedFor"] = [*have["status"].get("reservedFor", []), user]
            self._ask(200, "PUT", f"{path}/status", have)
        target = {"apiVersion": "v1", "kind": "Node", "name": spec["nodeName"]}
        binding = {"metadata": {"name": name}, "target": target}
        self._ask(201, "POST", f"{self._pods}/{name}/binding", binding)
        return uid

    async def running(self, pod: Pod) -> bool:
        status = self.http("GET", f"{self._pods}/{pod.name}").body.get("status", {})
        return bool(status.get("phase") == "Running")

    async def complaints(self, pod: Pod) -> list[str]:
        listed = self._ask(
            200,
            "GET",
            f"/api/v1/namespaces/{self.namespace}/events",
            fieldSelector=f"involvedObject.uid={pod.uid},reason=FailedPrepareDynamicResources",
        )
        return [each["message"] for each in listed["items"]]

    async def health(self, pod: Pod) -> str:
        status = self.http("GET", f"{self._pods}/{pod.name}").body.get("status", {})
        told = [
            resource["health"]
            for container in status.get("containerStatuses", [])
            for each in container.get("allocatedResourcesStatus", [])
            for resource in each["resources"]
        ]
        return told[0] if told else ""

    async def delete(self, pod: Pod, *, force: bool = False) -> None:
        grace = {"gracePeriodSeconds": 0} if force else None
        self.http("DELETE", f"{self._pods}/{pod.name}", grace)

    async def restart(self) -> None:
        await asyncio.to_thread(self.node.restart, "kubelet")

    async def clear(self) -> None:
        self.http("DELETE", self._pods, {"gracePeriodSeconds": 0})
        self.http("DELETE", f"/api/v1/namespaces/{self.namespace}")


@asynccontextmanager
async def real_kubelet(node: Node, kubeconfig: Path) -> AsyncIterator[RealKubelet]:
    with contextlib.closing(Http(kubeconfig)) as http:
        peer = RealKubelet(node, http, f"contract-{uuid.uuid4().hex[:8]}")
        assert http("POST", "/api/v1/namespaces", {"metadata": {"name": peer.namespace}}).code == 201
        path = f"/api/v1/namespaces/{peer.namespace}/serviceaccounts/default"
        await wait_until_async(lambda: http("GET", path).code == 200, 20.0, "a default account")
        try:
            yield peer
        finally:
            await peer.clear()
