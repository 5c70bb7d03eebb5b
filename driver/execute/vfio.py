"""Acts for a device that a pod drives itself, through vfio-pci: it is given files, and no netdev moves.

Invariant: as for every act, safe to repeat and safe where it does not apply. A function is found by its PCI
address, which no tenant can change, and what it should be bound to is in its record.
"""

from __future__ import annotations

from driver.errors import Refusal
from driver.execute.probe import address_of
from driver.execute.target import NotClean, Target, Vanished
from hw.sriov import binding
from hw.sriov.discovery import DEVICES
from hw.sysfs import Sysfs


def to_vfio(target: Target, sysfs: Sysfs) -> None:
    """Take it from the kernel's driver. Refusal where giving it away would give away more than it."""
    address = address_of(target)
    if not binding.is_loaded(sysfs, binding.VFIO_PCI):
        raise Refusal(
            "NoVfio",
            f"{target.device} was asked for with vfio-pci, which is not loaded on this node: modprobe it",
        )
    group = binding.group_of(sysfs, address)
    if group is None or binding.is_without_iommu(sysfs, group):
        _check_no_iommu(target, sysfs)
    elif others := binding.sharers(sysfs, address, group):
        raise Refusal(
            "IommuGroupShared",
            f"{target.device} shares IOMMU group {group}, and so would its holder: {', '.join(others)}",
        )
    binding.bind(sysfs, address, binding.VFIO_PCI)


def _check_no_iommu(target: Target, sysfs: Sysfs) -> None:
    """Nothing keeps the holder of such a function from reading and writing all memory."""
    if not target.preparation.no_iommu:
        raise Refusal(
            "NoIommu",
            f"{target.device} has no IOMMU group, and without an IOMMU its holder could read all memory: "
            "switch the IOMMU on in firmware and on the kernel's command line; where pods are trusted with "
            "that, let the node policy say vfio: {noIommu: true}",
        )
    allowed = binding.allows_no_iommu(sysfs)
    if not allowed:
        how = (
            "write Y to /sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
            if allowed is False
            else "this kernel has no such mode (CONFIG_VFIO_NOIOMMU)"
        )
        raise Refusal(
            "NoIommu",
            f"{target.device} has no IOMMU group; the node policy would give it away all the same, and vfio "
            f"does not: {how}",
        )


def verify_vfio(target: Target, sysfs: Sysfs) -> None:
    """NotClean or Vanished unless it is bound to vfio-pci, ready for the next sandbox."""
    address = address_of(target)
    driver = binding.driver_of(sysfs, address)
    if driver == binding.VFIO_PCI:
        return
    if sysfs.names(f"{DEVICES}/{address}") is None:
        raise Vanished(f"{target.device}: there is no PCI function {address} (any more)")
    raise NotClean(target.device, (f"its driver is {driver}, should be {binding.VFIO_PCI}",))
