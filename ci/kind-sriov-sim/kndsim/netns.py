"""Pods as real network namespaces: made, entered and deleted without moving the calling process.

Invariant: only threads made for it ever change their namespace, and they end at once. A process started
here reads from a pipe that its parent holds, so it ends with its parent, however that dies.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MNT_DETACH = 2
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def in_thread(work: Callable[[], T]) -> T:
    """work's result or exception, from a thread of its own that has ended when this returns."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def in_netns(path: Path, work: Callable[[], T]) -> T:
    """work's result, computed inside the network namespace at path. Sockets and processes that it makes
    stay in there."""

    def run() -> T:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_libc.setns(fd, CLONE_NEWNET), f"entering {path}")
        finally:
            os.close(fd)
        return work()

    return in_thread(run)


def create_netns(path: Path) -> None:
    """A new network namespace with lo up and IPv6 off, bind-mounted at path, as CNI users make it."""

    def run() -> None:
        _check(_libc.unshare(CLONE_NEWNET), "making a network namespace")
        _disable_ipv6()
        _set_up("lo")
        _bind("/proc/thread-self/ns/net", path)

    in_thread(run)


def pin_own_netns(path: Path) -> None:
    """The caller's own network namespace under another path, as CRI-O does for pods on the host's."""
    _bind("/proc/self/ns/net", path)


def delete_netns(path: Path) -> None:
    """Unmount and remove path; the namespace ends with its last process. Quiet if it is gone."""
    if _libc.umount2(os.fsencode(path), MNT_DETACH) != 0 and os.path.ismount(path):
        number = ctypes.get_errno()
        raise OSError(number, f"unmounting {path}: {os.strerror(number)}")
    path.unlink(missing_ok=True)


def _bind(source: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(exist_ok=False)
    try:
        _check(_libc.mount(source.encode(), os.fsencode(path), None, MS_BIND, None), f"mounting {path}")
    except OSError:
        path.unlink()
        raise


def _disable_ipv6() -> None:
    # /proc/sys/net shows the namespace of the thread that opens it.
    for name in ("all", "default"):
        knob = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
        if knob.exists():
            knob.write_text("1")


def _set_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        request = struct.pack("16sH22x", interface.encode(), 0)
        flags = struct.unpack_from("16sH", fcntl.ioctl(sock, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", interface.encode(), flags | IFF_UP))


class PodProcess:
    """A process inside the network namespace at netns (None: the caller's own). Without argv it only
    waits, as a pause process does."""

    def __init__(
        self, netns: Path | None, argv: Sequence[str] = ("cat",), env: Mapping[str, str] | None = None
    ) -> None:
        environment = None if env is None else {"PATH": os.environ.get("PATH", os.defpath), **env}

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

        self._process = start() if netns is None else in_netns(netns, start)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Kill it and wait for it. May repeat."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
