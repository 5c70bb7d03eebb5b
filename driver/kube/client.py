"""A small REST client over raw JSON: the only place that speaks HTTP to the API server.

Invariant: every request has time-outs and a size limit, is counted, and ends in a JSON object or an
ApiFailure. Objects stay plain dicts: the client package's models cost 25 MiB more and drop the fields
they do not know. The package is imported on first use, never at import of this module.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from driver.kube import failures
from driver.kube.failures import ApiFailure, NotFound, Unavailable
from driver.kube.retry import worth_an_immediate_repeat
from driver.kube.wire import JsonObject, Malformed, child, children, decode, text

log = logging.getLogger(__name__)

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON = "application/json"
USER_AGENT = "knd"
CHUNK = 1 << 16
CONNECTIONS = 16
"""Kept open at most: more than the threads that use them."""
_NO_NAMES = {"", ".", ".."}
"""What would make a request be about something else: the collection, or the folder above."""
_DELETE_OPTIONS = {"apiVersion": "v1", "kind": "DeleteOptions"}


class Resource(enum.Enum):
    """Value: prefix of the path, plural, whether it lives in a namespace."""

    NODES = ("/api/v1", "nodes", False)
    PODS = ("/api/v1", "pods", True)
    EVENTS = ("/api/v1", "events", True)
    RESOURCE_SLICES = ("/apis/resource.k8s.io/v1", "resourceslices", False)
    RESOURCE_CLAIMS = ("/apis/resource.k8s.io/v1", "resourceclaims", True)

    @property
    def plural(self) -> str:
        return self.value[1]

    def path(self, namespace: str | None, name: str | None, subresource: str = "") -> str:
        """Names are quoted: they come from kubelet and the runtime."""
        prefix, plural, namespaced = self.value
        parts = [prefix]
        if namespaced and namespace is not None:
            parts.append(f"namespaces/{quote(namespace, safe='')}")
        parts.append(plural)
        if name is not None:
            parts.append(quote(name, safe=""))
        if subresource:
            parts.append(subresource)
        return "/".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds and bytes. silence: longest a watch may say nothing (servers send a bookmark about every
    minute) before its connection is taken for dead."""

    connect: float = 3.0
    read: float = 8.0
    total: float = 30.0
    silence: float = 150.0
    answer: int = 64 << 20
    line: int = 8 << 20
    page: int = 100


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    query: Mapping[str, str]
    body: JsonObject | None = None
    kind: str = JSON


