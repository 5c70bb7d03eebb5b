"""What a run may not leave changed on the machine: seen before, seen after, compared.

Invariant: reading a state changes nothing, and takes well under a second. Items come and go by a name
that a reader can look for with ordinary tools.

`python -m kndsim.hostguard save FILE` before, `compare FILE` after: status 1 and a line for each difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Items = Mapping[str, str]
"""Item to its value, both for the reader."""

RUN_MARK = "KND_RUN"
"""Environment variable by which a run finds the processes it started, whoever their parent is now."""

_PRESENCE = "@knd-run-"
_SYSCTL_TREES = ("net/ipv4", "net/ipv6", "net/core")
_FOLDERS = (
    "/run",
    "/run/netns",
    "/var/run/nri",
    "/var/run/cdi",
    "/etc/cdi",
    "/var/lib/kubelet",
    "/var/lib/knd",
)
_OTHERS_OWN = frozenset({"/run/mount"})
"""mount(8) makes it at its first use on a machine, and keeps it."""
_DEVICE_FOLDERS = (
    "/sys/bus/netdevsim/devices",
    "/sys/class/infiniband",
    "/sys/bus/pci/drivers/vfio-pci",
    "/dev/vfio",
)


@dataclass(frozen=True, slots=True)
class HostState:
    """A machine at one time. sections maps what is looked at ("link", "mount") to its items."""

    sections: Mapping[str, Items]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="backslashreplace").strip()
    except OSError:
        return ""


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _links() -> Items:
    folder = Path("/sys/class/net")
    return {
        name: ", ".join(
            f"{key} {_read(folder / name / key)}" for key in ("ifindex", "flags", "mtu", "address")
        )
        for name in _names(folder)
    }


def _addresses() -> Items:
    """IPv6 addresses and IPv4 routes; the local table of the latter has every IPv4 address."""
    found = {}
    for line in _read(Path("/proc/net/if_inet6")).splitlines():
        address, _, prefix, scope, _, name = line.split()
        found[f"{address}/{int(prefix, 16)} on {name}"] = f"scope {scope}"
    for line in _read(Path("/proc/net/route")).splitlines()[1:]:
        (
            name,
            destination,
            gateway,
            *_,
        ) = line.split()
        found[f"route {destination} via {gateway} on {name}"] = ""
    return found


def _mountinfo() -> Iterator[tuple[str, str, str]]:
    """(mount point, file system type, root within it) of every mount."""
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        yield fields[4], after.split()[0], fields[3]


def _mounts() -> Items:
    counted = Counter(f"{point} ({kind})" for point, kind, _ in _mountinfo())
    return {item: f"{count} times" for item, count in counted.items()}


def _pins() -> Items:
    found = {}
    for point in sorted({point for point, kind, _ in _mountinfo() if kind == "bpf"}):
        for folder, folders, files in os.walk(point):
            found.update({f"{folder}/{name}": "" for name in folders + files})
    return found


def _sysctls() -> Items:
    found = {}
    for tree in _SYSCTL_TREES:
        for folder, _, files in os.walk(f"/proc/sys/{tree}"):
            for name in files:
                path = Path(folder, name)
                found[str(path.relative_to("/proc/sys"))] = _read(path)
    return found


def _folders() -> Items:
    found = {f"{folder}/{name}": "" for folder in _FOLDERS for name in _names(Path(folder))}
    found = {item: value for item, value in found.items() if item not in _OTHERS_OWN}
    found.update({f"/tmp/{name}": "" for name in _names(Path("/tmp")) if name.startswith("knd")})
    return found


def _devices() -> Items:
    return {f"{folder}/{name}": "" for folder in _DEVICE_FOLDERS for name in _names(Path(folder))}


def _cgroups() -> Items:
    """Of nodes made here: a folder in every hierarchy, which outlives the processes that were in it."""
    top = Path("/sys/fs/cgroup")
    return {str(path): "" for pattern in ("knd*", "*/knd*") for path in top.glob(pattern)}


def _processes() -> Items:
    """Processes of this run other than the caller: see RUN_MARK."""
    mark = os.environ.get(RUN_MARK)
    if mark is None:
        return {}
    wanted = f"{RUN_MARK}={mark}".encode()
    found = {}
    for name in _names(Path("/proc")):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                command = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ")
                found[f"process {name}"] = command.decode(errors="backslashreplace").strip()
    return found


_SECTIONS: Mapping[str, Callable[[], Items]] = {
    "link": _links,
    "address": _addresses,
    "mount": _mounts,
    "pin": _pins,
    "sysctl": _sysctls,
    "file": _folders,
    "device": _devices,
    "cgroup": _cgroups,
    "process": _processes,
}


def look() -> HostState:
    """The state of the machine the caller sees, from its own mount and network namespace."""
    return HostState({name: read() for name, read in _SECTIONS.items()})


def differences(before: HostState, after: HostState) -> list[str]:
    """What came, went or changed, one sentence each; empty when nothing did."""
    found = []
    for section, old in before.sections.items():
        new = after.sections[section]
        for item in sorted(old.keys() | new.keys()):
            if item not in old:
                detail = f" ({new[item]})" if new[item] else ""
                found.append(f"{section} left behind: {item}{detail}")
            elif item not in new:
                found.append(f"{section} gone: {item}")
            elif old[item] != new[item]:
                found.append(f"{section} changed: {item}: {old[item]} -> {new[item]}")
    return found


class Presence:
    """Says to other runs on this machine that this one goes on, by a name the kernel drops at exit."""

    def __init__(self) -> None:
        self._name = f"{_PRESENCE}{os.getpid()}"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind("\0" + self._name[1:])

    def others(self) -> frozenset[int]:
        """Process ids of the other runs that go on now."""
        names = {line.split()[-1] for line in _read(Path("/proc/net/unix")).splitlines()}
        return frozenset(
            int(name.removeprefix(_PRESENCE)) for name in names - {self._name} if name.startswith(_PRESENCE)
        )

    def close(self) -> None:
        self._socket.close()


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kndsim.hostguard")
    parser.add_argument("what", choices=("save", "compare"))
    parser.add_argument("file", type=Path)
    told = parser.parse_args(args)
    if told.what == "save":
        told.file.write_text(json.dumps(look().sections))
        return 0
    found = differences(HostState(json.loads(told.file.read_text())), look())
    print("\n".join(found) or "the machine is as it was")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
