"""Looking at the node, and saying what is to be done about each PF: for the agent and for who asks it.

Invariant: reads only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from driver.model import BootId, DeviceName, Preparation, device_of
from driver.policy import NodePolicy
from driver.provision.plan import Known, PortPlan, plan, removal
from driver.provision.records import Makings
from hw.eswitch import is_representor, read_eswitches
from hw.links import Links
from hw.model import LinkInfo, MacAddress, PfAddress, bus_of, device_folder
from hw.ports import sriov_ports
from hw.scan import uplinks_of
from hw.sysfs import Sysfs


@dataclass(frozen=True, slots=True)
class Survey:
    """plans by PF. leaving: what it takes to be without this driver, for the PFs with a record.
    macs: addresses on this node that no new VF may get."""

    plans: Mapping[PfAddress, PortPlan]
    leaving: Mapping[PfAddress, PortPlan]
    macs: frozenset[MacAddress]
    gone: frozenset[PfAddress]
    """PFs with a record that are not there any more."""
    problems: tuple[str, ...] = ()


def held_devices(
    preparations: Iterable[Preparation], quarantined: Mapping[DeviceName, str]
) -> Mapping[DeviceName, str]:
    """Devices that nobody may take away, each with why."""
    held = {device_of(name): f"is withheld: {why}" for name, why in quarantined.items()}
    held |= {p.key.device: f"is held by claim {p.claim.namespace}/{p.claim.name}" for p in preparations}
    return held


def survey(
    sysfs: Sysfs,
    links: Links,
    policy: NodePolicy,
    makings: Makings,
    boot_id: BootId,
    held: Mapping[DeviceName, str],
) -> Survey:
    seen = links.dump()
    ports = sriov_ports(sysfs, seen, uplinks_of(links), read_eswitches(sysfs))
    records, problems = makings.read()
    known = Known(makings=records, boot_id=boot_id, held=held)
    made = [port for pf in records if (port := ports.by_address.get(pf)) is not None]
    functions: set[PfAddress] = {vf for port in made for vf in port.vfs.values()}
    simulated = {port.address for port in made if bus_of(port.address) == "netdevsim"}

    def is_ours(link: LinkInfo) -> bool:
        return link.parent_device in functions or (link.parent_device in simulated and is_representor(link))

    return Survey(
        plans=plan(ports.by_address.values(), policy.sriov, known),
        leaving={
            pf: removal(port, record, known)
            for pf, record in records.items()
            if (port := ports.by_address.get(pf)) is not None
        },
        macs=frozenset(
            mac
            for link in seen
            if not is_ours(link)
            for mac in (link.mac, link.permanent_mac)
            if mac is not None
        ),
        gone=frozenset(pf for pf in records if sysfs.names(device_folder(pf)) is None),
        problems=(*ports.problems, *problems),
    )
