"""Making the VFs of a PF, configured before a driver sees them, and unmaking them.

Invariant: every step may be repeated, and what is half made is unmade by the next try, which begins at none.
No driver is bound to a VF before its PF is in its mode and has been told everything about it, so that no VF
ever comes up with another address. Who uses what would go was asked by the caller.

A simulated card's VFs are no functions: there is no driver to bind, and a netdev in switchdev mode alone.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from hw.errors import Busy, HwError, NotFound, Refused
from hw.eswitch import NO_ESWITCHES, is_representor, representors
from hw.model import (
    EswitchMode,
    IfIndex,
    IfName,
    LinkInfo,
    MacAddress,
    PciAddress,
    PfAddress,
    VfSettings,
    VfVlan,
    bus_of,
    device_folder,
)
from hw.sriov import binding, switching
from hw.sysfs import Sysfs

log = logging.getLogger(__name__)

T = TypeVar("T")

NUMVFS_SECONDS = 120.0
"""For the kernel to make or unmake the VFs: firmware takes up to a second for each."""
VF_SECONDS = 30.0
"""For each of: VFs in sysfs, drivers bound, netdevs made, a setting that firmware takes in its time."""
_PAUSE = 0.02
_VIRTFN = re.compile(r"virtfn([0-9]+)")
_NAME_BYTES = 15


class PortLinks(Protocol):
    """What is needed of hw.netlink.LinkSocket, in the host's namespace."""

    def dump(self) -> tuple[LinkInfo, ...]: ...

    def by_index(self, ifindex: IfIndex) -> LinkInfo | None: ...

    def set_up(self, ifindex: IfIndex) -> None: ...

    def set_down(self, ifindex: IfIndex) -> None: ...

    def change(
        self,
        ifindex: IfIndex,
        *,
        name: IfName | None = None,
        mtu: int | None = None,
        mac: MacAddress | None = None,
    ) -> None: ...

    def set_vf(self, pf: IfIndex, vf: int, setting: str, value: MacAddress | VfVlan | bool) -> None: ...

    def vf_settings(self, pf: IfIndex, vf: int) -> VfSettings | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be made. macs by index, or none to leave them; None: left as the hardware has it.

    mode None: the one from before anything was done to the PF."""

    pf: PfAddress
    ifindex: IfIndex
    count: int
    mode: EswitchMode | None = None
    pf_driver: str = ""
    macs: tuple[MacAddress, ...] = ()
    vlan: int | None = None
    spoof_check: bool | None = None
    trust: bool | None = None
    mtu: int | None = None
    driver: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What a PF was like before anything was done to it, to be given back so."""

    autoprobe: bool
    up: bool
    mtu: int
    mode: EswitchMode | None = None
    """None: nothing was said of its mode, so it is left."""


def look(sysfs: Sysfs, links: PortLinks, pf: PfAddress, ifindex: IfIndex, *, mode: bool) -> Before:
    """mode: it will be changed."""
    link = _link(links, ifindex)
    # Kernels before 4.12 have no such file, and always probe.
    autoprobe = sysfs.integer(f"{device_folder(pf)}/sriov_drivers_autoprobe")
    eswitch = switching.mode_of(pf) if mode else None
    return Before(autoprobe=autoprobe != 0, up=link.up, mtu=link.mtu, mode=eswitch)


def make(sysfs: Sysfs, links: PortLinks, order: Order, before: Before) -> None:
    """Have the PF have exactly these VFs, each with its netdev. HwError if not: then it has none, as far as
    that could be done, and is as it was before."""
    try:
        unmake(sysfs, order.pf)
        if order.mtu is not None and _link(links, order.ifindex).mtu < order.mtu:
            links.change(order.ifindex, mtu=order.mtu)
        # Some drivers (igb) make VFs that never leave reset while their PF is down.
        links.set_up(order.ifindex)
        _autoprobe(sysfs, order.pf, on=False)
        mode = order.mode or before.mode
        early = order.pf_driver in switching.BEFORE_VFS
        if mode is not None and early:
            order = replace(order, ifindex=_switched(links, order.pf, order.ifindex, mode))
        _write_number(sysfs, order.pf, order.count)
        vfs = _until(lambda: _all_vfs(sysfs, order), VF_SECONDS, f"{order.count} VFs of {order.pf} to appear")
        if mode is not None and not early:
            order = replace(order, ifindex=_switched(links, order.pf, order.ifindex, mode))
        for index in range(order.count):
            _configure(links, order, index)
        _bind(sysfs, order, vfs, before)
        _finish_netdevs(links, order, vfs)
    except HwError as error:
        if not (isinstance(error, Busy) and error.errno == errno.ETIMEDOUT):
            _undo(sysfs, links, order, before)
        raise


