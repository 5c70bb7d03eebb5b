"""A PCI core and an rtnetlink for making VFs: files that behave as the kernel's, and links in memory.

Played as the real ones were seen to behave (igb): a number can only be written from none or to none, VFs need
their PF up, nothing is probed with sriov_drivers_autoprobe off but by driver_override, a VF that was given no
address comes up with another one each time, and one takes its address only when its driver is bound.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hw.errors import Busy, NotFound, Refused, Unsupported
from hw.model import IfIndex, IfName, LinkFlags, LinkInfo, MacAddress, PciAddress, VfSettings, VfVlan
from hw.sysfs import Sysfs
from kndsim.sysfs_tree import write_tree

PF = PciAddress("0000:21:00.0")
SECOND = PciAddress("0000:22:00.0")
PF_INDEX = {PF: IfIndex(5), SECOND: IfIndex(6)}
BUS = "bus/pci/devices"
TREE = (
    "".join(
        f"""
pci pci0000:20/0000:20:00.{number}/{pf} = 0x020000 0x8086 0x10c9 driver=igb numa_node={number} \
sriov_totalvfs=7 sriov_numvfs=0 sriov_drivers_autoprobe=1
folder {BUS}/{pf}/net/pf{number}
"""
        for number, pf in enumerate((PF, SECOND))
    )
    + "folder bus/pci/drivers/igbvf\n"
)


class Killed(BaseException):
    """The process is dead: what it would do after this never happens."""


class Kernel(Sysfs):
    """Sysfs and Links at once; `links` is what is in the host's namespace."""

    def __init__(self, root: Path) -> None:
        super().__init__(write_tree(root, TREE))
        self.links: dict[IfIndex, LinkInfo] = {
            index: LinkInfo(
                ifindex=index,
                name=IfName(f"pf{number}"),
                flags=LinkFlags(0),
                link_type=1,
                mtu=1500,
                mac=MacAddress(f"52:54:00:00:00:1{number}"),
                permanent_mac=MacAddress(f"52:54:00:00:00:1{number}"),
                parent_bus="pci",
                parent_device=pf,
            )
            for number, (pf, index) in enumerate(PF_INDEX.items())
        }
        self.given: dict[tuple[IfIndex, int], VfSettings] = {}
        self.first_macs: dict[PciAddress, MacAddress | None] = {}
        """What each VF came up with, which is what the first frame has."""
        self.changes: list[str] = []
        self.die_at: int | None = None
        self.refuse: dict[str, Exception] = {}
        """By the beginning of a change, as in changes."""
        self.deaf = 0
        """How many times a PF answers before it does what it was told."""
        self._dead = False
        self._macs = itertools.count()
        self._indexes = itertools.count(100)

    # --- dying --------------------------------------------------------------------------------------

    def revive(self) -> None:
        self._dead, self.die_at = False, None

    def _change(self, what: str) -> None:
        """Every change comes through here; the ordered one is not done any more."""
        if self._dead:
            raise Killed
        if self.die_at is not None and len(self.changes) == self.die_at:
            self._dead = True
            raise Killed
        self.changes.append(what)
        for beginning, error in self.refuse.items():
            if what.startswith(beginning):
                raise error

    # --- sysfs --------------------------------------------------------------------------------------

    def write(self, path: str, value: str, *, timeout: float = 1.0) -> None:
        del timeout
        self._change(f"{path.rpartition('/')[2]} {value.strip()}")
        if path.endswith("/sriov_numvfs"):
            self._number(PciAddress(path.split("/")[-2]), int(value))
        elif path == "bus/pci/drivers_probe":
            self._probe(PciAddress(value))
        elif path.endswith("/unbind"):
            self._unbind(PciAddress(value))
        else:
            (self.root / path).write_text(value)

    def vfs(self, pf: PciAddress) -> list[PciAddress]:
        count = self.integer(f"{BUS}/{pf}/sriov_numvfs") or 0
        return [vf_address(pf, index) for index in range(count)]

    def _number(self, pf: PciAddress, number: int) -> None:
        before = self.vfs(pf)
        if number and before:
            raise Busy(f"write {number}", 16)
        if number > 7:
            raise Refused(f"write {number}", 34)
        index = PF_INDEX[pf]
        for place, vf in enumerate(before):
            self._unbind(vf)
            (self.root / BUS / vf).unlink()
            shutil.rmtree(self.root / "devices/pci0000:20" / vf)
            (self.root / BUS / pf / f"virtfn{place}").unlink()
            self.given.pop((index, place))
        (self.root / BUS / pf / "sriov_numvfs").write_text(f"{number}\n")
        for place in range(number):
            vf = vf_address(pf, place)
            home = self.root / "devices/pci0000:20" / vf
            home.mkdir()
            for name, text in {"class": "0x020000", "vendor": "0x8086", "device": "0x10ca"}.items():
                (home / name).write_text(text)
            (home / "driver_override").write_text("(null)")
            (home / "physfn").symlink_to(f"../{pf}")
            (self.root / BUS / vf).symlink_to(f"../../../devices/pci0000:20/{vf}")
            (self.root / BUS / pf / f"virtfn{place}").symlink_to(f"../{vf}")
            self.given[index, place] = VfSettings(spoof_check=True, trust=False, vlan=VfVlan())
            if not self.links[index].up:
                raise Refused("the PF is down and its VFs are dead", 5)
            if self.integer(f"{BUS}/{pf}/sriov_drivers_autoprobe"):
                self._bind(vf, "igbvf")

    def _probe(self, vf: PciAddress) -> None:
        pf = PciAddress(self.target_name(f"{BUS}/{vf}/physfn") or "")
        wanted = (self.text(f"{BUS}/{vf}/driver_override") or "").strip("\0\n ")
        wanted = "" if wanted == "(null)" else wanted
        if not wanted and not self.integer(f"{BUS}/{pf}/sriov_drivers_autoprobe"):
            raise NotFound("no driver may take it")
        if (self.root / "bus/pci/drivers/igbvf").exists():
            self._bind(vf, wanted or "igbvf")

    def _bind(self, vf: PciAddress, driver: str) -> None:
        home = self.root / BUS / vf
        if (home / "driver").is_symlink():
            return
        (home / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")
        pf = PciAddress(self.target_name(f"{BUS}/{vf}/physfn") or "")
        place = next(place for place in range(7) if vf_address(pf, place) == vf)
        given = self.given[PF_INDEX[pf], place].mac
        mac = given or MacAddress(f"02:00:00:00:00:{next(self._macs):02x}")
        self.first_macs[vf] = mac
        index = IfIndex(next(self._indexes))
        name = IfName(f"eth{index - 100}")
        (home / "net" / name).mkdir(parents=True)
        self.links[index] = LinkInfo(
            ifindex=index,
            name=name,
            flags=LinkFlags(0),
            link_type=1,
            mtu=1500,
            mac=mac,
            parent_bus="pci",
            parent_device=vf,
        )

    def _unbind(self, vf: PciAddress) -> None:
        home = self.root / BUS / vf
        (home / "driver").unlink(missing_ok=True)
        shutil.rmtree(home / "net", ignore_errors=True)
        for index, link in list(self.links.items()):
            if link.parent_device == vf:
                del self.links[index]

    # --- links --------------------------------------------------------------------------------------

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def dump(self) -> tuple[LinkInfo, ...]:
        return tuple(self.links.values())

    def all_addresses(self) -> tuple[Any, ...]:
        return ()

    def default_route_links(self) -> frozenset[IfIndex]:
        return frozenset()

    def by_index(self, ifindex: IfIndex) -> LinkInfo | None:
        return self.links.get(ifindex)

    def set_up(self, ifindex: IfIndex) -> None:
        self._change(f"up {ifindex}")
        self._set(ifindex, flags=LinkFlags.UP)

    def set_down(self, ifindex: IfIndex) -> None:
        self._change(f"down {ifindex}")
        self._set(ifindex, flags=LinkFlags(0))

    def change(self, ifindex: IfIndex, **fields: Any) -> None:
        self._change(f"change {fields}")
        if fields.get("name") in {link.name for link in self.links.values()}:
            raise Refused("rename", 17)
        self._set(ifindex, **fields)

    def _set(self, ifindex: IfIndex, **fields: Any) -> None:
        self.links[ifindex] = replace(self.links[ifindex], **fields)

    def set_vf(self, pf: IfIndex, vf: int, setting: str, value: Any) -> None:
        self._change(f"vf {vf} {setting} {value}")
        if self.deaf:
            self.deaf -= 1
            return
        self.given[pf, vf] = replace(self.given[pf, vf], **{setting: value})

    def vf_settings(self, pf: IfIndex, vf: int) -> VfSettings | None:
        return self.given.get((pf, vf))

    # --- for comparing ------------------------------------------------------------------------------

    def picture(self) -> Mapping[str, Any]:
        """All that a restart or a way back must find the same, indexes and chance apart."""
        return {
            "links": sorted(
                (link.name, link.mac, link.mtu, link.up, link.parent_device) for link in self.links.values()
            ),
            "vfs": {pf: self.vfs(pf) for pf in PF_INDEX},
            "given": dict(self.given),
            "autoprobe": {pf: self.integer(f"{BUS}/{pf}/sriov_drivers_autoprobe") for pf in PF_INDEX},
            "drivers": {vf: self.target_name(f"{BUS}/{vf}/driver") for pf in PF_INDEX for vf in self.vfs(pf)},
        }


def vf_address(pf: PciAddress, index: int) -> PciAddress:
    return PciAddress(f"{pf[:8]}10.{index}")


UNSUPPORTED = Unsupported("set trust", 95)
