"""Acts that have a device's driver let go of it and begin anew, which resets the function.

Invariant: as for every act, safe to repeat and safe where it does not apply; and nothing that a pod may still
drive is touched: that is asked of the kernel, not of a record. What has a netdev again has it under another
index and, for a moment, under another name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from driver.errors import NotNow
from driver.execute.target import NotClean, Target, Vanished
from hw.errors import NotFound
from hw.model import LinkInfo, PciAddress
from hw.netns import NetnsHandle
from hw.rdma.netlink import RdmaSocket
from hw.sriov import binding
from hw.sysfs import Sysfs
from hw.udev import Udev

NETDEV_SECONDS = 10.0
"""For a driver that was bound to make its netdev: igbvf has it at once, others when firmware has answered."""
_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class Host:
    """What tells of drivers, of netdevs that they made, and of RDMA devices."""

    sysfs: Sysfs
    udev: Udev
    rdma: Callable[[NetnsHandle | None], RdmaSocket] = RdmaSocket


def address_of(target: Target) -> PciAddress:
    address = target.preparation.pci_address
    assert address is not None, "only PCI functions are bound to drivers"
    return address


def check_in_nobodys_hands(target: Target, host: Host) -> None:
    """NotNow while a pod may drive it: by its files, or by a netdev that is not at home."""
    address = target.preparation.pci_address
    if address is not None:
        driver = binding.driver_of(host.sysfs, address)
        if driver is None:
            return
        if driver == binding.VFIO_PCI and target.preparation.config.by_file:
            raise NotNow(f"{target.device} is still bound to {driver}, by which its holder drives it")
    if target.find_at_home() is None:
        raise NotNow(f"{target.device} is not in the host's network namespace: whoever has it drives it")


def release(target: Target, host: Host) -> None:
    """Have no driver drive it, so that its settings can be changed in nobody's sight."""
    preparation, address = target.preparation, address_of(target)
    driver = binding.driver_of(host.sysfs, address)
    if driver is None:
        return
    if not preparation.config.by_file:
        _check_still_ours(target, driver)
        check_in_nobodys_hands(target, host)
    elif driver == preparation.home_driver:
        return
    binding.unbind(host.sysfs, address)


def to_kernel(target: Target, host: Host) -> None:
    """Give it (back) to the driver it was prepared from, and see its netdev at home."""
    address, home = address_of(target), target.preparation.home_driver
    driver = binding.driver_of(host.sysfs, address)
    if driver is not None and not target.preparation.config.by_file:
        _check_still_ours(target, driver)
    try:
        binding.bind(host.sysfs, address, home)
    except NotFound as error:
        if binding.is_loaded(host.sysfs, home):
            raise Vanished(f"{target.device}: {error}") from error
        raise
    _wait_for_netdev(target, host)


def again(target: Target, host: Host) -> LinkInfo:
    """Its driver begins anew with it, here and now; what it made of it."""
    check_in_nobodys_hands(target, host)
    binding.unbind(host.sysfs, address_of(target))
    binding.bind(host.sysfs, address_of(target), target.preparation.home_driver)
    return _wait_for_netdev(target, host)


def _check_still_ours(target: Target, driver: str) -> None:
    if driver != target.preparation.home_driver:
        raise Vanished(f"{target.device} was bound to {driver} by others: it is theirs")


def _wait_for_netdev(target: Target, host: Host) -> LinkInfo:
    give_up = time.monotonic() + NETDEV_SECONDS
    while True:
        link = target.find_at_home()
        if link is not None:
            break
        if time.monotonic() > give_up:
            home = target.preparation.home_driver
            raise NotClean(target.device, (f"its driver {home} made no netdev within {NETDEV_SECONDS:g} s",))
        time.sleep(_PAUSE)
    host.udev.wait(link.ifindex)
    return target.find_at_home() or link
