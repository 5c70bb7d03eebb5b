"""HTTP face of the simulated API server: paths, verbs, watches, faults, the request log.

Invariant: every request is logged before it is answered; an error is always a Status object; a watch sends
whole JSON lines in chunks, as the real server does.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from kndsim.api_store import ApiError, Json, Key, Kind, Selector, bad_request

PREFIXES = {("api", "v1"): "v1", ("apis", "resource.k8s.io", "v1"): "resource.k8s.io/v1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One logged request. verb is Kubernetes' (`list`, `watch`, `patch`...); at is time.monotonic()."""

    verb: str
    resource: str
    """Plural, with `/status` where it is that subresource."""
    namespace: str
    name: str
    query: dict[str, str]
    content_type: str
    body: Any
    authorization: str
    at: float

    @property
    def writes(self) -> bool:
        return self.verb not in ("get", "list", "watch")


@dataclass(slots=True)
class Fault:
    """Answers that are given instead of the real ones, times over. close: no answer, connection closed.
    verb or resource "" matches any."""

    times: int
    verb: str = ""
    resource: str = ""
    error: ApiError | None = None
    raw: bytes | None = None
    """A 200 answer with this body."""
    delay: float = 0.0
    """Seconds until the real answer is given, where there is no other fault."""

    def fits(self, request: Request) -> bool:
        return self.times > 0 and self.verb in ("", request.verb) and self.resource in ("", request.resource)


@dataclass(slots=True)
class Target:
    """What a path names."""

    kind: Kind
    namespace: str
    name: str
    subresource: str

    @property
    def key(self) -> Key:
        return Key(self.kind, self.namespace, self.name)


def parse_path(path: str) -> Target:
    parts = [unquote(part) for part in path.split("/") if part]
    for prefix, version in PREFIXES.items():
        if tuple(parts[: len(prefix)]) != prefix:
            continue
        rest = parts[len(prefix) :]
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        for kind in Kind:
            if rest and kind.api_version == version and rest[0] == kind.plural and len(rest) <= 3:
                name, subresource, *_ = [*rest[1:], "", ""]
                return Target(kind, namespace, name, subresource)
    raise ApiError(404, "NotFound", f"the server could not find the requested resource: {path}")


def parse_selector(text: str) -> Selector:
    terms = [term.partition("=") for term in text.split(",") if term]
    return {path: value.lstrip("=") for path, _, value in terms}


SELECTABLE = {
    Kind.NODE: {"spec.unschedulable"},
    Kind.POD: {"spec.nodeName", "spec.schedulerName", "spec.restartPolicy", "status.phase"},
    Kind.EVENT: {"involvedObject.name", "involvedObject.uid", "involvedObject.kind", "reason", "type"},
    Kind.SLICE: {"spec.nodeName", "spec.driver", "spec.pool.name"},
    Kind.CLAIM: set(),
}


def check_selector(kind: Kind, selector: Selector) -> None:
    """400 for a field that the kind cannot be selected by."""
    for path in selector.keys() - SELECTABLE[kind] - {"metadata.name", "metadata.namespace"}:
        raise bad_request(
            f'Unable to find "{kind.api_version}, Resource={kind.plural}" that match label selector "",'
            f' field selector "{path}={selector[path]}": field label not supported: {path}'
        )


def forbidden(user: str, request: Request, target: Target) -> ApiError:
    """What RBAC says to a user who has no rule for the request."""
    kind, named = target.kind, f' "{target.name}"' if target.name else ""
    where = f'in the namespace "{target.namespace}"' if target.namespace else "at the cluster scope"
    what = f'cannot {request.verb} resource "{request.resource}" in API group "{kind.group}" {where}'
    details = {"group": kind.group, "kind": kind.plural} | ({"name": target.name} if named else {})
    text = f'{kind.qualified}{named} is forbidden: User "{user}" {what}'
    return ApiError(403, "Forbidden", text, details=details)


