"""Whose a device is, decided from what the kernel shows of it and never from its name.

Invariant: pure. The kernel gives a physical device whose namespace died to the first namespace of the
machine, under the name its pod gave it; a kind node is not in that one. What belongs to a node is handed
back to it, and everything else is nobody's business here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class DeviceId:
    """What the kernel tells of a link in every namespace and no tenant can change."""

    bus: str
    """ "netdevsim", "pci"."""
    device: str
    """ "netdevsim5000", "0000:21:10.0"."""
    port: str = ""
    """phys_port_name, where one device has several links: "p1", "pf0vf2"."""

    def __str__(self) -> str:
        return f"{self.bus}/{self.device}" + (f"/{self.port}" if self.port else "")


@dataclass(frozen=True, slots=True)
class Home:
    """The node that has a device, and what it is called there."""

    node: str
    name: str


@dataclass(frozen=True, slots=True)
class SeenLink:
    """A link of one namespace. id is None for those without hardware below."""

    ifindex: int
    name: str
    id: DeviceId | None


@dataclass(frozen=True, slots=True)
class Stray:
    """A device of a node that stands in the first namespace."""

    ifindex: int
    name: str
    """What it is called there: whatever its last user called it."""
    id: DeviceId
    home: Home


def strays(links: Iterable[SeenLink], homes: Mapping[DeviceId, Home]) -> tuple[list[Stray], list[str]]:
    """What is to be handed back, in order; and a sentence for each device that cannot be told apart."""
    found: dict[DeviceId, list[SeenLink]] = {}
    for link in links:
        if link.id is not None and link.id in homes:
            found.setdefault(link.id, []).append(link)
    problems = [
        f"{id} is left where it is: it is each of {', '.join(ascii(link.name) for link in several)}"
        for id, several in sorted(found.items())
        if len(several) > 1
    ]
    alone = {id: several[0] for id, several in found.items() if len(several) == 1}
    return (
        [Stray(link.ifindex, link.name, id, homes[id]) for id, link in sorted(alone.items())],
        problems,
    )
