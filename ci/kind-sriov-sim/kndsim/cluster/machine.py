"""Nodes as namespaces of this machine: each has its own network, mounts, processes and root folder.

Invariant: the machine itself is not changed. Everything made here is a namespace, a process in one, a cgroup
folder or a file below the cluster's folder, and the keeper (kndsim.cluster.keeper) ends all of it when this
process does, however that happens. No link leads from a node to the machine's network.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from pyroute2 import IPRoute

from kndsim.cluster.conf import SERVICE_ADDRESS
from kndsim.cluster.forward import forwarded
from kndsim.cluster.ground import Devices
from kndsim.cluster.machine_place import NamespacePlace
from kndsim.links import SimNetns, netns, soft_link, veth_pair

NETDEVS = tuple(f"net-{number}" for number in range(8))
UPLINK = "mac-0"
CABLE = "cable-0"
_HERE = Path(__file__).parent
_CGROUPS = Path("/sys/fs/cgroup")
_CAP_SYS_RESOURCE = 24
_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
"""kubelet would set these on the whole machine."""


class MachineFailed(Exception):
    """A sentence for the reader: which node could not be made, and what was said."""


class Keeper:
    """The process that takes all down; see kndsim.cluster.keeper."""

    def __init__(self) -> None:
        argv = [sys.executable, "-I", str(_HERE / "keeper.py")]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def keep(self, kind: str, value: object) -> None:
        """Returns when it is sure to be taken down. kind: "process", "cgroup" or "folder"."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{kind} {value}\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise MachineFailed("the keeper of this cluster ended before its time")

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        """All is gone when this returns."""
        with self._process:
            pass


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineGround:
    """kndsim.cluster.ground.Ground in namespaces."""

    place: NamespacePlace
    netns: SimNetns
    address: str
    cgroup_root: str
    may_raise_oom: bool
    hook_seconds: int = 2
    devices: Devices
    shared: tuple[Path, ...]

    @property
    def root(self) -> Path:
        return self.place.root

    @property
    def enter(self) -> str:
        """The command with which a person gets a shell there."""
        return f"nsenter --target {self.place.pid} --net --mount --pid"

    def bring(self, path: Path) -> PurePosixPath:
        path = path.resolve()
        if any(path.is_relative_to(folder) for folder in self.shared):
            return PurePosixPath(path)
        there = PurePosixPath("/var/tmp", path.name)
        shutil.copy(path, self.root / str(there).lstrip("/"))
        return there

    def forward(self, port: int) -> AbstractContextManager[int]:
        # A socket belongs for ever to the namespace it was made in.
        return forwarded(lambda: self.netns.run(lambda: socket.create_connection((self.address, port), 10)))


@contextlib.contextmanager
def grounds(
    names: Sequence[str], folder: Path, shared: Sequence[Path], first: Path
) -> Iterator[list[MachineGround]]:
    """One for each name. folder: of the cluster, removed at the end. first: the program that stays as the
    first process. shared: folders that the nodes see, read-only, by the same paths."""
    if os.geteuid() != 0:
        raise MachineFailed("a cluster on this machine needs root: it makes namespaces and mounts")
    # What is in the stack is waited for, or taken apart, once the keeper has ended the processes.
    with ExitStack() as stack, Keeper() as keeper:
        keeper.keep("folder", folder)
        wire = stack.enter_context(netns())
        for bridge in ("cable", "fabric"):
            stack.enter_context(soft_link(bridge, "bridge", where=wire))
            wire.netlink(partial(_up, name=bridge))
        made = []
        for number, name in enumerate(names, 1):
            home = stack.enter_context(netns())
            _lay_network(stack, wire, home, number, len(names))
            made.append(_ground(stack, keeper, home, number, name, folder, tuple(shared), first))
        yield made


def _up(ipr: IPRoute, name: str) -> None:
    ipr.link("set", ifname=name, state="up")


def _plug(ipr: IPRoute, name: str, bridge: str) -> None:
    ipr.link("set", ifname=name, master=ipr.link_lookup(ifname=bridge)[0], state="up")


def _address(number: int) -> str:
    return f"10.88.0.{number}"


