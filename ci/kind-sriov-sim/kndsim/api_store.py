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
    def group(self) -> str:
        group, slash, _ = self.api_version.partition("/")
        return group if slash else ""

    @property
    def qualified(self) -> str:
        """As the server's sentences name the resource."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

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
        *,
        details: Mapping[str, str] | None = None,
        cause_reason: str = "FieldValueInvalid",
    ) -> None:
        self.details = details or {}
        self.cause_reason = cause_reason
        self.code = code
        self.reason = reason
        self.message = message
        self.causes = causes
        self.retry_after = retry_after
        super().__init__(f"{code} {reason}: {message}")

    def status(self) -> Json:
        details: Json = dict(self.details)
        if self.causes:
            details["causes"] = [
                {"reason": self.cause_reason, "message": message, "field": field}
                for field, message in self.causes
            ]
        if self.retry_after is not None:
            details["retryAfterSeconds"] = self.retry_after
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            **({"details": details} if details else {}),
            "code": self.code,
        }


def _about(kind: Kind, name: str) -> dict[str, str]:
    """The details of a Status that speaks of one object."""
    return {"name": name, **({"group": kind.group} if kind.group else {}), "kind": kind.plural}


def not_found(kind: Kind, name: str) -> ApiError:
    text = f'{kind.qualified} "{name}" not found'
    return ApiError(404, "NotFound", text, details=_about(kind, name))


def conflict(kind: Kind, name: str, why: str) -> ApiError:
    text = f'Operation cannot be fulfilled on {kind.qualified} "{name}": {why}'
    return ApiError(409, "Conflict", text, details=_about(kind, name))


def already_exists(kind: Kind, name: str) -> ApiError:
    text = f'{kind.qualified} "{name}" already exists'
    return ApiError(409, "AlreadyExists", text, details=_about(kind, name))


def invalid(kind: Kind, name: str, causes: tuple[tuple[str, str], ...]) -> ApiError:
    """Each cause is a field and what is wrong with it."""
    said = [f"{field}: {why}" for field, why in causes]
    listed = said[0] if len(said) == 1 else f"[{', '.join(said)}]"
    title = f"{kind.title}.{kind.group}" if kind.group else kind.title
    details = {**_about(kind, name), "kind": kind.title}
    return ApiError(422, "Invalid", f'{title} "{name}" is invalid: {listed}', causes, details=details)


def bad_request(text: str) -> ApiError:
    return ApiError(400, "BadRequest", text)


def expired(version: int, oldest: int) -> ApiError:
    return ApiError(410, "Expired", f"too old resource version: {version} ({oldest})")


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
        self._floor = self._version
        """The oldest version that a watch may start from; a server's first is not 1."""
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

    def list(self, kind: Kind, namespace: str, selector: Selector, version: int | None = None) -> list[Json]:
        """Ordered by namespace and name, as of now or of that version. namespace "" means all."""
        with self.changed:
            objects = self._as_of(kind, self._version if version is None else version)
            found = sorted(
                (key.namespace, key.name)
                for key, obj in objects.items()
                if namespace in ("", key.namespace) and matches(obj, selector)
            )
            return [copy.deepcopy(objects[Key(kind, ns, name)]) for ns, name in found]

    def _as_of(self, kind: Kind, version: int) -> dict[Key, Json]:
        objects = {key: obj for key, obj in self._objects.items() if key.kind is kind}
        for entry in reversed(self._history):
            if entry.version <= version:
                break
            obj = entry.before or entry.after
            if entry.kind is not kind or obj is None:
                continue
            key = Key(kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
            objects.pop(key, None)
            if entry.before is not None:
                objects[key] = entry.before
        return objects

    def create(self, kind: Kind, namespace: str, obj: Json) -> Json:
        with self.changed:
            return self._commit(*self._named(kind, namespace, obj))

    def pretend(self, kind: Kind, namespace: str, obj: Json) -> Json:
        """What create would make; nothing is made."""
        with self.changed:
            return self._named(kind, namespace, obj)[2]

    def _named(self, kind: Kind, namespace: str, obj: Json) -> tuple[Key, None, Json]:
        new = copy.deepcopy(obj)
        metadata = new.setdefault("metadata", {})
        name = metadata.get("name") or self._generated(kind, namespace, metadata)
        key = Key(kind, namespace, name)
        if key in self._objects:
            raise already_exists(kind, name)
        metadata.update(name=name, uid=str(uuid.uuid4()), creationTimestamp=now())
        if kind in (Kind.SLICE, Kind.POD):
            metadata["generation"] = 1
        if kind.namespaced:
            metadata["namespace"] = namespace
        new.update(apiVersion=kind.api_version, kind=kind.title)
        return key, None, new

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
            raise expired(version, self._floor)
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
            why = "Required value: name or generateName is required"
            raise invalid(kind, "", (("metadata.name", why),))
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
