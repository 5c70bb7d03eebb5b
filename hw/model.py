"""What hw knows of a device: plain values, validated where they are made.

Invariant: identity is never a name. Names, aliases and altnames are set by whoever holds the device,
so they are data to show (escaped) and to restore, never keys to find a device by.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from dataclasses import dataclass
from typing import NewType

PciAddress = NewType("PciAddress", str)
"""Extended BDF in lower case, `0000:3b:00.2`."""
NsimName = NewType("NsimName", str)
"""A netdevsim device on its bus, `netdevsim10`."""
PfAddress = PciAddress | NsimName
"""What a card that can have VFs is called on its bus."""
IfName = NewType("IfName", str)
"""A netdev's name in one netns: 1..15 bytes. Tenant input once a device has been in a pod."""
IfIndex = NewType("IfIndex", int)
MacAddress = NewType("MacAddress", str)
"""Lower-case colon form; 6 bytes for Ethernet, 20 for IPoIB."""
RdmaName = NewType("RdmaName", str)
Guid = NewType("Guid", str)
"""Of an InfiniBand node or port, as sysfs spells it: `0211:22ff:fe18:0000`."""
RdmaIndex = NewType("RdmaIndex", int)
"""What the kernel numbers an RDMA device with, for as long as it lives: a move to another netns keeps it."""
NetnsCookie = NewType("NetnsCookie", int)
"""SO_NETNS_COOKIE: unique for the life of one boot, unlike the inode, which is reused at once."""

InterfaceAddress = ipaddress.IPv4Interface | ipaddress.IPv6Interface

_BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_NSIM = re.compile(r"netdevsim[0-9]+")


def parse_pci_address(text: str) -> PciAddress:
    """Return text as a PciAddress; ValueError if it is not an extended BDF."""
    lowered = text.strip().lower()
    if not _BDF.fullmatch(lowered):
        raise ValueError(f"{text!r} is not a PCI address like 0000:3b:00.2")
    return PciAddress(lowered)


def parse_pf_address(text: str) -> PfAddress:
    """Return text as the address of a card on its bus; ValueError if it is none."""
    return NsimName(text) if _NSIM.fullmatch(text) else parse_pci_address(text)


def bus_of(address: PfAddress) -> str:
    """Its bus, by which sysfs and devlink know it."""
    return "netdevsim" if _NSIM.fullmatch(address) else "pci"


def device_folder(address: PfAddress) -> str:
    """Where sysfs tells of it, below its root."""
    return f"bus/{bus_of(address)}/devices/{address}"


def parse_mac(text: str) -> MacAddress:
    """Return text as a unicast Ethernet MacAddress; ValueError with the reason otherwise."""
    lowered = text.strip().lower()
    if not re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", lowered):
        raise ValueError(f"{text!r} is not a MAC address like 02:00:00:00:00:01")
    if int(lowered[:2], 16) & 1:
        raise ValueError(f"{text!r} is a multicast address; an interface needs a unicast one")
    if lowered == "00:00:00:00:00:00":
        raise ValueError("the all-zero MAC address cannot be given to an interface")
    return MacAddress(lowered)


