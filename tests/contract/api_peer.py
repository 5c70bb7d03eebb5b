"""An API server, simulated or real, as the cases see it: HTTP, a namespace of the case's own, an outsider.

Invariant: everything that is asked goes over HTTP in both forms; what a case made is deleted after it.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from driver.kube.client import ApiClient, Limits, connect
from driver.quantity import parse_quantity
from kndsim.api import SimApi
from kndsim.waiting import wait_until

Json = dict[str, Any]

JSON = "application/json"
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
RESOURCE = "/apis/resource.k8s.io/v1"
SLICES = f"{RESOURCE}/resourceslices"
DRIVER = "knd.contract.example"
PAUSE = "localhost/pause:1"
OUTSIDER = "outsider"


@dataclass(frozen=True, slots=True)
class Answer:
    code: int
    body: Json
    headers: Mapping[str, str]

    @property
    def fields(self) -> list[str]:
        """The fields that a refusal names, sorted."""
        causes = (self.body.get("details") or {}).get("causes") or []
        return sorted({cause["field"] for cause in causes})

    @property
    def said(self) -> str:
        return f"{self.code} {json.dumps(self.body)[:2000]}"


class Http:
    """Requests with the rights of a kubeconfig's user, or of a token instead."""

    def __init__(self, kubeconfig: Path, token: str = "") -> None:
        from kubernetes.client import Configuration
        from kubernetes.client.rest import RESTClientObject
        from kubernetes.config.kube_config import load_kube_config

        configuration = Configuration()
        load_kube_config(
            config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
        )
        configuration.retries = False
        self._host = configuration.host.rstrip("/")
        self._headers = {}
        if token:
            configuration.cert_file = configuration.key_file = None
            self._headers["Authorization"] = f"Bearer {token}"
        else:
            for setting in configuration.auth_settings().values():
                self._headers[setting["key"]] = setting["value"]
        self._rest = RESTClientObject(configuration)

    def close(self) -> None:
        self._rest.close()

    def __call__(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        kind: str = JSON,
        raw: bytes | None = None,
        **query: str,
    ) -> Answer:
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        with contextlib.closing(self._open(method, path, data, kind, query)) as response:
            text = response.read()
            return Answer(response.status, json.loads(text) if text else {}, dict(response.headers))

    @contextmanager
    def watch(self, path: str, *, seconds: int = 8, **query: str) -> Iterator[Iterator[Json]]:
        """The events of a watch, which the server ends after so many seconds."""
        asked = {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds), **query}
        with contextlib.closing(self._open("GET", path, None, JSON, asked)) as response:
            assert response.status == 200, response.read()
            yield (json.loads(line) for line in _lines(response) if line.strip())

    def _open(self, method: str, path: str, data: bytes | None, kind: str, query: Mapping[str, str]) -> Any:
        headers = {**self._headers, "Accept": JSON, "Content-Type": kind}
        url = f"{self._host}{path}" + (f"?{urlencode(query)}" if query else "")
        return self._rest.pool_manager.request(
            method, url, body=data, headers=headers, timeout=30.0, preload_content=False
        )


