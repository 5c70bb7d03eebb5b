"""What to write so that the cluster's ResourceSlices say what this node offers. Pure.

Invariant: an empty plan if and only if nothing differs. A pool is never seen complete with a mixture of old
and new: when more than one slice changes, all move to a new generation; obsolete ones go first, new ones
come last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from driver.kube.slice_device import same_device
from driver.kube.wire import JsonObject, Malformed, child, children, needed_text, number, text

API_VERSION = "resource.k8s.io/v1"
DEVICES_MAX = 128
DEVICES_NARROW_MAX = 64
"""Where any device of the slice has a taint or uses counters."""
COUNTER_SETS_MAX = 8
INDEX_DIGITS = 5

Adopted = Mapping[str, str]
"""Fingerprint of devices as sent to fingerprint of what the server made of them (fields of features that
are off are dropped): such a slice counts as unchanged, or it would be written for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Whose slices: the driver's on one node, in one pool named like the node."""

    driver: str
    node: str

    @property
    def name(self) -> str:
        return self.node


@dataclass(frozen=True, slots=True)
class Content:
    """What one slice holds: devices or counter sets, never both."""

    devices: tuple[JsonObject, ...] = ()
    counters: tuple[JsonObject, ...] = ()

    def says(self, stored: Content) -> bool:
        """Whether stored is this, in order. Quantities by value."""
        return says(self.devices, stored.devices) and says(self.counters, stored.counters)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.devices or self.counters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Existing:
    """A slice of this driver and node as the cluster has it."""

    name: str
    uid: str
    version: str
    pool: str
    generation: int
    count: int
    content: Content
    raw: JsonObject = field(repr=False)

    @property
    def devices(self) -> tuple[JsonObject, ...]:
        return self.content.devices

    @property
    def index(self) -> int | None:
        """From the name's prefix; None for a name of another scheme."""
        prefix, dash, _ = self.name.partition("-")
        if not dash or len(prefix) < INDEX_DIGITS or set(prefix) - set("0123456789abcdef"):
            return None
        return int(prefix, 16)


def parse_slice(raw: JsonObject) -> Existing:
    """Malformed for an object that is no ResourceSlice. managedFields are not kept."""
    metadata = {key: value for key, value in child(raw, "metadata").items() if key != "managedFields"}
    spec = child(raw, "spec")
    pool = child(spec, "pool")
    return Existing(
        name=needed_text(metadata, "name"),
        uid=needed_text(metadata, "uid"),
        version=needed_text(metadata, "resourceVersion"),
        pool=text(pool, "name"),
        generation=number(pool, "generation"),
        count=number(pool, "resourceSliceCount"),
        content=Content(tuple(children(spec, "devices")), tuple(children(spec, "sharedCounters"))),
        raw={**raw, "metadata": metadata},
    )


@dataclass(frozen=True, slots=True)
class Write:
    """existing None: to be created. content is as wanted; in body a taint that stays has its time."""

    existing: Existing | None
    content: Content
    body: JsonObject


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """Writes in the order they are to be made: deletes, updates, creates. creates lack the owner, which
    only they need."""

    deletes: tuple[Existing, ...] = ()
    updates: tuple[Write, ...] = ()
    creates: tuple[Write, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.deletes or self.updates or self.creates)


def plan_slices(
    pool: Pool,
    existing: Sequence[Existing],
    devices: Sequence[JsonObject],
    adopted: Adopted,
    counters: Sequence[JsonObject] = (),
) -> SlicePlan:
    """existing: every slice of this driver and node; devices: in the order they are to be offered; counters:
    the sets that they use."""
    generation = max((each.generation for each in existing if each.pool == pool.name), default=0)
    chunks = lay_out(devices, sum(each.pool == pool.name for each in existing), counters)
    matched, obsolete = _match(pool, existing, generation, len(chunks))
    changed = [
        index
        for index, each in matched.items()
        if not _unchanged(pool, each, chunks[index], len(chunks), adopted)
    ]
    missing = [index for index in range(len(chunks)) if index not in matched]
    if missing or len(changed) > 1:
        changed = sorted(matched)
        generation += 1
    updates = tuple(
        _update(pool, matched[index], chunks[index], generation, len(chunks)) for index in changed
    )
    creates = tuple(_create(pool, index, chunks[index], generation, len(chunks)) for index in missing)
    return SlicePlan(tuple(obsolete), updates, creates)


