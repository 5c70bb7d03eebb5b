"""Acts for a device that a pod drives itself, through vfio-pci: it is given files, and no netdev moves.

Invariant: as for every act, safe to repeat and safe where it does not apply. A function is found by its PCI
address, which no tenant can change, and what it should be bound to is in its record.
"""

from __future__ import annotations

import time

from driver.errors import Refusal
from driver.execute.target import NotClean, Target, Vanished
from hw.errors import NotFound
from hw.model import PciAddress
from hw.sriov import binding
from hw.sysfs import Sysfs

NETDEV_SECONDS = 10.0
"""For a driver that was bound to make its netdev: igbvf has it at once, others when firmware has answered."""
_PAUSE = 0.02


def to_vfio(target: Target, sysfs: Sysfs) -> None:
    """Take it from the kernel's driver. Refusal where giving it away would give away more than it."""
    address = _address(target)
    if not binding.is_loaded(sysfs, binding.VFIO_PCI):
        raise Refusal(
            "NoVfio",
            f"{target.device} was asked for with vfio-pci, which is not loaded on this node: modprobe it",
        )
    group = binding.group_of(sysfs, address)
    if group is None:
        raise Refusal(
            "NoIommu",
            f"{target.device} has no IOMMU group, and without an IOMMU its holder could read all memory: "
            "switch the IOMMU on in firmware and on the kernel's command line",
        )
    others = binding.sharers(sysfs, address, group)
    if others:
        raise Refusal(
            "IommuGroupShared",
            f"{target.device} shares IOMMU group {group}, and so would its holder: {', '.join(others)}",
        )
    binding.bind(sysfs, address, binding.VFIO_PCI)


def to_kernel(target: Target, sysfs: Sysfs) -> None:
    """Give it back to the driver it was prepared from, and see its netdev at home."""
    address = _address(target)
    home = target.preparation.home_driver
    try:
        binding.bind(sysfs, address, home)
    except NotFound as error:
        if binding.is_loaded(sysfs, home):
            raise Vanished(f"{target.device}: {error}") from error
        raise
    give_up = time.monotonic() + NETDEV_SECONDS
    while target.find_at_home() is None:
        if time.monotonic() > give_up:
            raise NotClean(target.device, (f"its driver {home} made no netdev within {NETDEV_SECONDS:g} s",))
        time.sleep(_PAUSE)


def verify_vfio(target: Target, sysfs: Sysfs) -> None:
    """NotClean or Vanished unless it is bound to vfio-pci, ready for the next sandbox."""
    address = _address(target)
    driver = binding.driver_of(sysfs, address)
    if driver == binding.VFIO_PCI:
        return
    if binding.group_of(sysfs, address) is None and driver is None:
        raise Vanished(f"{target.device}: there is no PCI function {address} (any more)")
    raise NotClean(target.device, (f"its driver is {driver}, should be {binding.VFIO_PCI}",))


def _address(target: Target) -> PciAddress:
    address = target.preparation.pci_address
    assert address is not None, "prepare lets only PCI functions through"
    return address