@dataclass(slots=True)
class Wire:
    """State of the HTTP side that tests steer: log, faults, open watches."""

    log: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    connections: set[socket.socket] = field(default_factory=set)
    closing: bool = False
    bookmark_seconds: float = 60.0
    hang_generation: int = 0
    """Raised by hang_watches(): watches opened before it never send again."""

    def take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.fits(request):
                    fault.times -= 1
                    return fault
            return None

    def linger(self, fault: Fault) -> None:
        """Keep a request waiting, but not past the end of the fault or of the server."""
        end = time.monotonic() + fault.delay
        while not self.closing and time.monotonic() < end and any(each is fault for each in self.faults):
            time.sleep(0.02)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, wire: Wire, backend: Backend, tls: ssl.SSLContext | None) -> None:
        self.wire = wire
        self.backend = backend
        super().__init__(("127.0.0.1", 0), Handler)
        if tls is not None:
            # The handshake is made in the connection's own thread, at its first read.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)


class Backend:
    """What the handler calls; implemented by kndsim.api. Each returns the object to answer with."""

    def read(self, target: Target, query: dict[str, str]) -> Json:
        raise NotImplementedError

    def write(self, verb: str, target: Target, query: dict[str, str], content_type: str, body: Any) -> Json:
        raise NotImplementedError

    def check_user(self, request: Request, target: Target) -> None:
        raise NotImplementedError

    def watch(self, target: Target, query: dict[str, str], gone: Callable[[], bool]) -> Iterator[Json | None]:
        raise NotImplementedError


VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    timeout = 600
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.server.wire.lock:
            self.server.wire.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.wire.lock:
            self.server.wire.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """The request log is what tests read; nothing goes to stderr."""

    def handle(self) -> None:
        with suppress(OSError):  # the client, or drop_connections(), closed it
            super().handle()

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        try:
            body = self._body()
            target = parse_path(url.path)
            request = self._logged(method, target, query, body)
            fault = self.server.wire.take_fault(request)
            if fault is not None and fault.delay:
                self.server.wire.linger(fault)
            elif fault is not None:
                self._act_out(fault)
                return
            self.server.backend.check_user(request, target)
            if request.verb == "watch":
                self._watch(target, query)
            elif method == "GET":
                self._answer(200, self.server.backend.read(target, query))
            else:
                kind = request.content_type
                answer = self.server.backend.write(request.verb, target, query, kind, body)
                self._answer(201 if request.verb == "create" else 200, answer)
        except ApiError as error:
            self._fail(error)

    def _body(self) -> Any:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not raw:
            return None
        try:
            return json.loads(raw)
        except ValueError as error:
            raise bad_request(f"the body is not JSON: {error}") from error

    def _logged(self, method: str, target: Target, query: dict[str, str], body: Any) -> Request:
        if method == "GET":
            verb = "get" if target.name else "watch" if query.get("watch") in ("1", "true") else "list"
        elif method == "DELETE" and not target.name:
            verb = "deletecollection"
        else:
            verb = VERBS[method]
        resource = target.kind.plural + (f"/{target.subresource}" if target.subresource else "")
        kind = (self.headers.get("Content-Type") or "").partition(";")[0]
        request = Request(
            verb=verb,
            resource=resource,
            namespace=target.namespace,
            name=target.name,
            query=query,
            content_type=kind,
            body=body,
            authorization=self.headers.get("Authorization") or "",
            at=time.monotonic(),
        )
        with self.server.wire.lock:
            self.server.wire.log.append(request)
        return request

    def _act_out(self, fault: Fault) -> None:
        if fault.error is not None:
            raise fault.error
        if fault.raw is not None:
            self._send(200, fault.raw)
            return
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _fail(self, error: ApiError) -> None:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        self._send(error.code, json.dumps(error.status()).encode(), headers)

    def _answer(self, code: int, obj: Json) -> None:
        self._send(code, json.dumps(obj).encode())

    def _send(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _watch(self, target: Target, query: dict[str, str]) -> None:
        wire = self.server.wire
        born = wire.hang_generation
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        for event in self.server.backend.watch(target, query, lambda: wire.closing):
            if wire.hang_generation != born:
                continue  # the connection stays open and silent until the watch's own end
            if event is not None:
                data = json.dumps(event).encode() + b"\n"
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if wire.hang_generation == born:
            self.wfile.write(b"0\r\n\r\n")


def encode_continue(version: int, start: int) -> str:
    return base64.urlsafe_b64encode(json.dumps({"rv": version, "start": start}).encode()).decode()


def decode_continue(token: str) -> tuple[int, int]:
    try:
        fields = json.loads(base64.urlsafe_b64decode(token))
        return int(fields["rv"]), int(fields["start"])
    except (ValueError, KeyError, TypeError) as error:
        raise bad_request(f"continue key is not valid: {error}") from error
