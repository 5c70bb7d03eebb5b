"""What claims may ask of a capacity that is given out in parts, in the API's form.

Invariant: what comes out passes the API server's validation. Its arithmetic is of whole numbers until
Kubernetes 1.37, so a fraction is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from driver.kube.wire import JsonObject
from driver.model import CapacityRequest
from driver.quantity import parse_quantity

VALUES_MAX = 10


def request_policy(request: CapacityRequest, capacity: str) -> JsonObject:
    """Of a capacity of this amount. ValueError with the reason where the API has no such policy."""
    if request.values:
        _check_values(request, _whole(capacity))
        return {"default": request.default, "validValues": list(request.values)}
    if request.least is None:
        raise ValueError("neither values nor a least amount are given")
    bounds = {"min": request.least, "max": request.most, "step": request.step}
    given = {name: text for name, text in bounds.items() if text is not None}
    _check_range(_whole(request.default), {name: _whole(text) for name, text in given.items()}, capacity)
    return {"default": request.default, "validRange": given}


def _check_values(request: CapacityRequest, capacity: Decimal) -> None:
    values = [_whole(text) for text in request.values]
    if request.least or request.most or request.step:
        raise ValueError("both values and a range are given")
    if len(values) > VALUES_MAX or values != sorted(set(values)):
        raise ValueError(f"{', '.join(request.values)} are not at most {VALUES_MAX} ascending values")
    if values[-1] > capacity:
        raise ValueError(f"{request.values[-1]} is more than there is")
    if _whole(request.default) not in values:
        raise ValueError(f"the default {request.default} is none of the values")


def _check_range(default: Decimal, bounds: dict[str, Decimal], capacity: str) -> None:
    there, least = _whole(capacity), bounds["min"]
    most, step = bounds.get("max", there), bounds.get("step")
    if not least <= default <= most <= there:
        raise ValueError(f"{least} <= {default} <= {most} <= {there} does not hold")
    if step is None:
        return
    if step <= 0 or least + step > there:
        raise ValueError(f"a step of {step} above {least} is more than there is, or none")
    limited = (default, most) if "max" in bounds else (default,)
    if any((amount - least) % step for amount in limited):
        raise ValueError(f"default and maximum are not multiples of {step} above {least}")


def _whole(text: str) -> Decimal:
    value = parse_quantity(text)
    if value < 0 or value != value.to_integral_value() or value >= 2**63:
        raise ValueError(f"{text} is no whole number of 0 to 63 bits")
    return value


def comparable_policy(policy: object) -> object:
    """By value: the server writes quantities back in a form of its own. ValueError for what is none."""
    if not isinstance(policy, dict):
        return policy
    return {key: _comparable(value) for key, value in policy.items() if value not in (None, [], {})}


def _comparable(value: object) -> object:
    if isinstance(value, str):
        return parse_quantity(value)
    if isinstance(value, Sequence):
        return [_comparable(each) for each in value]
    if isinstance(value, dict):
        return {key: _comparable(each) for key, each in value.items() if each is not None}
    return value
