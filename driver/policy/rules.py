"""The node policy as types: what this node offers, and what users may do with it.

Invariant: a NodePolicy is whole and checked; its defaults are what a node does without a policy:
physical devices are offered, software interfaces are not, claims may set what harms nobody.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from driver.claimconfig import DEFAULT_LIMITS, RATE, ClaimLimits
from driver.model import AttributeValue
from driver.policy.bandwidth import BANDWIDTH_RULES, BandwidthRule, rule_for
from driver.policy.health import DEFAULT_HEALTH, HealthPolicy
from driver.policy.rdma import DEFAULT_RDMA, RdmaRules
from driver.policy.selectors import DeviceSelector, NetdevSelector
from driver.policy.shared import SHARED_RULES, SharedRule, sharing_rule
from driver.policy.sriov import PF_RULES, PfRule
from driver.policy.usage import DEFAULT_USAGE, UsagePolicy
from driver.qos import DEFAULT_CLASSES, EgressShaper, PodLimits, PodMarks, QosClass, QosPolicy
from driver.strict import Key, Kind, Node, Problems, boolean, choice, converted, listing, record, shown
from driver.traffic import Sharable
from hw.model import HwDevice, LinkInfo

POLICY_ATTRIBUTES = 6
"""Places the API's limit of 32 leaves for attributes from the policy."""
_LOOPBACK = 772
_MAX_ENTRIES = 64

OWN_ATTRIBUTES = frozenset(
    {
        "ebpf",
        "eswitchMode",
        "firmware",
        "ifName",
        "kernelDriver",
        "kind",
        "linkSpeed",
        "linkType",
        "mac",
        "mtu",
        "nodeGuid",
        "pcieSwitch",
        "pfName",
        "pfPciAddress",
        "product",
        "productName",
        "rdma",
        "rdmaDevice",
        "rdmaLinkLayer",
        "representor",
        "subinterface",
        "vendor",
        "vendorName",
        "vfIndex",
        "vfSettings",
        "virtual",
    }
)
"""Read from the hardware; a policy cannot say otherwise. `rail` is not among them: only policy knows."""


class HookPreference(enum.StrEnum):
    """Where the accounting programs are to sit: auto takes tcx where the kernel has it."""

    AUTO = "auto"
    TCX = "tcx"
    CLSACT = "clsact"


class ForeignChoice(enum.StrEnum):
    """What is done with programs that others (a CNI's agent, monitoring) have on a device that a pod gets."""

    KEEP = "keep"
    REPORT = "report"
    DETACH = "detach"


class ResetPolicy(enum.StrEnum):
    """What is done to a VF between tenants, beyond restoring its settings."""

    REPROBE = "reprobe"
    """Unbind and bind its driver, which resets the function."""
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class VfioPolicy:
    """How VFs are given to pods that drive them themselves."""

    no_iommu: Annotated[
        bool,
        Key(
            "noIommu",
            boolean(),
            "true: also where no IOMMU holds them back, so that their pods can read and write all memory.",
        ),
    ] = False


# --- rules ------------------------------------------------------------------------------------------


def _attribute_name(value: str) -> str:
    domain, slash, name = value.rpartition("/")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,31}", name):
        raise ValueError("is not an attribute name: a letter or '_', then up to 31 letters, digits and '_'")
    if not slash:
        if name in OWN_ATTRIBUTES:
            raise ValueError("is read from the hardware and cannot be set by policy")
        return value
    label = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
    if len(domain) > 63 or not re.fullmatch(rf"{label}(\.{label})*", domain):
        raise ValueError(f"{shown(domain)} is not a domain name of at most 63 characters")
    if re.search(r"(^|\.)(kubernetes\.io|k8s\.io)$", domain):
        raise ValueError("belongs to Kubernetes and cannot be set by policy")
    return value


def _attribute_value(node: Node, problems: Problems) -> AttributeValue | None:
    match node.value:
        case bool():
            return node.value
        case int() if -(2**63) <= node.value < 2**63:
            return node.value
        case str() if len(node.value.encode(errors="surrogatepass")) <= 64:
            return node.value
    problems.add(
        node, f"must be true, false, a 64-bit integer or a string of at most 64 bytes, not {node.describe()}"
    )
    return None


