"""The devices of this node as the driver speaks of them: named, described, offered or withheld.

Invariant: pure. A name depends on the hardware's place and nothing else; what is published of a device
fits the API's limits whatever the device says of itself; a device that makes trouble costs itself only
and is a sentence in problems.

Attributes: always `kind`, `rdma`, `virtual`, `ebpf`, so that no selector aborts on an absent one; the
standard `resource.kubernetes.io/` ones where known; what the policy adds; then OPTIONAL in its order,
as many as fit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from driver.model import AttributeValue, CapacityRequest, Device, DeviceName
from driver.outlets import Outlet, SharingPolicy, as_shared, outlet_of
from driver.traffic import Portion, Sharable
from hw.model import (
    DeviceKind,
    HwDevice,
    Identity,
    IfIndex,
    LinkInfo,
    LinkSettings,
    NetdevsimIdentity,
    PciIdentity,
    PfAddress,
    SoftwareIdentity,
    card_of,
    check_ifname,
)
from hw.subinterface import is_ours

STANDARD_DOMAIN = "resource.kubernetes.io"
ATTRIBUTE_LIMIT = 32
"""Of the API, for attributes and capacities of a device together."""
OPTIONAL_LIMIT = 16
POLICY_LIMIT = 6
STRING_LIMIT = 64
"""Bytes of a string attribute."""

OPTIONAL = (
    "ifName",
    "subinterface",
    "pfName",
    "pfPciAddress",
    "vfIndex",
    "rdmaDevice",
    "rdmaLinkLayer",
    "vfSettings",
    "linkType",
    "linkSpeed",
    "pcieSwitch",
    "kernelDriver",
    "vendor",
    "product",
    "eswitchMode",
    "representor",
    "mtu",
    "mac",
    "nodeGuid",
    "firmware",
)
"""In the order in which they get a place: what selects a device first, what only describes it last."""

BANDWIDTH = "bandwidth"
SHARES = "shares"
"""Capacities: in bits per second, and how many claims can have one at once."""

_LINK_TYPES = {1: "ethernet", 32: "infiniband"}
_UNITS = ((1_000_000, "T"), (1_000, "G"))


class PortBandwidth(Protocol):
    """What is given out of a PF's port, in Mb/s."""

    def budget(self, link_speed: int | None) -> int | None:
        """What its VFs have together at most; None: nothing is known of the port's speed."""

    def size_of(self, vf: int) -> int | None:
        """Of the VF of this index; None: it has none."""


class DevicePolicy(SharingPolicy, Protocol):
    """What inventory asks of the node policy."""

    def selects(self, link: LinkInfo) -> bool:
        """Whether a netdev that is not hardware is to be offered."""

    def attributes_for(self, device: HwDevice, name: str) -> Mapping[str, AttributeValue]:
        """Extra attributes of a device; name is its name in slices."""

    def withheld(self, device: HwDevice, name: str) -> str:
        """Why the policy keeps it from the cluster, a sentence; "" if it does not."""

    def bandwidth_of(self, pf: HwDevice) -> PortBandwidth | None:
        """What is given out of a PF; None: the policy says nothing of it."""


@dataclass(frozen=True, slots=True)
class GivenOut:
    """What is given out of one PF, in Mb/s. whole None: the speed of its port was never seen. shared: what of
    it is given out in shares, of the PF itself or of a VF, and so is nothing for VFs any more."""

    rule: PortBandwidth
    whole: int | None
    shared: int = 0

    @property
    def budget(self) -> int | None:
        return None if self.whole is None else max(0, self.whole - self.shared)


@dataclass(frozen=True, slots=True)
class Inventory:
    """Devices by name, sorted, withheld ones included; problems are sentences for the log."""

    by_name: Mapping[DeviceName, Device] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    given_out: Mapping[PfAddress, GivenOut] = field(default_factory=dict)
    """By PF, where the policy says it."""


