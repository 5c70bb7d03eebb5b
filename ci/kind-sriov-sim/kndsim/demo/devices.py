"""The devices a demo gives away, each with a wire to a peer; and how to see whether they are as before.

Invariant: a device is used only if nothing else uses it, and is put back as it was. A wire's far end
stands in a network namespace of ours, so traffic never meets another network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from kndsim.links import SimNetns, netns, private_host, veth_pair
from kndsim.netns import in_netns, in_thread

COMPARED = (
    "IFLA_IFNAME",
    "IFLA_MTU",
    "IFLA_ADDRESS",
    "IFLA_TXQLEN",
    "IFLA_GROUP",
    "IFLA_IFALIAS",
    "IFLA_QDISC",
    "IFLA_PROMISCUITY",
    "IFLA_ALLMULTI",
    "IFLA_GSO_MAX_SIZE",
    "IFLA_GRO_MAX_SIZE",
    "IFLA_XDP",
    "IFLA_MASTER",
)
_SETTABLE_FLAGS = 0x1 | 0x80 | 0x100 | 0x200 | 0x1000


@dataclass(frozen=True, slots=True)
class Wire:
    """A device to give away, by its name at home, and the peer at the other end."""

    device: str
    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """wires: one per device. far: the netns of all peers. policy: offers these devices and no others."""

    wires: tuple[Wire, ...]
    far: SimNetns
    policy: str
    peer_of: Callable[[Path, str], str]
    """The peer of a device that is in a pod: by the pod's netns and the device's name there."""
    compared: frozenset[str] | None = None
    """The links, by dump's keys, that must be as they were; None: all of this namespace, which is ours."""
    udev: bool = False
    """Whether the machine's udev names them."""
    patience: float = 5.0
    """Seconds until all is as before, at most: what comes home by itself takes a little."""


@contextlib.contextmanager
def make_veths(count: int) -> Iterator[Devices]:
    """Pairs in a namespace of ours that plays the host: whatever happens, the machine is untouched."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(private_host())
        far = stack.enter_context(netns())
        far.netlink(lambda ipr: ipr.link("set", index=1, state="up"))
        far.run(disable_ipv6)
        wires = []
        for number in range(count):
            wire = Wire(f"port{number}", f"peer{number}")
            stack.enter_context(veth_pair(wire.device, wire.peer, peer_where=far))
            wires.append(wire)
        yield Devices(
            wires=tuple(wires), far=far, policy=POLICY, peer_of=lambda pod, name: _veth_peer(pod, name, far)
        )


def _veth_peer(pod: Path, ifname: str, far: SimNetns) -> str:
    """The name of the wire's far end, by the index the kernel gives for it."""

    def look() -> int:
        with IPRoute() as ipr:
            (link,) = ipr.get_links(ipr.link_lookup(ifname=ifname)[0])
            return int(link.get_attr("IFLA_LINK"))

    index = in_netns(pod, look)
    return far.netlink(lambda ipr: str(ipr.get_links(index)[0].get_attr("IFLA_IFNAME")))


POLICY = """\
apiVersion: knd.internal/v1alpha1
kind: NodePolicy
netdevs:
  - kinds: [veth]
    names: ["port*"]
claims:
  allow: [interface.hardwareAddress]
"""


def disable_ipv6() -> None:
    """In the calling thread's netns: neighbour discovery would be traffic nobody sent."""
    for scope in ("all", "default"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")


def dump(only: frozenset[str] | None = None) -> Mapping[str, Mapping[str, Any]]:
    """Links of this netns as the kernel shows them: what "home as before" is judged by. A PCI function is
    known by its address, since its driver gives it another ifindex each time it is bound; others by ifindex.

    only: these, wherever others come and go; None is all.
    """
    # pyroute2 runs an event loop of its own, which a thread that runs one already does not allow.
    found = in_thread(_dump)
    return {key: link for key, link in found.items() if only is None or key in only}


def _dump() -> Mapping[str, Mapping[str, Any]]:
    with IPRoute() as ipr:
        addresses: dict[int, list[str]] = {}
        for address in ipr.get_addr():
            addresses.setdefault(address["index"], []).append(str(address.get_attr("IFA_ADDRESS")))
        return {
            _key(link): {
                **{name: _plain(link.get_attr(name)) for name in COMPARED},
                "flags": link["flags"] & _SETTABLE_FLAGS,
                "altnames": sorted(_altnames(link)),
                "addresses": sorted(addresses.get(link["index"], [])),
            }
            for link in ipr.get_links()
        }


def _key(link: Any) -> str:
    parent: str = link.get_attr("IFLA_PARENT_DEV_NAME") or ""
    return parent if link.get_attr("IFLA_PARENT_DEV_BUS_NAME") == "pci" else str(link["index"])


def _altnames(link: Any) -> list[str]:
    properties = link.get_attr("IFLA_PROP_LIST")
    return [str(name) for name in properties.get_attrs("IFLA_ALT_IFNAME")] if properties is not None else []


def _plain(value: Any) -> Any:
    return str(value) if value is not None and not isinstance(value, int | str) else value


def changes(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per field that is not as it was."""
    lines = []
    for key in sorted(before.keys() | after.keys(), key=lambda key: (len(key), key)):
        old, new = before.get(key), after.get(key)
        if old is None or new is None:
            name = (old or new or {}).get("IFLA_IFNAME")
            lines.append(f"link {key} ({name!r}) {'appeared' if old is None else 'is gone'}")
            continue
        lines += [
            f"link {key} ({old['IFLA_IFNAME']!r}): {field} was {old[field]!r}, is {new[field]!r}"
            for field in old
            if old[field] != new[field]
        ]
    return lines
