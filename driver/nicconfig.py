"""What a claim asks of one device, after the configs of its class and of itself were merged.

Invariant: frozen values without I/O. They are part of the model, and are imported from there.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from driver.rdma import NO_WISHES, RdmaConfig
from driver.traffic import NO_QOS, QosConfig
from hw.model import IfName, InterfaceAddress, MacAddress, VfLinkState, VfVlan


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceConfig:
    """Section `interface`. None: keep what the device has; name None: the device's own host name."""

    name: IfName | None = None
    mtu: int | None = None
    hardware_address: MacAddress | None = None
    addresses: tuple[InterfaceAddress, ...] = ()


class VfDriver(enum.StrEnum):
    """Who drives a device while a pod has it: the node's kernel, or the pod itself through vfio."""

    KERNEL = "kernel"
    VFIO = "vfio-pci"


@dataclass(frozen=True, slots=True, kw_only=True)
class VfConfig:
    """Section `vf`. None: as it is. Rates in Mb/s, 0 for none."""

    driver: VfDriver = VfDriver.KERNEL
    vlan: VfVlan | None = None
    spoof_check: bool | None = None
    trust: bool | None = None
    link_state: VfLinkState | None = None
    min_rate: int | None = None
    max_rate: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SubinterfaceConfig:
    """Section `subinterface`: of the interface that a share of a device is."""

    vlan: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NicConfig:
    """A NetworkDeviceConfig after merging class and claim, for one device."""

    interface: InterfaceConfig = InterfaceConfig()
    vf: VfConfig = VfConfig()
    rdma: RdmaConfig = NO_WISHES
    qos: QosConfig = NO_QOS
    subinterface: SubinterfaceConfig = SubinterfaceConfig()

    @property
    def by_file(self) -> bool:
        """The pod gets device files and no netdev: nothing is moved, renamed or counted by BPF."""
        return self.vf.driver is VfDriver.VFIO

    def on_pf(self) -> Mapping[str, object]:
        """What is asked of a VF that its PF must set, by the names of VfSettings."""
        vf = self.vf
        least, most = vf.min_rate, vf.max_rate
        if self.qos.on_pf:
            least, most = self.qos.egress_min_rate or least, self.qos.egress_rate or most
        wishes = {
            "vlan": vf.vlan,
            "mac": self.interface.hardware_address,
            "min_rate": least,
            "max_rate": most,
            "spoof_check": vf.spoof_check,
            "trust": vf.trust,
            "link_state": vf.link_state,
        }
        return {name: value for name, value in wishes.items() if value is not None}

    def field_of(self, name: str) -> str:
        """Where the user asked for what on_pf() calls name."""
        if name == "min_rate" and self.qos.on_pf and self.qos.egress_min_rate:
            return "qos.egress.minRate"
        if name == "max_rate" and self.qos.on_pf and self.qos.egress_rate:
            return BY_SIZE if self.qos.by_size else "qos.egress.rate"
        return VF_FIELDS[name]


BY_SIZE = "its size (node policy, bandwidth)"
"""Where the node policy asked for an egress rate."""
VF_FIELDS: Mapping[str, str] = {
    "vlan": "vf.vlan",
    "mac": "interface.hardwareAddress",
    "min_rate": "vf.minRate",
    "max_rate": "vf.maxRate",
    "spoof_check": "vf.spoofCheck",
    "trust": "vf.trust",
    "link_state": "vf.linkState",
}
"""Of VfSettings, as users write them."""