@dataclass(frozen=True, slots=True)
class InventoryDiff:
    """What is new, what is gone, and what is the same device but described otherwise (as it is now)."""

    added: tuple[Device, ...] = ()
    removed: tuple[DeviceName, ...] = ()
    changed: tuple[Device, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


def build(devices: Iterable[HwDevice], policy: DevicePolicy, previous: Inventory | None = None) -> Inventory:
    """Merge what the backends found. previous: a speed that a port does not say while its link is down
    is taken from there, so that a flap is not a change of the device."""
    seen = tuple(devices)
    given_out = _given_out(seen, policy, previous)
    outlets = _outlets(seen, policy, previous, given_out)
    given_out = _without_shares(given_out, outlets)
    found: dict[DeviceName, Device] = {}
    problems: list[str] = []
    dropped: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for device in seen:
        if isinstance(device.identity, SoftwareIdentity) and not _selected(device, policy):
            continue
        try:
            made, without = _device(device, policy, previous, given_out, outlets.get(device.identity))
        except ValueError as error:
            problems.append(f"{device.identity} is left out: {error}")
            continue
        if made.name in found:
            problems.append(f"{made.name} is there twice; the one found later is left out")
            continue
        found[made.name] = made
        if without:
            dropped[without].append(made.name)
    for without, names in sorted(dropped.items()):
        problems.append(
            f"{len(names)} devices (the first is {min(names)}) are published without "
            f"{', '.join(without)}: a device has room for {ATTRIBUTE_LIMIT} attributes and capacities"
        )
    return Inventory({name: found[name] for name in sorted(found)}, tuple(problems), given_out)


def diff(old: Inventory, new: Inventory) -> InventoryDiff:
    """What changed from old to new."""
    before, after = old.by_name, new.by_name
    return InventoryDiff(
        added=tuple(device for name, device in after.items() if name not in before),
        removed=tuple(name for name in before if name not in after),
        changed=tuple(device for name, device in after.items() if name in before and before[name] != device),
    )


def name_of(identity: Identity) -> DeviceName:
    """The device's name in slices, a DNS label. ValueError where none can be made."""
    match identity:
        case PciIdentity():
            text = "pci-" + re.sub(r"[:.]", "-", identity.address)
            text += f"-p{identity.port}" if identity.port else ""
        case NetdevsimIdentity(vf_index=None):
            text = f"nsim-{identity.bus_id}-port-{identity.port}"
        case NetdevsimIdentity():
            pf = f"-pf-{identity.port}" if identity.port else ""
            text = f"nsim-{identity.bus_id}{pf}-vf-{identity.vf_index}"
        case SoftwareIdentity():
            text = f"{identity.kind.replace('_', '-')}-{identity.ifindex}"
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text):
        raise ValueError(f"{text!a} cannot be a device name")
    return DeviceName(text)


def _selected(device: HwDevice, policy: DevicePolicy) -> bool:
    """Shares in the host's namespace are parts of a device, whatever the policy selects."""
    return device.link is not None and not is_ours(device.link) and policy.selects(device.link)


def _device(
    device: HwDevice,
    policy: DevicePolicy,
    previous: Inventory | None,
    given_out: Mapping[PfAddress, GivenOut],
    outlet: Outlet | None,
) -> tuple[Device, tuple[str, ...]]:
    """The device, and the names of attributes that found no place."""
    name = name_of(device.identity)
    speed = device.speed_mbps or _last_speed(name, previous)
    sharable = outlet.sharable if outlet is not None else None
    shown = device if sharable is None else as_shared(device)
    portion, no_portion = _portion(device, given_out) if sharable is None else (None, "")
    sized = portion is not None and device.kind is DeviceKind.VF
    capacities = _capacities(shown, portion.size if portion is not None and sized else speed, sharable)
    extra = policy.attributes_for(shown, name)
    attributes, without = _attributes(shown, speed, extra, len(capacities), sharable)
    withheld = shown.withheld if outlet is None or sharable is not None else outlet.reason
    return Device(
        name=name,
        kind=shown.kind,
        identity=device.identity,
        ifindex=device.link.ifindex if device.link else None,
        settings=LinkSettings.of(device.link, kind=shown.kind) if device.link else None,
        attributes=attributes,
        capacities=capacities,
        withheld=withheld or _bad_name(device) or policy.withheld(shown, name) or no_portion,
        dies_with_netns=isinstance(device.identity, SoftwareIdentity),
        rdma=shown.rdma,
        min_mtu=device.link.min_mtu if device.link else None,
        max_mtu=device.link.max_mtu if device.link else None,
        driver=device.pci.driver if device.pci else None,
        taken=device.taken,
        pf_driver=device.pf_driver,
        vf_cannot=device.vf_cannot,
        physical_port=device.physical_port,
        has_netdev=device.has_netdev,
        portion=portion,
        instance=device.pci.instance if device.pci else None,
        sharable=sharable,
    ), without


# --- bandwidth that is given out ----------------------------------------------------------------------


