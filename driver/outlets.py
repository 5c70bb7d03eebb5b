"""Devices that the node policy wants given out in shares: how, or why one cannot be.

Invariant: pure. What the host or others do with the link of such a device is nothing against it, since it
stays where it is; whatever else is against giving it away counts here too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

from driver.traffic import Sharable
from hw.model import DeviceKind, HwDevice
from hw.subinterface import MADE_UNDERNEATH, SubinterfaceKind

_ETHERNET = 1
_RECEIVERS = {
    SubinterfaceKind.MACVLAN: frozenset({"macvlan", "macvtap"}),
    SubinterfaceKind.IPVLAN: frozenset({"ipvlan", "ipvtap"}),
}
"""Link kinds that get along on one interface."""


class SharingPolicy(Protocol):
    """What is asked of the node policy here."""

    def sharable(self, device: HwDevice, name: str, speed: int | None) -> Sharable | None:
        """How it is given out in shares, if its port has this speed in Mb/s (None: not known)."""

    def unsharable(self, device: HwDevice, name: str, speed: int | None) -> str:
        """Why it cannot be, where the policy wants it to, a sentence; "" else."""


@dataclass(frozen=True, slots=True)
class Outlet:
    """sharable None: it cannot be given out, and reason says why in a sentence."""

    sharable: Sharable | None
    reason: str = ""


def outlet_of(
    device: HwDevice, name: str, speed: int | None, policy: SharingPolicy, on_top: Collection[str] = ()
) -> Outlet | None:
    """Of a device of this name in slices; None where the policy does not want it given out in shares. on_top:
    the kinds of the links that are on top of it here."""
    sharable = policy.sharable(device, name, speed)
    reason = policy.unsharable(device, name, speed)
    if sharable is None and not reason:
        return None
    reason = _unfit(device) or reason or _no_place(device, sharable, on_top)
    return Outlet(None if reason else sharable, reason)


def as_shared(device: HwDevice) -> HwDevice:
    """As it is offered: what the interfaces on top of it do not have is not there."""
    return replace(
        device,
        kind=DeviceKind.SHARED,
        withheld="",
        rdma=None,
        more_rdma=(),
        rdma_capable=False,
        vf_can="",
    )


def _unfit(device: HwDevice) -> str:
    """Why nothing can be made on top of a device, or ""."""
    if device.withheld != device.in_use:
        return device.withheld
    if device.link is None:
        return "it has no interface here that could be shared (node policy, shared)"
    if device.link.kind in MADE_UNDERNEATH:
        return (
            f"it is a {device.link.kind}, and what is made on top of one the kernel makes on the device "
            "underneath: share that one (node policy, shared)"
        )
    if device.link.link_type != _ETHERNET:
        return "it is no Ethernet interface, and only those are shared (node policy, shared)"
    return ""


def _no_place(device: HwDevice, sharable: Sharable | None, on_top: Collection[str]) -> str:
    """The kernel lets one receive what comes in on an interface: a bridge or bond, its macvlans, its ipvlans.
    A VLAN's frames are taken before that."""
    mine = _RECEIVERS.get(sharable.kind) if sharable is not None else None
    if sharable is None or mine is None:
        return ""
    if device.link is not None and device.link.master is not None:
        return (
            f"it belongs to a bridge, a bond or the like, and no {sharable.kind} goes on top of it: share "
            "that one instead, or VLANs (node policy, shared)"
        )
    others = sorted(kind for kind in set(on_top) - mine if any(kind in each for each in _RECEIVERS.values()))
    if others:
        return f"it carries {' and '.join(others)}, and no {sharable.kind} beside that (node policy, shared)"
    return ""
