"""A VF's settings on its PF, in rtnetlink messages: IFLA_VFINFO_LIST read, one setting of it written.

Invariant: pure. One message carries one setting: the kernel does several of one message in turn and stops at
the first that the driver refuses, which would leave nobody knowing what was done. The encoding is our own,
since pyroute2's VLAN list entry is two bytes short of the kernel's structure and is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from hw.errors import HwError
from hw.model import Guid, MacAddress, VfLinkState, VfSettings, VfVlan, VlanProtocol
from hw.wire import attribute, attribute_list, attributes

_LINK_HEADER = 16
_IFLA_VFINFO_LIST = 22
_VF_INFO = 1
_VF_MAC = 1
_VF_VLAN = 2
_VF_SPOOFCHK = 4
_VF_LINK_STATE = 5
_VF_RATE = 6
_VF_TRUST = 9
_VF_NODE_GUID = 10
_VF_PORT_GUID = 11
_VF_VLAN_LIST = 12
_VF_VLAN_INFO = 1

_MAC = struct.Struct("=I32s")
_PLAIN_VLAN = struct.Struct("=III")
_VLAN = struct.Struct("=III2s2x")
"""The protocol is in network order; two bytes at the end make it as long as the kernel's structure."""
_RATE = struct.Struct("=III")
_NUMBER = struct.Struct("=II")
_GUID = struct.Struct("=I4xQ")
"""The number is in host order, its first byte on the wire being the highest."""
_UNKNOWN = 0xFFFFFFFF
"""What the kernel says where a driver does not tell a switch."""

_NO_GUID = (1 << 64) - 1
"""What some firmware keeps for none, as others keep zero."""

_PROTOCOLS = {VlanProtocol.CUSTOMER: b"\x81\x00", VlanProtocol.SERVICE: b"\x88\xa8"}
_STATES = {VfLinkState.AUTO: 0, VfLinkState.ENABLE: 1, VfLinkState.DISABLE: 2}


@dataclass(frozen=True, slots=True)
class VfRates:
    """Both limits of what a VF sends, in Mb/s; 0 is none. The kernel takes them together only."""

    minimum: int
    maximum: int


def vf_settings(payload: bytes) -> dict[int, VfSettings]:
    """What a PF's RTM_NEWLINK says of its VFs, by VF index. Empty where the list was not asked for or the
    link has no VFs; HwError where it is no such message."""
    if len(payload) < _LINK_HEADER:
        raise HwError("netlink: a link message without its header")
    listed = attributes(payload, _LINK_HEADER).get(_IFLA_VFINFO_LIST, b"")
    found: dict[int, VfSettings] = {}
    for kind, entry in attribute_list(listed):
        values = attributes(entry)
        mac = values.get(_VF_MAC, b"")
        if kind == _VF_INFO and len(mac) >= _MAC.size:
            # Room for 32 bytes, of which Ethernet has six.
            number, address = _MAC.unpack_from(mac)
            found[number] = _settings(values, address[:6])
    return found


def _settings(values: dict[int, bytes], address: bytes) -> VfSettings:
    rate = _unpacked(_RATE, values.get(_VF_RATE))
    spoof, trust = _switch(values.get(_VF_SPOOFCHK)), _switch(values.get(_VF_TRUST))
    state = _unpacked(_NUMBER, values.get(_VF_LINK_STATE))
    return VfSettings(
        mac=MacAddress(address.hex(":")) if any(address) else None,
        vlan=_vlan(values),
        min_rate=rate[1] if rate else None,
        max_rate=rate[2] if rate else None,
        spoof_check=spoof,
        trust=trust,
        node_guid=_guid(values.get(_VF_NODE_GUID)),
        port_guid=_guid(values.get(_VF_PORT_GUID)),
        link_state=next((name for name, number in _STATES.items() if state and number == state[1]), None),
    )


def _vlan(values: dict[int, bytes]) -> VfVlan | None:
    """From the list, which tells the protocol, or where that is not sent from the plain entry."""
    entries = attributes(values.get(_VF_VLAN_LIST, b""))
    found = _unpacked(_VLAN, entries.get(_VF_VLAN_INFO))
    if found is None:
        plain = _unpacked(_PLAIN_VLAN, values.get(_VF_VLAN))
        return VfVlan(id=plain[1], qos=plain[2]) if plain else None
    if not found[1]:
        # Without a VLAN some drivers (netdevsim) tell no protocol either, which is no VLAN all the same.
        return VfVlan(qos=found[2])
    protocol = next((name for name, raw in _PROTOCOLS.items() if raw == found[3]), None)
    return VfVlan(id=found[1], qos=found[2], protocol=protocol) if protocol else None


def _guid(raw: bytes | None) -> Guid | None:
    found = _unpacked(_GUID, raw)
    if not found or found[1] in (0, _NO_GUID):
        return None
    digits = f"{found[1]:016x}"
    return Guid(":".join(digits[at : at + 4] for at in range(0, 16, 4)))


def _switch(raw: bytes | None) -> bool | None:
    found = _unpacked(_NUMBER, raw)
    return bool(found[1]) if found and found[1] != _UNKNOWN else None


def _unpacked(form: struct.Struct, raw: bytes | None) -> tuple[Any, ...] | None:
    return form.unpack_from(raw) if raw is not None and len(raw) >= form.size else None


VfValue = MacAddress | Guid | VfVlan | VfRates | VfLinkState | bool | None


def vf_request(vf: int, setting: str, value: VfValue) -> bytes:
    """The attributes of an RTM_SETLINK to the PF that sets one thing of one VF.

    setting: `mac` (None: none given any more), `vlan`, `rates`, `spoof_check`, `trust`, `link_state`, or of
    InfiniBand `node_guid` and `port_guid` (None: none given any more), which the VF's driver takes up when it
    begins anew.
    """
    entry = attribute(_VF_INFO, _entry(vf, setting, value))
    return attribute(_IFLA_VFINFO_LIST, entry)


def _entry(vf: int, setting: str, value: VfValue) -> bytes:
    match setting, value:
        case "mac", None:
            return attribute(_VF_MAC, _MAC.pack(vf, b""))
        case "mac", str():
            return attribute(_VF_MAC, _MAC.pack(vf, bytes.fromhex(value.replace(":", ""))))
        case "vlan", VfVlan():
            packed = _VLAN.pack(vf, value.id, value.qos, _PROTOCOLS[value.protocol])
            return attribute(_VF_VLAN_LIST, attribute(_VF_VLAN_INFO, packed))
        case "rates", VfRates():
            return attribute(_VF_RATE, _RATE.pack(vf, value.minimum, value.maximum))
        case "spoof_check", bool():
            return attribute(_VF_SPOOFCHK, _NUMBER.pack(vf, value))
        case "trust", bool():
            return attribute(_VF_TRUST, _NUMBER.pack(vf, value))
        case "link_state", VfLinkState():
            return attribute(_VF_LINK_STATE, _NUMBER.pack(vf, _STATES[value]))
        case "node_guid" | "port_guid", None | str():
            number = int(value.replace(":", ""), 16) if value else 0
            return attribute(
                _VF_NODE_GUID if setting == "node_guid" else _VF_PORT_GUID, _GUID.pack(vf, number)
            )
    raise ValueError(f"a VF has no setting {setting} that can be {value!r}")
