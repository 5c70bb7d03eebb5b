"""BPF programs of others on devices that pods may get: what there is, and what the policy makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bpf.attach import pinned_links
from bpf.errors import CallRefused
from bpf.foreign import Own, described, foreign_programs
from bpf.parked import Parked
from bpf.sys import LinkId, prog_get_fd_by_id
from driver import running
from driver.doctor.model import Finding, Place, Subject, ok, warn
from driver.execute.foreign import filters_on
from driver.lifecycle.devices import Devices
from driver.policy import ForeignChoice
from hw.model import IfIndex
from hw.netlink import LinkSocket
from hw.sysfs import Sysfs

_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """free: programs on devices that no claim has; filtered: those of them with tc filters. along and off:
    programs that went with a device into its pod, and those that are off meanwhile. Each with its device."""

    choice: ForeignChoice
    free: tuple[str, ...] = ()
    filtered: tuple[str, ...] = ()
    along: tuple[str, ...] = ()
    off: tuple[str, ...] = ()


def look(place: Place) -> Foreign:
    policy = running.policy_in_force(place.paths, place.policy)
    devices = Devices(Sysfs(place.paths.sysfs), lambda: policy)
    devices.rescan()
    parked, ours = Parked(place.paths.pins), pinned_links(place.paths.pins)
    along: list[str] = []
    off: list[str] = []
    for name in sorted(parked.names()):
        # One that comes home while we look has its programs, and needs no telling.
        with contextlib.suppress(CallRefused, OSError):
            found = [f"{name}: {each}" for each in parked.described(name)]
            (off if parked.is_off(name) else along).extend(found)
    free, filtered = [], []
    with LinkSocket(None) as links:
        for name, device in sorted(devices.current().items()):
            if device.ifindex is None or device.withheld or name in parked.names():
                continue
            free += [f"{name}: {each}" for each in _programs_on(device.ifindex, ours)]
            filtered += [f"{name}: {each}" for each in filters_on(links, device.ifindex)]
    return Foreign(
        choice=policy.foreign_programs,
        free=tuple(free),
        filtered=tuple(filtered),
        along=tuple(along),
        off=tuple(off),
    )


def _programs_on(ifindex: IfIndex, ours: frozenset[LinkId]) -> list[str]:
    """Of a device that may be gone by now, or its programs."""
    found = []
    with contextlib.suppress(CallRefused, OSError):
        for each in foreign_programs(ifindex, own=Own(ours)):
            with prog_get_fd_by_id(each.program) as program:
                found.append(described(each.hook, program))
    return found


def judge(foreign: Foreign) -> Iterator[Finding]:
    choice = f"foreignPrograms: {foreign.choice}"
    if foreign.free:
        meanwhile = {
            ForeignChoice.KEEP: "go into pods with it",
            ForeignChoice.REPORT: "go into pods with it, and an event says so",
            ForeignChoice.DETACH: "are off while a pod has it",
        }[foreign.choice]
        yield ok("programs", f"on a device that is given away {meanwhile} ({choice}): {_some(foreign.free)}")
    else:
        yield ok("programs", f"nobody else has any on a device that can be given away ({choice})")
    if foreign.filtered:
        so = ", so claims for it are refused" if foreign.choice is ForeignChoice.DETACH else ""
        yield warn(
            "filters",
            f"of others end when a pod gets the device{so} ({choice}): {_some(foreign.filtered)}",
            "take the qdisc off, or have the policy offer other devices",
        )
    if foreign.along:
        yield ok("along", f"of others went into pods with their devices: {_some(foreign.along)}")
    if foreign.off:
        yield ok("off", f"of others are off until their devices are home: {_some(foreign.off)}")


def _some(found: Sequence[str]) -> str:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{', '.join(found[:_SHOWN])}{more}"


SUBJECT = Subject("foreign", look, judge)