class ApiClient:
    """Thread-safe. Construct with `connect`; close() ends idle connections."""

    def __init__(self, configuration: Any, rest: Any, limits: Limits) -> None:
        self._configuration = configuration
        self._rest = rest
        self.limits = limits
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self.last_error = ""
        """Why the last request got no usable answer; "" once one did."""

    @property
    def requests(self) -> Mapping[str, int]:
        """Requests made, by `verb resource`, for example `get resourceclaims`."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        self._rest.close()

    # --- verbs --------------------------------------------------------------------------------------

    def get(
        self, resource: Resource, name: str, namespace: str | None = None, *, exact: bool = False
    ) -> JsonObject:
        """exact: keep wire.RepeatedKeys."""
        return self._call("get", "GET", resource, namespace, name, exact=exact)

    def list_pages(self, resource: Resource, field_selector: str) -> Iterator[tuple[list[JsonObject], str]]:
        """Yield pages of objects over all namespaces and, with each, the list's resourceVersion. Gone if
        the list took so long that its snapshot expired."""
        token = ""
        while True:
            query = {"fieldSelector": field_selector, "limit": str(self.limits.page)}
            if token:
                query["continue"] = token
            answer = self._call("list", "GET", resource, None, None, query=query)
            metadata = child(answer, "metadata")
            yield list(children(answer, "items")), text(metadata, "resourceVersion")
            token = text(metadata, "continue")
            if not token:
                return

    def create(self, resource: Resource, body: JsonObject, namespace: str | None = None) -> JsonObject:
        return self._call("create", "POST", resource, namespace, None, body=body)

    def try_create(self, resource: Resource, body: JsonObject) -> JsonObject:
        """What the server would make of it; nothing is kept."""
        return self._call("create", "POST", resource, None, None, body=body, query={"dryRun": "All"})

    def replace(
        self, resource: Resource, name: str, body: JsonObject, namespace: str | None = None
    ) -> JsonObject:
        return self._call("update", "PUT", resource, namespace, name, body=body)

    def delete(
        self, resource: Resource, name: str, *, uid: str, resource_version: str, namespace: str | None = None
    ) -> None:
        """Delete exactly the object that was read: Conflict if it is another or has changed since."""
        body = {**_DELETE_OPTIONS, "preconditions": {"uid": uid, "resourceVersion": resource_version}}
        self._call("delete", "DELETE", resource, namespace, name, body=body)

    def apply(
        self,
        resource: Resource,
        name: str,
        body: JsonObject,
        *,
        namespace: str | None,
        subresource: str,
        manager: str,
    ) -> JsonObject:
        """Server-side apply, forced: body holds only the fields this manager owns."""
        query = {"fieldManager": manager, "force": "true"}
        return self._call(
            "patch",
            "PATCH",
            resource,
            namespace,
            name,
            subresource=subresource,
            body=body,
            query=query,
            kind=APPLY,
        )

    def merge(self, resource: Resource, name: str, body: JsonObject, namespace: str | None) -> JsonObject:
        """JSON merge patch."""
        return self._call("patch", "PATCH", resource, namespace, name, body=body, kind=MERGE)

    def watch(
        self, resource: Resource, *, field_selector: str, resource_version: str, seconds: int
    ) -> WatchStream:
        """Open a watch that the server ends after about so many seconds."""
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "fieldSelector": field_selector,
            "resourceVersion": resource_version,
            "timeoutSeconds": str(seconds),
        }
        what = f"watch {resource.plural}"
        self._count(what)
        response = self._send(what, _Request("GET", resource.path(None, None), query))
        if response.status != 200:
            raise self._failure(what, response)
        self.last_error = ""
        return WatchStream(what, response, self.limits)

    # --- one request --------------------------------------------------------------------------------

    def _call(
        self,
        verb: str,
        method: str,
        resource: Resource,
        namespace: str | None,
        name: str | None,
        *,
        subresource: str = "",
        query: Mapping[str, str] | None = None,
        body: JsonObject | None = None,
        kind: str = JSON,
        exact: bool = False,
    ) -> JsonObject:
        which = "/".join(part for part in (namespace, name) if part)
        counted = f"{verb} {resource.plural}" + (f"/{subresource}" if subresource else "")
        what = f"{counted} {which}".rstrip()
        if {namespace, name} & _NO_NAMES:
            raise NotFound(what, 404, f"nothing can be called {name!r} in {namespace!r}")
        request = _Request(method, resource.path(namespace, name, subresource), query or {}, body, kind)
        self._count(counted)
        try:
            return self._exchange(what, request, exact)
        except Unavailable as failure:
            if not worth_an_immediate_repeat(failure, safe=method == "GET"):
                raise
        self._count(counted)
        return self._exchange(what, request, exact)

    def _exchange(self, what: str, request: _Request, exact: bool) -> JsonObject:
        response = self._send(what, request)
        if not 200 <= response.status < 300:
            raise self._failure(what, response)
        try:
            answer = decode(self._body(what, response), what, exact=exact)
        except Malformed as error:
            raise self._unavailable(what, response.status, str(error)) from error
        self.last_error = ""
        return answer

    def _send(self, what: str, request: _Request) -> Any:
        query = f"?{urlencode(request.query)}" if request.query else ""
        headers = {"Accept": JSON, "User-Agent": USER_AGENT}
        data = None
        if request.body is not None:
            headers["Content-Type"] = request.kind
            data = json.dumps(request.body, separators=(",", ":")).encode()
        try:
            for setting in self._configuration.auth_settings().values():
                if setting["value"]:
                    headers[setting["key"]] = setting["value"]
            return self._rest.pool_manager.request(
                request.method,
                self._configuration.host.rstrip("/") + request.path + query,
                body=data,
                headers=headers,
                timeout=_timeout(self.limits),
                preload_content=False,
            )
        except Exception as error:  # TLS, DNS, token file, socket: all mean no answer
            raise self._unavailable(what, 0, _sentence(error), dropped=_dropped(error)) from error

    def _body(self, what: str, response: Any) -> bytes:
        """The whole body, bounded in size and in time; the connection goes back to the pool."""
        deadline = time.monotonic() + self.limits.total
        parts: list[bytes] = []
        size = 0
        try:
            while part := response.read1(CHUNK):
                parts.append(part)
                size += len(part)
                if size > self.limits.answer:
                    raise self._unavailable(what, response.status, f"answer over {self.limits.answer} bytes")
                if time.monotonic() > deadline:
                    raise self._unavailable(
                        what, response.status, f"answer took over {self.limits.total:.0f} s"
                    )
        except ApiFailure:
            response.close()
            raise
        except Exception as error:  # a broken or stalled body is no answer
            response.close()
            raise self._unavailable(what, 0, _sentence(error), dropped=_dropped(error)) from error
        response.release_conn()
        return b"".join(parts)

    def _failure(self, what: str, response: Any) -> ApiFailure:
        failure = failures.from_answer(
            what, response.status, response.headers.get("Retry-After"), self._body(what, response)
        )
        if isinstance(failure, Unavailable):
            self.last_error = str(failure)
        else:
            self.last_error = ""
        return failure

    def _unavailable(self, what: str, status: int, message: str, *, dropped: bool = False) -> Unavailable:
        failure = Unavailable(what, status, message, dropped=dropped)
        self.last_error = str(failure)
        return failure

    def _count(self, key: str) -> None:
        with self._lock:
            self._counts[key] += 1


class WatchStream:
    """An open watch: iterate over (type, object); stop() from any thread ends the iteration."""

    def __init__(self, what: str, response: Any, limits: Limits) -> None:
        self._what = what
        self._response = response
        self._limits = limits
        self._stopped = False
        connection = getattr(response, "connection", None)
        sock = getattr(connection, "sock", None)
        if sock is not None:
            sock.settimeout(limits.silence)

    def __enter__(self) -> WatchStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self._response.close()

    def stop(self) -> None:
        self._stopped = True
        with contextlib.suppress(Exception):  # closed already, or closing in its own thread
            self._response.shutdown()

    def __iter__(self) -> Iterator[tuple[str, JsonObject]]:
        """Raises Unavailable when the connection breaks, is silent too long or says what is no event;
        ends when the server ends it or stop() was called."""
        pending = bytearray()
        try:
            for part in self._response.stream(CHUNK):
                pending += part
                if b"\n" in part:
                    *lines, rest = bytes(pending).split(b"\n")
                    pending = bytearray(rest)
                    for line in lines:
                        if line.strip():
                            yield self._event(line)
                if len(pending) > self._limits.line:
                    raise Unavailable(self._what, 0, f"event over {self._limits.line} bytes")
        except ApiFailure:
            raise
        except GeneratorExit:
            raise
        except Exception as error:
            if self._stopped:
                return
            raise Unavailable(self._what, 0, _sentence(error)) from error

    def _event(self, line: bytes) -> tuple[str, JsonObject]:
        try:
            event = decode(line, self._what)
            return text(event, "type"), child(event, "object")
        except Malformed as error:
            raise Unavailable(self._what, 0, str(error)) from error


def connect(kubeconfig: Path | None, limits: Limits | None = None) -> ApiClient:
    """A client from a kubeconfig file, or from the pod's service account where kubeconfig is None.

    Unavailable, with what to do, when there is no usable configuration. Imports the client package:
    0.2 to 2.5 s and 29 MiB the first time.
    """
    from kubernetes.client import Configuration
    from kubernetes.client.rest import RESTClientObject
    from kubernetes.config.incluster_config import load_incluster_config
    from kubernetes.config.kube_config import load_kube_config

    configuration = Configuration()
    try:
        if kubeconfig is None:
            load_incluster_config(client_configuration=configuration)
        else:
            load_kube_config(
                config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
            )
    except Exception as error:  # the file may hold anything, and so may what YAML raises about it
        raise Unavailable("connect", 0, _advice(kubeconfig, error)) from error
    configuration.retries = False  # retry.py decides
    configuration.keep_alive = True
    configuration.connection_pool_maxsize = CONNECTIONS
    return ApiClient(configuration, RESTClientObject(configuration), limits or Limits())


def _advice(kubeconfig: Path | None, error: Exception) -> str:
    if kubeconfig is None:
        why = _sentence(error)
        return f"not in a cluster ({why}): run as a pod with a service account, or name a kubeconfig file"
    return f"cannot use kubeconfig {kubeconfig}: {_sentence(error)}"


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _dropped(error: Exception) -> bool:
    import urllib3

    return isinstance(error, urllib3.exceptions.ProtocolError)


def _timeout(limits: Limits) -> Any:
    import urllib3

    return urllib3.Timeout(connect=limits.connect, read=limits.read)
