"""The policy's section `sriov`: how many VFs a PF is to have, and what they are like.

Invariant: of the rules the first that matches a PF is the one about it, whole; a PF that none matches is left
alone. A rule about a PF that others manage sets nothing.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Annotated

from driver.policy.patterns import GLOBS, IDS, matches
from driver.strict import Key, Kind, boolean, choice, integer, listing, record, shown, text
from hw.model import EswitchMode

MAX_VFS = 4096
_MAX_RULES = 64
_USERSPACE = frozenset({"vfio-pci", "uio_pci_generic", "igb_uio", "pci-stub"})


class LinkType(enum.StrEnum):
    ETHERNET = "ethernet"
    INFINIBAND = "infiniband"


class MacChoice(enum.StrEnum):
    """generated: an address of its own that a VF keeps over a reboot. keep: what its driver comes up with,
    which is another one each time with many drivers."""

    KEEP = "keep"
    GENERATED = "generated"


def _driver(value: str) -> str:
    if value in _USERSPACE:
        raise ValueError(
            f"{value} leaves a VF without a netdev, and those are not offered: name the kernel's driver, and "
            "let claims ask for vf.driver"
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", value):
        raise ValueError(f"{shown(value)} is not a driver's name: 1 to 32 of letters, digits, '_' and '-'")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class PfSelector:
    """PFs a rule is about. All given criteria must fit, each by one of its entries."""

    pf_names: Annotated[tuple[str, ...], Key("pfNames", GLOBS, "Patterns for the interface's name.")] = ()
    addresses: Annotated[tuple[str, ...], Key("addresses", GLOBS, "Patterns for the PCI address.")] = ()
    vendors: Annotated[tuple[str, ...], Key("vendors", IDS, "PCI vendor ids.")] = ()
    products: Annotated[tuple[str, ...], Key("products", IDS, "PCI device ids.")] = ()
    link_types: Annotated[
        tuple[LinkType, ...],
        Key("linkTypes", listing(choice(LinkType), minimum=1, maximum=2), "What its port is."),
    ] = ()
    numa_nodes: Annotated[
        tuple[int, ...],
        Key("numaNodes", listing(integer(0, 1023), minimum=1, maximum=64), "NUMA nodes it is at."),
    ] = ()

    def __post_init__(self) -> None:
        if not any(getattr(self, attribute) for attribute in self.__slots__):
            raise ValueError("needs a criterion; leave match out for a rule about every PF")

    def selects(
        self,
        *,
        name: str | None,
        address: str,
        vendor: str | None,
        product: str | None,
        link_type: LinkType | None,
        numa_node: int | None,
    ) -> bool:
        return (
            matches(self.pf_names, name)
            and matches(self.addresses, address)
            and (not self.vendors or vendor in self.vendors)
            and (not self.products or product in self.products)
            and (not self.link_types or link_type in self.link_types)
            and (not self.numa_nodes or numa_node in self.numa_nodes)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VfDefaults:
    """What every VF of a PF is given before its driver sees it. None: as the hardware has it."""

    trust: Annotated[
        bool | None, Key("trust", boolean(), "Whether it may change its address and see more.")
    ] = None
    spoof_check: Annotated[
        bool | None, Key("spoofCheck", boolean(), "Whether frames with other source addresses are dropped.")
    ] = None
    vlan: Annotated[int | None, Key("vlan", integer(0, 4094), "VLAN of all its traffic; 0: none.")] = None
    mac: Annotated[MacChoice, Key("mac", choice(MacChoice), "Where its MAC address is from.")] = (
        MacChoice.GENERATED
    )
    driver: Annotated[
        str | None, Key("driver", text(_driver, {"maxLength": 32}), "Kernel driver; absent: the usual one.")
    ] = None


NO_DEFAULTS = VfDefaults()


@dataclass(frozen=True, slots=True, kw_only=True)
class PfRule:
    """What the policy says of some PFs."""

    vfs: Annotated[int, Key("vfs", integer(0, MAX_VFS), "How many VFs the PF is to have.")]
    match: Annotated[PfSelector | None, Key("match", record(PfSelector), "Which PFs; absent: every one.")] = (
        None
    )
    external: Annotated[
        bool, Key("external", boolean(), "Others make these VFs: their number is checked, nothing is done.")
    ] = False
    allow_host_uplink: Annotated[
        bool,
        Key("allowHostUplink", boolean(), "Also where the host itself uses the PF; its link may flap."),
    ] = False
    mtu: Annotated[
        int | None, Key("mtu", integer(68, 65535), "Of the VFs; the PF's is raised to it if need be.")
    ] = None
    mode: Annotated[
        EswitchMode | None, Key("mode", choice(EswitchMode), "Of the PF's embedded switch; absent: as it is.")
    ] = None
    vf: Annotated[VfDefaults, Key("vf", record(VfDefaults), "What each VF is given.")] = NO_DEFAULTS

    def __post_init__(self) -> None:
        sets = self.mtu is not None or self.mode is not None or self.vf != NO_DEFAULTS
        if self.external and (sets or self.allow_host_uplink):
            raise ValueError(
                "is external, so nothing is set: mtu, mode, vf and allowHostUplink do not go with it"
            )
        if self.mode is not None and not self.vfs:
            raise ValueError("gives mode and no VFs: without any the PF is left in the mode it was in")


PF_RULES: Kind[tuple[PfRule, ...]] = listing(record(PfRule), maximum=_MAX_RULES)
