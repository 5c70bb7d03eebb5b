"""Which interfaces and devices a rule of the node policy is about.

Invariant: pure. A selector has a criterion: none selects everything by accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from driver.policy.patterns import GLOBS, IDS, matches
from driver.strict import Key, choice, listing
from hw.model import DeviceKind, HwDevice, LinkInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class NetdevSelector:
    """Interfaces that are not hardware and are offered all the same. All given criteria must fit."""

    names: Annotated[tuple[str, ...], Key("names", GLOBS, "Patterns for the name on the host.")] = ()
    kinds: Annotated[tuple[str, ...], Key("kinds", GLOBS, "Link kinds, like veth or macvlan.")] = ()

    def __post_init__(self) -> None:
        if not self.names and not self.kinds:
            raise ValueError("needs names or kinds: it would select every interface of the node")

    def selects(self, link: LinkInfo) -> bool:
        return matches(self.names, link.name) and matches(self.kinds, link.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSelector:
    """Devices a rule is about. All given criteria must fit, each by one of its entries."""

    names: Annotated[tuple[str, ...], Key("names", GLOBS, "Patterns for the name in slices.")] = ()
    kinds: Annotated[
        tuple[DeviceKind, ...], Key("kinds", listing(choice(DeviceKind), minimum=1, maximum=8), "Kinds.")
    ] = ()
    vendors: Annotated[tuple[str, ...], Key("vendors", IDS, "PCI vendor ids.")] = ()
    products: Annotated[tuple[str, ...], Key("products", IDS, "PCI device ids.")] = ()
    drivers: Annotated[tuple[str, ...], Key("drivers", GLOBS, "Patterns for the kernel driver.")] = ()
    pf_names: Annotated[tuple[str, ...], Key("pfNames", GLOBS, "Patterns for the PF's interface.")] = ()
    interfaces: Annotated[
        tuple[str, ...], Key("interfaces", GLOBS, "Patterns for the interface's name on the host.")
    ] = ()

    def __post_init__(self) -> None:
        if not any(getattr(self, attribute) for attribute in self.__slots__):
            raise ValueError("needs a criterion; leave match out for a rule about every device")

    def selects(self, device: HwDevice, name: str) -> bool:
        pci = device.pci
        return (
            matches(self.names, name)
            and (not self.kinds or device.kind in self.kinds)
            and (not self.vendors or (pci is not None and pci.vendor.lower() in self.vendors))
            and (not self.products or (pci is not None and pci.product.lower() in self.products))
            and matches(self.drivers, pci.driver if pci else None)
            and matches(self.pf_names, device.pf_name)
            and matches(self.interfaces, device.link.name if device.link else None)
        )

    def selects_software(self, link: LinkInfo) -> bool:
        """Whether it names an interface that is not hardware, by nothing but its name on the host and its
        kind: a name in slices it has only once it is selected."""
        others = self.names or self.vendors or self.products or self.drivers or self.pf_names
        kinds = not self.kinds or DeviceKind.NETDEV in self.kinds
        return bool(self.interfaces) and not others and kinds and matches(self.interfaces, link.name)
