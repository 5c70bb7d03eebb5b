"""What a write does to the simulated API server's objects.

Invariant: a body is decoded before anything is looked at, and checked before anything is changed. Where
an object has a status of its own, writes of the object leave it and writes of the status leave the rest.
"""

from __future__ import annotations

from typing import Any

from kndsim import api_apply, api_rules, api_schema
from kndsim.api_http import Target, check_selector, parse_selector
from kndsim.api_store import ApiError, Json, Key, Kind, Store, conflict, invalid, now

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
WITH_STATUS = (Kind.CLAIM, Kind.POD)
IMMUTABLE = "field is immutable"


class Writer:
    """dropped_fields: fields of slices, devices and capacities that a disabled gate removes silently."""

    def __init__(self, store: Store, dropped_fields: set[str]) -> None:
        self.store = store
        self.dropped_fields = dropped_fields
        self._owners: dict[str, api_apply.Owners] = {}

    def write(self, verb: str, target: Target, query: dict[str, str], content_type: str, body: Any) -> Json:
        if verb == "deletecollection":
            return self._delete_collection(target, query)
        if verb == "delete":
            return self.store.delete(target.key, (body or {}).get("preconditions") or {})
        if verb == "create":
            return self._create(target, query, api_schema.decode_body(target.kind, body))
        if verb == "update":
            return self._replace(target, api_schema.decode_body(target.kind, body))
        return self._patch(target, query, content_type, body)

    def _delete_collection(self, target: Target, query: dict[str, str]) -> Json:
        selector = parse_selector(query.get("fieldSelector", ""))
        check_selector(target.kind, selector)
        gone = [
            self.store.delete(Key(target.kind, each["metadata"].get("namespace", ""), name), {})
            for each in self.store.list(target.kind, target.namespace, selector)
            if (name := each["metadata"]["name"])
        ]
        kind = target.kind
        return {"apiVersion": kind.api_version, "kind": f"{kind.title}List", "metadata": {}, "items": gone}

    def _create(self, target: Target, query: dict[str, str], body: Json) -> Json:
        if target.kind in WITH_STATUS:
            body = {key: value for key, value in body.items() if key != "status"}
        if target.kind is Kind.EVENT:
            _check_event(target, body)
        admitted = self._admit(target, body, None)
        if query.get("dryRun"):
            return self.store.pretend(target.kind, target.namespace, admitted)
        return self.store.create(target.kind, target.namespace, admitted)

    def _replace(self, target: Target, body: Json) -> Json:
        def change(old: Json) -> Json:
            _check_metadata(target, body.get("metadata") or {}, old["metadata"])
            if target.subresource == "status":
                return self._with_status(target, old, body.get("status") or {})
            if target.kind in WITH_STATUS:
                kept = {"status": old["status"]} if "status" in old else {}
                return {**{key: value for key, value in body.items() if key != "status"}, **kept}
            return self._admit(target, body, old)

        return self.store.update(target.key, change)

    def _with_status(self, target: Target, old: Json, status: Json) -> Json:
        """Entries of devices go with their allocation."""
        if target.kind is Kind.CLAIM and "devices" in status:
            results = ((status.get("allocation") or {}).get("devices") or {}).get("results")
            if not results:
                status = {key: value for key, value in status.items() if key != "devices"}
        new = {**old, "status": status}
        if not status:
            del new["status"]
        return new

    def _patch(self, target: Target, query: dict[str, str], content_type: str, body: Any) -> Json:
        if content_type == APPLY and target.kind is Kind.CLAIM and target.subresource == "status":
            return self._apply(target, query, api_schema.decode_body(target.kind, body))
        if content_type == MERGE and isinstance(body, dict):
            part = {"status": body.get("status")} if target.subresource == "status" else body
            return self.store.update(target.key, lambda old: merge_patch(old, part))
        raise ApiError(
            415, "UnsupportedMediaType", f"patch of {target.kind.plural} with {content_type} is not served"
        )

    def _apply(self, target: Target, query: dict[str, str], body: Json) -> Json:
        manager = query.get("fieldManager")
        if not manager:
            why = (("fieldManager", "Required value: is required for apply patch"),)
            text = f'PatchOptions.meta.k8s.io "" is invalid: {why[0][0]}: {why[0][1]}'
            raise ApiError(
                422, "Invalid", text, why, details={"group": "meta.k8s.io", "kind": "PatchOptions"}
            )
        force = query.get("force") == "true"

        def change(old: Json) -> Json:
            wanted = (body.get("metadata") or {}).get("uid")
            have = old["metadata"]["uid"]
            if wanted and wanted != have:
                why = f'Invalid value: "{wanted}": {IMMUTABLE}'
                raise invalid(target.kind, target.name, (("metadata.uid", why),))
            owners = {name: set(keys) for name, keys in self._owners.get(have, {}).items()}
            new = api_apply.apply_status(old, body, manager, force, owners)
            causes = tuple(api_rules.status_device_causes(new, new["status"].get("devices") or []))
            if causes:
                raise invalid(target.kind, target.name, causes)
            self._owners[have] = owners
            return new

        return self.store.update(target.key, change)

    def _admit(self, target: Target, body: Json, old: Json | None) -> Json:
        if target.kind is not Kind.SLICE:
            return body
        spec = body.get("spec") or {}
        name = (body.get("metadata") or {}).get("name") or target.name
        if old is not None:
            changed = [path for path in ("driver", "nodeName") if spec.get(path) != old["spec"].get(path)]
            if spec.get("pool", {}).get("name") != old["spec"]["pool"]["name"]:
                changed.append("pool.name")
            if changed:
                raise invalid(target.kind, name, tuple((f"spec.{path}", IMMUTABLE) for path in changed))
        spec = _without(spec, self.dropped_fields)
        causes = tuple(api_rules.slice_causes(spec))
        if causes:
            raise invalid(target.kind, name, causes)
        stored = {key: value for key, value in spec.items() if key != "devices"}
        if stored.get("sharedCounters"):
            stored["sharedCounters"] = [_canonical_counters(each) for each in stored["sharedCounters"]]
        if spec.get("devices"):
            stored["devices"] = [_stored_device(device) for device in spec["devices"]]
        return {**body, "spec": stored}


