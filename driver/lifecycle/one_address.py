"""No two devices of a node have one MAC address: frames would go to whichever was heard last.

Invariant: an address that a claim asked for is that claim's until its device is home and clean. What is
compared here is what records say, before the kernel is touched; what the kernel says is asked of Devices,
under the device's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from driver.errors import Refusal
from driver.model import ClaimUid, DeviceName, NicConfig, Preparation
from hw.model import MacAddress


@dataclass(frozen=True, slots=True)
class Has:
    """A device that has an address or is to have it, and how to say so."""

    device: DeviceName
    mac: MacAddress
    why: str


def asked_for(preparations: Iterable[Preparation]) -> frozenset[MacAddress]:
    """Addresses of claims' own choice."""
    return frozenset(mac for p in preparations if (mac := p.config.interface.hardware_address) is not None)


def asking(wanted: Iterable[tuple[DeviceName, NicConfig]], claim: str) -> tuple[Has, ...]:
    """The devices of a claim that is being prepared which are to have an address of its choice."""
    return tuple(
        Has(name, mac, f"claim {claim} is to have it on {name}")
        for name, config in wanted
        if (mac := config.interface.hardware_address) is not None
    )


def on_record(preparations: Iterable[Preparation], *, but: ClaimUid) -> Iterator[Has]:
    """Asked for, or a device's own, which it will come home with."""
    for p in preparations:
        if p.key.claim_uid == but:
            continue
        who = f"{p.key.unit} of claim {p.claim.namespace}/{p.claim.name}"
        if (mac := p.config.interface.hardware_address) is not None:
            yield Has(p.key.unit, mac, f"{who} has it")
        if p.baseline.mac is not None:
            yield Has(p.key.unit, p.baseline.mac, f"it is {who}'s own")


def check(mine: Iterable[Has], others: Iterable[Has]) -> None:
    """Refusal if two devices would have one address, of one claim or of several."""
    taken = list(others)
    for each in mine:
        for other in taken:
            if other.mac == each.mac and other.device != each.device:
                raise refused(each.device, each.mac, other.why)
        taken.append(each)


def refused(device: DeviceName, mac: MacAddress, why: str) -> Refusal:
    return Refusal(
        "AddressInUse",
        f"{device} cannot have the address {mac}: {why}; ask for another (interface.hardwareAddress), or "
        "wait until this one is free",
    )
