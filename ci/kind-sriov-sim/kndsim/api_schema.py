"""What a body may hold, as the API server decodes it: known fields of the right types, the rest dropped.

Invariant: decoding refuses types, never content: a value of another JSON type is a bad request that names
no field, a field that nobody knows is dropped without a word, null is absence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kndsim.api_rules import QUANTITY
from kndsim.api_store import Kind, bad_request

Json = dict[str, Any]

TEXT, INT, BOOL, QUANTITY_TEXT, ANY = "string", "int64", "bool", "quantity", "any"


class Map:
    """An object with any keys and values of one shape."""

    def __init__(self, value: Any) -> None:
        self.value = value


ATTRIBUTE = {
    "int": INT,
    "bool": BOOL,
    "string": TEXT,
    "version": TEXT,
    "ints": [INT],
    "bools": [BOOL],
    "strings": [TEXT],
    "versions": [TEXT],
}
TAINT = {"key": TEXT, "value": TEXT, "effect": TEXT, "timeAdded": TEXT}
REQUEST_POLICY = {
    "default": QUANTITY_TEXT,
    "validValues": [QUANTITY_TEXT],
    "validRange": {"min": QUANTITY_TEXT, "max": QUANTITY_TEXT, "step": QUANTITY_TEXT},
}
DEVICE = {
    "name": TEXT,
    "attributes": Map(ATTRIBUTE),
    "capacity": Map({"value": QUANTITY_TEXT, "requestPolicy": REQUEST_POLICY}),
    "taints": [TAINT],
    "allowMultipleAllocations": BOOL,
    "consumesCounters": [{"counterSet": TEXT, "counters": Map({"value": QUANTITY_TEXT})}],
    "nodeName": TEXT,
    "nodeSelector": ANY,
    "allNodes": BOOL,
    "bindsToNode": BOOL,
    "bindingConditions": [TEXT],
    "bindingFailureConditions": [TEXT],
}
SLICE_SPEC = {
    "driver": TEXT,
    "nodeName": TEXT,
    "nodeSelector": ANY,
    "allNodes": BOOL,
    "perDeviceNodeSelection": BOOL,
    "pool": {"name": TEXT, "generation": INT, "resourceSliceCount": INT},
    "devices": [DEVICE],
    "sharedCounters": [{"name": TEXT, "counters": Map({"value": QUANTITY_TEXT})}],
}
CONDITION = {
    "type": TEXT,
    "status": TEXT,
    "reason": TEXT,
    "message": TEXT,
    "lastTransitionTime": TEXT,
    "observedGeneration": INT,
}
STATUS_DEVICE = {
    "driver": TEXT,
    "pool": TEXT,
    "device": TEXT,
    "shareID": TEXT,
    "conditions": [CONDITION],
    "data": ANY,
    "networkData": {"interfaceName": TEXT, "hardwareAddress": TEXT, "ips": [TEXT]},
}
SHAPES: Mapping[Kind, Mapping[str, Any]] = {
    Kind.SLICE: {"spec": SLICE_SPEC},
    Kind.CLAIM: {
        "spec": ANY,
        "status": {"allocation": ANY, "reservedFor": ANY, "devices": [STATUS_DEVICE]},
    },
}
_PYTHON = {TEXT: str, BOOL: bool, INT: int, QUANTITY_TEXT: str}


def decode_body(kind: Kind, body: Any) -> Json:
    """The body as the server understands it: what it knows of it."""
    if not isinstance(body, dict):
        raise bad_request("the body must be an object")
    said = (body.get("apiVersion") or kind.api_version, body.get("kind") or kind.title)
    if said != (kind.api_version, kind.title):
        raise bad_request(
            f"the API version and kind of the data ({said[0]}, {said[1]}) do not match"
            f" the expected ones ({kind.api_version}, {kind.title})"
        )
    shape = SHAPES.get(kind)
    if shape is None:
        return body
    known: Json = _decode(kind, "", {"metadata": ANY, **shape}, body)
    return {**known, "apiVersion": kind.api_version, "kind": kind.title}


def _decode(kind: Kind, path: str, shape: Any, value: Any) -> Any:
    if shape == ANY:
        return value
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise _wrong(kind, path, value, "a list")
        return [_decode(kind, path, shape[0], item) for item in value]
    if isinstance(shape, Map | Mapping):
        if not isinstance(value, dict):
            raise _wrong(kind, path, value, "an object")
        shapes = dict.fromkeys(value, shape.value) if isinstance(shape, Map) else shape
        return {
            key: _decode(kind, f"{path}.{key}".lstrip("."), shapes[key], item)
            for key, item in value.items()
            if key in shapes and item is not None
        }
    return _scalar(kind, path, shape, value)


def _scalar(kind: Kind, path: str, shape: str, value: Any) -> Any:
    if shape == QUANTITY_TEXT and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    fits = isinstance(value, _PYTHON[shape]) and (shape == BOOL) == isinstance(value, bool)
    if not fits or (shape == INT and not -(2**63) <= value < 2**63):
        raise _wrong(kind, path, value, shape)
    if shape == QUANTITY_TEXT and not QUANTITY.fullmatch(value):
        raise _wrong(kind, path, value, "a quantity: they must match the regular expression")
    return value


def _wrong(kind: Kind, path: str, value: Any, wanted: str) -> Exception:
    what = f"{kind.title} cannot be handled: field {path} is {value!r:.60} and should be {wanted}"
    return bad_request(f"{kind.title} in version {kind.api_version!r}: {what}")
