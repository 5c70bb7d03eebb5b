"""Reading what a device in a pod counted itself: its interface, its VF on the PF, its RDMA ports.

Invariant: reads only, and nothing fails for it: what cannot be read is told with the reason. No socket and
no descriptor outlives the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from bpf.attach import child_of
from bpf.errors import BpfError
from bpf.limits import Dropped
from driver.execute.probe import Host
from driver.execute.rdma import find, places_of
from driver.execute.target import Target
from driver.journal.stretches import COUNTER_MAX, MeterKey, Reading
from driver.limits import POLICED, QUEUE_DROPPED
from driver.model import BootId, Preparation
from hw import wire
from hw.errors import HwError, NotFound, Refused, Unsupported
from hw.model import Identity, IfIndex, LinkInfo, NetdevsimIdentity, PciIdentity
from hw.netlink import LinkSocket
from hw.netns import NetnsHandle
from hw.rdma.counters import (
    Family,
    PortCounters,
    hardware_counters,
    hardware_counters_from_sysfs,
    port_counters,
)
from hw.rdma.netlink import RdmaSocket
from hw.rdma.nldev import NldevDevice
from hw.scan import pf_link
from hw.statistics import link_statistics
from hw.sysfs import Sysfs
from hw.sysfs_of import sysfs_of

INTERFACE = "interface"
VF = "pf-vf"
"""What the PF says of its VF: also of one that a pod drives itself."""
LIMITS = "limits"
"""What was counted and then dropped as above a limit, in packets."""
_QUEUE_BITS = 32
RDMA = frozenset(Family)
_VF_FAMILIES = (PciIdentity, NetdevsimIdentity)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a meter shows. reading None: it is there and cannot be read, and reason says why.

    cross_check: others count the same as well, so that what is missing here is no gap in a bill.
    """

    meter: MeterKey
    reading: Reading | None
    reason: str = ""
    cross_check: bool = False


class PfCounters:
    """What PFs say of their VFs, asked once for as long as this is kept: a PF tells of all of its VFs at
    once, and asks the hardware for it. For one pass over devices that were all in their pods before."""

    def __init__(self) -> None:
        self._links: tuple[LinkInfo, ...] | None = None
        self._told: dict[IfIndex, Mapping[int, Mapping[str, int]]] = {}

    def of(self, identity: Identity, home: LinkSocket) -> tuple[IfIndex, Mapping[str, int]] | None:
        """The PF's netdev, and the counters of that VF; None where there are none. HwError."""
        if not isinstance(identity, _VF_FAMILIES) or identity.vf_index is None:
            return None
        if self._links is None:
            self._links = home.dump()
        pf = pf_link(identity, self._links)
        if pf is None:
            return None
        if pf.ifindex not in self._told:
            self._told[pf.ifindex] = home.vf_statistics(pf.ifindex)
        found = self._told[pf.ifindex].get(identity.vf_index)
        return None if found is None else (pf.ifindex, found)


