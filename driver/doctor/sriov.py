"""SR-IOV: the PFs there are, what is made of them, and what it takes to give VFs away."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from driver import running
from driver.assembly import read_boot_id
from driver.doctor.model import Finding, Place, Subject, fail, ok, warn
from driver.journal import Journal
from driver.model import DeviceName
from driver.provision import hands_off
from driver.provision.carry_out import Provision
from driver.provision.survey import held_devices
from hw.devlink import Devlink
from hw.errors import HwError
from hw.sriov import binding
from hw.sriov.discovery import DEVICES
from hw.sysfs import Sysfs

_WRITTEN = ("bus/pci", "devices")
"""Below sysfs: where functions are bound and VFs made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pf:
    shown: str
    driver: str | None
    vfs: int
    possible: int
    maker: str
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sriov:
    """devlink: how many devices have it; None: devlink_problem. unmarked: VFs of ours without rules that keep
    the node's network managers off them. managers: those that run."""

    pfs: tuple[Pf, ...]
    functions: int
    readonly: tuple[str, ...]
    iommu_groups: int
    vfio_loaded: bool
    no_iommu_allowed: bool
    devlink: int | None
    devlink_problem: str
    managers: tuple[str, ...]
    unmarked: bool
    problems: tuple[str, ...]


def look(place: Place) -> Sriov:
    paths, sysfs = place.paths, Sysfs(place.paths.sysfs)
    policy = running.policy_in_force(paths, place.policy)
    provision = Provision(sysfs, paths, read_boot_id(paths.proc))
    held: Mapping[DeviceName, str] = {}
    if paths.journal.exists():
        with Journal.open_read_only(paths.journal) as journal:
            state = journal.state()
        held = held_devices(state.preparations, {q.device: q.reason for q in state.quarantines})
    found = provision.survey(policy, held)
    devlink, problem = _devlink()
    ours = frozenset(pf for pf, each in found.plans.items() if each.making is not None and each.port.num_vfs)
    return Sriov(
        pfs=tuple(
            Pf(
                shown=each.port.shown,
                driver=each.port.facts.driver if each.port.facts else "netdevsim",
                vfs=each.port.num_vfs,
                possible=each.port.total_vfs,
                maker=str(each.maker),
                why_not=each.why,
            )
            for each in found.plans.values()
        ),
        functions=len(sysfs.names(DEVICES) or ()),
        readonly=tuple(
            str(paths.sysfs / each)
            for each in _WRITTEN
            if (paths.sysfs / each).exists() and os.statvfs(paths.sysfs / each).f_flag & os.ST_RDONLY
        ),
        iommu_groups=len(sysfs.names("kernel/iommu_groups") or ()),
        vfio_loaded=binding.is_loaded(sysfs, binding.VFIO_PCI),
        no_iommu_allowed=policy.vfio.no_iommu,
        devlink=devlink,
        devlink_problem=problem,
        managers=tuple(name for name, folder in paths.network_managers().items() if folder.exists()),
        unmarked=bool(ours) and not hands_off.are_there(paths, ours),
        problems=found.problems,
    )


def _devlink() -> tuple[int | None, str]:
    try:
        with Devlink() as devlink:
            return len(devlink.devices()), ""
    except (HwError, OSError) as error:
        return None, str(error)


def judge(sriov: Sriov) -> Iterator[Finding]:
    if sriov.readonly:
        yield fail(
            "sysfs",
            f"{' and '.join(sriov.readonly)} cannot be written: no VF is made and no driver changed",
            "mount it writable, as deploy/manifests does",
        )
    else:
        yield ok("sysfs", "can be written")
    if not sriov.pfs:
        yield ok("ports", f"none of {sriov.functions} PCI functions is a PF: whole interfaces are offered")
    for pf in sriov.pfs:
        made = f"{pf.vfs} of {pf.possible} VFs" + (f", made by {pf.maker}" if pf.vfs else "")
        said = f"{pf.shown}, driver {pf.driver or 'none'}: {made}"
        if pf.driver is None:
            yield warn("port", said, "load or bind its driver")
        elif pf.why_not:
            yield warn("port", f"{said}: {pf.why_not}", "do what the sentence says, or change the policy")
        else:
            yield ok("port", said)
    for problem in sriov.problems:
        yield warn("port", problem, "look at the function: dmesg, lspci -vv")
    yield from _vfio(sriov)
    yield from _managers(sriov)
    if sriov.devlink is None:
        yield warn(
            "devlink",
            f"cannot be asked, so no switchdev mode and no health of hardware: {sriov.devlink_problem}",
            "load the module devlink, or a kernel with CONFIG_NET_DEVLINK",
        )
    else:
        yield ok("devlink", f"{sriov.devlink} devices have it")


def _vfio(sriov: Sriov) -> Iterator[Finding]:
    if sriov.iommu_groups and sriov.vfio_loaded:
        yield ok("vfio", f"there is an IOMMU ({sriov.iommu_groups} groups) and vfio-pci is loaded")
    elif sriov.iommu_groups:
        yield ok("vfio", "there is an IOMMU; before claims ask for vfio-pci: modprobe vfio-pci")
    elif sriov.no_iommu_allowed:
        yield warn(
            "vfio",
            "there is no IOMMU, and the policy gives functions away all the same (vfio.noIommu): their pods "
            "can read and write all memory",
            "switch the IOMMU on, in firmware and on the kernel's command line",
        )
    else:
        yield ok("vfio", "there is no IOMMU, so that claims which ask for vfio-pci are refused")


def _managers(sriov: Sriov) -> Iterator[Finding]:
    if not sriov.managers:
        yield ok("network-managers", "none is to be seen from here")
    elif sriov.unmarked:
        yield warn(
            "network-managers",
            f"{' and '.join(sriov.managers)} may take VFs that knd made: the rules against it are gone",
            "restart the agent, which writes them",
        )
    else:
        names = " and ".join(sriov.managers)
        yield ok("network-managers", f"{names} runs, and is kept off the VFs that knd makes")


SUBJECT = Subject("sriov", look, judge)
