"""What the simulated API server accepts: its own tables of the resource.k8s.io/v1 limits.

Invariant: nothing here comes from the driver, so that a limit the driver has wrong is found. Each check
returns (field, message) pairs as the server's Status does.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

Json = dict[str, Any]
Cause = tuple[str, str]

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
LABEL_NAME = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
REASON = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
QUANTITY = re.compile(
    r"([+-]?[0-9]+(?:\.[0-9]*)?|[+-]?\.[0-9]+)(Ki|Mi|Gi|Ti|Pi|Ei|n|u|m|k|M|G|T|P|E|[eE][+-]?[0-9]+)?"
)

DEVICES_MAX = 128
DEVICES_MARKED_MAX = 64
COUNTER_SETS_MAX = 8
COUNTERS_MAX = 32
USES_MAX = 2
PROPERTIES_MAX = 32
VALUE_BYTES_MAX = 64
TAINTS_MAX = 16
EFFECTS = ("None", "NoSchedule", "NoExecute")
IPS_MAX = 16
CONDITIONS_MAX = 8
DATA_MAX = 10 * 1024
VALID_VALUES_MAX = 10
INT64_MAX = 2**63 - 1

BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
DECIMAL = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
SMALL = {"m": Decimal("1e-3"), "u": Decimal("1e-6"), "n": Decimal("1e-9")}


def quantity_value(text: str) -> Decimal:
    """ValueError if text is no quantity."""
    found = QUANTITY.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a quantity")
    amount, suffix = Decimal(found[1]), found[2] or ""
    if suffix in BINARY:
        return amount * BINARY[suffix]
    if suffix in DECIMAL:
        return amount * DECIMAL[suffix]
    if suffix in SMALL:
        return amount * SMALL[suffix]
    return Decimal(f"{found[1]}{suffix}") if suffix else amount


def canonical_quantity(text: str) -> str:
    """As the server writes it back: the largest suffix of the same family that leaves a whole number; an
    exponent stays one."""
    value = quantity_value(text)
    found = QUANTITY.fullmatch(text)
    suffix = (found[2] or "") if found else ""
    table = BINARY if suffix in BINARY else DECIMAL
    if value != value.to_integral_value():
        return f"{(value * 1000).to_integral_value()}m"
    whole = int(value)
    exponent = suffix[:1] in ("e", "E") and suffix[1:].lstrip("+-").isdigit()
    for name, factor in sorted(table.items(), key=lambda pair: -pair[1]):
        if whole and whole % factor == 0:
            shown = f"e{len(str(factor)) - 1}" if exponent else name
            return f"{whole // factor}{shown}"
    return str(whole)


def slice_causes(spec: Json) -> list[Cause]:
    return [*_slice_head(spec), *_counter_sets(spec.get("sharedCounters") or []), *_slice_devices(spec)]


def _slice_head(spec: Json) -> Iterator[Cause]:
    driver = spec.get("driver")
    # Capitals are let pass, in the driver's name and in an attribute's domain.
    if not isinstance(driver, str) or len(driver) > 63 or not SUBDOMAIN.fullmatch(driver.lower()):
        yield "spec.driver", f"Invalid value: {driver!r}"
    pool = spec.get("pool") or {}
    name = pool.get("name")
    if (
        not isinstance(name, str)
        or len(name) > 253
        or not all(SUBDOMAIN.fullmatch(part) for part in name.split("/"))
    ):
        yield "spec.pool.name", f"Invalid value: {name!r}"
    if not isinstance(pool.get("generation"), int) or pool["generation"] < 0:
        yield "spec.pool.generation", "must be a whole number of at least 0"
    if not isinstance(pool.get("resourceSliceCount"), int) or pool["resourceSliceCount"] <= 0:
        yield "spec.pool.resourceSliceCount", "must be greater than zero"
    if (
        sum(
            spec.get(field) is not None
            for field in ("nodeName", "nodeSelector", "allNodes", "perDeviceNodeSelection")
        )
        != 1
    ):
        yield (
            "spec",
            "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required",
        )
    if spec.get("sharedCounters") is not None and spec.get("devices") is not None:
        yield "spec", "only one of `sharedCounters` or `devices` is allowed"


def _slice_devices(spec: Json) -> Iterator[Cause]:
    devices = spec.get("devices") or []
    marked = any(device.get("taints") or device.get("consumesCounters") for device in devices)
    limit = DEVICES_MARKED_MAX if marked else DEVICES_MAX
    if len(devices) > limit:
        yield "spec.devices", f"Too many: {len(devices)}: must have at most {limit} items"
    names: set[str] = set()
    for index, device in enumerate(devices):
        path = f"spec.devices[{index}]"
        name = device.get("name", "")
        if not LABEL.fullmatch(name):
            yield f"{path}.name", f"Invalid value: {name!r}: must be a DNS label"
        if name in names:
            yield path, f"Duplicate value: {name!r}"
        names.add(name)
        yield from _properties(path, device)
        yield from _taints(path, device.get("taints") or [])
        yield from _uses(f"{path}.consumesCounters", device.get("consumesCounters") or [])


def _counter_sets(sets: list[Json]) -> Iterator[Cause]:
    path = "spec.sharedCounters"
    if len(sets) > COUNTER_SETS_MAX:
        yield path, f"Too many: {len(sets)}: must have at most {COUNTER_SETS_MAX} items"
    names: set[str] = set()
    for index, each in enumerate(sets):
        name = each.get("name", "")
        if not LABEL.fullmatch(name):
            yield f"{path}[{index}].name", f"Invalid value: {name!r}: must be a DNS label"
        if name in names:
            yield f"{path}[{index}]", f"Duplicate value: {name!r}"
        names.add(name)
        yield from _counters(f"{path}[{index}].counters", each.get("counters") or {})


def _uses(path: str, uses: list[Json]) -> Iterator[Cause]:
    """Whether the set is there is the scheduler's to see: it may be in another slice."""
    if len(uses) > USES_MAX:
        yield path, f"Too many: {len(uses)}: must have at most {USES_MAX} items"
    names: set[str] = set()
    for index, each in enumerate(uses):
        name = each.get("counterSet", "")
        if not LABEL.fullmatch(name):
            yield f"{path}[{index}].counterSet", f"Invalid value: {name!r}: must be a DNS label"
        if name in names:
            yield f"{path}[{index}].counterSet", f"Duplicate value: {name!r}"
        names.add(name)
        yield from _counters(f"{path}[{index}].counters", each.get("counters") or {})


