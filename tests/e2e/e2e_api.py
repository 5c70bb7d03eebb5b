"""The API server, as the cases use it: raw objects over one connection pool, exec, logs, events.

Invariant: every request has a time limit, and whatever is not success is an ApiRefused that carries the
server's own sentence; only "there is no such object" has an answer of its own, None.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import client, config
from kubernetes.client.api.core_v1_api import CoreV1Api
from kubernetes.stream import stream

from tests.e2e.e2e_objects import Json

RESOURCES: Mapping[str, tuple[str, bool]] = {
    "Namespace": ("namespaces", False),
    "Node": ("nodes", False),
    "Pod": ("pods", True),
    "Event": ("events", True),
    "ConfigMap": ("configmaps", True),
    "ServiceAccount": ("serviceaccounts", True),
    "DaemonSet": ("daemonsets", True),
    "ResourceClaim": ("resourceclaims", True),
    "ResourceClaimTemplate": ("resourceclaimtemplates", True),
    "ResourceSlice": ("resourceslices", False),
    "DeviceClass": ("deviceclasses", False),
    "DeviceTaintRule": ("devicetaintrules", False),
}
"""Kind to plural, and whether it lives in a namespace."""
RESOURCE_API = "resource.k8s.io/v1"
_API_OF = {
    "DaemonSet": "apps/v1",
    **dict.fromkeys(("ResourceClaim", "ResourceClaimTemplate", "ResourceSlice", "DeviceClass"), RESOURCE_API),
}
MERGE = "application/merge-patch+json"


class ApiRefused(Exception):
    """status: the HTTP status; 0 where there was no answer."""

    def __init__(self, what: str, status: int, message: str) -> None:
        super().__init__(f"{what}: {status} {message}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Ran:
    """A command in a container, or on a node, that ended."""

    code: int
    out: str
    err: str


class Api:
    """Thread-safe, but for exec."""

    def __init__(self, kubeconfig: Path, limit: float) -> None:
        """limit: seconds that one request may take."""
        settings = client.Configuration()
        config.load_kube_config(
            config_file=str(kubeconfig), client_configuration=settings, persist_config=False
        )
        settings.retries = False
        self._settings = settings
        self._client = client.ApiClient(settings)
        self._pool = self._client.rest_client.pool_manager
        self.limit = limit

    def close(self) -> None:
        self._client.rest_client.close()

    # --- objects ------------------------------------------------------------------------------------

    def create(self, obj: Mapping[str, Any], namespace: str = "") -> Json:
        path = self.path(obj["kind"], namespace, api_version=obj["apiVersion"])
        return self.ask("POST", path, body=obj)

    def find(self, kind: str, name: str, namespace: str = "", *, api_version: str = "") -> Json | None:
        """None if there is none of that name."""
        try:
            return self.ask("GET", self.path(kind, namespace, name, api_version=api_version))
        except ApiRefused as refused:
            if refused.status == 404:
                return None
            raise

    def get(self, kind: str, name: str, namespace: str = "") -> Json:
        return self.ask("GET", self.path(kind, namespace, name))

    def list(self, kind: str, namespace: str = "", **query: str) -> Sequence[Json]:
        """query: fieldSelector, labelSelector. Of all namespaces where none is given."""
        items: list[Json] = self.ask("GET", self.path(kind, namespace), query=query)["items"]
        return items

    def merge(self, kind: str, name: str, patch: Mapping[str, Any], namespace: str = "") -> Json:
        return self.ask("PATCH", self.path(kind, namespace, name), body=patch, content=MERGE)

    def delete(
        self, kind: str, name: str, namespace: str = "", *, grace: int | None = None, api_version: str = ""
    ) -> None:
        """Fine where there is none. grace 0 is a forced deletion."""
        query = {} if grace is None else {"gracePeriodSeconds": str(grace)}
        try:
            self.ask("DELETE", self.path(kind, namespace, name, api_version=api_version), query=query)
        except ApiRefused as refused:
            if refused.status != 404:
                raise

    def serves(self, api_version: str, kind: str) -> bool:
        try:
            found = self.ask("GET", f"/apis/{api_version}")["resources"]
        except ApiRefused as refused:
            if refused.status == 404:
                return False
            raise
        return any(each["kind"] == kind for each in found)

    def events(self, namespace: str, name: str) -> Sequence[Json]:
        """Of one object, in no order."""
        return self.list("Event", namespace, fieldSelector=f"involvedObject.name={name}")

    # --- containers ---------------------------------------------------------------------------------

    def logs(self, namespace: str, pod: str, container: str, *, previous: bool = False) -> str:
        query = {"container": container, **({"previous": "true"} if previous else {})}
        answer = self._send("GET", f"{self.path('Pod', namespace, pod)}/log", query)
        return self._text(f"log of {namespace}/{pod} {container}", answer)

    def follow(self, namespace: str, pod: str, container: str, within: float) -> Iterator[bytes]:
        """The log from its beginning to the container's end. ApiRefused if it breaks off, or is silent for so
        long."""
        query = {"container": container, "follow": "true"}
        path = f"{self.path('Pod', namespace, pod)}/log"
        answer = self._send("GET", path, query, limit=within)
        if answer.status != 200:
            self._text(f"log of {namespace}/{pod} {container}", answer)
        try:
            yield from answer.stream(1 << 14)
        except urllib3.exceptions.HTTPError as error:
            raise ApiRefused(f"log of {namespace}/{pod} {container}", 0, str(error)) from error
        finally:
            answer.close()

    def exec(self, namespace: str, pod: str, container: str, argv: Sequence[str], within: float) -> Ran:
        """Run to its end. TimeoutError if it is still running after so many seconds."""
        socket = stream(
            CoreV1Api(client.ApiClient(self._settings)).connect_get_namespaced_pod_exec,
            pod,
            namespace,
            container=container,
            command=list(argv),
            stdin=False,
            stdout=True,
            stderr=True,
            tty=False,
            _preload_content=False,
            _request_timeout=self.limit,
        )
        try:
            socket.run_forever(timeout=within)
            if socket.is_open():
                raise TimeoutError(f"{' '.join(argv)} in {namespace}/{pod} still runs after {within:g} s")
            return Ran(socket.returncode, socket.read_stdout(), socket.read_stderr())
        finally:
            # Not WSClient.close: that leaves the socket open where the server has said goodbye first.
            socket.sock.shutdown()

    # --- one request --------------------------------------------------------------------------------

    def path(self, kind: str, namespace: str = "", name: str = "", *, api_version: str = "") -> str:
        plural, namespaced = RESOURCES[kind]
        version = api_version or _API_OF.get(kind, "v1")
        prefix = f"/apis/{version}" if "/" in version else f"/api/{version}"
        inside = f"/namespaces/{namespace}" if namespaced and namespace else ""
        return f"{prefix}{inside}/{plural}" + (f"/{name}" if name else "")

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content: str = "application/json",
    ) -> Json:
        answer = self._send(method, path, query or {}, body, content)
        decoded: Json = json.loads(self._text(f"{method} {path}", answer))
        return decoded

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        content: str = "application/json",
        limit: float = 0.0,
    ) -> Any:
        url = self._settings.host.rstrip("/") + path + (f"?{urlencode(query)}" if query else "")
        headers = {"Accept": "application/json, */*"}
        if body is not None:
            headers["Content-Type"] = content
        for setting in self._settings.auth_settings().values():
            if setting["value"]:
                headers[setting["key"]] = setting["value"]
        try:
            return self._pool.request(
                method,
                url,
                body=None if body is None else _canonical(body),
                headers=headers,
                timeout=urllib3.Timeout(connect=self.limit, read=limit or self.limit),
                preload_content=False,
                retries=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise ApiRefused(f"{method} {path}", 0, str(error)) from error

    def _text(self, what: str, answer: Any) -> str:
        try:
            said = answer.data.decode(errors="replace")
        except urllib3.exceptions.HTTPError as error:
            raise ApiRefused(what, 0, str(error)) from error
        finally:
            answer.release_conn()
        if not 200 <= answer.status < 300:
            try:
                said = json.loads(said)["message"]
            except (ValueError, KeyError, TypeError):
                said = said[:500]
            raise ApiRefused(what, answer.status, said)
        return str(said)


def _canonical(body: Mapping[str, Any]) -> bytes:
    """As kubectl writes it. The API server keeps a claim's opaque parameters byte for byte, and takes a
    server-side apply to any claim for a change of them where those bytes are not the ones it would write."""
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
