"""Interfaces made on top of another one, which keeps its own traffic: macvlan, ipvlan, VLAN, as an rtnetlink
message.

Invariant: pure. Attribute numbers and modes are those of uapi linux/if_link.h. Only modes in which every
packet of the interface passes its own hooks: in ipvlan's l3s what comes in is taken from the lower device by
netfilter (ipvlan_l3s.c), and in macvlan's passthru the lower device is the pod's alone.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from hw import wire
from hw.model import IfIndex, IfName, LinkInfo, MacAddress, SoftwareIdentity

_IFLA_ADDRESS = 1
_MODE = 1
"""IFLA_MACVLAN_MODE and IFLA_IPVLAN_MODE alike."""
_VLAN_ID = 1
_VLAN_FLAGS = 2
_VLAN_FLAG_LOOSE_BINDING = 4
"""Without it the kernel sets every VLAN up when the device underneath is, those too that are to be down."""

FIRST_INDEX = 500_000_000
LAST_INDEX = 999_999_999
"""Indices that interfaces made here are given. The kernel itself deals them out from 1 on, so none of
another's is ever among them, in a pod neither: each keeps its own wherever it is, and is known by it. At most
nine digits: they are in the names of what is made for an interface."""
_PREFIX = "knds"


class SubinterfaceKind(enum.StrEnum):
    MACVLAN = "macvlan"
    IPVLAN = "ipvlan"
    VLAN = "vlan"


MADE_UNDERNEATH = frozenset({"macvlan", "macvtap", "ipvlan", "ipvtap"})
"""Kinds that the kernel makes on the device underneath when they are asked for on one of them
(macvlan_common_newlink, ipvlan_link_new)."""


class SubinterfaceMode(enum.StrEnum):
    """How those on one lower device reach each other, and by what packets are told apart."""

    BRIDGE = "bridge"
    PRIVATE = "private"
    VEPA = "vepa"
    L2 = "l2"
    L3 = "l3"


_NUMBERS: Mapping[SubinterfaceKind, Mapping[SubinterfaceMode, bytes]] = {
    SubinterfaceKind.MACVLAN: {
        SubinterfaceMode.BRIDGE: struct.pack("=I", 4),
        SubinterfaceMode.PRIVATE: struct.pack("=I", 1),
        SubinterfaceMode.VEPA: struct.pack("=I", 2),
    },
    SubinterfaceKind.IPVLAN: {
        SubinterfaceMode.L2: struct.pack("=H", 0),
        SubinterfaceMode.L3: struct.pack("=H", 1),
    },
    SubinterfaceKind.VLAN: {},
}
MODES: Mapping[SubinterfaceKind, tuple[SubinterfaceMode, ...]] = {
    kind: tuple(numbers) for kind, numbers in _NUMBERS.items()
}
"""By kind; the first is what one gets who says nothing. A VLAN has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subinterface:
    """vlan: 1 to 4094, of a VLAN alone. mode: one of MODES. ValueError for what does not go together."""

    kind: SubinterfaceKind
    mode: SubinterfaceMode | None = None
    vlan: int | None = None

    def __post_init__(self) -> None:
        modes = MODES[self.kind]
        if self.mode not in (modes or (None,)):
            raise ValueError(f"a {self.kind} has no mode {self.mode}: {', '.join(modes) or 'it has none'}")
        if (self.vlan is not None) is not (self.kind is SubinterfaceKind.VLAN):
            raise ValueError("a VLAN id is what a vlan needs, and nothing else has one")
        if self.vlan is not None and not 1 <= self.vlan <= 4094:
            raise ValueError(f"{self.vlan} is not a VLAN id: 1 to 4094")

    @property
    def has_own_mac(self) -> bool:
        """Whether it is given an address of its own: the others have that of the lower device."""
        return self.kind is SubinterfaceKind.MACVLAN

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.kind, self.mode or self.vlan))


def identity(made: Subinterface, index: IfIndex, parent: IfIndex) -> SoftwareIdentity:
    """What it will be known by, before there is one."""
    return SoftwareIdentity(made.kind.value, index, parent, None)


def name_at_home(index: IfIndex) -> IfName:
    """At most 13 characters: IFNAMSIZ has room for 15."""
    return IfName(f"{_PREFIX}{index}")


def is_ours(link: LinkInfo) -> bool:
    """Whether a link of the host's namespace was made here. Its name alone would say nothing: a tenant who
    had one can have renamed it, and others can call theirs what they like."""
    return link.ifindex >= FIRST_INDEX and link.kind in set(SubinterfaceKind)


def request(
    made: Subinterface, *, index: IfIndex, parent: IfIndex, name: IfName, mac: MacAddress | None = None
) -> bytes:
    """Payload of an RTM_NEWLINK that makes it, with this index. mac None: the kernel's choice."""
    data = b""
    if made.mode is not None:
        data = wire.attribute(_MODE, _NUMBERS[made.kind][made.mode])
    if made.vlan is not None:
        flags = struct.pack("=II", _VLAN_FLAG_LOOSE_BINDING, _VLAN_FLAG_LOOSE_BINDING)
        data = wire.attribute(_VLAN_ID, struct.pack("=H", made.vlan)) + wire.attribute(_VLAN_FLAGS, flags)
    address = b"" if mac is None else wire.attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
    return wire.new_link(made.kind, data, parent=parent, name=name, index=index) + address
