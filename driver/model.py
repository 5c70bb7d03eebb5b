"""The driver's words as types: claims, preparations, sandboxes, attachments, devices.

Invariant: everything here is a frozen value without I/O and without protobuf or API types; ids that
look alike have types of their own. Objects are validated where they are made.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NewType

from bpf.layout import Framing, Slot
from driver.nicconfig import VF_FIELDS as VF_FIELDS
from driver.nicconfig import InterfaceConfig as InterfaceConfig
from driver.nicconfig import NicConfig as NicConfig
from driver.nicconfig import SubinterfaceConfig as SubinterfaceConfig
from driver.nicconfig import VfConfig as VfConfig
from driver.nicconfig import VfDriver as VfDriver
from driver.offers import CapacityRequest as CapacityRequest
from driver.offers import CounterUse as CounterUse
from driver.offers import Taint as Taint
from driver.offers import TaintEffect as TaintEffect
from driver.rdma import Infiniband, IpoibConfig, RdmaBinding, RdmaInPod
from driver.traffic import Portion, Sharable
from hw.ipoib import has_ipoib_address
from hw.model import (
    DeviceKind,
    Identity,
    IfIndex,
    IfName,
    InterfaceAddress,
    LinkSettings,
    MacAddress,
    NetnsCookie,
    PciAddress,
    PciIdentity,
    PortBaseline,
    PortState,
    RdmaFacts,
    VfLinkState,
    VfSettings,
)
from hw.subinterface import Subinterface

ClaimUid = NewType("ClaimUid", str)
PodUid = NewType("PodUid", str)
SandboxId = NewType("SandboxId", str)
NodeName = NewType("NodeName", str)
PoolName = NewType("PoolName", str)
DeviceName = NewType("DeviceName", str)
"""A DNS label, stable over reboots where the hardware allows: `pci-0000-3b-00-2`, `veth-57`."""
ShareId = NewType("ShareId", str)
BootId = NewType("BootId", str)
"""/proc/sys/kernel/random/boot_id."""
AttachmentId = NewType("AttachmentId", str)
"""Random and never reused: the key of usage in the ledger."""

AttributeValue = bool | int | str


class ConfigSource(enum.StrEnum):
    CLASS = "FromClass"
    CLAIM = "FromClaim"


@dataclass(frozen=True, slots=True)
class ClaimRef:
    namespace: str
    name: str
    uid: ClaimUid


@dataclass(frozen=True, slots=True)
class PodRef:
    namespace: str
    name: str
    uid: PodUid


# --- what the API server says of a claim ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatedDevice:
    """One entry of status.allocation.devices.results that is this driver's."""

    request: str
    """As allocated: `request` or `request/subrequest`."""
    pool: PoolName
    device: DeviceName
    share_id: ShareId | None = None
    admin_access: bool = False
    consumed_capacity: Mapping[str, str] = field(default_factory=dict)

    @property
    def base_request(self) -> str:
        return self.request.partition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpaqueConfig:
    """One entry of status.allocation.devices.config for this driver, in the scheduler's order.

    An empty requests applies to every device. parameters is the decoded JSON as text, so that strict
    decoding (duplicate keys) is possible.
    """

    source: ConfigSource
    requests: tuple[str, ...]
    parameters: str

    def applies_to(self, device: AllocatedDevice) -> bool:
        return not self.requests or device.request in self.requests or device.base_request in self.requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A ResourceClaim, as far as this driver and this node are concerned."""

    ref: ClaimRef
    allocated: bool
    devices: tuple[AllocatedDevice, ...]
    configs: tuple[OpaqueConfig, ...] = ()
    reserved_for: frozenset[PodUid] = frozenset()


# --- devices ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of this node, as offered or withheld.

    attributes keys are without domain for ours and with it for standard ones
    (`resource.kubernetes.io/pciBusID`). capacities are Kubernetes quantities as text. withheld is why
    it is not offered, a sentence, or "". dies_with_netns: the kernel destroys it with its netns rather
    than sending it home (rtnl_link_ops without netns_refund).
    """

    name: DeviceName
    kind: DeviceKind
    identity: Identity
    ifindex: IfIndex | None
    """In the host's netns now; None while it is elsewhere."""
    settings: LinkSettings | None
    attributes: Mapping[str, AttributeValue]
    capacities: Mapping[str, str] = field(default_factory=dict)
    withheld: str = ""
    dies_with_netns: bool = False
    min_mtu: int | None = None
    max_mtu: int | None = None
    """What its driver takes; None: no bound is known."""
    driver: str | None = None
    """Of a PCI function; None for others, and where none is bound."""
    rdma: RdmaFacts | None = None
    """The RDMA device that goes with it, or that it is, where one is to be seen."""
    vf: VfSettings | None = None
    pf_mtu: int | None = None
    """Of a VF whose PF is here, where it was looked at for a claim: a scan does not ask for it."""
    taken: bool = False
    """Withheld since someone has it: the host, others, or a pod."""
    pf_driver: str | None = None
    vf_cannot: frozenset[str] = frozenset()
    """What its PF's driver is known not to be able to set of it."""
    port: PortBaseline | None = None
    """Of a PF with VFs, where it was looked at for a claim."""
    physical_port: PortState | None = None
    has_netdev: bool = True
    """In whatever namespace."""
    portion: Portion | None = None
    """Of a PF and its VFs, where the policy says what is given out of the port."""
    instance: int | None = None
    """Of a PCI function: another one each time it is made."""
    sharable: Sharable | None = None
    """Of a SHARED one, and of no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedDevice:
    """What goes into a ResourceSlice. requests: of a device that several claims can have at once, by
    capacity; empty for one that a claim has whole."""

    name: DeviceName
    attributes: Mapping[str, AttributeValue]
    capacities: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()
    uses: tuple[CounterUse, ...] = ()
    """At most two, of different sets."""
    requests: Mapping[str, CapacityRequest] = field(default_factory=dict)


# --- preparations -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PreparationKey:
    claim_uid: ClaimUid
    pool: PoolName
    device: DeviceName
    share_id: ShareId | None = None

    @property
    def unit(self) -> DeviceName:
        """What the claim has of the device, as this node calls it: the device itself, or one share of it,
        which is locked, counted and withheld by itself."""
        return self.device if self.share_id is None else DeviceName(f"{self.device}{_OF}{self.share_id}")


_OF = "_"
"""Not in a DNS label, so no device is called like a share."""


def device_of(unit: DeviceName) -> DeviceName:
    """The device of which a unit is a share; itself where it is none."""
    return DeviceName(unit.partition(_OF)[0])


def preparation_owner(key: PreparationKey) -> str:
    """Names a preparation in the journal's step table. Written to disk: the text must not change."""
    return json.dumps([key.claim_uid, key.pool, key.device, key.share_id or ""], separators=(",", ":"))


