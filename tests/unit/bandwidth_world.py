"""PFs that give out their bandwidth in sizes, as discovered, offered and held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from driver.inventory import build
from driver.model import (
    Device,
    DeviceName,
    NicConfig,
    Preparation,
    VfConfig,
)
from driver.policy import NodePolicy
from driver.policy.bandwidth import BandwidthRule, SizeClass
from driver.sharing import Node, Sharing
from driver.traffic import QosConfig
from hw.model import (
    DeviceKind,
    HwDevice,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    PciAddress,
    PciFacts,
    PciIdentity,
    VfSettings,
)
from tests.unit.claims_world import device
from tests.unit.journal_values import preparation

PORT = PciAddress("0000:21:00.0")
PF_NAME = DeviceName("pci-0000-21-00-0")
SET = "pci-0000-21-00-0"


def vf_identity(index: int) -> PciIdentity:
    return PciIdentity(PciAddress(f"0000:21:10.{index}"), PORT, index)


def vf_name(index: int) -> DeviceName:
    return DeviceName(f"pci-0000-21-10-{index}")


def link(ifindex: int, name: str) -> LinkInfo:
    return LinkInfo(ifindex=IfIndex(ifindex), name=IfName(name), flags=LinkFlags(0), link_type=1, mtu=1500)


def port(vfs: int, speed: int | None = 25_000) -> list[HwDevice]:
    """A PF and its VFs, VFs first: the order of discovery is nobody's promise."""
    pf = HwDevice(
        kind=DeviceKind.PF,
        identity=PciIdentity(PORT),
        link=link(3, "ens1"),
        pci=PciFacts(address=PORT, vendor="8086", product="10c9", driver="igb"),
        speed_mbps=speed,
        total_vfs=7,
    )
    parts = [
        replace(
            pf,
            kind=DeviceKind.VF,
            identity=vf_identity(index),
            link=link(10 + index, f"ens1v{index}"),
            pci=PciFacts(address=vf_identity(index).address, vendor="8086", product="10ca", driver="igbvf"),
            total_vfs=None,
        )
        for index in range(vfs)
    ]
    return [*parts, pf]


def policy(*sizes: tuple[int, int | None], speed: int | None = None, percent: int = 100) -> NodePolicy:
    classes = tuple(SizeClass(rate=rate, vfs=vfs) for rate, vfs in sizes)
    return NodePolicy(port_bandwidth=(BandwidthRule(sizes=classes, speed=speed, percent=percent),))


def held(made: Device, **fields: Any) -> Preparation:
    record = preparation(0)
    sized = made.portion.size if made.portion is not None and made.kind is DeviceKind.VF else None
    return replace(
        record,
        key=replace(record.key, device=made.name),
        identity=made.identity,
        kind=made.kind,
        capacities=made.capacities,
        attributes=made.attributes,
        **({"size": sized} | fields),
    )


def sharing(devices: Mapping[DeviceName, Device], *holders: Preparation) -> Sharing:
    return Sharing(Node(devices=devices, held={each.key.device: each for each in holders}, quarantined={}))


def asked(vf: VfConfig | None = None, **fields: Any) -> NicConfig:
    return NicConfig(qos=QosConfig(**fields), vf=vf or VfConfig())


def present(vfs: int, made: NodePolicy, speed: int = 25_000) -> dict[DeviceName, Device]:
    """As discovered, with what a closer look at a VF adds."""
    return {
        name: replace(
            device(name, 20 + number),
            kind=each.kind,
            identity=each.identity,
            attributes=each.attributes,
            capacities=each.capacities,
            portion=each.portion,
            withheld=each.withheld,
            vf=VfSettings(max_rate=0) if each.kind is DeviceKind.VF else None,
            driver="igbvf",
        )
        for number, (name, each) in enumerate(build(port(vfs, speed), made).by_name.items())
    }