def check_ifname(text: str) -> IfName:
    """Return text if the kernel takes it as a netdev name (dev_valid_name) and it needs no escaping."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", text) or text in {".", ".."}:
        raise ValueError(f"{text!r} is not an interface name: 1 to 15 of letters, digits, '_', '-', '.'")
    return IfName(text)


class Direction(enum.IntEnum):
    """Of traffic, as the pod sees it. The value is the index in the BPF map."""

    EGRESS = 0
    INGRESS = 1


class LinkFlags(enum.IntFlag, boundary=enum.KEEP):
    """The bits of IFF_* that are state we read, set or restore (uapi linux/if.h)."""

    UP = 0x1
    RUNNING = 0x40
    NOARP = 0x80
    PROMISC = 0x100
    ALLMULTI = 0x200
    MULTICAST = 0x1000
    LOWER_UP = 0x10000


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkInfo:
    """One RTM_NEWLINK message, in the netns it was read in. Absent attributes are None."""

    ifindex: IfIndex
    name: IfName
    flags: LinkFlags
    link_type: int
    """ARPHRD_*: 1 Ethernet, 32 InfiniBand, 772 loopback."""
    mtu: int
    kind: str | None = None
    """IFLA_INFO_KIND ("veth", "macvlan"); None for hardware."""
    mac: MacAddress | None = None
    permanent_mac: MacAddress | None = None
    master: IfIndex | None = None
    peer: IfIndex | None = None
    """IFLA_LINK: the other end of a veth, the lower device of a macvlan."""
    peer_nsid: int | None = None
    """IFLA_LINK_NETNSID; None means: peer is in the netns this was read in."""
    alias: str = ""
    altnames: tuple[str, ...] = ()
    txqlen: int = 0
    group: int = 0
    gso_max_size: int | None = None
    gro_max_size: int | None = None
    gso_max_segs: int | None = None
    gso_ipv4_max_size: int | None = None
    gro_ipv4_max_size: int | None = None
    broadcast: MacAddress | None = None
    link_mode: int | None = None
    """IFLA_LINKMODE: 1 keeps the link dormant."""
    min_mtu: int | None = None
    max_mtu: int | None = None
    """What its driver takes; None: no bound, or an old kernel that does not tell it."""
    operstate: int = 0
    carrier: bool = False
    xdp_prog_ids: tuple[int, ...] = ()
    parent_bus: str | None = None
    parent_device: str | None = None
    """IFLA_PARENT_DEV_NAME: a PCI address on bus "pci"; readable in every netns (kernel 5.14)."""
    phys_switch_id: str | None = None
    phys_port_name: str | None = None
    vf_count: int = 0

    @property
    def up(self) -> bool:
        return LinkFlags.UP in self.flags

    @property
    def is_stacked(self) -> bool:
        """Made on top of another link of its namespace, as a macvlan or VLAN is; a veth is not."""
        on_other = self.peer is not None and self.peer != self.ifindex and self.peer_nsid is None
        return on_other and self.kind not in (None, "veth", "netkit")


@dataclass(frozen=True, slots=True)
class PciIdentity:
    """A PCI function's port. pf and vf_index are set for a VF; port where one function has several.

    permanent_mac tells the ports of one function apart: their netdevs have the same parent. It is set
    only there, and no tenant can change it.
    """

    address: PciAddress
    pf: PciAddress | None = None
    vf_index: int | None = None
    port: int | None = None
    permanent_mac: MacAddress | None = None

    def matches(self, link: LinkInfo) -> bool:
        return (
            link.parent_bus == "pci"
            and link.parent_device == self.address
            and self.permanent_mac in (None, link.permanent_mac)
            and not link.is_stacked
        )


@dataclass(frozen=True, slots=True)
class NetdevsimIdentity:
    """A port of a netdevsim device: bus id and port index (with vf_index: its VF port)."""

    bus_id: int
    port: int
    vf_index: int | None = None

    def matches(self, link: LinkInfo) -> bool:
        name = f"p{self.port}" if self.vf_index is None else f"pf{self.port}vf{self.vf_index}"
        return (
            link.parent_bus == "netdevsim"
            and link.parent_device == f"netdevsim{self.bus_id}"
            and link.phys_port_name in (None, name)
        )


@dataclass(frozen=True, slots=True)
class SoftwareIdentity:
    """A virtual netdev (veth, macvlan...). The kernel keeps its ifindex over a move unless it is taken
    there, and no tenant can change it, nor what the device hangs on (peer).

    peer_nsid is the peer's netns as the host numbers it (None: the host itself). The number means
    nothing in another netns, so it is compared only at home.
    """

    kind: str
    ifindex: IfIndex
    peer: IfIndex | None
    peer_nsid: int | None

    def matches(self, link: LinkInfo) -> bool:
        return link.kind == self.kind and link.ifindex == self.ifindex and link.peer == self.peer

    def matches_at_home(self, link: LinkInfo) -> bool:
        return self.matches(link) and link.peer_nsid == self.peer_nsid


Identity = PciIdentity | NetdevsimIdentity | SoftwareIdentity


def card_of(identity: Identity) -> PfAddress | None:
    """The PF that it is or that it is a VF of; itself where that is not to be seen; None for software."""
    match identity:
        case PciIdentity():
            return identity.pf or identity.address
        case NetdevsimIdentity():
            return NsimName(f"netdevsim{identity.bus_id}")
        case SoftwareIdentity():
            return None


def is_at_home(identity: Identity, link: LinkInfo) -> bool:
    """Whether link, read in the host's netns, is the device of this identity."""
    if isinstance(identity, SoftwareIdentity):
        return identity.matches_at_home(link)
    return identity.matches(link)