class NodeMeters:
    """The meters of this node's devices. Safe on any thread."""

    def __init__(
        self,
        host: Host,
        boot_id: BootId,
        dropped: Callable[[Target], Mapping[str, int]],
        find_child: Callable[[Target], tuple[LinkSocket, LinkInfo] | None],
    ) -> None:
        """dropped: as Shaper's. find_child: as of driver.execute.ipoib."""
        self._host = host
        self._boot = boot_id
        self._dropped = dropped
        self._find_child = find_child

    def read(self, target: Target, pfs: PfCounters | None = None) -> tuple[Shown, ...]:
        """All that the target's device has. pfs: ask its PF too, where that does not know; of a device given
        by its files it is asked in any case, since nothing else tells."""
        shown: list[Shown] = []
        if not target.preparation.by_file:
            shown += [*self._interface(target), *self.read_child(target), *self._limits(target)]
        if pfs is not None or target.preparation.config.by_file:
            shown += self._vf(target, pfs or PfCounters())
        if target.preparation.rdma is not None:
            shown += self._rdma_device(target)
        return tuple(shown)

    def told(
        self,
        preparation: Preparation,
        message: bytes,
        dropped: Dropped,
        vf: tuple[IfIndex, Mapping[str, int]] | None,
    ) -> tuple[Shown, ...] | None:
        """As read, of a device that has no other counters: from the kernel's message on its interface, what
        its limits dropped without a queue, and PfCounters. None if the message is of another device."""
        link, device = wire.link(message), preparation.key.unit
        if not preparation.identity.matches(link):
            return None
        drops = {**dict(zip(POLICED, dropped.packets, strict=True)), **dict.fromkeys(QUEUE_DROPPED, 0)}
        shown = [
            self._shown(MeterKey(device, INTERFACE), link_statistics(message), f"{link.ifindex}"),
            self._shown_limits(preparation, drops),
        ]
        if vf is not None:
            shown.append(self._shown_vf(preparation, *vf))
        return tuple(shown)

    def _interface(self, target: Target) -> Iterator[Shown]:
        if target.preparation.pod_ifname is None:
            return
        meter = MeterKey(target.device, INTERFACE)
        try:
            socket, link = target.pod, target.find_in_pod()
            if socket is None or link is None:
                # It came home by itself, with its counters: most drivers keep them.
                socket, link = target.home, target.find_at_home()
            if link is None:
                yield Shown(meter, None, f"{target.device} is neither at home nor in its pod")
                return
            yield self._shown(meter, socket.statistics(link.ifindex), f"{link.ifindex}")
        except HwError as error:
            yield Shown(meter, None, str(error))

    def read_child(self, target: Target) -> tuple[Shown, ...]:
        """Of the IPoIB interface that was made on the device: a meter of its own, since it may be gone while
        the device is not."""
        if target.preparation.config.rdma.ipoib is None:
            return ()
        meter = MeterKey(child_of(target.device), INTERFACE)
        try:
            found = self._find_child(target)
            if found is None:
                return (Shown(meter, None, "the IPoIB interface is neither at home nor in its pod"),)
            socket, link = found
            return (self._shown(meter, socket.statistics(link.ifindex), f"{link.ifindex}"),)
        except (HwError, BpfError) as error:
            return (Shown(meter, None, str(error)),)

    def _limits(self, target: Target) -> Iterator[Shown]:
        if target.preparation.pod_ifname is None:
            return
        meter = MeterKey(target.device, LIMITS)
        try:
            values = self._dropped(target)
        except (HwError, BpfError) as error:
            yield Shown(meter, None, str(error), cross_check=True)
            return
        if not values:
            return
        yield self._shown_limits(target.preparation, values)

    def _shown_limits(self, preparation: Preparation, values: Mapping[str, int]) -> Shown:
        meter, wraps = MeterKey(preparation.key.unit, LIMITS), dict.fromkeys(QUEUE_DROPPED, _QUEUE_BITS)
        return replace(self._shown(meter, values, f"slot{preparation.slot}", wraps), cross_check=True)

    def _shown_vf(self, preparation: Preparation, pf: IfIndex, values: Mapping[str, int]) -> Shown:
        told = self._shown(MeterKey(preparation.key.unit, VF), values, f"pf{pf}")
        return replace(told, cross_check=not preparation.config.by_file)

    def _vf(self, target: Target, pfs: PfCounters) -> Iterator[Shown]:
        meter, cross_check = MeterKey(target.device, VF), not target.preparation.config.by_file
        try:
            found = pfs.of(target.preparation.identity, target.home)
        except HwError as error:
            yield Shown(meter, None, str(error), cross_check)
            return
        if found is not None:
            yield self._shown_vf(target.preparation, *found)

    def _shown(
        self,
        meter: MeterKey,
        values: Mapping[str, int],
        instance: str,
        wraps: Mapping[str, int] | None = None,
    ) -> Shown:
        # What no counter can show is left out, and is a gap if it stays so.
        sane = {name: value for name, value in values.items() if value <= COUNTER_MAX}
        return Shown(meter, Reading(f"{self._boot}/{instance}", sane, wraps or {}))

    # --- RDMA ---------------------------------------------------------------------------------------

    def _rdma_device(self, target: Target) -> Iterator[Shown]:
        binding = target.preparation.rdma
        assert binding is not None
        problem = f"the RDMA device {binding.name} is neither at home nor in its pod"
        for netns in places_of(target):
            try:
                with self._host.rdma(netns) as socket:
                    device = find(socket, target)
                    if device is None:
                        continue
                    ports = [port.number for port in socket.ports(device.index)]
                    with self._sysfs_in(netns) as sysfs:
                        for port in ports:
                            yield from self._port(socket, sysfs, device, MeterKey(binding.name, "", port))
                    return
            except HwError as error:
                problem = str(error)
        yield Shown(MeterKey(binding.name, Family.HARDWARE, 1), None, problem)

    @contextmanager
    def _sysfs_in(self, netns: NetnsHandle | None) -> Iterator[Sysfs]:
        if netns is None:
            yield self._host.sysfs
        else:
            with sysfs_of(netns) as sysfs:
                yield sysfs

    def _port(self, socket: RdmaSocket, sysfs: Sysfs, device: NldevDevice, port: MeterKey) -> Iterator[Shown]:
        """Under the name on record: a tenant may call it something else."""
        reads: dict[Family, Callable[[], PortCounters | None]] = {
            Family.PORT: lambda: port_counters(sysfs, device.name, port.port),
            Family.HARDWARE: lambda: _hardware(socket, sysfs, device, port.port),
        }
        for family, read in reads.items():
            meter = replace(port, source=family)
            try:
                counters = read()
            except HwError as error:
                yield Shown(meter, None, str(error))
                continue
            if counters is not None and counters.values:
                yield self._shown(meter, counters.values, f"rdma{device.index}", counters.wraps)


def _hardware(socket: RdmaSocket, sysfs: Sysfs, device: NldevDevice, port: int) -> PortCounters | None:
    """By netlink, which reaches every namespace; by sysfs where that cannot: some drivers have more than fit
    in one answer, and old kernels tell none."""
    try:
        return hardware_counters(socket.statistics(device.index, port))
    except NotFound:
        raise
    except (Unsupported, Refused):
        return hardware_counters_from_sysfs(sysfs, device.name, port)
