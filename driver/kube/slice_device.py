"""From an offered device to the API's form of it, within the API's limits.

Invariant: what comes out passes the API server's validation, so that one bad device never costs a slice.
Whatever had to be left out or cut is said in a sentence. A device whose name, taints or shares cannot be
expressed is left out whole: it would be given away without its taint, or all of it at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from driver.kube.request_policy import comparable_policy, request_policy
from driver.kube.wire import JsonObject, clamp
from driver.model import AttributeValue, OfferedDevice, Taint
from driver.quantity import parse_quantity

PROPERTIES_MAX = 32
"""Attributes and capacities of one device together."""
STRING_MAX = 64
"""Bytes of UTF-8."""
TAINTS_MAX = 16
STANDARD_DOMAIN = "resource.kubernetes.io/"
VERSION_ATTRIBUTES = frozenset({"driverVersion", "firmwareVersion"})
"""Published as `version`. By name and not by content: a type that changed with the value would break the
CEL expressions of device classes."""

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_VERSION = re.compile(
    r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?"
    r"(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?"
)


@dataclass(slots=True)
class Described:
    """device None: left out whole."""

    device: JsonObject | None = None
    problems: list[str] = field(default_factory=list)


def describe(offered: OfferedDevice) -> Described:
    """The entry of spec.devices for one device."""
    out = Described()
    if not _LABEL.fullmatch(offered.name):
        out.problems.append(f"device {offered.name!r} is not offered: the name is not a DNS label")
        return out
    policies, bad = _policies(offered)
    bad = bad or _bad_taint(offered.taints)
    if bad:
        out.problems.append(f"device {offered.name} is not offered: {bad}")
        return out
    capacities = _capacities(offered, out)
    attributes = _attributes(offered, PROPERTIES_MAX - len(capacities), out)
    device: JsonObject = {"name": offered.name}
    if attributes:
        device["attributes"] = attributes
    if capacities:
        device["capacity"] = {name: {**capacities[name], **policies.get(name, {})} for name in capacities}
    if policies:
        device["allowMultipleAllocations"] = True
    if offered.taints:
        device["taints"] = [_taint(taint) for taint in offered.taints]
    if offered.uses:
        device["consumesCounters"] = [
            {"counterSet": use.set, "counters": _amounts(use.takes)} for use in offered.uses
        ]
    out.device = device
    return out


def describe_all(offered: Sequence[OfferedDevice]) -> tuple[tuple[JsonObject, ...], tuple[str, ...]]:
    """Entries in the given order, and what had to be left out or cut."""
    devices: list[JsonObject] = []
    problems: list[str] = []
    names: set[str] = set()
    for each in offered:
        if each.name in names:
            problems.append(f"device {each.name} is offered once: the name occurs again")
            continue
        names.add(each.name)
        described = describe(each)
        problems += described.problems
        if described.device is not None:
            devices.append(described.device)
    return tuple(devices), tuple(problems)


def counter_sets(offered: Sequence[OfferedDevice]) -> tuple[JsonObject, ...]:
    """Entries of spec.sharedCounters for what the devices use, each set once."""
    sets = {use.set: use.of for each in offered for use in each.uses}
    return tuple({"name": name, "counters": _amounts(sets[name])} for name in sorted(sets))


def without_counters(offered: Sequence[OfferedDevice]) -> tuple[OfferedDevice, ...]:
    """For a server that has none: of devices that rule each other out those that were not to give way."""
    return tuple(replace(each, uses=()) for each in offered if not any(use.instead for use in each.uses))


def without_shared(offered: Sequence[OfferedDevice]) -> tuple[OfferedDevice, ...]:
    """For a server that knows nothing of shares: it would give such a device away whole."""
    return tuple(each for each in offered if not each.requests)


def _policies(offered: OfferedDevice) -> tuple[Mapping[str, JsonObject], str]:
    """What is said of each capacity that is given out in parts, and why that cannot be said, or ""."""
    policies: dict[str, JsonObject] = {}
    for name, request in offered.requests.items():
        try:
            policies[name] = {"requestPolicy": request_policy(request, offered.capacities.get(name, ""))}
        except ValueError as error:
            return {}, f"of capacity {name} no amounts can be given out: {error}"
    return policies, ""


def _amounts(amounts: Mapping[str, str]) -> JsonObject:
    return {name: {"value": value} for name, value in amounts.items()}


def _capacities(offered: OfferedDevice, out: Described) -> JsonObject:
    capacities: JsonObject = {}
    for name, value in offered.capacities.items():
        try:
            if not _qualified(name):
                raise ValueError("the name is not a C identifier, with or without a domain")
            if parse_quantity(value) < 0:
                raise ValueError("it is negative")
        except ValueError as error:
            out.problems.append(f"device {offered.name}: capacity {name!r} is left out: {error}")
            continue
        capacities[name] = {"value": value}
    for name in list(capacities)[PROPERTIES_MAX:]:
        del capacities[name]
        out.problems.append(
            f"device {offered.name}: capacity {name!r} is left out: {PROPERTIES_MAX} are allowed"
        )
    return capacities


def _attributes(offered: OfferedDevice, room: int, out: Described) -> JsonObject:
    """Standard attributes first, others as given: what is over falls off at the end."""
    attributes: JsonObject = {}
    ranked = sorted(offered.attributes.items(), key=lambda pair: not pair[0].startswith(STANDARD_DOMAIN))
    over: list[str] = []
    for name, value in ranked:
        typed, problem = _typed(name, value)
        if problem:
            out.problems.append(f"device {offered.name}: attribute {name!r} {problem}")
        if typed is None:
            continue
        if len(attributes) < room:
            attributes[name] = typed
        else:
            over.append(name)
    if over:
        out.problems.append(
            f"device {offered.name}: attributes {', '.join(over)} are left out:"
            f" a device may have {PROPERTIES_MAX} attributes and capacities"
        )
    return attributes


def _typed(name: str, value: AttributeValue) -> tuple[JsonObject | None, str]:
    """The attribute in its API form or None, and what is to be said about it."""
    if not _qualified(name):
        return None, "is left out: the name is not a C identifier, with or without a domain"
    if isinstance(value, bool):
        return {"bool": value}, ""
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            return None, f"is left out: {value} does not fit into 64 bits"
        return {"int": value}, ""
    if name in VERSION_ATTRIBUTES:
        if not _VERSION.fullmatch(value) or len(value) > STRING_MAX:
            return None, f"is left out: {clamp(value, STRING_MAX)!r} is not a semantic version"
        return {"version": value}, ""
    cut = clamp(value, STRING_MAX)
    return {"string": cut}, "" if cut == value else f"is cut to {STRING_MAX} bytes: {cut!r}"


def _qualified(name: str) -> bool:
    domain, slash, identifier = name.rpartition("/")
    if slash and not (0 < len(domain) <= 63 and _SUBDOMAIN.fullmatch(domain)):
        return False
    return bool(_IDENTIFIER.fullmatch(identifier))


def _bad_taint(taints: Sequence[Taint]) -> str:
    if len(taints) > TAINTS_MAX:
        return f"it has {len(taints)} taints and {TAINTS_MAX} are allowed"
    for taint in taints:
        domain, slash, word = taint.key.rpartition("/")
        if not re.fullmatch(_WORD, word) or (
            slash and not (len(domain) <= 253 and _SUBDOMAIN.fullmatch(domain))
        ):
            return f"the taint key {taint.key!r} is not a label name"
        if taint.value and not re.fullmatch(_WORD, taint.value):
            return f"the value {taint.value!r} of taint {taint.key} is not a label value"
    return ""


def _taint(taint: Taint) -> JsonObject:
    out: JsonObject = {"key": taint.key, "effect": taint.effect.value}
    if taint.value:
        out["value"] = taint.value
    return out


def same_device(wanted: Mapping[str, object], stored: Mapping[str, object]) -> bool:
    """Whether the server's form of a device, or of a counter set, says what is wanted. Quantities by value; a
    taint's time is the server's."""
    return _comparable(wanted) == _comparable(stored)


def _comparable(device: Mapping[str, object]) -> dict[str, object]:
    out: dict[str, object] = {key: value for key, value in device.items() if value not in (None, {}, [])}
    capacity = out.get("capacity")
    if isinstance(capacity, dict):
        out["capacity"] = _comparable_amounts(capacity)
    uses = out.get("consumesCounters")
    if isinstance(uses, list):
        out["consumesCounters"] = [_comparable(use) if isinstance(use, dict) else use for use in uses]
    counters = out.get("counters")
    if isinstance(counters, dict):
        out["counters"] = _comparable_amounts(counters)
    taints = out.get("taints")
    if isinstance(taints, list):
        out["taints"] = [_timeless(taint) for taint in taints]
    return out


def _comparable_amounts(amounts: Mapping[str, object]) -> dict[str, object]:
    return {name: _comparable_amount(value) for name, value in amounts.items()}


def _comparable_amount(value: object) -> object:
    if isinstance(value, dict) and isinstance(value.get("value"), str):
        try:
            policy = comparable_policy(value.get("requestPolicy"))
            return {**value, "value": parse_quantity(value["value"]), "requestPolicy": policy}
        except ValueError:
            return value
    return value


def _timeless(taint: object) -> object:
    if not isinstance(taint, dict):
        return taint
    return {key: value for key, value in taint.items() if key != "timeAdded" and value != ""}
