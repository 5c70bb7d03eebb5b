"""The act that gives a PF back to its VFs: what it holds of each as it was, and its link up where it was.

Invariant: as for every act, safe to repeat and safe where it does not apply. A PF is up again only when it is
clean: through it its VFs have a network.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

from driver.errors import NotNow
from driver.execute import probe, vf
from driver.execute.target import NotClean, Target
from hw.errors import HwError
from hw.model import (
    PciIdentity,
    PortBaseline,
    VfSettings,
)
from hw.scan import USERSPACE_DRIVERS
from hw.sriov import binding
from hw.sriov.provision import vfs_of

log = logging.getLogger(__name__)

_PAUSE = 0.05


def restore_vfs(target: Target, host: probe.Host, baseline: PortBaseline) -> None:
    """Every setting of every VF that is still there. NotClean, naming each, for what does not go back."""
    link = target.find_at_home()
    if link is None:
        raise NotNow(f"{target.device} is not in the host's network namespace")
    now = target.home.all_vf_settings(link.ifindex)
    problems: list[str] = []
    for each in baseline.vfs:
        found = now.get(each.index)
        for setting in _changed(each.settings, found):
            try:
                target.home.set_vf(link.ifindex, each.index, setting, vf.value_of(each.settings, setting))
            except HwError as error:
                problems.append(str(error))
        if found is not None and found.mac != each.settings.mac:
            _begin_anew(target, host, each.index)
    if problems:
        raise NotClean(target.device, tuple(problems))
    give_up = time.monotonic() + vf.SETTLE_SECONDS
    while left := tuple(_left(baseline, target.home.all_vf_settings(link.ifindex))):
        if time.monotonic() > give_up:
            raise NotClean(target.device, left)
        time.sleep(_PAUSE)


def set_up_again(target: Target, baseline: PortBaseline) -> None:
    link = target.find_at_home()
    if link is not None and baseline.up and not link.up:
        target.home.set_up(link.ifindex)


def _changed(was: VfSettings, now: VfSettings | None) -> Iterator[str]:
    """In the order in which settings are made. A VF that was unmade meanwhile has nothing to restore, nor has
    what was not told."""
    if now is None:
        return
    for setting in vf.ORDER:
        before = vf.value_of(was, setting)
        told = before is not None or setting == "mac"
        if told and vf.value_of(now, setting) != before:
            yield setting


def _left(baseline: PortBaseline, now: Mapping[int, VfSettings]) -> Iterator[str]:
    for each in baseline.vfs:
        for setting in _changed(each.settings, now.get(each.index)):
            if setting != "mac" or each.settings.mac is not None:
                yield f"{setting} of its VF {each.index} is not as it was"


def _begin_anew(target: Target, host: probe.Host, index: int) -> None:
    """A VF's driver takes up an address from its PF when it is reset, and keeps it until the next time."""
    identity = target.preparation.identity
    assert isinstance(identity, PciIdentity)
    address = vfs_of(host.sysfs, identity.address).get(index)
    driver = binding.driver_of(host.sysfs, address) if address is not None else None
    if address is None or driver is None or driver in USERSPACE_DRIVERS:
        return
    log.info("VF %s begins anew: %s, its PF, was told another address for it", address, target.device)
    binding.unbind(host.sysfs, address)
    binding.bind(host.sysfs, address, driver)