def _without(spec: Json, fields: set[str]) -> Json:
    """What is left where a gate is off, before anything is checked."""
    kept = {key: value for key, value in spec.items() if key not in fields}
    if kept.get("devices"):
        kept["devices"] = [
            {key: value for key, value in device.items() if key not in fields} for device in kept["devices"]
        ]
        for device in kept["devices"]:
            for name, amount in device.get("capacity", {}).items():
                left = {key: value for key, value in amount.items() if key not in fields}
                device["capacity"] = {**device["capacity"], name: left}
    return kept


def _stored_device(device: Json) -> Json:
    """As the server keeps it: no empty fields, quantities canonical, taints with a time."""
    stored = {key: value for key, value in device.items() if value not in ({}, [], "")}
    if "capacity" in stored:
        stored["capacity"] = {name: _canonical(amount) for name, amount in stored["capacity"].items()}
    if "consumesCounters" in stored:
        stored["consumesCounters"] = [_canonical_counters(each) for each in stored["consumesCounters"]]
    if "taints" in stored:
        stored["taints"] = [{"timeAdded": now(), **taint} for taint in stored["taints"]]
    return stored


def _canonical(amounts: Any) -> Any:
    """A capacity with its policy, whose texts are all quantities."""
    match amounts:
        case str():
            return api_rules.canonical_quantity(amounts)
        case list():
            return [_canonical(each) for each in amounts]
    return {key: _canonical(each) for key, each in amounts.items() if each != []}


def _canonical_counters(holder: Json) -> Json:
    counters = {
        name: {**amount, "value": api_rules.canonical_quantity(amount["value"])}
        for name, amount in holder["counters"].items()
    }
    return {**holder, "counters": counters}


def _check_metadata(target: Target, sent: Json, have: Json) -> None:
    """409 for another object, or another version of it, than the body speaks of."""
    if sent.get("uid") and sent["uid"] != have["uid"]:
        why = f"Precondition failed: UID in precondition: {sent['uid']}, UID in object meta: {have['uid']}"
        raise conflict(target.kind, target.name, why)
    if sent.get("resourceVersion") and sent["resourceVersion"] != have["resourceVersion"]:
        why = "the object has been modified; please apply your changes to the latest version and try again"
        raise conflict(target.kind, target.name, why)


def _check_event(target: Target, body: Json) -> None:
    """What is about something without a namespace belongs into `default`."""
    if ((body.get("involvedObject") or {}).get("namespace") or "default") != target.namespace:
        why = "Invalid value: does not match event.namespace"
        raise invalid(target.kind, "", (("involvedObject.namespace", why),))


def merge_patch(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    base = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            base.pop(key, None)
        else:
            base[key] = merge_patch(base.get(key), value)
    return base
