"""A PF and a VF as igb and igbvf behave, seen on real ones: what the PF takes and refuses, that a VF's driver
keeps the address it was given, and takes up another one only when it is probed."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

from driver.execute.probe import Host
from driver.execute.target import Target
from driver.model import Preparation
from hw.errors import Refused, Unsupported
from hw.model import (
    DeviceKind,
    IfIndex,
    IfName,
    LinkFlags,
    LinkInfo,
    LinkSettings,
    MacAddress,
    PciAddress,
    PciIdentity,
    VfLinkState,
    VfSettings,
    VfVlan,
    VlanProtocol,
)
from hw.sysfs import Sysfs
from hw.udev import Udev
from hw.vf import VfRates
from kndsim.sysfs_tree import write_tree
from tests.unit.journal_values import preparation

PF, VF = PciAddress("0000:21:00.0"), PciAddress("0000:21:10.0")
IDENTITY = PciIdentity(VF, PF, 0)
OWN = MacAddress("2a:4d:2c:38:b0:56")
RANDOM = MacAddress("2a:4d:2c:00:00:99")
ASKED = MacAddress("02:00:5e:00:00:01")
FRESH = VfSettings(
    vlan=VfVlan(), min_rate=0, max_rate=0, spoof_check=True, trust=False, link_state=VfLinkState.AUTO
)
PF_LINK = LinkInfo(
    ifindex=IfIndex(4),
    name=IfName("ens1f0"),
    flags=LinkFlags.UP,
    link_type=1,
    mtu=1500,
    parent_bus="pci",
    parent_device=PF,
)
VF_LINK = replace(
    PF_LINK,
    ifindex=IfIndex(7),
    name=IfName("ens1f0v0"),
    flags=LinkFlags.MULTICAST,
    mac=OWN,
    parent_device=VF,
    altnames=("enp33s0f0v0",),
)
TREE = f"""
pci pci0000:20/0000:20:00.0/{VF} = 0x020000 0x8086 0x10ca driver=igbvf iommu_group=15
pci pci0000:20/0000:20:00.0/{PF} = 0x020000 0x8086 0x10c9 driver=igb
bus/pci/devices/{VF}/driver_override = (null)
folder bus/pci/drivers/igbvf
folder bus/pci/drivers/vfio-pci
folder bus/pci/drivers/uio
"""


class Igb(Sysfs):
    """sysfs and the host's links in one: what is bound decides what links there are."""

    def __init__(self, folder: Path, *, given: MacAddress | None = None) -> None:
        super().__init__(write_tree(folder, TREE))
        self.udev = folder.with_name("udev")
        self.host = Host(self, Udev(self.udev))
        self.vf: LinkInfo | None = VF_LINK
        self.held = replace(FRESH, mac=given)
        self.pinned = given is not None
        self.sent: list[tuple[str, object]] = []
        self.refused: dict[str, Exception] = {}
        self.probes = 0
        self.named_in: int | None = None
        """Looks at the links until udev, if it is on, has given a new netdev another name of its own."""
        self.makes_netdevs = True

    def with_udev(self) -> None:
        """It has named what there is."""
        (self.udev / "data").mkdir(parents=True)
        for name in ("control", f"data/n{VF_LINK.ifindex}"):
            (self.udev / name).touch()

    # --- links ----------------------------------------------------------------------------------------

    def dump(self) -> tuple[LinkInfo, ...]:
        if self.named_in is not None and self.vf is not None:
            self.named_in -= 1
            if self.named_in == 0:
                self.vf = replace(self.vf, altnames=(*self.vf.altnames, "enx2a4d2c38b056"))
                (self.udev / f"data/n{self.vf.ifindex}").touch()
        return (PF_LINK, *((self.vf,) if self.vf is not None else ()))

    def by_index(self, ifindex: IfIndex) -> LinkInfo | None:
        return next((link for link in self.dump() if link.ifindex == ifindex), None)

    def addresses(self, ifindex: IfIndex) -> tuple[()]:
        return ()

    def set_down(self, ifindex: IfIndex) -> None:
        assert self.vf is not None
        self.vf = replace(self.vf, flags=self.vf.flags & ~LinkFlags.UP)

    def remove_altnames(self, ifindex: IfIndex, names: tuple[str, ...]) -> None:
        assert self.vf is not None
        self.vf = replace(self.vf, altnames=tuple(n for n in self.vf.altnames if n not in names))

    def change(self, ifindex: IfIndex, **fields: Any) -> None:
        assert self.vf is not None
        assert ifindex == self.vf.ifindex
        mac = fields.get("mac")
        if mac is not None and self.pinned:
            # Also where it is the one it was given: the driver does not even look.
            raise Refused("change link", errno.EADDRNOTAVAIL)
        if mac is not None:
            self.held = replace(self.held, mac=mac)
        self.vf = replace(self.vf, **{k: v for k, v in fields.items() if not k.endswith("_flags")})

    def add_altnames(self, ifindex: IfIndex, names: tuple[str, ...]) -> None:
        assert self.vf is not None
        self.vf = replace(self.vf, altnames=(*self.vf.altnames, *names))

    def vf_settings(self, pf: IfIndex, vf: int) -> VfSettings:
        assert (pf, vf) == (PF_LINK.ifindex, 0)
        return self.held

    def set_vf(self, pf: IfIndex, vf: int, setting: str, value: object) -> None:
        assert (pf, vf) == (PF_LINK.ifindex, 0)
        if setting in self.refused:
            raise self.refused[setting]
        match value:
            case VfRates() if value.minimum:
                raise Refused("set rates", errno.EINVAL)
            case VfVlan(protocol=VlanProtocol.SERVICE):
                raise Unsupported("set vlan", errno.EPROTONOSUPPORT)
            case VfLinkState():
                raise Unsupported("set link_state", errno.EOPNOTSUPP)
            case VfRates():
                self.held = replace(self.held, min_rate=value.minimum, max_rate=value.maximum)
            case _:
                self.held = replace(self.held, **{setting: value})
        if setting == "mac":
            self.pinned = value is not None
        self.sent.append((setting, value))

    # --- binding --------------------------------------------------------------------------------------

    def write(self, path: str, value: str, *, timeout: float = 1.0) -> None:
        driver = self.root / f"bus/pci/devices/{VF}/driver"
        if path.endswith("/unbind"):
            driver.unlink()
            self.vf = None
            if not self.pinned:
                self.held = replace(self.held, mac=None)
        elif path == "bus/pci/drivers_probe":
            wanted = (self.text(f"bus/pci/devices/{VF}/driver_override") or "").strip()
            assert wanted
            driver.symlink_to(f"../../../../bus/pci/drivers/{wanted}")
            if wanted == "igbvf" and self.makes_netdevs:
                self.probes += 1
                index = IfIndex(7 + 10 * self.probes)
                mac = self.held.mac or RANDOM
                self.vf = replace(VF_LINK, ifindex=index, name=IfName("eth0"), mac=mac, altnames=())
        else:
            (self.root / path).write_text(value)


def prepared(igb: Igb, **fields: Any) -> Preparation:
    """As a prepare records it. fields: of the Preparation."""
    made: Preparation = replace(
        preparation(0),
        identity=IDENTITY,
        kind=DeviceKind.VF,
        baseline=LinkSettings.of(VF_LINK, kind=DeviceKind.VF),
        home_driver="igbvf",
        vf_baseline=igb.held,
    )
    return replace(made, **fields)


def target(igb: Igb, made: Preparation) -> Target:
    links: Any = igb
    return Target(preparation=made, attachment=None, home=links, home_netns=links)
