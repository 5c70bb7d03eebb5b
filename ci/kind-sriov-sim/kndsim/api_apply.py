"""Server-side apply on a ResourceClaim's status.devices, with the fields that each manager owns.

Invariant: an apply sets the fields it names, removes those that only its manager owned and no longer names,
and touches no other field. A field is a leaf of an entry; entries are keyed by driver, device, pool and
shareID, their conditions by type; addresses and data are one field each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kndsim.api_store import ApiError

Json = dict[str, Any]
EntryKey = tuple[str, str, str, str]
Leaf = tuple[EntryKey, tuple[str, ...]]
"""An entry and a path in it; the empty path is the entry's being there."""
Owners = dict[str, set[Leaf]]
"""Field manager to the fields it owns in one claim."""

KEYS = ("driver", "device", "pool", "shareID")


def entry_key(entry: Json) -> EntryKey:
    """A key that is not named is an empty one, which validation refuses."""
    driver, device, pool, share = (str(entry.get(key) or "") for key in KEYS)
    return driver, device, pool, share


def leaves(entry: Json) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and values of an entry's fields, but for its keys."""
    yield (), None
    for name, value in entry.items():
        if name in KEYS or value is None:
            continue
        if name == "conditions":
            for condition in value:
                for field, content in condition.items():
                    yield (name, str(condition.get("type")), field), content
        elif name == "networkData":
            for field, content in value.items():
                yield (name, field), content
        else:
            yield (name,), value


def flatten(entries: list[Json]) -> dict[Leaf, Any]:
    """All fields of all entries, in order."""
    found: dict[Leaf, Any] = {}
    for entry in entries:
        key = entry_key(entry)
        if (key, ()) in found:
            text = f".status.devices: duplicate entries for key {key}"
            raise ApiError(500, "InternalError", f"failed to create typed patch object: {text}")
        found.update(((key, path), value) for path, value in leaves(entry))
    return found


def assemble(fields: dict[Leaf, Any]) -> list[Json]:
    """The entries that have these fields. Conditions that nobody set are null, as the server shows them."""
    entries: dict[EntryKey, Json] = {}
    conditions: dict[tuple[EntryKey, str], Json] = {}
    for (key, path), value in fields.items():
        keys = {name: text for name, text in zip(KEYS, key, strict=True) if text}
        entry = entries.setdefault(key, {**keys, "conditions": None})
        if not path:
            continue
        if path[0] == "conditions":
            if (key, path[1]) not in conditions:
                made = conditions[key, path[1]] = {}
                entry["conditions"] = [*(entry["conditions"] or []), made]
            conditions[key, path[1]][path[2]] = value
        elif len(path) == 2:
            entry.setdefault(path[0], {})[path[1]] = value
        else:
            entry[path[0]] = value
    return list(entries.values())


def apply_status(claim: Json, body: Json, manager: str, force: bool, owners: Owners) -> Json:
    """Return the claim after the apply and update owners. 409 without force where another manager owns
    a field with another value."""
    status: Json = dict(claim.get("status") or {})
    have = flatten(status.get("devices") or [])
    wanted = flatten((body.get("status") or {}).get("devices") or [])
    others = {name: owned for name, owned in owners.items() if name != manager}
    rivals = [
        (name, leaf)
        for leaf, value in wanted.items()
        for name, owned in others.items()
        if leaf in owned and leaf in have and have[leaf] != value
    ]
    if rivals and not force:
        raise _conflict(rivals)
    for name, leaf in rivals:
        owners[name].discard(leaf)
    for leaf in owners.get(manager, set()) - wanted.keys():
        if not any(leaf in owned for owned in others.values()):
            have.pop(leaf, None)
    have.update(wanted)
    owners[manager] = set(wanted)
    status["devices"] = assemble(have)
    if not status["devices"]:
        del status["devices"]
    return {**claim, "status": status}


def _conflict(rivals: list[tuple[str, Leaf]]) -> ApiError:
    causes = tuple(
        (_shown(leaf), f'conflict with "{name}" using resource.k8s.io/v1') for name, leaf in rivals
    )
    text = f"Apply failed with {len(causes)} conflict{'s' if len(causes) > 1 else ''}: {causes[0][1]}"
    return ApiError(409, "Conflict", text, causes, cause_reason="FieldManagerConflict")


def _shown(leaf: Leaf) -> str:
    key, path = leaf
    keys = ",".join(f'{name}="{text}"' for name, text in zip(KEYS, key, strict=True) if text)
    return f".status.devices[{keys}]" + "".join(f".{part}" for part in path)