def _lay_network(stack: ExitStack, wire: SimNetns, home: SimNetns, number: int, nodes: int) -> None:
    """The links of one node, their far ends in the wire, and the routes to the other nodes' pods."""
    for bridge, names in (("cable", (CABLE,)), ("fabric", (*NETDEVS, UPLINK))):
        for name in names:
            far = f"n{number}-{name}"
            stack.enter_context(veth_pair(name, far, where=home, peer_where=wire))
            wire.netlink(partial(_plug, name=far, bridge=bridge))

    def routes(ipr: IPRoute) -> None:
        _up(ipr, "lo")
        _up(ipr, CABLE)
        _up(ipr, UPLINK)
        index = ipr.link_lookup(ifname=CABLE)[0]
        ipr.addr("add", index=index, address=_address(number), prefixlen=24)
        if number == 1:
            ipr.addr("add", index=1, address=SERVICE_ADDRESS, prefixlen=32)
        else:
            ipr.route("add", dst=f"{SERVICE_ADDRESS}/32", gateway=_address(1))
        for other in range(1, nodes + 1):
            if other != number:
                ipr.route("add", dst=f"10.244.{other}.0/24", gateway=_address(other))
        # kubelet takes no node for one that has no default route; nothing answers there.
        ipr.route("add", family=socket.AF_INET, dst="0.0.0.0/0", oif=index)

    home.netlink(routes)
    home.run(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))


def _ground(
    stack: ExitStack,
    keeper: Keeper,
    home: SimNetns,
    number: int,
    name: str,
    folder: Path,
    shared: tuple[Path, ...],
    first: Path,
) -> MachineGround:
    node_folder = folder / name
    (node_folder / "logs").mkdir(parents=True)
    cgroup = f"{folder.name}-{name}"
    for path in _make_cgroups(cgroup):
        keeper.keep("cgroup", path)
    told = {
        "root": str(node_folder / "root"),
        "name": name,
        "sysctls_in": str(node_folder / "sysctls"),
        "sysctls": _SYSCTLS,
        "shared": [str(path) for path in (*shared, first.parent)],
        "then": [str(first), "sleep"],
    }
    (node_folder / "root").mkdir()
    pid = _hold(stack, keeper, home, node_folder / "logs", told)
    place = NamespacePlace(name, pid, node_folder / "logs", [])
    stack.callback(place.close)
    return MachineGround(
        place=place,
        netns=home,
        address=_address(number),
        cgroup_root=f"/{cgroup}",
        may_raise_oom=_has_capability(_CAP_SYS_RESOURCE),
        devices=Devices(netdevs=NETDEVS, uplink=UPLINK),
        shared=shared,
    )


def _hold(stack: ExitStack, keeper: Keeper, home: SimNetns, logs: Path, told: Mapping[str, object]) -> int:
    """Start the first process of a node; its number on this machine."""
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    argv = ["nsenter", f"--net={home.path}", *namespaces, sys.executable, "-I", str(_HERE / "holder.py")]
    with (logs / "holder.log").open("wb") as log:
        holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    stack.callback(holder.wait)
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder.stdin, holder.stdout:
        # Known to the keeper before it does anything; until then it waits for its input.
        keeper.keep("process", holder.pid)
        holder.stdin.write(json.dumps(told))
        holder.stdin.close()
        said = holder.stdout.readline().split()
        if said[:1] == ["pid"]:
            keeper.keep("process", said[1])
            if holder.stdout.readline() == "ready\n":
                return int(said[1])
    why = (logs / "holder.log").read_text(errors="backslashreplace").strip()
    raise MachineFailed(f"the root of node {told['name']} could not be made: {why[-2000:]}")


def _make_cgroups(name: str) -> list[Path]:
    """A folder for a node in every hierarchy: one of version 2, or each of version 1."""
    if (_CGROUPS / "cgroup.controllers").exists():
        there = (_CGROUPS / "cgroup.controllers").read_text().split()
        enabled = (_CGROUPS / "cgroup.subtree_control").read_text().split()
        if missing := {"cpu", "memory", "pids"} & set(there) - set(enabled):
            raise MachineFailed(
                f"this machine's cgroups pass no {', '.join(sorted(missing))} controller on: "
                "write +NAME to cgroup.subtree_control, which is the machine's, first"
            )
        hierarchies = [_CGROUPS]
    else:
        # Symbolic links are second names of hierarchies with several controllers.
        hierarchies = [path for path in _CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]
    made = [hierarchy / name for hierarchy in hierarchies]
    for path in made:
        path.mkdir()
        for setting in ("cpuset.cpus", "cpuset.mems"):
            # Version 1 starts with none, and takes no process then.
            if (path / setting).exists() and not (path / setting).read_text().strip():
                (path / setting).write_text((path.parent / setting).read_text())
    return made


def _has_capability(number: int) -> bool:
    status = Path("/proc/self/status").read_text()
    bounds = next(line for line in status.splitlines() if line.startswith("CapBnd:"))
    return bool(int(bounds.split()[1], 16) >> number & 1)
