"""VFs of an idle PF as the demo's devices: real moves, real drivers, traffic through the PF's own switch.

Invariant: afterwards the PF has no VFs, and its admin state, sysctls and autoprobe are as they were, also
after a failure or an interrupt. One VF more than is given away stands in the far netns as the peer of all.
Where the driver can, the VFs are in a VLAN of their own, so that what others send on the wire is neither
seen nor counted, and what the demo sends is not seen by others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kndsim.agent import wait_until
from kndsim.demo.choice import PEERS, CannotUse, PhysicalFunction
from kndsim.demo.devices import Devices, Wire, disable_ipv6
from kndsim.demo.host import here, link_index, link_up, udev_is_done, written
from kndsim.links import SimNetns, netns

_PCI = Path("/sys/bus/pci/devices")
_OWN_VLAN = 3999
_PATIENCE = 60.0
"""Seconds for a driver to make its netdevs, for udev to name them, for a port to find its partner."""


@contextlib.contextmanager
def make_vfs(pf: PhysicalFunction, count: int) -> Iterator[Devices]:
    """count VFs at home. CannotUse if the PF turns out not to serve."""
    ipv6 = Path("/proc/sys/net/ipv6/conf") / pf.name / "disable_ipv6"
    autoprobe = _PCI / pf.address / "sriov_drivers_autoprobe"
    with contextlib.ExitStack() as stack:
        far = stack.enter_context(netns())
        far.run(disable_ipv6)
        stack.enter_context(written(ipv6, "1"))
        # Some drivers tell their VFs an address, and that they have a link, only while they are up.
        stack.enter_context(link_up(pf.name))
        stack.enter_context(written(autoprobe, "1"))
        stack.enter_context(_virtual_functions(pf, count + PEERS))
        names = _named(pf, count + PEERS)
        peer = _send_peer(names[-1], far)
        yield Devices(
            wires=tuple(Wire(name, peer) for name in names[:-1]),
            far=far,
            policy=_policy(pf),
            peer_of=lambda _netns, _ifname: peer,
            compared=frozenset((pf.address, *(_address(pf, vf) for vf in range(count)))),
            udev=True,
            patience=_PATIENCE / 2,
        )


@contextlib.contextmanager
def _virtual_functions(pf: PhysicalFunction, count: int) -> Iterator[None]:
    number = _PCI / pf.address / "sriov_numvfs"
    try:
        try:
            number.write_text(str(count))
        except OSError as error:
            raise CannotUse(f"does not make {count} VFs: {error.strerror}") from error
        _isolate(pf, count)
        yield
    finally:
        number.write_text("0")


def _isolate(pf: PhysicalFunction, count: int) -> None:
    """Put the VFs into a VLAN of their own, all or none; a driver that cannot is let be."""

    def set_vlan(ipr: IPRoute, vlan: int) -> None:
        index = ipr.link_lookup(ifname=pf.name)[0]
        for vf in range(count):
            ipr.link("set", index=index, vf={"vf": vf, "vlan": vlan})

    try:
        here(lambda ipr: set_vlan(ipr, _OWN_VLAN))
    except NetlinkError:
        with contextlib.suppress(NetlinkError):
            here(lambda ipr: set_vlan(ipr, 0))


def _named(pf: PhysicalFunction, count: int) -> list[str]:
    """The names of the VFs' netdevs, by VF index, when their drivers and udev are done with them."""
    try:
        wait_until(lambda: all(_settled(pf, vf) for vf in range(count)), "netdevs of the VFs", _PATIENCE)
    except TimeoutError as error:
        raise CannotUse("has VFs whose driver makes no netdev") from error
    return [_netdev(pf, vf) or "" for vf in range(count)]


def _netdev(pf: PhysicalFunction, vf: int) -> str | None:
    with contextlib.suppress(OSError):
        names = os.listdir(_PCI / pf.address / f"virtfn{vf}" / "net")
        return names[0] if len(names) == 1 else None
    return None


def _address(pf: PhysicalFunction, vf: int) -> str:
    return os.path.basename(os.readlink(_PCI / pf.address / f"virtfn{vf}"))


def _settled(pf: PhysicalFunction, vf: int) -> bool:
    name = _netdev(pf, vf)
    index = link_index(name) if name is not None else None
    return index is not None and udev_is_done(index)


def _index(name: str) -> int:
    index = link_index(name)
    if index is None:
        raise CannotUse(f"has VFs that do not stay: {name!a} is gone")
    return index


def _send_peer(name: str, far: SimNetns) -> str:
    """Move a VF to the far netns and have it ready there. CannotUse if the port has no link."""
    index = _index(name)
    here(lambda ipr: ipr.link("set", index=index, net_ns_fd=far.fd))

    def is_running(ipr: IPRoute) -> bool:
        (link,) = ipr.get_links(ipr.link_lookup(ifname=name)[0])
        return bool(link.get_attr("IFLA_CARRIER"))

    far.netlink(lambda ipr: ipr.link("set", index=ipr.link_lookup(ifname=name)[0], state="up"))
    try:
        wait_until(lambda: far.netlink(is_running), "a link on the VF", _PATIENCE / 4)
    except TimeoutError as error:
        raise CannotUse("has no link, and its VFs carry nothing without one") from error
    return name


def _policy(pf: PhysicalFunction) -> str:
    return f"""\
apiVersion: knd.internal/v1alpha1
kind: NodePolicy
devices:
  - offer: false
  - match: {{kinds: [vf], pfNames: ["{pf.name}"]}}
    offer: true
claims:
  allow: [interface.hardwareAddress]
"""
