"""Whether devices are well: from what is seen of them now and was seen before to what counts as a trouble.

Invariant: pure. A trouble counts when it lasted as long as its rule says, and does not count any more when
it was over for as long; so a port that flaps faster than that changes nothing. What is seen for the first
time counts as it is: there is nothing to hold on to. What is wrong with a port is wrong with all behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NewType

from driver.model import (
    Device,
    DeviceName,
    Preparation,
    VfDriver,
)
from driver.policy.health import Rule
from driver.troubles import DeviceHealth, Finding, Trouble
from hw.model import DeviceKind, PciIdentity, PortState
from hw.scan import USERSPACE_DRIVERS

Subject = NewType("Subject", str)
"""What can have a trouble: a device by its name, or a port by its key."""
Troubles = Mapping[Trouble, str]
"""Each with a sentence about it."""
Rules = Callable[[Trouble], Rule]

NOTHING: Troubles = {}


# --- over time ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """One trouble of one subject. since: monotonic seconds when present became what it is."""

    text: str
    present: bool
    since: float
    counted: bool

    def due(self, rule: Rule) -> float | None:
        """When it counts, or does not any more, if nothing changes; None if nothing is to come."""
        if self.present is self.counted:
            return None
        return self.since + (rule.after if self.present else rule.until)


@dataclass(frozen=True, slots=True)
class Watch:
    """All that is looked at, and the troubles that are, or were a moment ago."""

    subjects: frozenset[Subject] = frozenset()
    entries: Mapping[tuple[Subject, Trouble], Watched] = field(default_factory=dict)

    def counted(self, subject: Subject) -> Troubles:
        if not self.entries:
            return {}
        return {t: self.entries[subject, t].text for t in Trouble if self._counts(subject, t)}

    def pending(self, subject: Subject, trouble: Trouble) -> bool:
        """Whether it is there, counted or not yet, or was until a moment ago."""
        return (subject, trouble) in self.entries

    def _counts(self, subject: Subject, trouble: Trouble) -> bool:
        entry = self.entries.get((subject, trouble))
        return entry is not None and entry.counted


def advance(before: Watch, seen: Mapping[Subject, Troubles], rules: Rules, now: float) -> Watch:
    """seen: every subject there is to look at, with its troubles; those that are not in it are forgotten."""
    there = {(subject, trouble): text for subject, found in seen.items() for trouble, text in found.items()}
    entries = {}
    for subject, trouble in there.keys() | before.entries.keys():
        if subject not in seen:
            continue
        key = (subject, trouble)
        entry = _next(before.entries.get(key), there.get(key), subject in before.subjects, now)
        due = entry.due(rules(trouble))
        if due is not None and due <= now:
            entry = replace(entry, counted=entry.present)
        if entry.present or entry.counted:
            entries[key] = entry
    return Watch(frozenset(seen), entries)


def _next(old: Watched | None, text: str | None, known: bool, now: float) -> Watched:
    """One of the two is there."""
    present = text is not None
    if old is None:
        return Watched(text=text or "", present=True, since=now, counted=not known)
    since = old.since if old.present is present else now
    return replace(old, text=text if text is not None else old.text, present=present, since=since)


def next_look(watch: Watch, rules: Rules) -> float | None:
    """Monotonic seconds at which advance says something else by the mere passing of time."""
    moments = (entry.due(rules(trouble)) for (_, trouble), entry in watch.entries.items())
    return min((moment for moment in moments if moment is not None), default=None)


# --- now ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A device that is offered or held, and what is known of it beside the scan. device is None where the
    scan does not have it."""

    name: DeviceName
    device: Device | None
    held: Preparation | None = None
    in_hand: bool = False
    """This driver may be at work on it, so that nothing follows from what is seen of the device itself."""
    attached: bool = False
    dead: bool = False
    """Its programs say that the netdev they were on is no more."""
    lost: str = ""
    """Why the pod that had it has it no more, a sentence."""
    quarantine: str = ""
    reporters: frozenset[str] = frozenset()
    """Health reporters of the device itself that say error."""
    port_reporters: frozenset[str] = frozenset()
    """Of its port's."""

    @property
    def port(self) -> PortState | None:
        return self.device.physical_port if self.device is not None else None


