"""Of `knd devices`: the ports of RDMA devices as they are now, and the addresses they are reached by."""

from __future__ import annotations

import ipaddress

from driver.cli.output import Row
from hw.errors import HwError
from hw.rdma import verbs
from hw.rdma.details import DeviceDetails, PortDetails, every_device
from hw.rdma.infiniband import partitions
from hw.sysfs import Sysfs

COLUMNS = ("rdma", "port", "link_layer", "state", "link", "rate_mbps", "node_guid", "gids")


def read(sysfs: Sysfs) -> tuple[tuple[DeviceDetails, ...], tuple[str, ...]]:
    """libibverbs first; and sentences about what could not be read."""
    return every_device(sysfs, verbs.devices)


def port_rows(devices: tuple[DeviceDetails, ...], sysfs: Sysfs) -> list[Row]:
    return [
        {
            "rdma": device.name,
            "port": port.number,
            "link_layer": port.link_layer or None,
            "state": port.state.name.lower(),
            "link": port.phys_state.name.lower(),
            "rate_mbps": port.rate_mbps,
            "node_guid": device.node_guid,
            "sys_image_guid": device.sys_image_guid,
            "firmware": device.firmware,
            "lid": port.lid or None,
            "sm_lid": port.sm_lid or None,
            "partitions": _partitions(sysfs, device, port),
            "gids": len(port.gids),
            "told_by": device.source,
        }
        for device in devices
        for port in device.ports
    ]


def _partitions(sysfs: Sysfs, device: DeviceDetails, port: PortDetails) -> str | None:
    if port.link_layer != "InfiniBand":
        return None
    try:
        return " ".join(f"{one.pkey:#06x}" for one in partitions(sysfs, device.name, port.number)) or None
    except HwError as error:
        return str(error)


def gid_rows(devices: tuple[DeviceDetails, ...]) -> list[Row]:
    return [
        {
            "rdma": device.name,
            "port": port.number,
            "index": gid.index,
            "gid": _shown(gid.address),
            "type": gid.type,
            "interface": gid.netdev,
        }
        for device in devices
        for port in device.ports
        for gid in port.gids
    ]


def _shown(address: ipaddress.IPv6Address) -> str:
    """With an IPv4 address in its usual form, which only later Pythons write."""
    return f"::ffff:{address.ipv4_mapped}" if address.ipv4_mapped else str(address)