def _given_out(
    devices: Iterable[HwDevice], policy: DevicePolicy, previous: Inventory | None
) -> Mapping[PfAddress, GivenOut]:
    """A PF that is in a pod has neither name nor speed here: what was given out of it then still is."""
    known = previous.given_out if previous is not None else {}
    found: dict[PfAddress, GivenOut] = {}
    for device in devices:
        identity, card = device.identity, card_of(device.identity)
        if card is None or isinstance(identity, SoftwareIdentity) or identity.vf_index is not None:
            continue
        if device.link is None and card in known:
            found[card] = known[card]
        elif (rule := policy.bandwidth_of(device)) is not None:
            speed = device.speed_mbps or _last_speed(name_of(identity), previous)
            found.setdefault(card, GivenOut(rule, rule.budget(speed)))
    return found


def _without_shares(
    given_out: Mapping[PfAddress, GivenOut], outlets: Mapping[Identity, Outlet]
) -> Mapping[PfAddress, GivenOut]:
    """What is given out in shares of a PF or its VFs is not given out a second time."""
    shared: defaultdict[PfAddress, int] = defaultdict(int)
    for identity, outlet in outlets.items():
        card = card_of(identity)
        if card is not None and outlet.sharable is not None:
            shared[card] += outlet.sharable.bandwidth
    return {card: replace(out, shared=shared[card]) for card, out in given_out.items()}


def _portion(device: HwDevice, given_out: Mapping[PfAddress, GivenOut]) -> tuple[Portion | None, str]:
    """What the device takes of its PF's bandwidth, and why it is not given away for want of that, or ""."""
    identity, card = device.identity, card_of(device.identity)
    out = given_out.get(card) if card is not None else None
    if out is None or isinstance(identity, SoftwareIdentity):
        return None, ""
    if identity.vf_index is None:
        return (Portion(size=out.budget, of=out.budget) if out.budget else None), ""
    size, by = out.rule.size_of(identity.vf_index), "(node policy, bandwidth)"
    if size is None:
        return None, f"no size is left for VF {identity.vf_index} of its PF {by}"
    if device.kind is DeviceKind.RDMA:
        return None, f"it has no netdev, and nobody could hold it to a size {by}"
    if out.whole and not out.budget:
        return None, "all that its PF gives out is given out in shares (node policy, shared)"
    if not out.budget:
        return None, f"the speed of its port is not known: set its PF up, or say the speed {by}"
    if size > out.budget:
        return None, f"its size is {quantity(size)} and its PF gives out {quantity(out.budget)} {by}"
    return Portion(size=size, of=out.budget), ""


# --- devices that are given out in shares -------------------------------------------------------------


def _outlets(
    devices: Iterable[HwDevice],
    policy: DevicePolicy,
    previous: Inventory | None,
    given_out: Mapping[PfAddress, GivenOut],
) -> Mapping[Identity, Outlet]:
    """Of the devices that the policy wants given out in shares. A VF that has a size shares that."""
    found: dict[Identity, Outlet] = {}
    on_top: defaultdict[IfIndex, set[str]] = defaultdict(set)
    for link in (device.link for device in devices):
        if link is not None and link.is_stacked and link.peer is not None and link.kind is not None:
            on_top[link.peer].add(link.kind)
    for device in devices:
        try:
            name = name_of(device.identity)
        except ValueError:
            continue  # left out, and told, with all other devices
        speed = _size(device.identity, given_out) or device.speed_mbps or _last_speed(name, previous)
        above = on_top[device.link.ifindex] if device.link is not None else ()
        outlet = outlet_of(device, name, speed, policy, above)
        if outlet is not None:
            found[device.identity] = outlet
    return found


def _size(identity: Identity, given_out: Mapping[PfAddress, GivenOut]) -> int | None:
    """Mb/s that a VF has of its PF; None where the policy gives it none."""
    card = card_of(identity)
    out = given_out.get(card) if card is not None else None
    if out is None or isinstance(identity, SoftwareIdentity) or identity.vf_index is None:
        return None
    return out.rule.size_of(identity.vf_index)


def capacity_requests(sharable: Sharable) -> Mapping[str, CapacityRequest]:
    """What one claim can ask for of each capacity of a device that is given out in shares."""
    amounts = sharable.amounts
    bandwidth = CapacityRequest(
        default=quantity(amounts.default),
        least=quantity(amounts.least),
        most=quantity(amounts.most),
        step=quantity(amounts.step) if amounts.step else None,
    )
    return {BANDWIDTH: bandwidth, SHARES: CapacityRequest(default="1", values=("1",))}


# --- attributes and capacities ------------------------------------------------------------------------


def _bad_name(device: HwDevice) -> str:
    """Its name is a default in pods and goes into status and metrics."""
    if device.link is None:
        return ""
    try:
        check_ifname(device.link.name)
    except ValueError as error:
        return f"{error}; give it another name"
    return ""


