"""PFs as values, for tests of what is to be done about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driver.model import BootId, DeviceName
from driver.policy.sriov import PfRule
from driver.provision.plan import Known, settings_of
from driver.provision.records import Making
from hw.model import IfIndex, IfName, LinkFlags, LinkInfo, MacAddress, PciAddress, PciFacts
from hw.ports import SriovPort

BOOT = BootId("5c4c5b30-0000-4000-8000-000000000001")
OLD_BOOT = BootId("5c4c5b30-0000-4000-8000-000000000000")
PF = PciAddress("0000:21:00.0")


def vf_address(index: int, pf: PciAddress = PF) -> PciAddress:
    return PciAddress(f"{pf[:8]}10.{index}")


def pf_link(index: int = 5, **fields: Any) -> LinkInfo:
    given: dict[str, Any] = {
        "ifindex": IfIndex(index),
        "name": IfName(f"pf{index}"),
        "flags": LinkFlags(0),
        "link_type": 1,
        "mtu": 1500,
        "permanent_mac": MacAddress(f"52:54:00:00:00:{index:02x}"),
    }
    return LinkInfo(**(given | fields))


def port(num: int = 0, address: PciAddress = PF, **fields: Any) -> SriovPort:
    given: dict[str, Any] = {
        "address": address,
        "facts": PciFacts(address=address, vendor="8086", product="10c9", driver="igb", numa_node=0),
        "total_vfs": 7,
        "num_vfs": num,
        "vfs": {index: vf_address(index, address) for index in range(num)},
        "links": (pf_link(),),
    }
    return SriovPort(**(given | fields))


def making(rule: PfRule, **fields: Any) -> Making:
    given: dict[str, Any] = {
        "address": PF,
        "boot_id": BOOT,
        "vfs": rule.vfs,
        "previous": 0,
        "settings": settings_of(rule),
        "done": True,
        "autoprobe": True,
        "was_up": False,
        "mtu": 1500,
    }
    return Making(**(given | fields))


def known(*makings: Making, held: Mapping[str, str] | None = None) -> Known:
    return Known(
        makings={each.address: each for each in makings},
        boot_id=BOOT,
        held={DeviceName(name): why for name, why in (held or {}).items()},
    )
