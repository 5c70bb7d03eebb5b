"""A simulated Kubernetes API server, strict where the real one is.

Invariant: what passes here passes there: names, limits, conflicts, generations, versions and field
ownership are the real server's for the few kinds the driver uses. It listens on loopback only and
keeps everything in memory.
"""

from __future__ import annotations

import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from socket import SHUT_RDWR
from types import TracebackType
from typing import Any

from kndsim import api_alloc
from kndsim.api_http import (
    Backend,
    Fault,
    Request,
    Server,
    Target,
    Wire,
    check_selector,
    decode_continue,
    encode_continue,
    forbidden,
    parse_selector,
)
from kndsim.api_parts import Parts
from kndsim.api_store import ApiError, Json, Key, Kind, Store
from kndsim.api_write import Writer

Device = tuple[str, str, str, str | None]
"""request, pool, device, share id."""

KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: sim, cluster: {{server: "{url}"}}}}]
users: [{{name: agent, user: {{token: sim}}}}]
contexts: [{{name: sim, context: {{cluster: sim, user: agent}}}}]
current-context: sim
"""


class SimApi(Backend):
    """Use as a context manager. dropped_fields are fields of slices, devices and capacities that a disabled
    gate removes silently (`taints`, `allowMultipleAllocations`...). tokens are those it knows, None: any will
    do, or none. With tls it serves HTTPS. The log has what each request carried as authorization."""

    def __init__(
        self,
        *,
        bookmark_seconds: float = 60.0,
        dropped_fields: Iterable[str] = (),
        tokens: Iterable[str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.store = Store()
        self.wire = Wire(bookmark_seconds=bookmark_seconds)
        self.dropped_fields = set(dropped_fields)
        self._tokens = None if tokens is None else frozenset(tokens)
        self._outsiders: dict[str, str] = {}
        self._writer = Writer(self.store, self.dropped_fields)
        self._server = Server(self.wire, self, tls)
        self._scheme = "http" if tls is None else "https"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="sim-api", daemon=True
        )

    def __enter__(self) -> SimApi:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wire.closing = True
        with self.store.changed:
            self.store.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self.drop_connections()
        self._thread.join(5)

    # --- for tests: where it is, what it saw, how it fails -------------------------------------------

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig file for this server and return its path."""
        path.write_text(KUBECONFIG.format(url=self.url))
        path.chmod(0o600)
        return path

    def requests(self, verb: str = "", resource: str = "") -> list[Request]:
        """The request log, oldest first. resource is the plural, with `/status` for the subresource."""
        with self.wire.lock:
            return [
                each for each in self.wire.log if verb in ("", each.verb) and resource in ("", each.resource)
            ]

    def outsider(self, namespace: str, account: str) -> str:
        """The token of a service account that may do nothing."""
        token = f"outsider-{namespace}-{account}"
        self._outsiders[token] = f"system:serviceaccount:{namespace}:{account}"
        return token

    def writes(self) -> list[Request]:
        return [each for each in self.requests() if each.writes]

    def clear_log(self) -> None:
        with self.wire.lock:
            self.wire.log.clear()

    def fail(
        self,
        code: int,
        *,
        times: int = 1,
        verb: str = "",
        resource: str = "",
        message: str = "injected",
        retry_after: int | None = None,
        causes: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """The next so many fitting requests fail with this status."""
        error = ApiError(code, "Injected", message, causes, retry_after)
        self.wire.faults.append(Fault(times, verb, resource, error=error))

    def close_on(self, *, times: int = 1, verb: str = "", resource: str = "") -> None:
        """The next so many fitting requests get no answer, their connection is closed."""
        self.wire.faults.append(Fault(times, verb, resource))

    def answer_raw(self, data: bytes, *, times: int = 1, verb: str = "", resource: str = "") -> None:
        """The next so many fitting requests get 200 and this body, which may be nonsense."""
        self.wire.faults.append(Fault(times, verb, resource, raw=data))

    def delay(self, seconds: float, *, times: int = 1, verb: str = "", resource: str = "") -> None:
        """The next so many fitting requests are answered as ever, so much later."""
        self.wire.faults.append(Fault(times, verb, resource, delay=seconds))

    def clear_faults(self) -> None:
        with self.wire.lock:
            self.wire.faults.clear()

    def hang_watches(self) -> None:
        """Watches open now stay open and never say anything again."""
        self.wire.hang_generation += 1

    def drop_connections(self) -> None:
        """Close every connection, as a load balancer or a restart does."""
        with self.wire.lock:
            connections = list(self.wire.connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)

    def compact(self) -> None:
        """Older resourceVersions get 410; open watches are ended."""
        self.store.compact()
        self.drop_connections()

    # --- for tests: objects --------------------------------------------------------------------------

    def add_node(self, name: str) -> str:
        """Returns the UID."""
        node = self.store.create(Kind.NODE, "", {"metadata": {"name": name}, "spec": {}})
        return str(node["metadata"]["uid"])

    def add_pod(
        self,
        namespace: str,
        name: str,
        *,
        node: str = "",
        claims: Mapping[str, str | None] | None = None,
        template_claims: Mapping[str, str | None] | None = None,
        extended_claim: str = "",
        host_network: bool = False,
        annotations: Mapping[str, str] | None = None,
    ) -> str:
        """Make a pod and return its UID. claims: name in the pod to ResourceClaim; template_claims: name in
        the pod to the claim made for it, None while there is none yet."""
        direct = [{"name": key, "resourceClaimName": value} for key, value in (claims or {}).items()]
        templated = [{"name": key, "resourceClaimTemplateName": key} for key in template_claims or {}]
        spec: Json = {
            "nodeName": node,
            "containers": [{"name": "main"}],
            "resourceClaims": direct + templated,
        }
        if host_network:
            spec["hostNetwork"] = True
        status: Json = {
            "phase": "Pending",
            "resourceClaimStatuses": [
                {"name": key, "resourceClaimName": value}
                for key, value in (template_claims or {}).items()
                if value is not None
            ],
        }
        if extended_claim:
            status["extendedResourceClaimStatus"] = {
                "resourceClaimName": extended_claim,
                "requestMappings": [],
            }
        metadata: Json = {"name": name, "annotations": dict(annotations or {})}
        pod = self.store.create(Kind.POD, namespace, {"metadata": metadata, "spec": spec, "status": status})
        return str(pod["metadata"]["uid"])

    def set_template_claim(self, namespace: str, pod: str, name: str, claim: str) -> None:
        """The claim controller has made the claim of a pod's template."""

        def change(obj: Json) -> Json:
            statuses = obj["status"].setdefault("resourceClaimStatuses", [])
            statuses.append({"name": name, "resourceClaimName": claim})
            return obj

        self.store.update(Key(Kind.POD, namespace, pod), change)

    def add_claim(
        self,
        namespace: str,
        name: str,
        *,
        driver: str = "knd.internal",
        devices: Sequence[Device] = (),
        configs: Sequence[Json] = (),
        reserved_for: Sequence[str] = (),
        extra_results: Sequence[Json] = (),
    ) -> str:
        """Make an allocated claim (unallocated without devices) and return its UID. configs are whole
        entries of allocation.devices.config; `{"parameters": {...}}` is short for this driver's, FromClaim.
        extra_results are whole results, of other drivers for example."""
        results = [self._result(driver, device) for device in devices]
        results += extra_results
        status: Json = {}
        if results:
            entries = [self._config(driver, config) for config in configs]
            status["allocation"] = {"devices": {"results": results, "config": entries}}
        if reserved_for:
            status["reservedFor"] = [
                {"resource": "pods", "name": f"pod-{uid}", "uid": uid} for uid in reserved_for
            ]
        names = sorted({request.partition("/")[0] for request, *_ in devices} or {"net"})
        spec = {
            "devices": {"requests": [{"name": each, "exactly": {"deviceClassName": "knd"}} for each in names]}
        }
        claim = self.store.create(
            Kind.CLAIM, namespace, {"metadata": {"name": name}, "spec": spec, "status": status}
        )
        return str(claim["metadata"]["uid"])

    @staticmethod
    def _result(driver: str, device: Device) -> Json:
        request, pool, name, share = device
        result = {"request": request, "driver": driver, "pool": pool, "device": name}
        return {**result, "shareID": share} if share else result

    @staticmethod
    def _config(driver: str, config: Json) -> Json:
        if "parameters" not in config:
            return config
        rest = {key: value for key, value in config.items() if key != "parameters"}
        return {
            "source": "FromClaim",
            **rest,
            "opaque": {"driver": driver, "parameters": config["parameters"]},
        }

    def reserve(self, namespace: str, name: str, pods: Sequence[str]) -> None:
        """Set status.reservedFor to these pod UIDs."""

        def change(obj: Json) -> Json:
            obj.setdefault("status", {})["reservedFor"] = [
                {"resource": "pods", "name": f"pod-{uid}", "uid": uid} for uid in pods
            ]
            return obj

        self.store.update(Key(Kind.CLAIM, namespace, name), change)

    def allocate(
        self,
        namespace: str,
        name: str,
        driver: str,
        node: str,
        requests: Mapping[str, Callable[[Json], bool]],
        *,
        amounts: Mapping[str, Mapping[str, str]] | None = None,
        tolerate: bool = False,
    ) -> list[Device]:
        """Give the claim free devices as the scheduler does: from the node's complete pools of the highest
        generation, untainted unless it tolerates all taints, in order, one per request whose predicate takes
        the published device. amounts: of capacities, by request, of devices that are given out in parts.
        LookupError where there is none."""
        claims = self.store.list(Kind.CLAIM, "", {})
        chosen = api_alloc.choose(
            self.slices(driver, node),
            api_alloc.allocated(claims, driver),
            Parts(claims, driver),
            requests,
            amounts=amounts or {},
            tolerate=tolerate,
        )
        devices: list[Device] = [
            (each.request, each.pool, each.device, None if each.consumed is None else new_share_id())
            for each in chosen
        ]

        def change(obj: Json) -> Json:
            results = [
                self._result(driver, device)
                | ({} if each.consumed is None else {"consumedCapacity": dict(each.consumed)})
                for device, each in zip(devices, chosen, strict=True)
            ]
            allocation = {"devices": {"results": results, "config": []}}
            return {**obj, "status": {**(obj.get("status") or {}), "allocation": allocation}}

        self.store.update(Key(Kind.CLAIM, namespace, name), change)
        return devices

    def delete(self, resource: str, name: str, namespace: str = "") -> None:
        """Delete an object by its plural (`pods`, `resourceslices`...)."""
        kind = next(each for each in Kind if each.plural == resource)
        self.store.delete(Key(kind, namespace, name), {})

    def edit(self, resource: str, name: str, change: Callable[[Json], Json], namespace: str = "") -> None:
        """Change an object behind everybody's back."""
        kind = next(each for each in Kind if each.plural == resource)
        self.store.update(Key(kind, namespace, name), change)

    def slices(self, driver: str, node: str) -> list[Json]:
        return self.store.list(Kind.SLICE, "", {"spec.driver": driver, "spec.nodeName": node})

    def claim(self, namespace: str, name: str) -> Json:
        return self.store.get(Key(Kind.CLAIM, namespace, name))

    def events(self) -> list[Json]:
        return self.store.list(Kind.EVENT, "", {})

    # --- what the HTTP side calls ---------------------------------------------------------------------

    def read(self, target: Target, query: dict[str, str]) -> Json:
        if target.name:
            return self.store.get(target.key)
        start, version = 0, self.store.version
        if query.get("continue"):
            version, start = decode_continue(query["continue"])
            self.store.check_continue(version)
        selector = parse_selector(query.get("fieldSelector", ""))
        check_selector(target.kind, selector)
        found = self.store.list(target.kind, target.namespace, selector, version)
        limit = int(query.get("limit") or 0) or len(found)
        metadata: Json = {"resourceVersion": str(version)}
        if start + limit < len(found):
            metadata["continue"] = encode_continue(version, start + limit)
            if not selector:
                metadata["remainingItemCount"] = len(found) - start - limit
        kind = target.kind
        return {
            "apiVersion": kind.api_version,
            "kind": f"{kind.title}List",
            "metadata": metadata,
            "items": found[start : start + limit],
        }

    def watch(self, target: Target, query: dict[str, str], gone: Callable[[], bool]) -> Iterator[Json | None]:
        """Yield watch events; None now and then, so that the caller notices a closed server. Without a
        version it starts with what there is. A bookmark comes where the version has moved since the last
        word: now and then, and two seconds before the end."""
        selector = parse_selector(query.get("fieldSelector", ""))
        end = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        version = int(query.get("resourceVersion") or self.store.version)
        if not query.get("resourceVersion"):
            for obj in self.store.list(target.kind, target.namespace, selector, version):
                yield {"type": "ADDED", "object": obj}
        told = version
        bookmark_at = self._next_bookmark(end)
        while not gone() and time.monotonic() < end:
            batch: list[Json | None] = []
            with self.store.changed:
                try:
                    news = self.store.events_after(version, target.kind, selector)
                    batch.extend({"type": change, "object": obj} for change, obj in news)
                    version = max(version, self.store.version)
                except ApiError as error:
                    yield {"type": "ERROR", "object": error.status()}
                    return
                if not batch:
                    self.store.wait(min(end, bookmark_at, time.monotonic() + 1.0))
            told = version if batch else told
            yield from batch or [None]
            if time.monotonic() >= bookmark_at:
                bookmark_at = self._next_bookmark(end)
                if version > told and query.get("allowWatchBookmarks") in ("1", "true"):
                    told = version
                    yield self._bookmark(target.kind, version)

    def _next_bookmark(self, end: float) -> float:
        soon, last = time.monotonic() + self.wire.bookmark_seconds, end - 2.0
        return min(soon, last) if last > time.monotonic() else soon

    @staticmethod
    def _bookmark(kind: Kind, version: int) -> Json:
        return {
            "type": "BOOKMARK",
            "object": {
                "kind": kind.title,
                "apiVersion": kind.api_version,
                "metadata": {"resourceVersion": str(version)},
            },
        }

    def write(self, verb: str, target: Target, query: dict[str, str], content_type: str, body: Any) -> Json:
        return self._writer.write(verb, target, query, content_type, body)

    def check_user(self, request: Request, target: Target) -> None:
        """401 for a token that nobody knows, where that matters; 403 for an outsider."""
        token = request.authorization.partition(" ")[2]
        if token in self._outsiders:
            raise forbidden(self._outsiders[token], request, target)
        if self._tokens is not None and token not in self._tokens:
            raise ApiError(401, "Unauthorized", "Unauthorized")


def new_share_id() -> str:
    return str(uuid.uuid4())
