"""The first process of a simulated node: lays the node's own root, then becomes a process that only reaps.

Invariant: run in new mount and pid namespaces (and the node's network namespace), it changes nothing
outside of them: the machine's /usr is bound read-only into a root of the node's own, everything else that
a node writes to is a folder below that root. Standard library alone: it runs as `python -I holder.py`.

Reads a JSON object from standard input; writes "pid N" (seen from outside) and "ready" to standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_SHARED = 1, 32, 4096, 16384, 1 << 20
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_libc = ctypes.CDLL(None, use_errno=True)

_FOLDERS = (
    *("dev", "proc", "sys", "usr", "root", "mnt", "srv", "tmp", "mnt/proc"),
    *("run/lock", "run/nri", "run/netns", "run/cdi"),
    *("var/lib/kubelet", "var/lib/containerd", "var/log/pods", "var/log/containers", "var/cache", "var/tmp"),
    *("etc/cni/net.d", "etc/cdi", "etc/nri/conf.d", "opt/nri/plugins"),
)
_LINKS = {"var/run": "../run", "var/lock": "../run/lock", "etc/mtab": "../proc/self/mounts"}
_OF_MACHINE = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/resolv.conf": "",
}


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str | Path, target: str | Path, kind: str = "none", flags: int = 0) -> None:
    done = _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), None)
    _checked(done, f"mounting {source} at {target}")


def _bind(source: str | Path, target: Path, *, read_only: bool = False) -> None:
    """The tree at source, with its mounts, also at target, which is made if need be."""
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount(source, target, flags=_MS_BIND | _MS_REC)
    if read_only:
        _mount("none", target, flags=_MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def _lay_tree(root: Path, name: str) -> None:
    for folder in _FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "var/tmp").chmod(0o1777)
    for link, target in _LINKS.items():
        (root / link).symlink_to(target)
    for path, text in {**_FILES, "etc/hosts": f"127.0.0.1 localhost {name}\n"}.items():
        (root / path).write_text(text)


def _lay_machine(root: Path) -> None:
    """Programs and libraries of the machine."""
    _bind("/usr", root / "usr", read_only=True)
    for entry in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        source = Path("/", entry)
        if source.is_symlink():
            (root / entry).symlink_to(source.readlink())
        elif source.is_dir():
            _bind(source, root / entry, read_only=True)
    for entry in _OF_MACHINE:
        if Path(entry).exists():
            _bind(entry, root / entry[1:], read_only=True)


def _lay_kernel(root: Path) -> None:
    """The kernel's file systems: of this pid and network namespace, with a bpffs that is the node's own."""
    _bind("/dev", root / "dev")
    _mount("proc", root / "proc", "proc")
    # In a user namespace the kernel grants a new proc only where an uncovered one is there to be seen, and
    # parts of the first are about to be covered: without this no pod could have `hostUsers: false`.
    _mount("proc", root / "mnt/proc", "proc")
    # Bound before anything is shared: see the order in main.
    _mount("sysfs", root / "sys", "sysfs")
    _bind("/sys/fs/cgroup", root / "sys/fs/cgroup")
    _mount("bpf", root / "sys/fs/bpf", "bpf")


def _cover_sysctls(root: Path, kept: Path, values: dict[str, str]) -> None:
    """Files in the place of settings of the whole machine that kubelet insists on: it finds them done."""
    for name, value in values.items():
        knob = root / "proc/sys" / name
        if knob.exists():
            stand_in = kept / name.replace("/", ".")
            stand_in.parent.mkdir(exist_ok=True)
            stand_in.write_text(f"{value}\n")
            _mount(stand_in, knob, flags=_MS_BIND)


def _pivot(root: Path) -> None:
    os.chdir(root)
    # "." on "." : the old root lies over the new one, and is taken off. No folder is needed for it.
    _checked(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "making the node's root the root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "leaving the machine's root")
    os.chdir("/")


def main(told: dict[str, Any]) -> None:
    # /proc is still the machine's: this is the number by which the machine knows the node.
    print("pid", Path("/proc/self").readlink(), flush=True)
    root = Path(told["root"])
    _mount(root, root, flags=_MS_BIND)
    _lay_tree(root, told["name"])
    _lay_machine(root)
    _lay_kernel(root)
    _cover_sysctls(root, Path(told["sysctls_in"]), told["sysctls"])
    for path in told["shared"]:
        _bind(path, root / path.lstrip("/"), read_only=True)
    _pivot(root)
    # Of this namespace alone: all mounts were private before, so nothing reaches the machine.
    _mount("none", "/", flags=_MS_SHARED | _MS_REC)
    print("ready", flush=True)
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.execv(told["then"][0], told["then"])


if __name__ == "__main__":
    main(json.load(sys.stdin))
