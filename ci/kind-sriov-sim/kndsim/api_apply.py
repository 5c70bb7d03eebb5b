"""Server-side apply on a ResourceClaim's status, with one owner set per field manager.

Invariant: an apply adds or replaces the entries it names, removes those that only its manager owned and no
longer names, and touches no other manager's entries. Entries are keyed by driver, device, pool, shareID.
"""

from __future__ import annotations

from typing import Any

from kndsim.api_store import ApiError

Json = dict[str, Any]
EntryKey = tuple[str, str, str, str]
Owners = dict[str, set[EntryKey]]
"""Field manager to the entries it owns in one claim."""

RESET = ("metadata", "spec")
"""Not settable through the status subresource: ignored, as the server does."""


def entry_key(entry: Json) -> EntryKey:
    try:
        driver, device, pool = entry["driver"], entry["device"], entry["pool"]
    except KeyError as error:
        raise ApiError(
            400,
            "BadRequest",
            f"status.devices: associative list with keys has an element that omits key {error}",
        ) from error
    return driver, device, pool, entry.get("shareID") or ""


def apply_status(claim: Json, body: Json, manager: str, force: bool, owners: Owners) -> Json:
    """Return the claim after the apply and update owners. 409 without force where another manager owns
    an entry with other content."""
    status: Json = dict(claim.get("status") or {})
    entries = {entry_key(entry): entry for entry in status.get("devices") or []}
    wanted: dict[EntryKey, Json] = {}
    for entry in (body.get("status") or {}).get("devices") or []:
        key = entry_key(entry)
        if key in wanted:
            raise ApiError(400, "BadRequest", f"status.devices: duplicate entries for key {key}")
        wanted[key] = entry
    others = {manager_: keys for manager_, keys in owners.items() if manager_ != manager}
    for key in owners.get(manager, set()) - wanted.keys():
        if not any(key in keys for keys in others.values()):
            entries.pop(key, None)
    for key, entry in wanted.items():
        rivals = [name for name, keys in others.items() if key in keys]
        if rivals and not force and entries.get(key) != entry:
            raise ApiError(
                409, "Conflict", f"Apply failed with 1 conflict: conflict with {rivals[0]!r}: .status.devices"
            )
        for name in rivals:
            owners[name].discard(key)
        entries[key] = entry
    owners[manager] = set(wanted)
    status["devices"] = list(entries.values())
    if not entries:
        del status["devices"]
    return {**claim, "status": status}