def _counters(path: str, counters: Json) -> Iterator[Cause]:
    if not counters:
        yield path, "Required value"
    if len(counters) > COUNTERS_MAX:
        yield path, f"Too many: {len(counters)}: must have at most {COUNTERS_MAX} items"
    for name in counters:
        if not LABEL.fullmatch(name):
            yield path, f"Invalid value: {name!r}: must be a DNS label"


def _properties(path: str, device: Json) -> Iterator[Cause]:
    attributes = device.get("attributes") or {}
    capacity = device.get("capacity") or {}
    count = len(attributes) + len(capacity)
    if count > PROPERTIES_MAX:
        yield path, f"Too many: {count}: must have at most {PROPERTIES_MAX} attributes and capacities"
    for name, value in attributes.items():
        if not _qualified(name):
            yield f"{path}.attributes", f"Invalid value: {name!r}: not a qualified name"
        yield from _attribute(f"{path}.attributes[{name}]", value)
    shared = device.get("allowMultipleAllocations") is True
    for name, amount in capacity.items():
        if not _qualified(name):
            yield f"{path}.capacity", f"Invalid value: {name!r}: not a qualified name"
        where = f"{path}.capacity[{name}].requestPolicy"
        if "requestPolicy" in amount and not shared:
            yield where, "Forbidden: allowMultipleAllocations must be true"
        elif "requestPolicy" in amount:
            yield from _request_policy(where, amount["requestPolicy"], quantity_value(amount["value"]))