def seen_now(views: Iterable[View]) -> Mapping[Subject, Troubles]:
    seen: dict[Subject, Troubles] = {}
    for view in views:
        seen[Subject(view.name)] = device_troubles(view)
        if view.port is not None:
            seen[Subject(view.port.key)] = port_troubles(view.port, view.port_reporters)
    return seen


def port_troubles(port: PortState, reporters: Collection[str] = ()) -> Troubles:
    found: dict[Trouble, str] = {}
    if port.carrier is False:
        why = "has no carrier: look at its cable and its switch" if port.up else "is down: set it up"
        found[Trouble.NO_CARRIER] = f"{port.shown} {why}"
    if reporters:
        found[Trouble.FIRMWARE] = f"{port.shown}: {_says_error(reporters)}"
    return found


def _says_error(reporters: Collection[str]) -> str:
    names = ", ".join(sorted(reporters))
    return f"health reporter {names} says error: see `devlink health`"


def device_troubles(view: View) -> Troubles:
    found: dict[Trouble, str] = {}
    if view.quarantine:
        found[Trouble.QUARANTINED] = f"{view.name} is withheld until it is clean: {view.quarantine}"
    if view.reporters:
        found[Trouble.FIRMWARE] = f"{view.name}: {_says_error(view.reporters)}"
    if view.in_hand:
        return found
    if view.lost or (view.attached and view.dead):
        gone = f"the interface that the pod had of {view.name} is no more: it was reset or unbound"
        found[Trouble.RESET] = view.lost or gone
    device, held = view.device, view.held
    if device is None:
        if held is not None and isinstance(held.identity, PciIdentity):
            found[Trouble.GONE] = _gone(view.name, held.identity)
        return found
    if isinstance(device.identity, PciIdentity) and (why := _driver_trouble(device, held)):
        found[Trouble.NO_DRIVER] = why
    if held is not None and (why := _slower(device, held)):
        found[Trouble.SLOW_LINK] = why
    return found


def _gone(name: DeviceName, identity: PciIdentity) -> str:
    if identity.pf is None:
        return f"{name} is no more on this node: the card is unplugged or dead"
    return f"{name} is no more: VF {identity.vf_index} of PF {identity.pf} was removed"


def _driver_trouble(device: Device, held: Preparation | None) -> str:
    wanted = ""
    if held is not None:
        wanted = VfDriver.VFIO.value if held.config.by_file else held.home_driver
    again = f"bind it to {wanted!a} again" if wanted else "bind one to it"
    if not device.driver:
        return f"{device.name} has no driver: {again}"
    if wanted and device.driver != wanted:
        return f"{device.name} is bound to {device.driver!a}: {again}"
    if held is None and device.driver in USERSPACE_DRIVERS:
        # Others have taken it into use: it is theirs, and not offered.
        return ""
    needs_none = device.kind is DeviceKind.RDMA or (held is not None and held.by_file)
    if not device.has_netdev and not needs_none:
        return f"{device.name} has no netdev: its driver {device.driver!a} made none, see the kernel's log"
    return ""


def _slower(device: Device, held: Preparation) -> str:
    """Only where both are known: a port that is down does not say."""
    promised, port = held.attributes.get("linkSpeed"), device.physical_port
    if port is None or not port.carrier or port.speed_mbps is None or not isinstance(promised, int):
        return ""
    if port.speed_mbps >= promised:
        return ""
    return f"{port.shown} has {port.speed_mbps} Mb/s, and had {promised} when the claim was prepared"


# --- told ---------------------------------------------------------------------------------------------


def findings(watch: Watch, view: View) -> tuple[Finding, ...]:
    """What counts against a device, its port's troubles included."""
    troubles = dict(watch.counted(Subject(view.name)))
    if view.port is not None:
        troubles |= watch.counted(Subject(view.port.key))
    return tuple(Finding(trouble=trouble, text=text) for trouble, text in troubles.items())


def healths(
    watch: Watch, views: Iterable[View], before: Mapping[DeviceName, DeviceHealth], wall: float
) -> Mapping[DeviceName, DeviceHealth]:
    """One for each view. A device keeps its time while it has the same troubles, in whatever words."""
    told = {}
    for view in views:
        new = DeviceHealth(device=view.name, findings=findings(watch, view), since=wall)
        old = before.get(view.name)
        same = old is not None and [f.trouble for f in old.findings] == [f.trouble for f in new.findings]
        told[view.name] = replace(new, since=old.since) if same and old is not None else new
    return told