class DeviceKind(enum.StrEnum):
    """What can be given away; the attribute `kind`. SHARED: in parts, each an interface on top of it."""

    VF = "vf"
    PF = "pf"
    RDMA = "rdma"
    NETDEV = "netdev"
    SHARED = "shared"


class EswitchMode(enum.StrEnum):
    LEGACY = "legacy"
    SWITCHDEV = "switchdev"


@dataclass(frozen=True, slots=True, kw_only=True)
class PciFacts:
    """What sysfs says of a PCI function, independent of netns. None: the file is absent or unreadable."""

    address: PciAddress
    vendor: str
    product: str
    """Four hex digits each, as in pci.ids."""
    driver: str | None = None
    numa_node: int | None = None
    pcie_root: str | None = None
    """`pci0000:3a`, resource.kubernetes.io/pcieRoot."""
    pcie_switch: str | None = None
    """Nearest bridge above that has a sibling below it; None directly under the root."""
    iommu_group: int | None = None
    instance: int | None = None
    """Another one each time the function is made: it outlives a driver, and not its PF's number of VFs."""


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """A port of an RDMA device. netdev_* is looked up only where it is not plain from the device's place: of
    software, of a device with several ports, of several devices on one function."""

    number: int
    link_layer: str
    """`Ethernet` or `InfiniBand`, as sysfs spells it."""
    netdev_index: IfIndex | None = None
    netdev_name: IfName | None = None

    def carries(self, link: LinkInfo) -> bool:
        if self.netdev_index is not None:
            return self.netdev_index == link.ifindex
        return self.netdev_name == link.name


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaFacts:
    """What is lasting about an RDMA device. State, rate and GIDs are asked of the hardware when needed."""

    name: RdmaName
    link_layer: str
    """Of the port that goes with the netdev, or its first."""
    node_guid: str | None = None
    firmware: str | None = None
    ports: tuple[RdmaPort, ...] = ()
    port: int = 1
    """The port that goes with the netdev."""
    index: RdmaIndex | None = None
    """None where NETLINK_RDMA does not tell."""
    protocol: str | None = None
    """`roce`, `ib`, `iw`; None where NETLINK_RDMA does not tell."""
    sys_image_guid: str | None = None
    software: bool = False
    """Made on a netdev by the kernel (rxe, siw)."""
    shared: bool = False
    """Other netdevs are ports of it too, and use its files and its counters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortState:
    """The physical port that a device is behind, as the host's namespace shows it.

    key names the port: its PF's address, or its place on a netdevsim. carrier None: nobody can tell, since
    the port is down and need not be up for what is behind it.
    """

    key: str
    name: IfName
    up: bool
    carrier: bool | None
    speed_mbps: int | None = None

    @property
    def shown(self) -> str:
        return f"port {self.name!a} ({self.key})"


@dataclass(frozen=True, slots=True, kw_only=True)
class HwDevice:
    """One device as a backend found it. Backends yield these; inventory merges them into Devices.

    link is None while the netdev is in another netns or the driver made none. withheld says in a
    sentence why this device must not be offered ("" means it may).
    """

    kind: DeviceKind
    identity: Identity
    link: LinkInfo | None
    pci: PciFacts | None = None
    rdma: RdmaFacts | None = None
    more_rdma: tuple[RdmaName, ...] = ()
    """Others of the same function that do not go with this netdev."""
    rdma_capable: bool = False
    """It has an RDMA device, in whatever namespace that is now."""
    pf_name: IfName | None = None
    pf_eswitch: EswitchMode | None = None
    representor: IfName | None = None
    """Of a VF in switchdev mode: the netdev that is its end in the PF's switch, where the host rules it."""
    speed_mbps: int | None = None
    total_vfs: int | None = None
    """VFs that a PF can have; None where it is not capable of SR-IOV."""
    physical_port: PortState | None = None
    """None where there is none: of software, and of a VF whose PF is not to be seen."""
    has_netdev: bool = True
    """Its driver has made one, in whatever namespace that is."""
    withheld: str = ""
    pf_driver: str | None = None
    vf_can: str = ""
    """Of a VF: what its PF's driver can set of it, as published; "" where that is not known."""
    vf_cannot: frozenset[str] = frozenset()
    """What it is known not to be able to set."""
    taken: bool = False
    """Withheld since someone has it: the host, others, or a pod."""
    in_use: str = ""
    """Why others need its link as it is, a sentence, or "". It can be given out in parts all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """What "clean" means for a netdev: the baseline that a tenant's device is put back to.

    The closed list of compared fields: a field not here is either flushed by the kernel when a netdev
    changes its netns (addresses, routes, neighbours, qdiscs, sysctls, multicast and unicast filters)
    or not settable from a pod. None: the kernel, or the version that wrote this, does not tell it.
    """

    name: IfName
    mtu: int
    mac: MacAddress | None
    txqlen: int
    group: int
    alias: str
    altnames: tuple[str, ...]
    gso_max_size: int | None
    gro_max_size: int | None
    noarp: bool
    promisc: bool
    allmulti: bool
    multicast: bool
    gso_max_segs: int | None = None
    gso_ipv4_max_size: int | None = None
    gro_ipv4_max_size: int | None = None
    broadcast: MacAddress | None = None
    link_mode: int | None = None

    @classmethod
    def of(cls, link: LinkInfo, *, kind: DeviceKind | None = None) -> LinkSettings:
        """The settings a link has now. The permanent MAC wins over the current one where there is one,
        but for a VF: there the drivers (igbvf, iavf) call permanent what its PF last knew of it, and that
        may be what a tenant chose.
        """
        return cls(
            name=link.name,
            mtu=link.mtu,
            mac=link.mac if kind in (DeviceKind.VF, DeviceKind.SHARED) else link.permanent_mac or link.mac,
            txqlen=link.txqlen,
            group=link.group,
            alias=link.alias,
            altnames=link.altnames,
            gso_max_size=link.gso_max_size,
            gro_max_size=link.gro_max_size,
            noarp=LinkFlags.NOARP in link.flags,
            promisc=LinkFlags.PROMISC in link.flags,
            allmulti=LinkFlags.ALLMULTI in link.flags,
            multicast=LinkFlags.MULTICAST in link.flags,
            gso_max_segs=link.gso_max_segs,
            gso_ipv4_max_size=link.gso_ipv4_max_size,
            gro_ipv4_max_size=link.gro_ipv4_max_size,
            broadcast=link.broadcast,
            link_mode=link.link_mode,
        )


# --- a VF, as its PF sees it --------------------------------------------------------------------------


class VlanProtocol(enum.StrEnum):
    """Which tag a VF's frames get on the wire."""

    CUSTOMER = "802.1q"
    SERVICE = "802.1ad"


