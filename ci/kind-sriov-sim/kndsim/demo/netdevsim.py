"""Ports of two netdevsim devices as the demo's devices, linked in pairs by the kernel.

Invariant: the devices are made here and deleted here. One device's ports are at home and given away, the
other's stand in the far netns; the kernel carries frames between the two ports of a pair wherever they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import IPRoute

from kndsim.agent import wait_until
from kndsim.demo.choice import CannotUse
from kndsim.demo.devices import Devices, Wire, disable_ipv6
from kndsim.demo.host import here, udev_is_done
from kndsim.links import SimNetns, netns
from kndsim.netns import in_netns

_BUS = Path("/sys/bus/netdevsim")
_PATIENCE = 30.0


@contextlib.contextmanager
def make_ports(count: int) -> Iterator[Devices]:
    """count ports at home. CannotUse if the kernel does not make or link them."""
    with contextlib.ExitStack() as stack:
        far = stack.enter_context(netns())
        far.run(disable_ipv6)
        near_id, far_id = _free_ids(2)
        stack.enter_context(_device(near_id, count))
        stack.enter_context(_device(far_id, count, where=far))
        near_ports = _ports(near_id, count)
        far_ports = far.run(lambda: _ports(far_id, count, udev=False))
        for (near_index, _), (far_index, _) in zip(near_ports, far_ports, strict=True):
            _link(near_index, far, far_index)
        peers = {f"p{number + 1}": name for number, (_, name) in enumerate(far_ports)}

        def peer_of(pod: Path, ifname: str) -> str:
            return peers[in_netns(pod, lambda: _port_name(ifname))]

        yield Devices(
            wires=tuple(Wire(near[1], peer[1]) for near, peer in zip(near_ports, far_ports, strict=True)),
            far=far,
            policy=_policy(near_id),
            peer_of=peer_of,
            compared=frozenset(str(index) for index, _ in near_ports),
            patience=_PATIENCE,
        )


def _free_ids(count: int) -> tuple[int, ...]:
    taken = {path.name for path in (_BUS / "devices").glob("*")}
    free = [number for number in range(3990, 4990) if f"netdevsim{number}" not in taken]
    return tuple(free[:count])


@contextlib.contextmanager
def _device(bus_id: int, ports: int, where: SimNetns | None = None) -> Iterator[None]:
    """A device whose ports appear in the namespace of whoever writes."""

    def make() -> None:
        (_BUS / "new_device").write_text(f"{bus_id} {ports}")

    try:
        try:
            make() if where is None else where.run(make)
        except OSError as error:
            raise CannotUse(f"netdevsim does not make a device: {error.strerror}") from error
        yield
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (_BUS / "devices" / f"netdevsim{bus_id}").exists():
                (_BUS / "del_device").write_text(str(bus_id))


def _ports(bus_id: int, count: int, *, udev: bool = True) -> list[tuple[int, str]]:
    """ifindex and name of each port, in order, in the caller's namespace, when udev has named them."""
    found: list[tuple[int, str]] = []

    def look() -> bool:
        found[:] = here(lambda ipr: _ports_of(ipr, bus_id))
        return len(found) == count and (not udev or all(udev_is_done(index) for index, _ in found))

    try:
        wait_until(look, f"{count} ports of netdevsim{bus_id}", _PATIENCE)
    except TimeoutError as error:
        raise CannotUse(str(error)) from error
    return found


def _ports_of(ipr: IPRoute, bus_id: int) -> list[tuple[int, str]]:
    ports = [
        (str(link.get_attr("IFLA_PHYS_PORT_NAME")), link["index"], str(link.get_attr("IFLA_IFNAME")))
        for link in ipr.get_links()
        if link.get_attr("IFLA_PARENT_DEV_NAME") == f"netdevsim{bus_id}"
    ]
    return [(index, name) for _, index, name in sorted(ports)]


def _port_name(ifname: str) -> str:
    with IPRoute() as ipr:
        (link,) = ipr.get_links(ipr.link_lookup(ifname=ifname)[0])
        return str(link.get_attr("IFLA_PHYS_PORT_NAME"))


def _link(near_index: int, far: SimNetns, far_index: int) -> None:
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        (_BUS / "link_device").write_text(f"{home}:{near_index} {far.fd}:{far_index}")
    except OSError as error:
        raise CannotUse(f"netdevsim does not link two ports: {error.strerror}") from error
    finally:
        os.close(home)


def _policy(bus_id: int) -> str:
    return f"""\
apiVersion: knd.internal/v1alpha1
kind: NodePolicy
devices:
  - offer: false
  - match: {{names: ["nsim-{bus_id}-port-*"]}}
    offer: true
claims:
  allow: [interface.hardwareAddress]
"""
