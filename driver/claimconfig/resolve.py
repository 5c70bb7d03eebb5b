"""From the configs of a class and a claim to the one config of a device.

Invariant: default < DeviceClass < claim, field by field, later entries win within a source; lists are
replaced whole. A claim never changes what its DeviceClass lists under `fixed`, sets no field that the
node policy keeps from claims, and stays within the bounds of both. The API server's order of entries
is kept. Everything wrong with any entry is reported at once; nothing is silently left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar, cast

from driver.claimconfig.rdma import RdmaLimitsSection, RdmaSection
from driver.claimconfig.sections import (
    FIELD_PATH,
    FIELDS,
    GUARDED_FIELDS,
    HARMLESS,
    KERNEL_BOUNDS,
    MTU_FIELD,
    SECTIONS,
    Document,
    FieldPath,
    InterfaceSection,
    MtuBounds,
    SubinterfaceSection,
    VfSection,
    decode,
)
from driver.claimconfig.traffic import EgressSection, IngressSection, QosSection
from driver.claimconfig.values import RESERVED_NAMES
from driver.errors import ConfigError, FieldProblem
from driver.model import (
    AllocatedDevice,
    ConfigSource,
    InterfaceConfig,
    NicConfig,
    OpaqueConfig,
    SubinterfaceConfig,
    VfConfig,
    VfDriver,
)
from driver.rdma import RdmaConfig, RdmaLimits
from driver.strict import Key, listing, record
from driver.traffic import Enforcement, QosConfig
from hw.model import IfName

S = TypeVar("S")

LOWERED: Mapping[FieldPath, str] = {
    FieldPath("qos.egress.rate"): "M",
    FieldPath("qos.ingress.rate"): "M",
    FieldPath("rdma.limits.handles"): "",
    FieldPath("rdma.limits.objects"): "",
}
"""Limits that a claim can lower where its class has them, with their unit in messages."""
_WHO = {ConfigSource.CLASS: "the DeviceClass", ConfigSource.CLAIM: "the claim"}


_PATHS = listing(FIELD_PATH, maximum=len(FIELDS))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimLimits:
    """What users' claims may set on this node: section `claims` of the node policy.

    DeviceClasses are written by admins and are bound by the kernel's limits alone.
    """

    allow: Annotated[
        tuple[FieldPath, ...],
        Key("allow", _PATHS, "Fields kept from claims by default that they may set here."),
    ] = ()
    deny: Annotated[tuple[FieldPath, ...], Key("deny", _PATHS, "Fields that claims may not set here.")] = ()
    mtu: Annotated[MtuBounds, Key("mtu", record(MtuBounds), "Bounds of interface.mtu in claims.")] = (
        KERNEL_BOUNDS
    )

    def __post_init__(self) -> None:
        both = sorted(set(self.allow) & set(self.deny))
        if both:
            raise ValueError(f"{', '.join(both)} is both allowed and denied")

    def settable(self, field: FieldPath, value: object) -> bool:
        if field in self.deny:
            return False
        harmless = field not in GUARDED_FIELDS or value in HARMLESS.get(field, ())
        return harmless or field in self.allow


DEFAULT_LIMITS = ClaimLimits()
"""What claims may set where no node policy says otherwise: what cannot hurt others."""


def resolve(device: AllocatedDevice, configs: Sequence[OpaqueConfig], limits: ClaimLimits) -> NicConfig:
    """The config of one allocated device.

    configs: this driver's entries, in the scheduler's order; those that do not apply to the device are
    not looked at. Raises ConfigError with every problem; each says whether the class or the claim has
    it.
    """
    problems: list[FieldProblem] = []
    mine = [entry for entry in configs if entry.applies_to(device)]
    from_class = [entry.parameters for entry in mine if entry.source is ConfigSource.CLASS]
    from_claim = [entry.parameters for entry in mine if entry.source is ConfigSource.CLAIM]

    values: dict[FieldPath, object] = {}
    fixed: set[FieldPath] = set()
    bounds = [(limits.mtu, "on this node (node policy, claims.mtu)")]
    for document in _documents(from_class, ConfigSource.CLASS, problems):
        values |= document.given()
        fixed.update(document.fixed)
        if document.bounds is not None:
            bounds.append((document.bounds.mtu, "(in the DeviceClass, bounds.mtu)"))
    by_class = dict(values)
    for document in _documents(from_claim, ConfigSource.CLAIM, problems):
        problems.extend(_presumption(document))
        given = document.given()
        problems.extend(_overreach(given, by_class, fixed, limits))
        if (mtu := given.get(MTU_FIELD)) is not None and mtu != by_class.get(MTU_FIELD):
            problems.extend(_out_of_bounds(cast(int, mtu), bounds))
        problems.extend(_raised(given, by_class))
        values |= given
    problems.extend(_rates_at_odds(values))
    problems.extend(_ipoib_without_partition(values))
    if problems:
        # An entry that names several requests may come once per request.
        raise ConfigError(tuple(dict.fromkeys(problems)))
    return build(values)


def _documents(
    parameters: Sequence[str], source: ConfigSource, problems: list[FieldProblem]
) -> Iterator[Document]:
    for text in parameters:
        document, found = decode(text)
        for problem in found:
            subject = "" if problem.path else "the config "
            problems.append(FieldProblem(problem.path, f"{subject}{problem.message} (in {_WHO[source]})"))
        if document is not None:
            yield document


def _presumption(document: Document) -> Iterator[FieldProblem]:
    """What only a DeviceClass may say, said by a claim."""
    if document.fixed:
        yield FieldProblem("fixed", "only a DeviceClass can fix fields (in the claim)")
    if document.bounds is not None:
        yield FieldProblem("bounds", "only a DeviceClass can bound fields (in the claim)")


def _out_of_bounds(mtu: int, bounds: Sequence[tuple[MtuBounds, str]]) -> Iterator[FieldProblem]:
    for allowed, whose in bounds:
        if not allowed.minimum <= mtu <= allowed.maximum:
            yield FieldProblem(
                MTU_FIELD, f"must be {allowed.minimum} to {allowed.maximum}, not {mtu} {whose}"
            )


def _overreach(
    given: Mapping[FieldPath, object],
    by_class: Mapping[FieldPath, object],
    fixed: set[FieldPath],
    limits: ClaimLimits,
) -> Iterator[FieldProblem]:
    """What a claim sets that it may not set."""
    for field, value in given.items():
        if field in by_class and by_class[field] == value:
            continue
        if field in fixed:
            yield FieldProblem(field, "is fixed by the DeviceClass and cannot be set by a claim")
        elif not limits.settable(field, value):
            yield FieldProblem(field, "cannot be set by a claim on this node (node policy, claims)")


def _raised(
    given: Mapping[FieldPath, object], by_class: Mapping[FieldPath, object]
) -> Iterator[FieldProblem]:
    """A limit that a DeviceClass sets can be lowered by a claim."""
    for field, unit in LOWERED.items():
        most, asked = cast(int, by_class.get(field) or 0), cast("int | None", given.get(field))
        if most and asked is not None and not 0 < asked <= most:
            yield FieldProblem(field, f"can be lowered by a claim, and is {most}{unit} in the DeviceClass")


def _rates_at_odds(values: Mapping[FieldPath, object]) -> Iterator[FieldProblem]:
    """Class and claim may each be right and not fit together."""
    for section, most_name in (("vf", "maxRate"), ("qos.egress", "rate")):
        least, most = (
            cast(int, values.get(FieldPath(f"{section}.{name}")) or 0) for name in ("minRate", most_name)
        )
        if most and least > most:
            yield FieldProblem(
                f"{section}.minRate", f"is {least}M, above {section}.{most_name}, which is {most}M"
            )
    for vf, qos in (("vf.maxRate", "qos.egress.rate"), ("vf.minRate", "qos.egress.minRate")):
        if values.get(FieldPath(vf)) and values.get(FieldPath(qos)):
            yield FieldProblem(qos, f"says the same as {vf}, which is there too; leave one out")


def _ipoib_without_partition(values: Mapping[FieldPath, object]) -> Iterator[FieldProblem]:
    """Who may choose a partition is said of that field alone."""
    partition, ipoib = (values.get(FieldPath(f"rdma.{name}")) for name in ("partition", "ipoib"))
    if ipoib is not None and partition is None:
        yield FieldProblem("rdma.ipoib", "needs rdma.partition, which says of which partition it is to be")


def build(values: Mapping[FieldPath, object]) -> NicConfig:
    """Merged fields as the driver's own types."""
    interface = _section(InterfaceSection, "interface", values)
    vf = _section(VfSection, "vf", values)
    rdma = _section(RdmaSection, "rdma", values)
    rdma_limits = _section(RdmaLimitsSection, "rdma.limits", values)
    qos = _section(QosSection, "qos", values)
    egress = _section(EgressSection, "qos.egress", values)
    ingress = _section(IngressSection, "qos.ingress", values)
    subinterface = _section(SubinterfaceSection, "subinterface", values)
    return NicConfig(
        interface=InterfaceConfig(
            name=interface.name,
            mtu=interface.mtu,
            hardware_address=interface.hardware_address,
            addresses=interface.addresses or (),
        ),
        vf=VfConfig(
            driver=vf.driver or VfDriver.KERNEL,
            vlan=vf.vlan,
            spoof_check=vf.spoof_check,
            trust=vf.trust,
            link_state=vf.link_state,
            min_rate=vf.min_rate,
            max_rate=vf.max_rate,
        ),
        rdma=RdmaConfig(
            mode=rdma.mode,
            files=rdma.files or (),
            nccl=bool(rdma.nccl),
            ucx=bool(rdma.ucx),
            partition=rdma.partition,
            ipoib=rdma.ipoib,
            limits=RdmaLimits(handles=rdma_limits.handles, objects=rdma_limits.objects),
        ),
        qos=QosConfig(
            traffic_class=qos.traffic_class,
            enforcement=qos.enforcement or Enforcement.AUTO,
            egress_rate=egress.rate or 0,
            egress_burst=egress.burst,
            egress_min_rate=egress.min_rate or 0,
            ingress_rate=ingress.rate or 0,
        ),
        subinterface=SubinterfaceConfig(vlan=subinterface.vlan),
    )


