"""What a pod has of an RDMA device once it is attached: its files by number, and the address it talks from.

Invariant: reads only, and opens no device. Numbers are asked of the kernel for this device, never taken from
a name: names are given anew whenever a driver begins anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from driver.errors import NotNow, Refusal
from driver.execute.infiniband import index_of_partition
from driver.execute.probe import Host
from driver.execute.rdma import binding_of, find
from driver.execute.target import Target
from driver.rdma import DeviceFile, RdmaFile, RdmaInPod
from hw.errors import HwError, NotFound
from hw.model import LinkInfo
from hw.rdma.gids import GidEntry, gid_table, roce_v2
from hw.rdma.netlink import RdmaSocket
from hw.rdma.nldev import CharacterDeviceKind, NldevDevice
from hw.sysfs import Sysfs
from hw.sysfs_of import sysfs_of

log = logging.getLogger(__name__)

GID_SECONDS = 0.3
"""The kernel fills the table in a queue of its own, within a few milliseconds of the address."""
_PAUSE = 0.01


def note(target: Target, host: Host) -> None:
    """The act: what is found goes on record with the attachment."""
    target.given.append(look(target, host))


def look(target: Target, host: Host, *, gid_seconds: float = GID_SECONDS) -> RdmaInPod:
    """Refusal where a file is missing that the pod was to have. An address that is not in the table yet is
    told in the log: the pod has its device all the same."""
    binding = binding_of(target)
    with ExitStack() as stack:
        socket = stack.enter_context(host.rdma(target.pod_netns if binding.moves else None))
        device = find(socket, target)
        if device is None:
            raise NotNow(f"the RDMA device {binding.name} of {target.device} is not in the pod")
        link = None if target.preparation.rdma_only else target.find_in_pod()
        port = _port(target, host, device, link)
        gid = _gid(target, host, device, port, link, gid_seconds)
        return RdmaInPod(
            name=device.name,
            index=device.index,
            port=port,
            files=_files(target, socket, device, port),
            gid_index=gid.index if gid is not None else None,
            gid=str(gid.address) if gid is not None else "",
            pkey_index=_pkey_index(target, host, device, port),
        )


@contextmanager
def _sysfs(target: Target, host: Host) -> Iterator[Sysfs]:
    """The one that shows the device."""
    if binding_of(target).moves and target.pod_netns is not None:
        with sysfs_of(target.pod_netns) as sysfs:
            yield sysfs
    else:
        yield host.sysfs


def _pkey_index(target: Target, host: Host, device: NldevDevice, port: int) -> int | None:
    if target.preparation.config.rdma.partition is None:
        return None
    with _sysfs(target, host) as sysfs:
        return index_of_partition(target, sysfs, device.name, port)


def _port(target: Target, host: Host, device: NldevDevice, link: LinkInfo | None) -> int:
    """The one whose netdev this is; the kernel tells it only in the netdev's own namespace."""
    if link is None or device.ports < 2:
        return 1
    with host.rdma(target.pod_netns) as pod:
        ports = pod.ports(device.index)
    return next((port.number for port in ports if port.netdev_index == link.ifindex), 1)


def _files(target: Target, socket: RdmaSocket, device: NldevDevice, port: int) -> tuple[DeviceFile, ...]:
    wanted: list[tuple[CharacterDeviceKind, int | None]] = [(CharacterDeviceKind.UVERBS, None)]
    if binding_of(target).rdma_cm:
        wanted.append((CharacterDeviceKind.RDMA_CM, None))
    wanted += [(_KINDS[file], port) for file in target.preparation.config.rdma.files]
    found = []
    for kind, of_port in wanted:
        try:
            file = socket.character_device(device.index, kind, of_port)
        except NotFound as error:
            raise Refusal("NoDeviceFile", f"{target.device}: {error}") from error
        found.append(DeviceFile(file.name, file.major, file.minor))
    return tuple(found)


_KINDS = {RdmaFile.UMAD: CharacterDeviceKind.UMAD, RdmaFile.ISSM: CharacterDeviceKind.ISSM}


def _gid(
    target: Target, host: Host, device: NldevDevice, port: int, link: LinkInfo | None, seconds: float
) -> GidEntry | None:
    """The RoCE v2 entry of the pod's first address; of a later one if that has none within seconds. The
    kernel writes them one by one, and a job that starts anew must find the same one. None for what has no
    such table: InfiniBand, iWARP."""
    if link is None or device.protocol not in (None, "roce"):
        return None
    addresses = target.preparation.config.interface.addresses
    give_up = time.monotonic() + seconds
    with _sysfs(target, host) as sysfs:
        while True:
            try:
                table = gid_table(sysfs, device.name, port)
            except HwError as error:
                log.warning("the GID table of %s cannot be read: %s", target.device, error)
                return None
            if roce_v2(table, link.name, addresses[:1]) or time.monotonic() > give_up:
                break
            time.sleep(_PAUSE)
    entry = roce_v2(table, link.name, addresses)
    if entry is None:
        text = "%s: the kernel has not put the pod's address into the GID table of %s yet"
        log.warning(text, target.device, device.name)
    return entry
