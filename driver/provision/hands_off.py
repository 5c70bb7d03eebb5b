"""Rules that keep the node's own network managers off the VFs that this driver makes.

Invariant: there before the VFs are, in folders that go at a reboot; they are about VFs of the named PFs and
nothing else. udev marks such a netdev with properties, which NetworkManager and systemd-networkd ask it for
when a netdev appears: a networkd that runs reads no new file until it is told to. Its file is for those that
do not know that property yet (before systemd 256); udev's naming matches ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from driver.errors import NotNow
from driver.paths import Paths
from driver.whole_file import replace_whole
from hw.model import PfAddress, bus_of

NOTICE_SECONDS = 3.2
"""udev looks for changed rules when an event comes, but not more often than every three seconds."""
_PROPERTY = "KND_VF"
_MANAGER = "internal.knd"
"""Any but its own name keeps networkd away."""
_RULE = "10-knd-vf.rules"
_LINK = "10-knd-vf.link"
_NETWORK = "10-knd-vf.network"
_HEAD = "# Written by knd; see its policy's section sriov. Goes with `knd cleanup` and at a reboot.\n"


def write(paths: Paths, pfs: Iterable[PfAddress]) -> bool:
    """Have the rules be there for the VFs of these PFs; True if they are new. NotNow if they cannot be."""
    changed = False
    for path, text in _files(paths, sorted(pfs)).items():
        try:
            if _read(path) != text:
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                replace_whole(path, text, 0o644)
                changed = True
        except OSError as error:
            raise NotNow(
                f"{path} cannot be written, and without it the node's network managers would take the VFs: "
                f"{error.strerror}"
            ) from error
    return changed


def are_there(paths: Paths, pfs: Iterable[PfAddress]) -> bool:
    """Whether the rules say what write would have them say, of these PFs at least."""
    wanted = _files(paths, sorted(pfs))
    return all(line in (_read(path) or "") for path, text in wanted.items() for line in text.splitlines())


def remove(paths: Paths) -> None:
    for path in _files(paths, ()):
        with contextlib.suppress(OSError):
            path.unlink()


def _files(paths: Paths, pfs: Iterable[PfAddress]) -> Mapping[Path, str]:
    return {
        paths.networkd / _LINK: f"{_HEAD}[Match]\nProperty={_PROPERTY}=1\n\n"
        "[Link]\nNamePolicy=keep\nMACAddressPolicy=none\n",
        paths.networkd / _NETWORK: f"{_HEAD}[Match]\nProperty={_PROPERTY}=1\n\n[Link]\nUnmanaged=yes\n",
        # Last, since it is what makes the others apply.
        paths.udev_rules / _RULE: _HEAD + "".join(map(_rule, pfs)),
    }


def _rule(pf: PfAddress) -> str:
    """A VF's netdev is told by its PF's address: its own is not known yet, nor is its name."""
    vf = f'ATTR{{device/physfn/uevent}}=="*PCI_SLOT_NAME={pf}*"'
    if bus_of(pf) == "netdevsim":
        vf = f'KERNELS=="{pf}", ATTR{{phys_port_name}}=="pf*vf*"'
    marks = f'ENV{{{_PROPERTY}}}="1", ENV{{NM_UNMANAGED}}="1", ENV{{ID_NET_MANAGED_BY}}="{_MANAGER}"'
    return f'SUBSYSTEM=="net", {vf}, {marks}\n'


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