def _request_policy(path: str, policy: Json, capacity: Decimal) -> Iterator[Cause]:
    values, bounds = policy.get("validValues") or [], policy.get("validRange")
    if values and bounds is not None:
        yield path, "Forbidden: cannot specify `validValues` and `validRange` at the same time"
    elif (values or bounds is not None) and "default" not in policy:
        yield f"{path}.default", "Required value"
    elif values:
        default = quantity_value(policy["default"])
        yield from _valid_values(f"{path}.validValues", default, list(map(quantity_value, values)), capacity)
    elif bounds is not None:
        amounts = {name: quantity_value(text) for name, text in bounds.items()}
        amounts["default"] = quantity_value(policy["default"])
        yield from _valid_range(f"{path}.validRange", amounts, capacity)


def _valid_values(path: str, default: Decimal, values: list[Decimal], capacity: Decimal) -> Iterator[Cause]:
    for index in range(1, len(values)):
        if values[index - 1] > values[index]:
            yield f"{path}[{index}]", "Invalid value: values must be sorted in ascending order"
    if len(values) > VALID_VALUES_MAX:
        yield path, f"Too many: {len(values)}: must have at most {VALID_VALUES_MAX} items"
        found = False
    else:
        found = default in values
        for index, value in enumerate(values):
            if value > capacity:
                yield f"{path}[{index}]", "Invalid value: option is larger than capacity value"
            if value in values[:index]:
                yield f"{path}[{index}]", "Duplicate value"
    if not found:
        yield path, "Invalid value: default value is not valid according to the requestPolicy"


def _valid_range(path: str, amounts: Mapping[str, Decimal], capacity: Decimal) -> Iterator[Cause]:
    """amounts: the bounds that are given, and the default."""
    if "min" not in amounts:
        yield f"{path}.min", "Required value"
        return
    least, default, most, step = amounts["min"], amounts["default"], amounts.get("max"), amounts.get("step")
    if least > capacity:
        yield f"{path}.min", "Invalid value: min is larger than capacity value"
    if default < least:
        yield f"{path}.default", "Invalid value: default is less than min"
    if most is not None:
        if least > most:
            yield f"{path}.max", "Invalid value: min is larger than max"
        if most > capacity:
            yield f"{path}.max", "Invalid value: max is larger than capacity value"
        if default > most:
            yield f"{path}.default", "Invalid value: default is more than max"
    too_fine = [name for name, amount in amounts.items() if amount * 1000 % 1]
    yield from (
        (f"{path}.{name}", "Invalid value: cannot be represented as a milli value") for name in too_fine
    )
    if step is not None and not too_fine:
        yield from _steps(path, amounts, step, capacity)


def _steps(path: str, amounts: Mapping[str, Decimal], step: Decimal, capacity: Decimal) -> Iterator[Cause]:
    """In thousandths where any amount is a fraction; 63 bits hold only whole ones."""
    if step <= 0:
        yield f"{path}.step", "Invalid value: must be greater than zero"
        return
    if amounts["min"] + step > capacity:
        yield f"{path}.step", "Invalid value: one step is larger than capacity value"
    whole = not any(amount % 1 for amount in amounts.values())
    unsafe = [name for name, amount in amounts.items() if whole and not 0 <= amount <= INT64_MAX]
    yield from ((f"{path}.{name}", "Invalid value: must be 0 to 2^63-1") for name in unsafe)
    for name in ("default", "max"):
        if name in amounts and not unsafe and (amounts[name] - amounts["min"]) % step:
            yield f"{path}.step", "Invalid value: value is not a multiple of a given step"


def _qualified(name: str) -> bool:
    domain, slash, identifier = name.rpartition("/")
    if slash and (len(domain) > 63 or not SUBDOMAIN.fullmatch(domain.lower())):
        return False
    return bool(IDENTIFIER.fullmatch(identifier))


def _attribute(where: str, value: Json) -> Iterator[Cause]:
    """Types are checked where a body is decoded."""
    if len(value) != 1:
        yield where, "Invalid value: exactly one value must be specified"
        return
    kind, content = next(iter(value.items()))
    if kind == "version" and not SEMVER.fullmatch(content):
        yield f"{where}.{kind}", f"Invalid value: {content!r}: must be a string compatible with semver.org"
    elif kind in ("string", "version") and len(content.encode()) > VALUE_BYTES_MAX:
        yield f"{where}.{kind}", f"Too long: may not be more than {VALUE_BYTES_MAX} bytes"


