"""What is to be done about the VFs of each PF.

Invariant: pure. A PF is changed only if a rule of the policy says so, nobody uses what would go, and what is
there was made by this driver in this boot; everything else is a sentence. The PFs of one bond change together
or not at all.
"""

from __future__ import annotations

import enum
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from driver.inventory import name_of
from driver.model import BootId, DeviceName
from driver.policy.sriov import LinkType, PfRule
from driver.provision.records import Making
from hw.model import EswitchMode, IfIndex, PciIdentity, PfAddress, bus_of, parse_pci_address
from hw.ports import SriovPort

_LINK_TYPES = {1: LinkType.ETHERNET, 32: LinkType.INFINIBAND}


class Verdict(enum.StrEnum):
    NONE = "none"
    """No rule is about it."""
    FINE = "fine"
    MAKE = "make"
    """VFs are to be made, through none where there are some."""
    REMOVE = "remove"
    """This driver's VFs are to go, and the PF is to be as it was before."""
    REFUSED = "refused"


class Maker(enum.StrEnum):
    NOBODY = "nobody"
    KND = "knd"
    OTHERS = "others"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortPlan:
    """why is a sentence: what stands against it, or what there is to know."""

    port: SriovPort
    rule: PfRule | None
    making: Making | None
    maker: Maker
    verdict: Verdict
    why: str = ""
    unfinished: bool = False
    """Its VFs are ours and not as they should be, or not yet: none of them may be given away."""

    @property
    def changes(self) -> bool:
        return self.verdict in (Verdict.MAKE, Verdict.REMOVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known beside the ports themselves. held: devices that are not to be touched, with why."""

    makings: Mapping[PfAddress, Making]
    boot_id: BootId
    held: Mapping[DeviceName, str]


def plan(ports: Iterable[SriovPort], rules: Iterable[PfRule], known: Known) -> Mapping[PfAddress, PortPlan]:
    ordered = tuple(rules)
    plans = {port.address: _plan(port, rule_for(port, ordered), known) for port in ports}
    return _together(plans)


def rule_for(port: SriovPort, rules: Iterable[PfRule]) -> PfRule | None:
    """The first that matches."""
    link = port.link
    for rule in rules:
        if rule.match is None or rule.match.selects(
            name=link.name if link else None,
            address=port.address,
            vendor=port.facts.vendor if port.facts else None,
            product=port.facts.product if port.facts else None,
            link_type=_LINK_TYPES.get(link.link_type) if link else None,
            numa_node=port.facts.numa_node if port.facts else None,
        ):
            return rule
    return None


def settings_of(rule: PfRule) -> str:
    """What the rule gives each VF, to be compared with what was given."""
    # Left out where nothing is said of it: a record of an earlier version is then still as it was.
    mode = {"mode": rule.mode} if rule.mode is not None else {}
    return json.dumps({"mtu": rule.mtu, **asdict(rule.vf), **mode}, sort_keys=True)


def removal(port: SriovPort, making: Making | None, known: Known) -> PortPlan:
    """The plan for a node that is to be without this driver."""
    maker = _maker(port, making, known.boot_id)
    made = PortPlan(port=port, rule=None, making=making, maker=maker, verdict=Verdict.NONE)
    if making is None:
        return made
    if maker is Maker.OTHERS:
        return replace(made, why=_foreign(port, making, known.boot_id))
    against = _against(port, known, uplink=True)
    return replace(made, verdict=Verdict.REFUSED if against else Verdict.REMOVE, why=against)


def _plan(port: SriovPort, rule: PfRule | None, known: Known) -> PortPlan:
    making = known.makings.get(port.address)
    maker = _maker(port, making, known.boot_id)
    unfinished = maker is Maker.KND and making is not None and not making.done
    made = PortPlan(
        port=port, rule=rule, making=making, maker=maker, verdict=Verdict.FINE, unfinished=unfinished
    )
    if making is not None and port.num_vfs == 0 and (rule is None or rule.external or not rule.vfs):
        # Only the record is left, and perhaps the PF's own settings: nobody is in the way of that.
        return replace(made, verdict=Verdict.REMOVE)
    if rule is None and not unfinished:
        kept = "no rule of the policy is about it any more: its VFs stay until a rule says vfs: 0"
        return replace(made, verdict=Verdict.NONE, why=kept if maker is Maker.KND else "")
    wanted = rule.vfs if rule is not None else 0
    if rule is not None and rule.external:
        return _external(made, wanted)
    if maker is Maker.OTHERS:
        return _of_others(made, wanted, known.boot_id)
    if wanted > port.total_vfs:
        why = f"the policy says {wanted} VFs and {port.shown} can have {port.total_vfs}"
        return replace(made, verdict=Verdict.REFUSED, why=why)
    if _is_so(made, wanted):
        return made
    if wanted and rule is not None and (against := _cannot(port, rule)):
        return replace(made, verdict=Verdict.REFUSED, why=against)
    if port.in_use and not (rule is not None and rule.allow_host_uplink):
        why = f"{port.shown} is left alone: it is {port.in_use}; allowHostUplink: true makes VFs all the same"
        return replace(made, verdict=Verdict.REFUSED, why=why)
    if against := _against(port, known, uplink=False):
        return replace(made, verdict=Verdict.REFUSED, why=against)
    return replace(made, verdict=Verdict.MAKE if wanted else Verdict.REMOVE)


def _maker(port: SriovPort, making: Making | None, boot_id: BootId) -> Maker:
    if port.num_vfs == 0:
        return Maker.NOBODY
    ours = making is not None and making.made(port.num_vfs, port.instance, boot_id)
    return Maker.KND if ours else Maker.OTHERS


def _is_so(made: PortPlan, wanted: int) -> bool:
    if made.port.num_vfs != wanted or made.unfinished:
        return False
    if wanted == 0:
        # A record without VFs: the PF may not have been given back yet.
        return made.making is None
    if made.rule is None or made.making is None or made.making.settings != settings_of(made.rule):
        return False
    return made.rule.mode in (None, made.port.eswitch) or _has_no_other(made.port, made.rule)


def _has_no_other(port: SriovPort, rule: PfRule) -> bool:
    return port.eswitch is None and rule.mode is EswitchMode.LEGACY


def _cannot(port: SriovPort, rule: PfRule) -> str:
    """What of the rule is not to be had of this PF, whoever uses it; "" if nothing."""
    if rule.mode is EswitchMode.SWITCHDEV and port.eswitch is None:
        return f"{port.shown} cannot be in switchdev mode: its driver {port.driver} has no eswitch modes"
    if rule.vf.driver is not None and bus_of(port.address) == "netdevsim":
        return f"{port.shown} is simulated, and its VFs have no driver: leave vf.driver out of its rule"
    return ""


def _external(made: PortPlan, wanted: int) -> PortPlan:
    number = made.port.num_vfs
    if number == wanted:
        return made
    why = f"{made.port.shown} has {number} VFs, and others should have made {wanted} (external: true)"
    return replace(made, verdict=Verdict.REFUSED, why=why)


def _of_others(made: PortPlan, wanted: int, boot_id: BootId) -> PortPlan:
    why = _foreign(made.port, made.making, boot_id)
    if made.port.num_vfs == wanted:
        return replace(made, why=f"{why}, so nothing was set on them")
    why = f"{why}, and the policy says {wanted}: remove them, or say external: true"
    return replace(made, verdict=Verdict.REFUSED, why=why)


def _foreign(port: SriovPort, making: Making | None, boot_id: BootId) -> str:
    if making is not None and making.boot_id == boot_id:
        if making.vfs == port.num_vfs:
            return f"knd made the {making.vfs} VFs of {port.shown} and someone has made them anew"
        return f"knd made {making.vfs} VFs on {port.shown} and someone has made {port.num_vfs} of that"
    return f"others made the {port.num_vfs} VFs of {port.shown}"


def _against(port: SriovPort, known: Known, *, uplink: bool) -> str:
    """What keeps the VFs that are there from going, or the PF from getting some; "" if nothing does.
    uplink: it is about to be given back, and its own link is not needed."""
    for name, why in known.held.items():
        if _is_of(name, port):
            return f"{port.shown} cannot be changed now: {name} {why}"
    if port.vfs_in_use:
        return f"{port.shown} cannot be changed now: {port.vfs_in_use}"
    if uplink:
        return ""
    if port.link is None:
        return f"{port.shown} has no netdev in the host's network namespace: no VFs are made on it"
    return ""


def _is_of(name: DeviceName, port: SriovPort) -> bool:
    """Whether a device of that name is the port's or a VF's of it."""
    if bus_of(port.address) == "netdevsim":
        return name.startswith(f"nsim-{port.address.removeprefix('netdevsim')}-")
    functions = (parse_pci_address(port.address), *port.vfs.values())
    bases = [name_of(PciIdentity(function)) for function in functions]
    return any(name == base or name.startswith(f"{base}-p") for base in bases)


def _together(plans: Mapping[PfAddress, PortPlan]) -> Mapping[PfAddress, PortPlan]:
    bonds: defaultdict[IfIndex, list[PortPlan]] = defaultdict(list)
    for each in plans.values():
        if each.port.bond is not None:
            bonds[each.port.bond].append(each)
    result = dict(plans)
    for members in bonds.values():
        stuck = [each for each in members if each.verdict in (Verdict.REFUSED, Verdict.NONE)]
        if not stuck:
            continue
        reason = stuck[0].why or f"no rule of the policy is about {stuck[0].port.shown}"
        for each in members:
            if each.changes:
                why = f"{each.port.shown} changes together with the other ports of its bond: {reason}"
                result[each.port.address] = replace(each, verdict=Verdict.REFUSED, why=why)
    return result