def _lines(response: Any) -> Iterator[bytes]:
    rest = b""
    for part in response.stream(1 << 16):
        *lines, rest = (rest + part).split(b"\n")
        yield from lines


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiPeer:
    """node exists and has no kubelet's interest; elsewhere is a node name that nothing has, so nobody
    touches what is said of it."""

    http: Http
    kubeconfig: Path
    namespace: str
    node: str
    elsewhere: str
    version: str
    sim: SimApi | None

    @property
    def claims(self) -> str:
        return f"{RESOURCE}/namespaces/{self.namespace}/resourceclaims"

    @property
    def pods(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    @property
    def events(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/events"

    @contextmanager
    def client(self, **limits: Any) -> Iterator[ApiClient]:
        """The product's own client, with an administrator's rights."""
        client = connect(self.kubeconfig, Limits(**limits))
        try:
            yield client
        finally:
            client.close()

    def outsider(self) -> AbstractContextManager[Http]:
        """Somebody whom the server knows and who may do nothing: a service account of the namespace."""
        return self._simulated_outsider() if self.sim is not None else self._real_outsider()

    @contextmanager
    def _real_outsider(self) -> Iterator[Http]:
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        self.http("POST", path, {"metadata": {"name": OUTSIDER}})
        answer = self.http("POST", f"{path}/{OUTSIDER}/token", asked)
        assert answer.code == 201, answer.said
        http = Http(self.kubeconfig, answer.body["status"]["token"])
        try:
            yield http
        finally:
            http.close()

    @contextmanager
    def _simulated_outsider(self) -> Iterator[Http]:
        assert self.sim is not None
        http = Http(self.kubeconfig, self.sim.outsider(self.namespace, OUTSIDER))
        try:
            yield http
        finally:
            http.close()

    def claim(self, name: str, devices: Sequence[str], *, driver: str = DRIVER) -> Json:
        """A claim to which these devices of pool `elsewhere` are allocated, each by a request of its name."""
        spec = {
            "devices": {
                "requests": [{"name": each, "exactly": {"deviceClassName": "contract"}} for each in devices]
            }
        }
        made = self.http("POST", self.claims, {"metadata": {"name": name}, "spec": spec})
        assert made.code == 201, made.said
        results = [
            {"request": each, "driver": driver, "pool": self.elsewhere, "device": each} for each in devices
        ]
        if not results:
            return made.body
        body = {**made.body, "status": {"allocation": {"devices": {"results": results}}}}
        done = self.http("PUT", f"{self.claims}/{name}/status", body)
        assert done.code == 200, done.said
        return done.body

    def slice(self, devices: Sequence[Json] | None = (), **spec: Any) -> Json:
        """A slice's body as the driver sends it, for the node that nothing has. None: without any devices."""
        pool = {"name": self.elsewhere, "generation": 1, "resourceSliceCount": 1}
        return {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "ResourceSlice",
            "metadata": {"generateName": f"00000-{DRIVER}-{self.elsewhere}-"},
            "spec": {
                "driver": DRIVER,
                "nodeName": self.elsewhere,
                "pool": pool,
                **({} if devices is None else {"devices": list(devices)}),
                **spec,
            },
        }

    def made_slice(self, devices: Sequence[Json] = ()) -> Json:
        made = self.http("POST", SLICES, self.slice(devices))
        assert made.code == 201, made.said
        return made.body

    @property
    def selector(self) -> str:
        """The driver's selector for its slices on a node."""
        return f"spec.driver={DRIVER},spec.nodeName={self.elsewhere}"

    def give(self, claim: str, kind: str, *, bandwidth: str = "") -> str | None:
        """What the scheduler gives of `node` to a pod that claims a device of this kind, with at least this
        capacity `bandwidth`; None: nothing."""
        if self.sim is not None:
            self.sim.add_claim(self.namespace, claim, driver=DRIVER)
            takes = {"net": partial(_fits, kind, bandwidth)}
            try:
                ((_, _, device, _),) = self.sim.allocate(
                    *(self.namespace, claim, DRIVER, self.node, takes),
                    amounts={"net": {"bandwidth": bandwidth}} if bandwidth else None,
                )
            except LookupError:
                return None
            return device
        self._ask_scheduler(claim, kind, bandwidth)
        return wait_until(lambda: self._decision(claim), 60.0, f"the scheduler decides on {claim}")[0]

    def part(self, claim: str) -> tuple[str, Mapping[str, Decimal]]:
        """The share that a claim was given of a device, and the amounts."""
        status = self.http("GET", f"{self.claims}/{claim}").body["status"]
        (result,) = status["allocation"]["devices"]["results"]
        consumed = result.get("consumedCapacity", {})
        return result.get("shareID", ""), {name: parse_quantity(text) for name, text in consumed.items()}

    def _ask_scheduler(self, claim: str, kind: str, bandwidth: str) -> None:
        cel = {"expression": f'device.attributes["{DRIVER}"].kind == "{kind}"'}
        wanted: Json = {"deviceClassName": self.namespace, "selectors": [{"cel": cel}]}
        if bandwidth:
            wanted["capacity"] = {"requests": {"bandwidth": bandwidth}}
        request = {"name": "net", "exactly": wanted}
        spec = {"devices": {"requests": [request]}}
        made = self.http("POST", self.claims, {"metadata": {"name": claim}, "spec": spec})
        assert made.code == 201, made.said
        self.pod(
            claim,
            nodeName=None,
            nodeSelector={"kubernetes.io/hostname": self.node},
            tolerations=[{"operator": "Exists"}],
            resourceClaims=[{"name": "net", "resourceClaimName": claim}],
        )

    def _decision(self, claim: str) -> tuple[str | None] | None:
        """None while there is none."""
        status = self.http("GET", f"{self.claims}/{claim}").body.get("status") or {}
        results = ((status.get("allocation") or {}).get("devices") or {}).get("results") or []
        if results:
            return (str(results[0]["device"]),)
        pod = self.http("GET", f"{self.pods}/{claim}").body
        said = [each.get("reason") for each in (pod.get("status") or {}).get("conditions") or []]
        return (None,) if "Unschedulable" in said else None

    def take_back(self, claim: str) -> None:
        """The pod and its claim end, and what it had is free."""
        if self.sim is not None:
            self.sim.delete("resourceclaims", claim, self.namespace)
            return
        self.http("DELETE", f"{self.pods}/{claim}", {"gracePeriodSeconds": 0})
        self.http("DELETE", f"{self.claims}/{claim}")
        wait_until(
            lambda: self.http("GET", f"{self.claims}/{claim}").code == 404, 90.0, f"claim {claim} is gone"
        )

    @contextmanager
    def device_class(self) -> Iterator[None]:
        """One of the namespace's name for what the driver of the cases offers."""
        path = f"{RESOURCE}/deviceclasses"
        selector = {"cel": {"expression": f'device.driver == "{DRIVER}"'}}
        if self.sim is None:
            body = {"metadata": {"name": self.namespace}, "spec": {"selectors": [selector]}}
            made = self.http("POST", path, body)
            assert made.code == 201, made.said
        try:
            yield
        finally:
            if self.sim is None:
                self.http("DELETE", f"{path}/{self.namespace}")

    def pod(self, name: str, **spec: Any) -> Json:
        """A pod of node `elsewhere`, which nobody starts."""
        body = {
            "metadata": {"name": name},
            "spec": {
                "nodeName": self.elsewhere,
                "terminationGracePeriodSeconds": 0,
                "containers": [{"name": "main", "image": PAUSE}],
                **spec,
            },
        }
        made = wait_until(lambda: _made(self.http("POST", self.pods, body)), 20.0, f"pod {name} is taken")
        return made.body


def _fits(kind: str, bandwidth: str, device: Json) -> bool:
    has = (device.get("capacity") or {}).get("bandwidth", {"value": "0"})
    enough = parse_quantity(has["value"]) >= parse_quantity(bandwidth or "0")
    return bool(device["attributes"]["kind"] == {"string": kind}) and enough


def _made(answer: Answer) -> Answer | None:
    """None while the namespace's service account is not there, which a server makes a moment later."""
    if answer.code in (403, 404) and "serviceaccount" in str(answer.body.get("message", "")):
        return None
    assert answer.code == 201, answer.said
    return answer


@contextmanager
def simulated_api(folder: Path) -> Iterator[ApiPeer]:
    with SimApi(tokens={"sim"}) as sim:
        sim.add_node("sim-node")
        kubeconfig = sim.kubeconfig(folder / "kubeconfig")
        with contextlib.closing(Http(kubeconfig)) as http:
            yield ApiPeer(
                http=http,
                kubeconfig=kubeconfig,
                namespace="contract",
                node="sim-node",
                elsewhere="nowhere",
                version="simulated",
                sim=sim,
            )


@contextmanager
def real_api(kubeconfig: Path) -> Iterator[ApiPeer]:
    mark = f"contract-{uuid.uuid4().hex[:8]}"
    with contextlib.closing(Http(kubeconfig)) as http:
        version = http("GET", "/version").body["gitVersion"]
        node = http("GET", "/api/v1/nodes").body["items"][0]["metadata"]["name"]
        assert http("POST", "/api/v1/namespaces", {"metadata": {"name": mark}}).code == 201
        peer = ApiPeer(
            http=http,
            kubeconfig=kubeconfig,
            namespace=mark,
            node=node,
            elsewhere=mark,
            version=version,
            sim=None,
        )
        try:
            yield peer
        finally:
            http("DELETE", SLICES, fieldSelector=f"spec.driver={DRIVER}")
            http("DELETE", peer.pods, {"gracePeriodSeconds": 0})
            http("DELETE", f"/api/v1/namespaces/{mark}")