def _taints(path: str, taints: list[Json]) -> Iterator[Cause]:
    if len(taints) > TAINTS_MAX:
        yield f"{path}.taints", f"Too many: {len(taints)}: must have at most {TAINTS_MAX} items"
    for index, taint in enumerate(taints):
        where = f"{path}.taints[{index}]"
        if not LABEL_NAME.fullmatch(taint.get("key") or ""):
            yield f"{where}.key", f"Invalid value: {taint.get('key')!r}"
        if not LABEL_VALUE.fullmatch(taint.get("value") or ""):
            yield f"{where}.value", f"Invalid value: {taint.get('value')!r}"
        if taint.get("effect") not in EFFECTS:
            yield f"{where}.effect", f"Unsupported value: {taint.get('effect')!r}"


def status_device_causes(claim: Json, entries: list[Json]) -> Iterator[Cause]:
    """Checks of status.devices, after a merge."""
    allocated = {
        (result["driver"], result["pool"], result["device"], result.get("shareID"))
        for result in _results(claim)
    }
    for index, entry in enumerate(entries):
        path = f"status.devices[{index}]"
        key = tuple(entry.get(field) for field in ("driver", "pool", "device", "shareID"))
        if not LABEL.fullmatch(entry.get("device") or ""):
            yield f"{path}.device", f"Invalid value: {entry.get('device')!r}: must be a DNS label"
        if key not in allocated:
            yield path, f"Invalid value: {key!r}: must be an allocated device in the claim"
        yield from _conditions(path, entry.get("conditions") or [])
        yield from _network(f"{path}.networkData", entry.get("networkData") or {})
        if len(json.dumps(entry.get("data"), separators=(",", ":"))) > DATA_MAX:
            yield f"{path}.data", f"Too long: may not be more than {DATA_MAX} bytes"


def _results(claim: Mapping[str, Any]) -> list[Json]:
    allocation = (claim.get("status") or {}).get("allocation") or {}
    results: list[Json] = (allocation.get("devices") or {}).get("results") or []
    return results


def _conditions(path: str, conditions: list[Json]) -> Iterator[Cause]:
    if len(conditions) > CONDITIONS_MAX:
        yield f"{path}.conditions", f"Too many: {len(conditions)}"
    for index, condition in enumerate(conditions):
        where = f"{path}.conditions[{index}]"
        if not LABEL_NAME.fullmatch(condition.get("type") or ""):
            yield f"{where}.type", "Invalid value"
        if condition.get("status") not in ("True", "False", "Unknown"):
            yield f"{where}.status", "Unsupported value"
        if not REASON.fullmatch(condition.get("reason") or ""):
            yield f"{where}.reason", f"Invalid value: {condition.get('reason')!r}"
        if not re.fullmatch(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", condition.get("lastTransitionTime") or ""
        ):
            yield f"{where}.lastTransitionTime", "Required value"
        if len(condition.get("message") or "") > 32768:
            yield f"{where}.message", "Too long"


def _network(path: str, data: Json) -> Iterator[Cause]:
    if len((data.get("interfaceName") or "").encode()) > 256:
        yield f"{path}.interfaceName", "Too long"
    if len((data.get("hardwareAddress") or "").encode()) > 128:
        yield f"{path}.hardwareAddress", "Too long"
    ips = data.get("ips") or []
    if len(ips) > IPS_MAX:
        yield f"{path}.ips", f"Too many: {len(ips)}"
    if len(set(ips)) != len(ips):
        yield f"{path}.ips", "Duplicate value"
    for index, text in enumerate(ips):
        try:
            good = str(ipaddress.ip_interface(text)) == text and "/" in text
        except ValueError:
            good = False
        if not good:
            yield f"{path}.ips[{index}]", f"Invalid value: {text!r}: must be in canonical form"