class PreparationState(enum.StrEnum):
    PREPARING = "preparing"
    PREPARED = "prepared"
    UNPREPARING = "unpreparing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The interface that is made for a claim on top of a device. ifname: what it is called in the pod unless
    the claim says it, after the device itself."""

    interface: Subinterface
    ifname: IfName


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """A device of a claim made ready on this node. Journalled before the first change.

    baseline and attributes are those at prepare time: what the device is put back to, and what its
    slice goes on saying while it is away.
    """

    key: PreparationKey
    claim: ClaimRef
    request: str
    identity: Identity
    kind: DeviceKind
    dies_with_netns: bool
    config: NicConfig
    baseline: LinkSettings
    attributes: Mapping[str, AttributeValue]
    capacities: Mapping[str, str]
    reserved_for: frozenset[PodUid]
    slot: Slot
    state: PreparationState
    generation: int
    home_driver: str = ""
    """The kernel's driver that it had when it was prepared, and goes back to; "" for what is not PCI."""
    vf_baseline: VfSettings | None = None
    """What its PF held of it; None for what is no VF, and where there is no PF to be seen."""
    rdma: RdmaBinding | None = None
    infiniband: Infiniband | None = None
    port: PortBaseline | None = None
    """Of a PF that had VFs when it was prepared."""
    size: int | None = None
    """Mb/s that it was given of its PF's bandwidth, or of what its device gives out in shares; None where the
    policy gave it no size."""
    no_iommu: bool = False
    """The policy let it be given by its files without an IOMMU."""
    share: Share | None = None
    """Of a device that is given out in shares; identity and baseline are those of the share's own
    interface."""

    @property
    def rdma_only(self) -> bool:
        """Whether an RDMA device is all there is."""
        return self.kind is DeviceKind.RDMA

    @property
    def by_file(self) -> bool:
        """Whether pods get device files instead of a netdev."""
        return self.config.by_file or self.rdma_only

    @property
    def framing(self) -> Framing:
        """How the packets of its netdev are framed."""
        return Framing.IPOIB if has_ipoib_address(self.baseline) else Framing.ETHERNET

    @property
    def ifname(self) -> IfName:
        """Its name inside the pod; where the pod gets no netdev, of the one it was at home."""
        own = self.share.ifname if self.share is not None else self.baseline.name
        return self.config.interface.name or own

    @property
    def pod_ifname(self) -> IfName | None:
        """The name of its netdev in the pod; None where the pod gets none."""
        return None if self.by_file else self.ifname

    @property
    def pci_address(self) -> PciAddress | None:
        return self.identity.address if isinstance(self.identity, PciIdentity) else None

    @property
    def vf_wanted(self) -> VfSettings | None:
        """What its PF is to hold of it while it is prepared; None where nothing of that is asked for."""
        asked: dict[str, Any] = dict(self.config.on_pf())
        if self.vf_baseline is None:
            return None
        if self.infiniband is not None:
            asked |= dict.fromkeys(("node_guid", "port_guid"), self.infiniband.guid)
            if self.vf_baseline.link_state is VfLinkState.DISABLE:
                # As VFs are on InfiniBand until somebody says otherwise: no subnet manager would see it.
                asked.setdefault("link_state", VfLinkState.AUTO)
        return replace(self.vf_baseline, **asked) if asked else None

    @property
    def can_be_probed(self) -> bool:
        """Whether its driver can be had to start anew with it: a VF whose driver is on record."""
        return self.kind is DeviceKind.VF and self.pci_address is not None and bool(self.home_driver)

    @property
    def mac(self) -> MacAddress | None:
        """None on InfiniBand with a GUID of ours: part of it is the driver's choice, each time anew."""
        if self.infiniband is not None:
            return None
        return self.config.interface.hardware_address or self.baseline.mac

    @property
    def mtu(self) -> int:
        return self.config.interface.mtu or self.baseline.mtu


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDevice:
    """What kubelet is told of one device of a prepared claim."""

    request: str
    """Base request name."""
    pool: PoolName
    device: DeviceName
    share_id: ShareId | None
    cdi_ids: tuple[str, ...]


