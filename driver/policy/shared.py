"""The policy's section `shared`: uplinks that are given out in shares, each an interface on top of one.

Invariant: pure. The first rule that matches a device is the one about it, whole. What it gives out keeps to
the API's rules for what claims may ask of a capacity: least <= default <= most <= all of it, and default and
most are multiples of the step above the least. Where a port is too slow for that, nothing is given out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from driver.claimconfig import RATE
from driver.errors import FieldProblem
from driver.policy.selectors import DeviceSelector
from driver.strict import Key, Kind, Node, Problems, choice, integer, listing, record
from driver.traffic import Amounts, Sharable, VlanRange
from hw.model import DeviceKind, HwDevice
from hw.subinterface import MODES, SubinterfaceKind, SubinterfaceMode

MAX_SHARES = 256
DEFAULT_SHARES = 64
"""Or as many as there are VLANs, where those are fewer."""
_LEAST = 1
"""Mb/s of a share at least, where the policy says neither minimum nor step."""
_MAX_VLAN = 4094
_MAX_RULES = 64
_MAX_RANGES = 64
_VLANS = r"[1-9][0-9]{0,3}(-[1-9][0-9]{0,3})?"

Misfit = tuple[str, str]
"""A field of a rule, and what is wrong with it."""


def _vlan_range(node: Node, problems: Problems) -> VlanRange | None:
    text = str(node.value) if isinstance(node.value, int | str) else ""
    if not re.fullmatch(_VLANS, text):
        problems.add(node, f'must be a VLAN id like 100 or a range like "200-299", not {node.describe()}')
        return None
    first, _, last = text.partition("-")
    found = VlanRange(first=int(first), last=int(last or first))
    if found.last > _MAX_VLAN:
        problems.add(node, f"must be 1 to {_MAX_VLAN}, not {found}")
    elif found.first > found.last:
        problems.add(node, f"is empty: {found.first} is above {found.last}")
    else:
        return found
    return None


_RANGE: Kind[VlanRange] = Kind(
    _vlan_range,
    {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": _MAX_VLAN},
            {"type": "string", "pattern": f"^{_VLANS}$"},
        ]
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRule:
    """What one claim may ask for of the bandwidth. Mb/s; None: as it follows from the rest of the rule."""

    default: Annotated[
        int | None,
        Key("default", RATE, "Of claims that ask for none; absent: all of it, divided by the shares."),
    ] = None
    minimum: Annotated[
        int | None, Key("minimum", RATE, "Less is rounded up to this; absent: the step, or 1M.")
    ] = None
    maximum: Annotated[
        int | None, Key("maximum", RATE, "Who asks for more fits nowhere; absent: all there is.")
    ] = None
    step: Annotated[
        int | None, Key("step", RATE, "Amounts are rounded up to multiples of this above the minimum.")
    ] = None


ANY_AMOUNT = RequestRule()


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRule:
    """How the policy gives out some uplinks in shares. bandwidth in Mb/s; None: what the port says."""

    match: Annotated[DeviceSelector, Key("match", record(DeviceSelector), "Which devices.")]
    kind: Annotated[SubinterfaceKind, Key("kind", choice(SubinterfaceKind), "What pods get on top of it.")]
    mode: Annotated[
        SubinterfaceMode | None,
        Key("mode", choice(SubinterfaceMode), "Of a macvlan or ipvlan; absent: bridge, or l2."),
    ] = None
    bandwidth: Annotated[
        int | None,
        Key("bandwidth", RATE, "Bits per second of all shares; absent: the speed of the port."),
    ] = None
    shares: Annotated[
        int | None,
        Key("shares", integer(1, MAX_SHARES), "How many at most; absent: 64, or as many as it has VLANs."),
    ] = None
    request: Annotated[
        RequestRule, Key("request", record(RequestRule), "What one claim may ask for of the bandwidth.")
    ] = ANY_AMOUNT
    vlans: Annotated[
        tuple[VlanRange, ...],
        Key(
            "vlans",
            listing(_RANGE, minimum=1, maximum=_MAX_RANGES),
            "Of kind vlan: ids and ranges of them that claims may choose from.",
        ),
    ] = ()

    def sharable(self, speed: int | None) -> Sharable | None:
        """Of a device whose port has this speed; None where unsharable() says why."""
        given = self.bandwidth or speed
        if given is None or self.unsharable(speed):
            return None
        shares = self._shares
        return Sharable(
            kind=self.kind,
            mode=self.mode or next(iter(MODES[self.kind]), None),
            bandwidth=given,
            amounts=self._amounts(given, shares),
            shares=shares,
            vlans=self.vlans,
        )

    def unsharable(self, speed: int | None) -> str:
        """Why a device whose port has this speed cannot be given out as the rule says, a sentence; or ""."""
        given = self.bandwidth or speed
        if not given:
            return "the speed of its port is not known: set it up, or say the bandwidth (node policy, shared)"
        field, what = next(self.misfits(given), ("", ""))
        return f"{field} {what} (node policy, shared)" if field else ""

    def misfits(self, given: int | None) -> Iterator[Misfit]:
        """What one claim may ask for against the rest of the rule, and against what there is of it in Mb/s,
        where that is known."""
        request, least = self.request, self._least
        most = request.maximum
        if most is not None and most < least:
            yield "request.maximum", f"is {most}M, less than the minimum, which is {least}M"
        elif most is not None and self._off_grid(most):
            yield "request.maximum", self._off_grid(most)
        if given is not None:
            most = given if most is None else min(most, given)
            yield from self._too_much(given)
        if request.default is not None:
            if request.default < least:
                yield "request.default", f"is {request.default}M, less than the minimum, which is {least}M"
            elif most is not None and request.default > most:
                yield "request.default", f"is {request.default}M, and one claim can have {most}M at most"
            elif self._off_grid(request.default):
                yield "request.default", self._off_grid(request.default)

    def _too_much(self, given: int) -> Iterator[Misfit]:
        least, step = self._least, self.request.step
        if least > given:
            field = "request.step" if self.request.minimum is None else "request.minimum"
            yield field, f"is {least}M, and {given}M are given out"
        elif step is not None and least + step > given:
            yield "request.step", f"is {step}M: one step above {least}M is more than the {given}M given out"

    def _off_grid(self, amount: int) -> str:
        step, least = self.request.step, self._least
        if step is None or (amount - least) % step == 0:
            return ""
        return f"is {amount}M, which is no multiple of {step}M above the minimum, {least}M"

    @property
    def vlan_count(self) -> int:
        return len({id for each in self.vlans for id in range(each.first, each.last + 1)})

    @property
    def _shares(self) -> int:
        return self.shares or min(DEFAULT_SHARES, self.vlan_count or DEFAULT_SHARES)

    @property
    def _least(self) -> int:
        return self.request.minimum or self.request.step or _LEAST

    def _amounts(self, given: int, shares: int) -> Amounts:
        request, least = self.request, self._least
        most = self._on_grid(min(request.maximum or given, given))
        default = request.default or self._on_grid(min(max(given // shares, least), most))
        return Amounts(default=default, least=least, most=most, step=request.step or 0)

    def _on_grid(self, amount: int) -> int:
        """The most that is not above it. amount: not less than the minimum."""
        step = self.request.step or 1
        return amount - (amount - self._least) % step


SHARED_RULES: Kind[tuple[SharedRule, ...]] = listing(record(SharedRule), maximum=_MAX_RULES)


def sharing_rule(device: HwDevice, name: str, rules: Iterable[SharedRule]) -> SharedRule | None:
    """The first that matches the device, whose name in slices is name."""
    return next((rule for rule in rules if rule.match.selects(device, name)), None)


def shared_problems(rules: Sequence[SharedRule]) -> tuple[FieldProblem, ...]:
    """What is wrong with rules whose fields are each right, with paths like `shared[0].request.default`."""
    return tuple(
        FieldProblem(f"shared[{index}].{field}".rstrip("."), what)
        for index, rule in enumerate(rules)
        for field, what in _problems(rule)
    )


def _problems(rule: SharedRule) -> Iterator[Misfit]:
    if DeviceKind.SHARED in rule.match.kinds:
        yield "match.kinds", "cannot be shared: that is what devices are only by such a rule"
    modes = MODES[rule.kind]
    if rule.mode is not None and rule.mode not in modes:
        known = f"must be one of {', '.join(modes)}" if modes else "must not be there"
        yield "mode", f"is {rule.mode.value!r}, and of a {rule.kind} it {known}"
    yield from _vlan_problems(rule)
    rates = {"bandwidth": rule.bandwidth} | {
        f"request.{name}": getattr(rule.request, name) for name in RequestRule.__slots__
    }
    zeros = [field for field, rate in rates.items() if rate == 0]
    for field in zeros:
        yield field, "must be more than 0; leave it out for what follows from the rest"
    if not zeros:
        maximum = rule.request.maximum
        if rule.bandwidth is not None and maximum is not None and maximum > rule.bandwidth:
            yield "request.maximum", f"is {maximum}M, and {rule.bandwidth}M are given out"
        yield from rule.misfits(rule.bandwidth)


def _vlan_problems(rule: SharedRule) -> Iterator[Misfit]:
    if rule.kind is not SubinterfaceKind.VLAN:
        if rule.vlans:
            yield "vlans", f"is there for kind vlan alone: a {rule.kind} has none"
    elif not rule.vlans:
        yield "", "needs vlans: the ids that claims may choose from"
    elif rule.shares is not None and rule.shares > rule.vlan_count:
        yield "shares", f"is {rule.shares}, and there are {rule.vlan_count} VLANs: no two shares have one"