@dataclass(frozen=True, slots=True)
class Attributes:
    """Attributes a rule adds, as sorted pairs: a mapping would not be hashable."""

    pairs: tuple[tuple[str, AttributeValue], ...] = ()


def _attributes(node: Node, problems: Problems) -> Attributes | None:
    if not isinstance(node.value, Mapping):
        problems.add(node, f"must be an object, not {node.describe()}")
        return None
    before = len(problems)
    pairs: list[tuple[str, AttributeValue]] = []
    for name, child in node.value.items():
        try:
            _attribute_name(name)
        except ValueError as error:
            problems.add(child, str(error))
        value = _attribute_value(child, problems)
        if value is not None:
            pairs.append((name, value))
    return None if len(problems) > before else Attributes(tuple(sorted(pairs)))


_ATTRIBUTES = Kind(
    _attributes,
    {"type": "object", "additionalProperties": {"type": ["boolean", "integer", "string"], "maxLength": 64}},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRule:
    """What the policy says of some devices. Rules are read in order; later ones win."""

    match: Annotated[
        DeviceSelector | None,
        Key("match", record(DeviceSelector), "Which devices; absent: every one."),
    ] = None
    offer: Annotated[bool | None, Key("offer", boolean(), "false: withheld from the cluster.")] = None
    attributes: Annotated[Attributes, Key("attributes", _ATTRIBUTES, "Extra attributes.")] = Attributes()

    def __post_init__(self) -> None:
        if self.offer is None and not self.attributes.pairs:
            raise ValueError("says nothing: needs offer or attributes")

    def applies_to(self, device: HwDevice, name: str) -> bool:
        return self.match is None or self.match.selects(device, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodLimitRules:
    """Kept by the node's kernel, beside what claims ask for: the lower of the two counts."""

    egress: Annotated[int, Key("egress", RATE, "Bits per second that a pod's interface sends at most.")] = 0
    ingress: Annotated[int, Key("ingress", RATE, "Bits per second that it is sent at most.")] = 0

    def value(self) -> PodLimits:
        return PodLimits(egress=self.egress, ingress=self.ingress)


_NO_LIMITS = PodLimits()
_POD_LIMITS = converted(record(PodLimitRules), PodLimitRules.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePolicy:
    """All of it. Satisfies what inventory asks of a policy."""

    netdevs: Annotated[
        tuple[NetdevSelector, ...],
        Key(
            "netdevs",
            listing(record(NetdevSelector), maximum=_MAX_ENTRIES),
            "Software interfaces to offer; without an entry none is.",
        ),
    ] = ()
    devices: Annotated[
        tuple[DeviceRule, ...],
        Key("devices", listing(record(DeviceRule), maximum=_MAX_ENTRIES), "Rules about devices, in order."),
    ] = ()
    sriov: Annotated[
        tuple[PfRule, ...],
        Key("sriov", PF_RULES, "How many VFs a PF is to have, and which; the first match wins."),
    ] = ()
    port_bandwidth: Annotated[
        tuple[BandwidthRule, ...],
        Key(
            "bandwidth", BANDWIDTH_RULES, "What PFs give out, and how much each VF has; the first match wins."
        ),
    ] = ()
    shared: Annotated[
        tuple[SharedRule, ...],
        Key("shared", SHARED_RULES, "Uplinks that many pods have a share of; the first match wins."),
    ] = ()
    claim_limits: Annotated[
        ClaimLimits, Key("claims", record(ClaimLimits), "What users' claims may set.")
    ] = DEFAULT_LIMITS
    classes: Annotated[
        tuple[QosClass, ...],
        Key("qosClasses", listing(record(QosClass), minimum=1, maximum=8), "Replaces the built-in ones."),
    ] = DEFAULT_CLASSES
    health: Annotated[
        HealthPolicy, Key("health", record(HealthPolicy), "What a device's trouble means, and when.")
    ] = DEFAULT_HEALTH
    pod_marks: Annotated[
        PodMarks,
        Key(
            "podMarks",
            choice(PodMarks),
            "trust: a packet's DSCP or VLAN priority says its class. clear: its claim does, or it is in 0.",
        ),
    ] = PodMarks.TRUST
    pod_limits: Annotated[
        PodLimits, Key("podLimits", _POD_LIMITS, "What each pod's interface has at most; changes at once.")
    ] = _NO_LIMITS
    shaper: Annotated[
        EgressShaper,
        Key(
            "shaper",
            choice(EgressShaper),
            "htb: limits of what pods send are queued by class. fq: by times of departure, with "
            "congestion told early, where the kernel has it. Of interfaces that have no limit yet.",
        ),
    ] = EgressShaper.HTB
    hook: Annotated[HookPreference, Key("hook", choice(HookPreference), "Where counting sits.")] = (
        HookPreference.AUTO
    )
    usage: Annotated[UsagePolicy, Key("usage", record(UsagePolicy), "What the usage ledger keeps.")] = (
        DEFAULT_USAGE
    )
    vfio: Annotated[VfioPolicy, Key("vfio", record(VfioPolicy), "VFs that pods drive themselves.")] = (
        VfioPolicy()
    )
    reset: Annotated[ResetPolicy, Key("reset", choice(ResetPolicy), "VFs between tenants.")] = (
        ResetPolicy.REPROBE
    )
    foreign_programs: Annotated[
        ForeignChoice,
        Key(
            "foreignPrograms",
            choice(ForeignChoice),
            "BPF programs of others on a device: keep: they go into the pod with it. report: they do, and an "
            "event says so. detach: they are off until it is home, and a claim is refused whose device could "
            "not have them back.",
        ),
    ] = ForeignChoice.REPORT
    rdma: Annotated[RdmaRules, Key("rdma", record(RdmaRules), "RDMA on this node.")] = DEFAULT_RDMA

    def __post_init__(self) -> None:
        names = {name for rule in self.devices for name, _ in rule.attributes.pairs}
        if len(names) > POLICY_ATTRIBUTES:
            raise ValueError(
                f"devices: the rules name {len(names)} different attributes ({', '.join(sorted(names))}) "
                f"and {POLICY_ATTRIBUTES} are possible"
            )

    @property
    def qos(self) -> QosPolicy:
        return QosPolicy(
            classes=self.classes, marks=self.pod_marks, limits=self.pod_limits, shaper=self.shaper
        )

    def selects(self, link: LinkInfo) -> bool:
        """Whether an interface that is not hardware is to be offered, in shares or whole. Loopback never
        is."""
        return link.link_type != _LOOPBACK and (
            any(selector.selects(link) for selector in self.netdevs)
            or any(rule.match.selects_software(link) for rule in self.shared)
        )

    def attributes_for(self, device: HwDevice, name: str) -> Mapping[str, AttributeValue]:
        """Extra attributes of a device; name is its name in slices. At most 6."""
        found: dict[str, AttributeValue] = {}
        for rule in self._rules(device, name):
            found.update(rule.attributes.pairs)
        return found

    def withheld(self, device: HwDevice, name: str) -> str:
        """Why the policy keeps a device from the cluster, a sentence; "" where it does not."""
        offers = [rule.offer for rule in self._rules(device, name) if rule.offer is not None]
        if offers and not offers[-1]:
            return "the node policy withholds it (devices, offer: false)"
        there = device.rdma
        if there is not None and there.software and self.rdma.software.kind is not None:
            # Nobody's to take away but theirs who made it, and prepare would refuse each claim for it.
            return (
                f"the software RDMA device {there.name!a} is on it already, in the way of the one that pods "
                f"are to get (node policy, rdma.software: {self.rdma.software}): rdma link delete it"
            )
        return ""

    def bandwidth_of(self, pf: HwDevice) -> BandwidthRule | None:
        """What is given out of a PF; None: nothing is said of it, and its VFs are bound by nobody."""
        return rule_for(pf, self.port_bandwidth)

    def sharable(self, device: HwDevice, name: str, speed: int | None) -> Sharable | None:
        """How a device is given out in shares. speed: of its port in Mb/s, where that is known. None: nothing
        is said of it, or it cannot be, and unsharable() says why."""
        rule = sharing_rule(device, name, self.shared)
        return rule.sharable(speed) if rule is not None else None

    def unsharable(self, device: HwDevice, name: str, speed: int | None) -> str:
        """Why a device of which the policy says so cannot be given out in shares, a sentence; or ""."""
        rule = sharing_rule(device, name, self.shared)
        return rule.unsharable(speed) if rule is not None else ""

    def _rules(self, device: HwDevice, name: str) -> Iterator[DeviceRule]:
        return (rule for rule in self.devices if rule.applies_to(device, name))