def _last_speed(name: DeviceName, previous: Inventory | None) -> int | None:
    known = previous.by_name.get(name) if previous is not None else None
    speed = known.attributes.get("linkSpeed") if known is not None else None
    return speed if isinstance(speed, int) else None


def _attributes(
    device: HwDevice,
    speed: int | None,
    extra: Mapping[str, AttributeValue],
    capacities: int,
    sharable: Sharable | None,
) -> tuple[Mapping[str, AttributeValue], tuple[str, ...]]:
    attributes: dict[str, AttributeValue] = {
        "kind": device.kind.value,
        "rdma": device.rdma_capable,
        "virtual": device.pci is None,
        "ebpf": device.link is not None or device.kind is not DeviceKind.RDMA,
        **_standard(device),
    }
    added = {key: value for key, value in extra.items() if key not in attributes and key not in OPTIONAL}
    kept = dict(list(added.items())[:POLICY_LIMIT])
    room = min(OPTIONAL_LIMIT, ATTRIBUTE_LIMIT - capacities - len(attributes) - len(kept))
    known = _optional(device, speed) | {"subinterface": sharable.kind.value if sharable else None}
    optional = {key: value for key, value in known.items() if value not in (None, "")}
    ordered = [key for key in OPTIONAL if key in optional]
    attributes.update({key: value for key in ordered[:room] if (value := optional[key]) is not None})
    attributes.update(kept)
    without = (*ordered[room:], *(key for key in extra if key not in kept))
    clamped = {key: _clamp(value) if isinstance(value, str) else value for key, value in attributes.items()}
    return clamped, without


def _standard(device: HwDevice) -> dict[str, AttributeValue]:
    pci = device.pci
    if pci is None:
        return {}
    values: dict[str, AttributeValue | None] = {
        "pciBusID": pci.address,
        "pcieRoot": pci.pcie_root,
        "numaNode": pci.numa_node,
    }
    return {f"{STANDARD_DOMAIN}/{key}": value for key, value in values.items() if value is not None}


def _optional(device: HwDevice, speed: int | None) -> dict[str, AttributeValue | None]:
    """By the names in OPTIONAL; None where not known."""
    link, pci, rdma, identity = device.link, device.pci, device.rdma, device.identity
    vf = identity if isinstance(identity, PciIdentity | NetdevsimIdentity) else None
    return {
        "ifName": link.name if link else None,
        "pfName": device.pf_name,
        "vfSettings": device.vf_can,
        "pfPciAddress": identity.pf if isinstance(identity, PciIdentity) else None,
        "vfIndex": vf.vf_index if vf else None,
        "rdmaDevice": rdma.name if rdma else None,
        "rdmaLinkLayer": rdma.link_layer if rdma else None,
        "linkType": _LINK_TYPES.get(link.link_type, "other") if link else None,
        "linkSpeed": speed,
        "pcieSwitch": pci.pcie_switch if pci else None,
        "kernelDriver": pci.driver if pci else None,
        "vendor": pci.vendor if pci else None,
        "product": pci.product if pci else None,
        "eswitchMode": device.pf_eswitch.value if device.pf_eswitch else None,
        "representor": device.representor,
        "mtu": link.mtu if link else None,
        "mac": LinkSettings.of(link, kind=device.kind).mac if link else None,
        "nodeGuid": rdma.node_guid if rdma else None,
        "firmware": rdma.firmware if rdma else None,
    }


def _capacities(device: HwDevice, bandwidth: int | None, sharable: Sharable | None) -> Mapping[str, str]:
    """bandwidth in Mb/s; vfs is how many a PF can have."""
    if sharable is not None:
        return {BANDWIDTH: quantity(sharable.bandwidth), SHARES: str(sharable.shares)}
    capacities: dict[str, str] = {}
    if bandwidth:
        capacities[BANDWIDTH] = quantity(bandwidth)
    if device.total_vfs:
        capacities["vfs"] = str(device.total_vfs)
    return capacities


def quantity(mbps: int) -> str:
    """Megabits per second as a Kubernetes quantity in its canonical form: `25G`, `2500M`, `0`."""
    if not mbps:
        return "0"
    for size, unit in _UNITS:
        if mbps % size == 0:
            return f"{mbps // size}{unit}"
    return f"{mbps}M"


def _clamp(value: str) -> str:
    """Cut to the API's limit; what is not printable ASCII is escaped, since others may have chosen it."""
    if value.isascii() and value.isprintable():
        return value[:STRING_LIMIT]
    plain = "".join(char if char.isascii() and char.isprintable() else ascii(char)[1:-1] for char in value)
    return plain[:STRING_LIMIT]