def _section(cls: Callable[..., S], name: str, values: Mapping[FieldPath, object]) -> S:
    keys = SECTIONS[name].items()
    return cls(**{attribute: values.get(FieldPath(f"{name}.{key.name}")) for attribute, key in keys})


# --- devices side by side in one pod ----------------------------------------------------------------


def check_together(configs: Sequence[tuple[str, NicConfig, IfName]]) -> None:
    """Check what no device's config shows alone. Raises ConfigError with every problem.

    configs: for each device of one pod, what to call it in a message, its config, and the name it will
    have in the pod.
    """
    problems: list[FieldProblem] = []
    names = _Claimed("interface.name", "be named")
    macs = _Claimed("interface.hardwareAddress", "have the MAC address")
    addresses = _Claimed("interface.addresses", "have the address")
    for position, (label, config, ifname) in enumerate(configs):
        if ifname in RESERVED_NAMES:
            problems.append(
                FieldProblem(
                    names.path,
                    f"{label} would be named {ifname!r}, which {RESERVED_NAMES[ifname]}; "
                    "set interface.name to another",
                )
            )
        problems.extend(names.clash(ifname, position, label))
        if config.interface.hardware_address is not None:
            problems.extend(macs.clash(config.interface.hardware_address, position, label))
        for address in config.interface.addresses:
            problems.extend(addresses.clash(str(address.ip), position, label))
        ipoib = config.rdma.ipoib
        if ipoib is not None:
            # An interface beside the device's own, so that the two can be at odds as well.
            problems.extend(names.clash(ipoib.name, ~position, f"the IPoIB interface of {label}"))
            for address in ipoib.addresses:
                problems.extend(
                    addresses.clash(str(address.ip), ~position, f"the IPoIB interface of {label}")
                )
    if problems:
        raise ConfigError(problems)


class _Claimed:
    """Values of one field that only one device of a pod can have, and which has them."""

    def __init__(self, path: str, what: str) -> None:
        self.path = path
        self._what = what
        self._owners: dict[str, tuple[int, str]] = {}

    def clash(self, value: str, position: int, label: str) -> Iterator[FieldProblem]:
        first, first_label = self._owners.setdefault(value, (position, label))
        if first != position:
            yield FieldProblem(
                self.path, f"{first_label} and {label} would both {self._what} {value} in one pod"
            )