class VfLinkState(enum.StrEnum):
    """What a VF is told of its carrier: the port's, or always one."""

    AUTO = "auto"
    ENABLE = "enable"
    DISABLE = "disable"


class RatesBy(enum.StrEnum):
    """What bounds a VF's rates: its PF, or the VF's port in the PF's switch."""

    PF = "VF rate"
    DEVLINK = "devlink rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class VfVlan:
    """The VLAN that a PF puts all of a VF's traffic into. id 0: none, and its frames go out as they are."""

    id: int = 0
    qos: int = 0
    protocol: VlanProtocol = VlanProtocol.CUSTOMER

    def __str__(self) -> str:
        return f"{self.id} qos {self.qos} ({self.protocol})" if self.id else "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class VfSettings:
    """What a PF holds of one of its VFs, and no tenant of the VF can change, but for the MAC address, where
    the VF is trusted or none was given. Rates in Mb/s, 0 for none. None: its driver does not tell.

    mac: the address that the VF was given on the PF, or, with drivers that do not keep the two apart (igb,
    i40e, ice), the one it chose itself; None if neither.
    """

    mac: MacAddress | None = None
    vlan: VfVlan | None = None
    min_rate: int | None = None
    max_rate: int | None = None
    spoof_check: bool | None = None
    trust: bool | None = None
    link_state: VfLinkState | None = None
    node_guid: Guid | None = None
    port_guid: Guid | None = None
    """InfiniBand alone. None: it was given none, or the driver does not tell."""
    rates_by: RatesBy = RatesBy.PF


@dataclass(frozen=True, slots=True, kw_only=True)
class PortVf:
    """What a PF holds of the VF of this index."""

    index: int
    settings: VfSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class PortBaseline:
    """What becomes of a PF's VFs is in the hands of whoever has the PF: what it was like before."""

    up: bool
    """Without its PF up no VF has a carrier."""
    vfs: tuple[PortVf, ...] = ()