def _switched(links: PortLinks, pf: PfAddress, ifindex: IfIndex, mode: EswitchMode) -> IfIndex:
    """The PF in that mode; returns its netdev's index, since some drivers make another netdev of it."""
    if not switching.change(pf, mode):
        return ifindex
    link = _until(lambda: _netdev_of(links, pf), VF_SECONDS, f"the netdev of {pf} in {mode} mode")
    links.set_up(link.ifindex)
    return link.ifindex


def _netdev_of(links: PortLinks, pf: PfAddress) -> LinkInfo | None:
    place = (bus_of(pf), pf)
    mine = [x for x in links.dump() if (x.parent_bus, x.parent_device) == place and not x.is_stacked]
    return min((x for x in mine if not is_representor(x)), key=lambda x: x.ifindex, default=None)


def unmake(sysfs: Sysfs, pf: PfAddress) -> None:
    """No VFs any more, and their entries gone."""
    if sysfs.integer(f"{device_folder(pf)}/sriov_numvfs") != 0:
        _write_number(sysfs, pf, 0)
    _until(lambda: not vfs_of(sysfs, pf), VF_SECONDS, f"the VFs of {pf} to go")


def give_back(sysfs: Sysfs, links: PortLinks, pf: PfAddress, ifindex: IfIndex | None, before: Before) -> None:
    """The PF without VFs and as it was. ifindex None: its link is left, since others use it now."""
    unmake(sysfs, pf)
    if before.mode is not None and switching.change(pf, before.mode):
        again = _until(lambda: _netdev_of(links, pf), VF_SECONDS, f"the netdev of {pf} in {before.mode} mode")
        ifindex = again.ifindex if ifindex is not None else None
    _autoprobe(sysfs, pf, on=before.autoprobe)
    if ifindex is None:
        return
    link = _link(links, ifindex)
    if link.mtu > before.mtu:
        links.change(ifindex, mtu=before.mtu)
    if link.up and not before.up:
        links.set_down(ifindex)


def is_given_back(sysfs: Sysfs, pf: PfAddress, before: Before) -> bool:
    """Whether nothing of what was made is there any more."""
    number = sysfs.integer(f"{device_folder(pf)}/sriov_numvfs")
    return not number and before.mode in (None, switching.mode_of(pf))


def vfs_of(sysfs: Sysfs, pf: PfAddress) -> Mapping[int, PciAddress]:
    """Functions by index, which is the N of virtfnN and nothing else."""
    found = {}
    folder = device_folder(pf)
    for name in sysfs.names(folder) or ():
        match = _VIRTFN.fullmatch(name)
        target = sysfs.target_name(f"{folder}/{name}") if match else None
        if match and target:
            found[int(match[1])] = PciAddress(target)
    return found


Functions = Mapping[int, PciAddress | None]
"""By index; None for a VF that is no function."""


def _all_vfs(sysfs: Sysfs, order: Order) -> Functions | None:
    if bus_of(order.pf) == "netdevsim":
        number = sysfs.integer(f"{device_folder(order.pf)}/sriov_numvfs")
        return dict.fromkeys(range(order.count)) if number == order.count else None
    found = vfs_of(sysfs, order.pf)
    there = all(sysfs.names(device_folder(vf)) is not None for vf in found.values())
    return found if there and found.keys() == set(range(order.count)) else None


def _write_number(sysfs: Sysfs, pf: PfAddress, number: int) -> None:
    sysfs.write(f"{device_folder(pf)}/sriov_numvfs", str(number), timeout=NUMVFS_SECONDS)


def _autoprobe(sysfs: Sysfs, pf: PfAddress, *, on: bool) -> None:
    path = f"{device_folder(pf)}/sriov_drivers_autoprobe"
    if sysfs.integer(path) not in (int(on), None):
        sysfs.write(path, str(int(on)))


def _configure(links: PortLinks, order: Order, index: int) -> None:
    """Everything its PF can say of a VF, told and read back."""
    wishes: dict[str, MacAddress | VfVlan | bool | None] = {
        "vlan": VfVlan(id=order.vlan) if order.vlan is not None else None,
        "mac": order.macs[index] if order.macs else None,
        "spoof_check": order.spoof_check,
        "trust": order.trust,
    }
    for setting, value in wishes.items():
        if value is None:
            continue
        # Firmware may take a change later than its driver answers, or be too busy to be told.
        _until(
            partial(_told, links, order.ifindex, index, setting, value),
            VF_SECONDS,
            f"VF {index} of {order.pf} to have {setting} {value}",
        )