# --- sandboxes and attachments ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A pod sandbox as the runtime describes it. netns_path is None where none was given. static: its pod is
    kubelet's own, from a file, and can name no claim."""

    id: SandboxId
    pod: PodRef
    netns_path: Path | None
    pid: int = 0
    static: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container that the runtime is about to make. env is what it will find, CDI's variables included."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """What the runtime is to change of a container. cgroup: its cgroup's files (version 2) and their text."""

    cgroup: Mapping[str, str] = field(default_factory=dict)


AS_IT_IS = Adjustment()


class AttachmentState(enum.StrEnum):
    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A preparation inside a sandbox. A closed attachment is no longer in the journal, only in the
    ledger."""

    id: AttachmentId
    preparation: PreparationKey
    pod: PodRef
    sandbox: SandboxId
    netns_path: Path
    netns_cookie: NetnsCookie
    boot_id: BootId
    state: AttachmentState
    generation: int
    rdma: RdmaInPod | None = None
    """None until it is attached, and where no RDMA device goes with it."""


def attachment_owner(id: AttachmentId) -> str:
    """Names an attachment in the journal's step table."""
    return str(id)


# --- outward: status and usage ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    """One entry of ResourceClaim.status.devices. ready False carries the reason in message."""

    claim: ClaimRef
    pool: PoolName
    device: DeviceName
    share_id: ShareId | None
    ready: bool
    reason: str
    """CamelCase, as a condition's reason must be."""
    message: str
    interface: IfName | None = None
    mac: MacAddress | None = None
    addresses: tuple[InterfaceAddress, ...] = ()
    hook: str = ""
    """`tcx` or `clsact`: what counts, and so how strong the promise is."""
    unhealthy: str | None = None
    """What is wrong with it, a sentence, or ""; None: it was not looked at yet."""
    partition: int | None = None
    """The key that the claim chose, with its membership bit."""
    ipoib: IpoibConfig | None = None
    """What the pod has beside the device's own interface, of that partition."""


class PodSample(NamedTuple):
    """One counter of one attached device, for a scrape. The fields before bytes are its labels.

    A tuple and no dataclass, since thousands are made for each scrape.
    """

    namespace: str
    pod: str
    claim: str
    device: str
    interface: str
    direction: str
    """`egress` or `ingress`, as the pod sees it."""
    traffic_class: str
    kind: str
    source: str
    bytes: int
    packets: int


class EventKind(enum.StrEnum):
    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True, slots=True)
class NodeRef:
    """This node: for what concerns no claim."""

    name: str

    @property
    def namespace(self) -> str:
        """Of the event's own: a node has none, and where kubelet puts its."""
        return "default"

    @property
    def uid(self) -> str:
        """As kubelet names it in its events, by which `kubectl describe node` finds them."""
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverEvent:
    """A Kubernetes event about a claim, a pod or this node."""

    subject: ClaimRef | PodRef | NodeRef
    kind: EventKind
    reason: str
    message: str
