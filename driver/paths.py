"""Every path of the driver's own and of its peers, under one root.

Invariant: what the driver makes, reads or talks to lies below that root, so the demo and the tests pass a
private one. Only the kernel's own may stay the machine's: /sys, /proc and the device nodes in /dev.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SUN_PATH_MAX = 107
"""Usable bytes of a unix socket's path: sockaddr_un.sun_path less its terminator."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Where things are. driver is the DRA driver name, also the name of its folders."""

    driver: str = "knd.internal"
    root: Path = Path("/")
    sysfs: Path = Path("/sys")
    proc: Path = Path("/proc")

    @property
    def state(self) -> Path:
        """Journal, ledger, program cache: must survive a reboot. Root only."""
        return self.root / "var/lib/knd"

    @property
    def run(self) -> Path:
        """Locks and the live files that the netns check reads: may go at reboot. Root only."""
        return self.root / "run/knd"

    @property
    def journal(self) -> Path:
        return self.state / "journal.sqlite"

    @property
    def ledger(self) -> Path:
        return self.state / "ledger.sqlite"

    @property
    def reserve(self) -> Path:
        """Keeps room beside the records for opening them."""
        return self.state / "reserve"

    @property
    def program_cache(self) -> Path:
        return self.state / "programs"

    @property
    def makings(self) -> Path:
        """One file per PF whose VFs the driver made."""
        return self.state / "sriov"

    @property
    def udev_rules(self) -> Path:
        """Read by udev when it has changed, which it looks for every few seconds."""
        return self.udev / "rules.d"

    @property
    def udev_control(self) -> Path:
        """There while udev runs."""
        return self.udev / "control"

    @property
    def udev(self) -> Path:
        """What it says of itself and of links."""
        return self.root / "run/udev"

    @property
    def networkd(self) -> Path:
        """Of systemd-networkd, and of udev for .link files."""
        return self.root / "run/systemd/network"

    def network_managers(self) -> Mapping[str, Path]:
        """By name: a folder that is there while it runs. Of the host: not to be seen from the container,
        nor needed by the agent."""
        return {
            "NetworkManager": self.root / "run/NetworkManager",
            "systemd-networkd": self.root / "run/systemd/netif",
        }

    def containerd_config(self) -> Path:
        """Of the host, as network_managers are."""
        return self.root / "etc/containerd/config.toml"

    @property
    def live(self) -> Path:
        """One file per claim UID: netns cookies of its live attachments, one decimal a line."""
        return self.run / "live"

    @property
    def running(self) -> Path:
        """What the agent tells other commands of itself."""
        return self.run / "agent.json"

    @property
    def netns_check(self) -> Path:
        """The createRuntime hook's helper, on the host, where the runtime can run it."""
        return self.state / "bin/knd-netns-check"

    @property
    def cdi(self) -> Path:
        return self.root / "var/run/cdi"

    @property
    def bpffs(self) -> Path:
        """Pins live here, in a folder of ours. Must be the host's bpffs; the agent never mounts."""
        return self.root / "sys/fs/bpf"

    @property
    def pins(self) -> Path:
        """A folder for each version's maps, and one for the links of all."""
        return self.bpffs / "knd"

    @property
    def nri_socket(self) -> Path:
        return self.root / "var/run/nri/nri.sock"

    @property
    def kubelet_registry(self) -> Path:
        return self.root / "var/lib/kubelet/plugins_registry"

    @property
    def registration_socket(self) -> Path:
        return self.kubelet_registry / f"{self.driver}-reg.sock"

    @property
    def plugin_dir(self) -> Path:
        return self.root / "var/lib/kubelet/plugins" / self.driver

    @property
    def dra_socket(self) -> Path:
        return self.plugin_dir / "dra.sock"

    @property
    def takeover_lock(self) -> Path:
        """flock of the one agent that may own the sockets, the pins and the journal."""
        return self.plugin_dir / "serialize.lock"

    def check_sockets(self) -> None:
        """ValueError naming the first socket path that is too long for the kernel."""
        for path in (self.registration_socket, self.dra_socket, self.nri_socket):
            length = len(bytes(path))
            if length > SUN_PATH_MAX:
                raise ValueError(
                    f"{path} is {length} bytes long and a socket path may have {SUN_PATH_MAX}: "
                    "use a shorter driver name or kubelet root"
                )