def lay_out(
    devices: Sequence[JsonObject], existing: int, counters: Sequence[JsonObject] = ()
) -> list[Content]:
    """Devices in slices, at least one, and after them the counter sets in slices of their own.

    128 devices to a slice, or 64 everywhere once any device has a taint or uses counters; a layout of 64
    stays when the taint goes, so that a link that flaps never moves devices about.
    """
    wide = -(-len(devices) // DEVICES_MAX)
    narrow = -(-len(devices) // DEVICES_NARROW_MAX)
    marked = any(device.get("taints") or device.get("consumesCounters") for device in devices)
    size = DEVICES_NARROW_MAX if marked or wide < narrow <= existing else DEVICES_MAX
    chunks = [Content(devices=chunk) for chunk in _chunks(devices, size)] or [Content()]
    return chunks + [Content(counters=chunk) for chunk in _chunks(counters, COUNTER_SETS_MAX)]


def _chunks(entries: Sequence[JsonObject], size: int) -> list[tuple[JsonObject, ...]]:
    return [tuple(entries[start : start + size]) for start in range(0, len(entries), size)]


def fingerprint(devices: Sequence[JsonObject]) -> str:
    data = json.dumps(list(devices), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(data.encode("utf-8", "replace")).hexdigest()


def says(devices: Sequence[JsonObject], stored: Sequence[JsonObject]) -> bool:
    """Whether stored devices are the wanted ones, in order."""
    return len(devices) == len(stored) and all(map(same_device, devices, stored))


def dropped_fields(devices: Sequence[JsonObject], stored: Sequence[JsonObject]) -> tuple[str, ...]:
    """Names of device fields, and of those of capacities, that were sent and not kept."""
    pairs = list(zip(devices, stored, strict=False))
    pairs += [
        (capacity, (kept.get("capacity") or {}).get(name, {}))
        for sent, kept in pairs
        for name, capacity in sent.get("capacity", {}).items()
    ]
    return tuple(sorted({key for sent, kept in pairs for key in sent if sent[key] and not kept.get(key)}))


def _match(
    pool: Pool, existing: Sequence[Existing], generation: int, count: int
) -> tuple[dict[int, Existing], list[Existing]]:
    """The slice of each index, and those that are none."""
    matched: dict[int, Existing] = {}
    obsolete: list[Existing] = []
    for each in sorted(existing, key=lambda one: one.name):
        index = each.index
        current = each.pool == pool.name and each.generation == generation
        if not current or index is None or index >= count or index in matched or not _is_ours(pool, each):
            obsolete.append(each)
        else:
            matched[index] = each
    return matched, obsolete


def _is_ours(pool: Pool, each: Existing) -> bool:
    """Immutable fields as we would make them; what is otherwise cannot be mended, only replaced."""
    spec = child(each.raw, "spec")
    return text(spec, "driver") == pool.driver and text(spec, "nodeName") == pool.node


_OWN_SPEC = frozenset({"driver", "pool", "nodeName", "devices", "sharedCounters"})


def _unchanged(pool: Pool, each: Existing, wanted: Content, count: int, adopted: Adopted) -> bool:
    spec = child(each.raw, "spec")
    if each.count != count or any(value for key, value in spec.items() if key not in _OWN_SPEC):
        return False
    return wanted.says(each.content) or adopted.get(wanted.fingerprint) == each.content.fingerprint


def _spec(pool: Pool, content: Content, generation: int, count: int) -> JsonObject:
    return {
        "driver": pool.driver,
        "nodeName": pool.node,
        "pool": {"name": pool.name, "generation": generation, "resourceSliceCount": count},
        **(
            {"sharedCounters": list(content.counters)}
            if content.counters
            else {"devices": list(content.devices)}
        ),
    }


def _update(pool: Pool, existing: Existing, content: Content, generation: int, count: int) -> Write:
    timed = Content(tuple(_with_times(content.devices, existing.devices)), content.counters)
    body = {**existing.raw, "spec": _spec(pool, timed, generation, count)}
    return Write(existing, content, body)


def _with_times(devices: Sequence[JsonObject], before: Sequence[JsonObject]) -> Iterator[JsonObject]:
    """A taint that stays keeps the time it was added."""
    try:
        times = {
            (text(device, "name"), text(taint, "key"), text(taint, "value"), text(taint, "effect")): taint[
                "timeAdded"
            ]
            for device in before
            for taint in children(device, "taints")
            if "timeAdded" in taint
        }
    except Malformed:
        times = {}
    for device in devices:
        if not device.get("taints"):
            yield device
            continue
        taints = []
        for taint in children(device, "taints"):
            key = (text(device, "name"), text(taint, "key"), text(taint, "value"), text(taint, "effect"))
            taints.append({**taint, "timeAdded": times[key]} if key in times else taint)
        yield {**device, "taints": taints}


def _create(pool: Pool, index: int, content: Content, generation: int, count: int) -> Write:
    body = {
        "apiVersion": API_VERSION,
        "kind": "ResourceSlice",
        "metadata": {"generateName": f"{index:0{INDEX_DIGITS}x}-{pool.driver}-{pool.node}-"},
        "spec": _spec(pool, content, generation, count),
    }
    return Write(None, content, body)


def counter_trials(pool: Pool) -> tuple[JsonObject, JsonObject]:
    """Slices to be tried, not kept: one with a counter set and one with a device that uses it. A server that
    has counters gives both back whole."""
    counters: JsonObject = {"name": "trial", "counters": {"trial": {"value": "1"}}}
    uses: JsonObject = {"counterSet": "trial", "counters": {"trial": {"value": "1"}}}
    device: JsonObject = {"name": "trial", "consumesCounters": [uses]}
    return (
        _create(pool, 0, Content(counters=(counters,)), 1, 2).body,
        _create(pool, 1, Content(devices=(device,)), 1, 2).body,
    )


def sharing_trial(pool: Pool) -> JsonObject:
    """A slice to be tried, not kept, with a device that several claims can have at once. A server that lets
    them gives it back whole."""
    policy: JsonObject = {"default": "1", "validRange": {"min": "1"}}
    capacity: JsonObject = {"trial": {"value": "2", "requestPolicy": policy}}
    device: JsonObject = {"name": "trial", "allowMultipleAllocations": True, "capacity": capacity}
    return _create(pool, 0, Content(devices=(device,)), 1, 1).body
