"""Which driver a PCI function is bound to, and binding it to another.

Invariant: whatever happens, no driver_override of ours stays behind, since the next probe of the function
would stick to it. Never by "bind" alone: with sriov_drivers_autoprobe off that is ENODEV for a VF, and only a
matching driver_override makes the PCI core take it (drivers/pci/pci-driver.c, pci_device_can_probe).
"""

from __future__ import annotations

import errno
import logging

from hw.errors import Busy, HwError, NotFound, Refused
from hw.model import PciAddress
from hw.sriov.discovery import DEVICES
from hw.sysfs import Sysfs

log = logging.getLogger(__name__)

VFIO_PCI = "vfio-pci"
_DRIVERS = "bus/pci/drivers"
_GROUPS = "kernel/iommu_groups"
_NO_OVERRIDE = "\n"
_BRIDGE_CLASS = 0x06


def driver_of(sysfs: Sysfs, address: PciAddress) -> str | None:
    """The name of its driver; None if it has none, or is not there."""
    return sysfs.target_name(f"{DEVICES}/{address}/driver")


def is_loaded(sysfs: Sysfs, driver: str) -> bool:
    return sysfs.names(f"{_DRIVERS}/{driver}") is not None


def bind(sysfs: Sysfs, address: PciAddress, driver: str) -> None:
    """Have the function bound to driver, taking it from another one if need be. May be repeated.

    NotFound if the function or driver is not there, Busy if the old driver did not let go in time (someone
    still holds its files), Refused if the new one did not take it: then it is bound to none.
    """
    if sysfs.names(f"{DEVICES}/{address}") is None:
        raise NotFound(f"there is no PCI function {address} (any more)")
    if driver_of(sysfs, address) == driver:
        return
    if not is_loaded(sysfs, driver):
        raise NotFound(f"the driver {driver} is not there: load its module")
    override = f"{DEVICES}/{address}/driver_override"
    sysfs.write(override, driver)
    try:
        unbind(sysfs, address)
        sysfs.write("bus/pci/drivers_probe", address)
    finally:
        _clear(sysfs, override)
    if driver_of(sysfs, address) != driver:
        raise Refused(f"bind {address} to {driver}: its driver did not take it", errno.EIO)


def probe(sysfs: Sysfs, address: PciAddress) -> bool:
    """Let whichever driver the kernel has for it take the function; whether one has it now. For a VF only
    with sriov_drivers_autoprobe on. May be repeated, until a module is loaded."""
    if driver_of(sysfs, address) is None:
        try:
            sysfs.write("bus/pci/drivers_probe", address)
        except (NotFound, Refused) as error:
            if isinstance(error, Busy):
                raise
            # ENODEV says no more than that no driver took it, or that it is gone.
            log.debug("%s", error)
    return driver_of(sysfs, address) is not None


def unbind(sysfs: Sysfs, address: PciAddress) -> None:
    """Take it from its driver, if it has one. Busy if that did not let go in time."""
    current = driver_of(sysfs, address)
    if current is not None:
        sysfs.write(f"{_DRIVERS}/{current}/unbind", address)


def group_of(sysfs: Sysfs, address: PciAddress) -> int | None:
    """Its IOMMU group; None where there is no IOMMU."""
    name = sysfs.target_name(f"{DEVICES}/{address}/iommu_group")
    return int(name) if name is not None and name.isdecimal() else None


def is_without_iommu(sysfs: Sysfs, group: int) -> bool:
    """Whether it is a group that vfio made for a function that no IOMMU holds back (drivers/vfio/group.c,
    vfio_noiommu_group_alloc). It is there while the function is bound to vfio-pci, and others cannot join."""
    return sysfs.text(f"{_GROUPS}/{group}/name") == "vfio-noiommu"


def allows_no_iommu(sysfs: Sysfs) -> bool | None:
    """Whether vfio takes functions without an IOMMU now; None: its kernel was built without that."""
    value = sysfs.text("module/vfio/parameters/enable_unsafe_noiommu_mode")
    return None if value is None else value == "Y"


def sharers(sysfs: Sysfs, address: PciAddress, group: int) -> tuple[str, ...]:
    """Other functions of its IOMMU group, bridges apart: whoever holds one of them holds all."""
    names = sysfs.names(f"{_GROUPS}/{group}/devices") or ()
    return tuple(name for name in names if name != address and not _is_bridge(sysfs, name))


def _is_bridge(sysfs: Sysfs, address: str) -> bool:
    number = sysfs.integer(f"{DEVICES}/{address}/class", base=16)
    return number is not None and number >> 16 == _BRIDGE_CLASS


def _clear(sysfs: Sysfs, override: str) -> None:
    try:
        sysfs.write(override, _NO_OVERRIDE)
    except HwError as error:
        log.error("%s; the next probe of the function may take the wrong driver", error)
