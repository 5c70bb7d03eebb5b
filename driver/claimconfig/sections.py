"""What a NetworkDeviceConfig may say, declared once: the decoder and the JSON Schema follow from it.

Invariant: a section is a frozen dataclass whose fields are all None until given, so that "not said"
and "said" stay apart until class and claim are merged. A new section is a dataclass here, a field of
Document, and a line in resolve.build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NewType

from driver.claimconfig.rdma import RdmaLimitsSection, RdmaSection
from driver.claimconfig.traffic import RATE, EgressSection, IngressSection, QosSection
from driver.claimconfig.values import ADDRESS, IFNAME, MAC, MAX_ADDRESSES, MTU, MTU_MAX, MTU_MIN
from driver.model import VfDriver
from driver.strict import (
    Key,
    Kind,
    Node,
    Problem,
    Problems,
    boolean,
    choice,
    converted,
    integer,
    keys_of,
    listing,
    parse_json,
    record,
    shown,
    text,
)
from hw.model import (
    IfName,
    InterfaceAddress,
    MacAddress,
    VfLinkState,
    VfVlan,
    VlanProtocol,
)

API_VERSION = "knd.internal/v1alpha1"
KIND = "NetworkDeviceConfig"

FieldPath = NewType("FieldPath", str)
"""`section.field`, as users write it: `interface.hardwareAddress`, `qos.egress.rate`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceSection:
    name: Annotated[
        IfName | None, Key("name", IFNAME, "Its name in the pod; absent: its name on the host.")
    ] = None
    mtu: Annotated[int | None, Key("mtu", MTU, "In bytes; absent: what the device has.")] = None
    hardware_address: Annotated[
        MacAddress | None,
        Key(
            "hardwareAddress",
            MAC,
            "Its MAC address in the pod. From a claim only where the node policy allows it.",
            guarded=True,
        ),
    ] = None
    addresses: Annotated[
        tuple[InterfaceAddress, ...] | None,
        Key(
            "addresses",
            listing(ADDRESS, maximum=MAX_ADDRESSES),
            "Addresses with prefix length. A list given later replaces the earlier one whole.",
        ),
    ] = None


VF_DRIVER: Kind[VfDriver] = text(VfDriver, {"enum": [each.value for each in VfDriver]})
MAX_VLAN = 4094


@dataclass(frozen=True, slots=True, kw_only=True)
class VlanSection:
    """Taken whole: an id with another document's priority would be nobody's wish."""

    id: Annotated[int, Key("id", integer(0, MAX_VLAN), "1 to 4094; 0: none.")]
    qos: Annotated[int, Key("qos", integer(0, 7), "Priority in the tag.")] = 0
    protocol: Annotated[
        VlanProtocol, Key("protocol", choice(VlanProtocol), "The tag; 802.1ad is what providers use.")
    ] = VlanProtocol.CUSTOMER

    def __post_init__(self) -> None:
        if not self.id and (self.qos or self.protocol is not VlanProtocol.CUSTOMER):
            raise ValueError("has a qos or protocol, and id 0 means no VLAN at all")

    def value(self) -> VfVlan:
        return VfVlan(id=self.id, qos=self.qos, protocol=self.protocol)