def _told(links: PortLinks, pf: IfIndex, vf: int, setting: str, value: MacAddress | VfVlan | bool) -> bool:
    if _has(links, pf, vf, setting, value):
        return True
    try:
        links.set_vf(pf, vf, setting, value)
    except Refused as error:
        if not isinstance(error, Busy):
            raise
    return _has(links, pf, vf, setting, value)


def _has(links: PortLinks, pf: IfIndex, vf: int, setting: str, value: object) -> bool:
    found = links.vf_settings(pf, vf)
    return found is not None and getattr(found, setting) == value


def _bind(sysfs: Sysfs, order: Order, found: Functions, before: Before) -> None:
    vfs = {index: vf for index, vf in found.items() if vf is not None}
    if order.driver is not None:
        driver = order.driver
        # The VFs' own events may be just having its module loaded.
        _until(lambda: binding.is_loaded(sysfs, driver), VF_SECONDS, f"driver {driver}: load its module")
        for _, vf in sorted(vfs.items()):
            binding.bind(sysfs, vf, driver)
    else:
        # Only now may a driver take them by itself, one that is loaded later included.
        _autoprobe(sysfs, order.pf, on=True)
        for index, vf in sorted(vfs.items()):
            _until(
                partial(binding.probe, sysfs, vf),
                VF_SECONDS,
                f"a driver for VF {index} of {order.pf} ({vf}): load its module",
            )
    _autoprobe(sysfs, order.pf, on=before.autoprobe)


def _finish_netdevs(links: PortLinks, order: Order, vfs: Functions) -> None:
    """The netdev of each VF there, with its MTU, and named after its PF where that name is free."""
    simulated = bus_of(order.pf) == "netdevsim"
    if simulated and switching.mode_of(order.pf) is not EswitchMode.SWITCHDEV:
        return
    found = _until(
        lambda: _netdevs(links, order.pf, vfs),
        VF_SECONDS,
        f"the netdevs of all {order.count} VFs of {order.pf}",
    )
    base = _link(links, order.ifindex).name
    for index, link in sorted(found.items()):
        if order.mtu is not None and link.mtu != order.mtu:
            links.change(link.ifindex, mtu=order.mtu)
        if simulated and order.macs and link.mac != order.macs[index]:
            # There is no driver that would take up what its PF was told.
            links.change(link.ifindex, mac=order.macs[index])
        name = IfName(f"{base}v{index}")
        if link.name != name and not link.up and len(name) <= _NAME_BYTES:
            try:
                links.change(link.ifindex, name=name)
            except Refused as error:
                log.info("VF %d of %s keeps its name %a: %s", index, order.pf, link.name, error)


def _netdevs(links: PortLinks, pf: PfAddress, vfs: Functions) -> Mapping[int, LinkInfo] | None:
    indexes = {address: index for index, address in vfs.items() if address is not None}
    if bus_of(pf) == "netdevsim":
        ends = representors(links.dump(), NO_ESWITCHES)
        ours = {index: link for (card, index), link in ends.items() if card == pf}
        return ours if ours.keys() == vfs.keys() else None
    found = {
        indexes[PciAddress(link.parent_device)]: link
        for link in links.dump()
        if link.parent_bus == "pci" and link.parent_device in indexes and not link.is_stacked
    }
    return found if len(found) == len(vfs) else None


def _undo(sysfs: Sysfs, links: PortLinks, order: Order, before: Before) -> None:
    try:
        give_back(sysfs, links, order.pf, order.ifindex, before)
    except HwError as error:
        log.error("%s is left half made, until the next try: %s", order.pf, error)


def _link(links: PortLinks, ifindex: IfIndex) -> LinkInfo:
    link = links.by_index(ifindex)
    if link is None:
        raise NotFound(f"link {ifindex} of the PF is not there (any more)")
    return link


def _until(look: Callable[[], T | None], seconds: float, what: str) -> T:
    """What look gives as soon as that is true. Busy where it is not in time."""
    give_up = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > give_up:
            raise Busy(f"waiting {seconds:g} s for {what}", errno.EAGAIN)
        time.sleep(_PAUSE)
    return found
