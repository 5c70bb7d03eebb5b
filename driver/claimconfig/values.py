"""Values that several sections of a NetworkDeviceConfig have: names, addresses, MTUs.

Invariant: as driver.claimconfig.sections.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from driver.strict import Kind, integer, shown, text
from hw.model import IfName, InterfaceAddress, MacAddress, check_ifname, parse_mac

MTU_MIN = 68
MTU_MAX = 65535
"""The kernel's least for IPv4 and most for Ethernet; drivers allow less, and say so at attach."""
MAX_ADDRESSES = 16
"""As many as ResourceClaim.status can report."""

RESERVED_NAMES: Mapping[str, str] = {
    "lo": "is the pod's loopback",
    "eth0": "belongs to the pod's main network (CNI)",
    "all": "means every interface to sysctl",
    "default": "means future interfaces to sysctl",
    "bonding_masters": "is a control file of the bonding driver",
    # Made by the kernel in every network namespace once their module is loaded.
    **dict.fromkeys(
        ("tunl0", "gre0", "gretap0", "erspan0", "sit0", "ip6tnl0", "ip6gre0", "ip_vti0", "ip6_vti0"),
        "is a tunnel that the kernel may already have made in the pod",
    ),
}
"""Names no attached device may have in a pod, and why."""


def _name(value: str) -> IfName:
    if value in RESERVED_NAMES:
        raise ValueError(f"{value!r} {RESERVED_NAMES[value]}; choose another name")
    return check_ifname(value)


def _mac(value: str) -> MacAddress:
    if value != value.strip():
        raise ValueError(f"{shown(value)} has white space around it")
    return parse_mac(value)


def _address(value: str) -> InterfaceAddress:
    if not re.fullmatch(r"[0-9A-Fa-f:.]+/(0|[1-9][0-9]{0,2})", value):
        raise ValueError(f"{shown(value)} is not an address with its prefix length, like 192.0.2.5/24")
    try:
        address = ipaddress.ip_interface(value)
    except ValueError as error:
        raise ValueError(f"{shown(value)} is not an address with its prefix length: {error}") from None
    if isinstance(address, ipaddress.IPv6Interface) and address.ip.ipv4_mapped:
        raise ValueError(f"{value!r} is an IPv4 address in IPv6 form; write it as IPv4")
    for bad in ("unspecified", "multicast", "loopback"):
        if getattr(address.ip, f"is_{bad}"):
            raise ValueError(f"{value!r} is {'an' if bad[0] == 'u' else 'a'} {bad} address")
    return address


_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_V4 = rf"(?!0\.0\.0\.0/)(?!127\.)(?!22[4-9]\.)(?!23[0-9]\.){_OCTET}(\.{_OCTET}){{3}}/(3[0-2]|[12]?[0-9])"
_V6 = r"(?=[^/]*:)[0-9A-Fa-f:.]+/(12[0-8]|1[01][0-9]|[1-9]?[0-9])"

IFNAME: Kind[IfName] = text(
    _name,
    {
        "pattern": r"^[A-Za-z0-9_.-]{1,15}$",
        "not": {"enum": sorted({".", "..", *RESERVED_NAMES})},
    },
)
MAC: Kind[MacAddress] = text(
    _mac,
    {"pattern": r"^(?!00:00:00:00:00:00$)[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$"},
)
MTU: Kind[int] = integer(MTU_MIN, MTU_MAX)
ADDRESS: Kind[InterfaceAddress] = text(_address, {"pattern": f"^({_V4}|{_V6})$"})
