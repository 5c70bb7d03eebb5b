"""Acts for a VF on InfiniBand: it takes up the GUID that its PF was told, and its port becomes active.

Invariant: as for every act, safe to repeat and safe where it does not apply. A VF's driver asks for its GUIDs
once, when it begins, so it begins anew after its PF was told. What the VF's own RDMA device says is what
counts: not every PF tells the GUIDs that it was given.
"""

from __future__ import annotations

import time

from driver.errors import NotNow, Refusal
from driver.execute import probe
from driver.execute.rdma import find_at_home
from driver.execute.target import NotClean, Target
from hw.errors import HwError
from hw.model import RdmaName
from hw.rdma.infiniband import partitions, port_guid, wait_for_port
from hw.rdma.nldev import NldevDevice, NldevPort, PortState
from hw.sysfs import Sysfs

DEVICE_SECONDS = 5.0
"""For a driver that began anew to register its RDMA device."""
_PAUSE = 0.05
_PORT = 1
"""A VF has one."""


def take_up(target: Target, host: probe.Host) -> None:
    """See that the VF has its GUID. NotClean if it has not, though its driver began anew."""
    wish = target.preparation.infiniband
    if wish is None or target.preparation.config.by_file:
        return
    device = _device(target, host)
    if device is not None and device.node_guid == wish.guid:
        return
    if not target.preparation.can_be_probed:
        raise NotNow(
            f"{target.device} has another GUID, and no driver on record that could begin anew with it"
        )
    probe.again(target, host)
    _check(_wait_for_device(target, host), target)


def port_active(target: Target, host: probe.Host) -> None:
    """NotNow with its state, and who would change it, if the port is not active in time."""
    wish = target.preparation.infiniband
    if wish is None or target.preparation.rdma is None:
        return
    device = _wait_for_device(target, host)
    _check(device, target)
    if not wish.active_seconds:
        return

    def ask() -> NldevPort:
        with host.rdma(None) as socket:
            return next(port for port in socket.ports(device.index) if port.number == _PORT)

    what = f"port {_PORT} of {device.name}, the RDMA device of {target.device},"
    try:
        wait_for_port(ask, {PortState.ACTIVE}, within=wish.active_seconds, what=what)
    except HwError as error:
        raise NotNow(f"{error} (node policy, rdma.infiniband.activeSeconds)") from error
    found = port_guid(host.sysfs, device.name, _PORT)
    if found not in (None, wish.guid):
        raise NotClean(target.device, (f"its port's GUID is {found}, should be {wish.guid}",))


def find_partition(target: Target, host: probe.Host) -> None:
    """Refusal if the port is no full member of the partition that the claim chose."""
    device = _wait_for_device(target, host)
    index_of_partition(target, host.sysfs, device.name, _PORT)


def index_of_partition(target: Target, sysfs: Sysfs, device: RdmaName, port: int) -> int | None:
    """Where the port's table has it; None where the claim chose none. Refusal if it is not there."""
    wanted = target.preparation.config.rdma.partition
    if wanted is None:
        return None
    table = partitions(sysfs, device, port)
    found = next((each.index for each in table if each.key == wanted and each.full), None)
    if found is None:
        keys = ", ".join(f"{each.pkey:#06x}" for each in table) or "none"
        raise Refusal(
            "NoPartition",
            f"{target.device}: port {port} of its RDMA device {device} is no full member of partition "
            f"{wanted:#06x} (rdma.partition); those of its table are {keys}, as the subnet manager gave them",
        )
    return found


def _check(device: NldevDevice, target: Target) -> None:
    wish = target.preparation.infiniband
    assert wish is not None
    if device.node_guid != wish.guid:
        found = device.node_guid or "none"
        problem = f"its node GUID is {found}, should be {wish.guid}, as its PF was told"
        raise NotClean(target.device, (problem,))


def _device(target: Target, host: probe.Host) -> NldevDevice | None:
    if target.preparation.rdma is None:
        return None
    with host.rdma(None) as socket:
        return find_at_home(socket, target, host)


def _wait_for_device(target: Target, host: probe.Host) -> NldevDevice:
    give_up = time.monotonic() + DEVICE_SECONDS
    while (device := _device(target, host)) is None:
        if time.monotonic() > give_up:
            raise NotNow(f"the driver of {target.device} made no RDMA device within {DEVICE_SECONDS:g} s")
        time.sleep(_PAUSE)
    return device
