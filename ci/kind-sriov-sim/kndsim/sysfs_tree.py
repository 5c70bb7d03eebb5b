"""A sysfs made of plain files, from a text that describes it.

Invariant: what is written is exactly what the text says, below the given root. One entry a line:

    folder path/                 a folder, with its parents
    path = text                  a file; the text may be empty
    path -> target               a link, as sysfs writes it
    pci CHAIN = CLASS VENDOR DEVICE [key=value ...]
                                 a PCI function at the end of a chain of bridges, in devices/ and in
                                 bus/pci/devices/; keys are files of it (numa_node=0) or driver=NAME,
                                 iommu_group=N, which become links
    netdev ADDRESS NAME [key=value ...]
                                 a netdev of that function and its files
    vf PF N ADDRESS              virtfnN and physfn between two functions that are there already
    rdma NAME ADDRESS [key=value ...]
                                 an RDMA device of that function; keys are files of it, `/` allowed
    gid NAME PORT INDEX ADDRESS NETDEV TYPE
                                 an entry of the GID table of an RDMA device that is there already; ADDRESS
                                 in any form, NETDEV `-` for none, TYPE as the kernel's words

Empty lines and lines that begin with # are left out. Bridges of a chain are made as functions of class
0x060400 where the text has not made them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from pathlib import Path

DEVICES = "bus/pci/devices"
_BRIDGE = {"class": "0x060400", "vendor": "0x8086", "device": "0x2030"}


def write_tree(root: Path, text: str) -> Path:
    """Write the described tree below root, which is made; returns root. ValueError names a bad line."""
    builder = _Builder(root)
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if entry and not entry.startswith("#"):
            try:
                builder.add(entry)
            except (ValueError, OSError, IndexError) as error:
                raise ValueError(f"line {number}, {entry!r}: {error}") from error
    return root


def vf_farm(pfs: int, vfs_per_pf: int) -> str:
    """The text of a node with many VFs, for measuring. Each PF is below a switch of its own."""
    lines: list[str] = []
    for pf in range(pfs):
        bus = f"{0x20 + pf:02x}"
        chain = f"pci0000:{bus}/0000:{bus}:00.0/1000:{bus}:00.0/1000:{bus}:01.0"
        of_pf = f"0000:{bus}:02.0"
        facts = "numa_node=0 driver=mlx5_core"
        lines += (
            f"pci {chain}/{of_pf} = 0x020000 0x15b3 0x101b sriov_totalvfs={vfs_per_pf} {facts}",
            f"netdev {of_pf} pf{pf} speed=100000 dev_port=0",
        )
        for vf in range(vfs_per_pf):
            number = pf * 1000 + vf
            of_vf = f"0001:{bus}:{vf // 8:02x}.{vf % 8}"
            lines += (
                f"pci {chain}/{of_vf} = 0x020000 0x15b3 0x101c iommu_group={number} {facts}",
                f"netdev {of_vf} pf{pf}v{vf} speed=-1 dev_port=0",
                f"vf {of_pf} {vf} {of_vf}",
                f"rdma mlx5_{number} {of_vf} ports/1/link_layer=Ethernet node_guid=1:2:3:4",
            )
    return "\n".join(lines)


class _Builder:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._chains: dict[str, str] = {}
        self._words: Mapping[str, Callable[[str], None]] = {
            "folder": self._folder,
            "pci": self._pci,
            "netdev": self._netdev,
            "vf": self._vf,
            "rdma": self._rdma,
            "gid": self._gid,
        }
        root.mkdir(parents=True, exist_ok=True)

    def add(self, entry: str) -> None:
        word, _, rest = entry.partition(" ")
        if word in self._words:
            self._words[word](rest.strip())
        elif " -> " in entry:
            path, _, target = entry.partition(" -> ")
            self._link(path.strip(), target.strip())
        elif "=" in entry:
            path, _, text = entry.partition("=")
            self._file(path.strip(), text.strip())
        else:
            raise ValueError("not an entry")

    def _file(self, path: str, text: str) -> None:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")

    def _link(self, path: str, target: str) -> None:
        link = self._root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)

    def _folder(self, path: str) -> None:
        (self._root / path).mkdir(parents=True, exist_ok=True)

    def _pci(self, rest: str) -> None:
        chain, _, facts = rest.partition(" = ")
        names = chain.strip().split("/")
        for depth in range(2, len(names)):
            self._bridge("/".join(names[:depth]))
        kind, vendor, device, *keys = facts.split()
        self._function(chain.strip(), {"class": kind, "vendor": vendor, "device": device, **_pairs(keys)})

    def _bridge(self, chain: str) -> None:
        if chain.rpartition("/")[2] not in self._chains:
            self._function(chain, _BRIDGE)

    def _function(self, chain: str, keys: Mapping[str, str]) -> None:
        address = chain.rpartition("/")[2]
        self._chains[address] = chain
        self._link(f"{DEVICES}/{address}", f"../../../devices/{chain}")
        for key, value in keys.items():
            up = "../" * (chain.count("/") + 2)
            if key == "driver":
                self._link(f"devices/{chain}/driver", f"{up}bus/pci/drivers/{value}")
            elif key == "iommu_group":
                self._link(f"devices/{chain}/iommu_group", f"{up}kernel/iommu_groups/{value}")
            else:
                self._file(f"devices/{chain}/{key}", value)

    def _netdev(self, rest: str) -> None:
        address, name, *keys = rest.split()
        base = f"devices/{self._chains[address]}/net/{name}"
        self._folder(base)
        for key, value in _pairs(keys).items():
            self._file(f"{base}/{key}", value)

    def _vf(self, rest: str) -> None:
        pf, number, address = rest.split()
        self._link(f"devices/{self._chains[pf]}/virtfn{number}", f"../{address}")
        self._link(f"devices/{self._chains[address]}/physfn", f"../{pf}")

    def _rdma(self, rest: str) -> None:
        name, address, *keys = rest.split()
        base = f"devices/{self._chains[address]}/infiniband/{name}"
        self._folder(base)
        self._link(f"class/infiniband/{name}", f"../../{base}")
        for key, value in _pairs(keys).items():
            self._file(f"{base}/{key}", value)

    def _gid(self, rest: str) -> None:
        name, port, index, address, netdev, kind = rest.split(maxsplit=5)
        base = f"class/infiniband/{name}/ports/{port}"
        self._file(f"{base}/gids/{index}", ipaddress.IPv6Address(address).exploded)
        self._file(f"{base}/gid_attrs/types/{index}", kind)
        if netdev != "-":
            self._file(f"{base}/gid_attrs/ndevs/{index}", netdev)


def _pairs(keys: list[str]) -> dict[str, str]:
    return {key: value for key, _, value in (word.partition("=") for word in keys)}