VLAN: Kind[VfVlan] = converted(record(VlanSection), VlanSection.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class VfSection:
    driver: Annotated[
        VfDriver | None,
        Key(
            "driver",
            VF_DRIVER,
            "kernel: the pod gets a network interface. vfio-pci: it gets device files and drives the VF "
            "itself, as virtual machines and DPDK do. From a claim only where the node policy allows it.",
            guarded=True,
        ),
    ] = None
    vlan: Annotated[
        VfVlan | None,
        Key(
            "vlan",
            VLAN,
            "The VLAN that the PF puts all of its traffic into; the pod sees no tag. From a claim only where "
            "the node policy allows it: whoever chooses a VLAN chooses whom to reach.",
            guarded=True,
        ),
    ] = None
    spoof_check: Annotated[
        bool | None,
        Key(
            "spoofCheck",
            boolean(),
            "Frames with another sender's address than the VF's own are dropped. false from a claim only "
            "where the node policy allows it.",
            guarded=True,
            harmless=(True,),
        ),
    ] = None
    trust: Annotated[
        bool | None,
        Key(
            "trust",
            boolean(),
            "The VF may change its address and see others' traffic. true from a claim only where the node "
            "policy allows it.",
            guarded=True,
            harmless=(False,),
        ),
    ] = None
    link_state: Annotated[
        VfLinkState | None,
        Key(
            "linkState",
            choice(VfLinkState),
            "auto: its carrier is the port's. enable, disable: it always has one, never has one.",
        ),
    ] = None
    min_rate: Annotated[
        int | None,
        Key(
            "minRate",
            RATE,
            "Bits per second that it can always send, like 2G; 0: none. From a claim only where the node "
            "policy allows it: it is taken from the other VFs.",
            guarded=True,
            harmless=(0,),
        ),
    ] = None
    max_rate: Annotated[
        int | None, Key("maxRate", RATE, "Bits per second that it can send at most, like 500M; 0: no limit.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubinterfaceSection:
    vlan: Annotated[
        int | None,
        Key(
            "vlan",
            integer(1, MAX_VLAN),
            "Of a device that is given out by VLAN: one of those that the node policy names for it.",
        ),
    ] = None


_INTERFACE_LATER = frozenset(
    {
        "dhcp",
        "gsoMaxSize",
        "groMaxSize",
        "gsoIPv4MaxSize",
        "groIPv4MaxSize",
        "arpIgnore",
        "arpAnnounce",
        "forwarding",
        "vrf",
        "disableEbpfPrograms",
    }
)
_SECTIONS_LATER = frozenset({"routes", "rules", "neighbors", "ethtool"})

SECTIONS: Mapping[str, Mapping[str, Key[Any]]] = {
    "interface": keys_of(InterfaceSection),
    "vf": keys_of(VfSection),
    "rdma": {name: key for name, key in keys_of(RdmaSection).items() if name != "limits"},
    "rdma.limits": keys_of(RdmaLimitsSection),
    "subinterface": keys_of(SubinterfaceSection),
    "qos": {name: key for name, key in keys_of(QosSection).items() if name not in ("egress", "ingress")},
    "qos.egress": keys_of(EgressSection),
    "qos.ingress": keys_of(IngressSection),
}
"""Section to attribute to key. A section within another is merged field by field as well."""


def _declared(guarded_only: bool) -> frozenset[FieldPath]:
    return frozenset(
        FieldPath(f"{section}.{key.name}")
        for section, keys in SECTIONS.items()
        for key in keys.values()
        if key.guarded or not guarded_only
    )


FIELDS = _declared(guarded_only=False)
"""Every field a config can set."""
GUARDED_FIELDS = _declared(guarded_only=True)
"""Fields that could hurt others: taken from claims only where the node policy allows it."""
HARMLESS: Mapping[FieldPath, tuple[object, ...]] = {
    FieldPath(f"{section}.{key.name}"): key.harmless
    for section, keys in SECTIONS.items()
    for key in keys.values()
    if key.harmless
}
"""Values of guarded fields that any claim may ask for."""

MTU_FIELD = FieldPath("interface.mtu")


def _field_path(value: str) -> FieldPath:
    if value not in FIELDS:
        raise ValueError(f"{shown(value)} is not a field; the fields are {', '.join(sorted(FIELDS))}")
    return FieldPath(value)


FIELD_PATH: Kind[FieldPath] = text(_field_path, {"enum": sorted(FIELDS)})


@dataclass(frozen=True, slots=True, kw_only=True)
class MtuBounds:
    minimum: Annotated[int, Key("minimum", MTU, "Least MTU of a claim.")] = MTU_MIN
    maximum: Annotated[int, Key("maximum", MTU, "Greatest MTU of a claim.")] = MTU_MAX

    def __post_init__(self) -> None:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")


KERNEL_BOUNDS = MtuBounds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Between what the claims of a DeviceClass may choose. The class's own values are not bound."""

    mtu: Annotated[MtuBounds, Key("mtu", record(MtuBounds), "Bounds of interface.mtu in claims.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One NetworkDeviceConfig as written, before merging."""

    fixed: Annotated[
        tuple[FieldPath, ...],
        Key(
            "fixed",
            listing(FIELD_PATH, maximum=len(FIELDS)),
            "In a DeviceClass: fields that claims cannot change, whether the class sets them or not.",
        ),
    ] = ()
    bounds: Annotated[
        Bounds | None,
        Key("bounds", record(Bounds), "In a DeviceClass: what claims must stay within."),
    ] = None
    interface: Annotated[
        InterfaceSection | None,
        Key(
            "interface",
            record(InterfaceSection, later=_INTERFACE_LATER),
            "The network interface in the pod.",
        ),
    ] = None
    vf: Annotated[
        VfSection | None,
        Key("vf", record(VfSection), "The virtual function as such."),
    ] = None
    rdma: Annotated[
        RdmaSection | None,
        Key("rdma", record(RdmaSection), "The RDMA device that goes with the interface, or is all there is."),
    ] = None
    qos: Annotated[
        QosSection | None,
        Key("qos", record(QosSection), "How much traffic it may have, and of which class."),
    ] = None

    subinterface: Annotated[
        SubinterfaceSection | None,
        Key(
            "subinterface",
            record(SubinterfaceSection),
            "The interface that is made for the claim, of a device that is given out in parts.",
        ),
    ] = None

    def given(self) -> Mapping[FieldPath, object]:
        """The fields this document sets."""
        found: dict[FieldPath, object] = {}
        for section, keys in SECTIONS.items():
            values: object = self
            for part in section.split("."):
                values = getattr(values, part, None)
            if values is None:
                continue
            for attribute, key in keys.items():
                value = getattr(values, attribute)
                if value is not None:
                    found[FieldPath(f"{section}.{key.name}")] = value
        return found


_DOCUMENT: Kind[Document] = record(
    Document, header={"apiVersion": API_VERSION, "kind": KIND}, later=_SECTIONS_LATER
)


def decode(parameters: str) -> tuple[Document | None, tuple[Problem, ...]]:
    """The document, or None and everything that is wrong with it."""
    problems = Problems()
    node = parse_json(parameters, problems)
    document = decode_tree(node, problems) if node is not None else None
    found = tuple(problems)
    return (None if found else document), found


def decode_tree(node: Node, problems: Problems) -> Document | None:
    """As decode, of a document that is part of another. What is wrong with it is added to problems."""
    return _DOCUMENT.decode(node, problems)


def json_schema() -> dict[str, object]:
    """JSON Schema (draft 2020-12) of a NetworkDeviceConfig."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": KIND,
        "description": "How a network device given to a pod by a ResourceClaim is set up.",
        **_DOCUMENT.schema,
    }
