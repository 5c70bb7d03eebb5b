"""The simulated API server's objects, their versions and the history that watches replay.

Invariant: every change has one resourceVersion, larger than all before it, and is seen by every watch
that started before it, in order. Objects handed out are copies. No rule about content lives here.
"""

from __future__ import annotations

import copy
import enum
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]
SUFFIX_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
"""Of generated names: no vowels, so that no words appear."""
GENERATED_BASE_MAX = 58


class Kind(enum.Enum):
    """Value: group and version, plural, kind, whether namespaced."""

    NODE = ("v1", "nodes", "Node", False)
    POD = ("v1", "pods", "Pod", True)
    EVENT = ("v1", "events", "Event", True)
    SLICE = ("resource.k8s.io/v1", "resourceslices", "ResourceSlice", False)
    CLAIM = ("resource.k8s.io/v1", "resourceclaims", "ResourceClaim", True)

    @property
    def api_version(self) -> str:
        return self.value[0]

    @property
    def plural(self) -> str:
        return self.value[1]

    @property
    def title(self) -> str:
        return self.value[2]

    @property
    def namespaced(self) -> bool:
        return self.value[3]


class ApiError(Exception):
    """What is answered instead of an object: a Status of kind Failure."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        causes: tuple[tuple[str, str], ...] = (),
        retry_after: int | None = None,
    ) -> None:
        self.code = code
        self.reason = reason
        self.message = message
        self.causes = causes
        self.retry_after = retry_after
        super().__init__(f"{code} {reason}: {message}")

    def status(self) -> Json:
        details: Json = {
            "causes": [{"reason": "FieldValueInvalid", "message": m, "field": f} for f, m in self.causes]
        }
        if self.retry_after is not None:
            details["retryAfterSeconds"] = self.retry_after
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": details,
            "code": self.code,
        }


def not_found(kind: Kind, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{kind.plural} "{name}" not found')


def conflict(kind: Kind, name: str, why: str) -> ApiError:
    return ApiError(409, "Conflict", f'Operation cannot be fulfilled on {kind.plural} "{name}": {why}')


def expired() -> ApiError:
    return ApiError(410, "Expired", "too old resource version")


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Key:
    kind: Kind
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    version: int
    kind: Kind
    before: Json | None
    after: Json | None


Selector = Mapping[str, str]
"""Field path to value."""


def matches(obj: Mapping[str, Any], selector: Selector) -> bool:
    for path, wanted in selector.items():
        value: Any = obj
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if (value or "") != wanted:
            return False
    return True


class Store:
    """Thread-safe. Callers give whole objects; metadata is the store's business."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._objects: dict[Key, Json] = {}
        self._history: list[HistoryEntry] = []
        self._version = 1000
        self._floor = 0
        self._random = random.Random(uuid.uuid4().int)

    @property
    def version(self) -> int:
        return self._version

    def compact(self) -> None:
        """Forget all history: older resourceVersions and continue tokens get 410."""
        with self.changed:
            self._history.clear()
            self._version += 1
            self._floor = self._version
            self.changed.notify_all()

    def get(self, key: Key) -> Json:
        with self.changed:
            if key not in self._objects:
                raise not_found(key.kind, key.name)
            return copy.deepcopy(self._objects[key])

    def list(self, kind: Kind, namespace: str, selector: Selector) -> list[Json]:
        """Ordered by namespace and name. namespace "" means all."""
        with self.changed:
            found = sorted(
                (key.namespace, key.name)
                for key, obj in self._objects.items()
                if key.kind is kind and namespace in ("", key.namespace) and matches(obj, selector)
            )
            return [copy.deepcopy(self._objects[Key(kind, ns, name)]) for ns, name in found]

    def create(self, kind: Kind, namespace: str, obj: Json) -> Json:
        with self.changed:
            new = copy.deepcopy(obj)
            metadata = new.setdefault("metadata", {})
            name = metadata.get("name") or self._generated(kind, namespace, metadata)
            key = Key(kind, namespace, name)
            if key in self._objects:
                raise ApiError(409, "AlreadyExists", f'{kind.plural} "{name}" already exists')
            metadata.update(name=name, uid=str(uuid.uuid4()), creationTimestamp=now())
            if kind in (Kind.SLICE, Kind.POD):
                metadata["generation"] = 1
            if kind.namespaced:
                metadata["namespace"] = namespace
            new.update(apiVersion=kind.api_version, kind=kind.title)
            return self._commit(key, None, new)

    def update(self, key: Key, change: Callable[[Json], Json]) -> Json:
        """Replace an object by change(copy of it). One that changes nothing leaves the version alone, as
        the real server does. metadata of the result is the old one, with labels and annotations new."""
        with self.changed:
            if key not in self._objects:
                raise not_found(key.kind, key.name)
            old = self._objects[key]
            new = change(copy.deepcopy(old))
            metadata = copy.deepcopy(old["metadata"])
            for field in ("labels", "annotations", "ownerReferences", "managedFields"):
                if field in new.get("metadata", {}):
                    metadata[field] = new["metadata"][field]
            new = {**new, "apiVersion": old["apiVersion"], "kind": old["kind"], "metadata": metadata}
            if new == old:
                return copy.deepcopy(old)
            if "generation" in metadata and new.get("spec") != old.get("spec"):
                metadata["generation"] += 1
            return self._commit(key, old, new)

    def delete(self, key: Key, preconditions: Mapping[str, str]) -> Json:
        with self.changed:
            if key not in self._objects:
                raise not_found(key.kind, key.name)
            old = self._objects[key]
            for field, wanted in preconditions.items():
                have = old["metadata"].get(field)
                if have != wanted:
                    field = "UID" if field == "uid" else field
                    why = f"{field} in precondition: {wanted}, {field} in object meta: {have}"
                    raise conflict(key.kind, key.name, f"Precondition failed: {why}")
            del self._objects[key]
            self._version += 1
            gone = copy.deepcopy(old)
            gone["metadata"]["resourceVersion"] = str(self._version)
            self._history.append(HistoryEntry(self._version, key.kind, gone, None))
            self.changed.notify_all()
            return gone

    def events_after(self, version: int, kind: Kind, selector: Selector) -> Iterator[tuple[str, Json]]:
        """Yield (type, object) of what a watch must send; 410 if version is compacted. Call
        with `changed` held; waiting for more is the caller's."""
        if version < self._floor:
            raise expired()
        for entry in self._history:
            if entry.version <= version or entry.kind is not kind:
                continue
            was = entry.before is not None and matches(entry.before, selector)
            fits = entry.after is not None and matches(entry.after, selector)
            if fits and entry.after is not None:
                yield "MODIFIED" if was else "ADDED", entry.after
            elif was and entry.before is not None:
                gone = copy.deepcopy(entry.before)
                gone["metadata"]["resourceVersion"] = str(entry.version)
                yield "DELETED", gone

    def wait(self, until: float) -> None:
        """Wait for a change or the time.monotonic() moment. `changed` must be held."""
        self.changed.wait(max(0.0, until - time.monotonic()))

    def check_continue(self, version: int) -> None:
        if version < self._floor:
            raise ApiError(410, "Expired", "The provided continue parameter is too old")

    def _generated(self, kind: Kind, namespace: str, metadata: Json) -> str:
        base = metadata.get("generateName")
        if not base:
            raise ApiError(
                422,
                "Invalid",
                "metadata.name: Required value: name or generateName is required",
                (("metadata.name", "Required value"),),
            )
        while True:
            suffix = "".join(self._random.choices(SUFFIX_ALPHABET, k=5))
            name = f"{base[:GENERATED_BASE_MAX]}{suffix}"
            if Key(kind, namespace, name) not in self._objects:
                return name

    def _commit(self, key: Key, old: Json | None, new: Json) -> Json:
        self._version += 1
        new["metadata"]["resourceVersion"] = str(self._version)
        self._objects[key] = new
        self._history.append(HistoryEntry(self._version, key.kind, old, copy.deepcopy(new)))
        self.changed.notify_all()
        return copy.deepcopy(new)
