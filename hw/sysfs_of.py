"""The /sys that a process in another network namespace would see, without a process there.

Invariant: nothing is mounted anywhere. The file system is open by a descriptor alone and gone when that is
closed; what of it depends on the namespace (/sys/class/net, /sys/class/infiniband) is the given one's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from hw.errors import refusal
from hw.netns import PROC, NetnsHandle, run_in
from hw.sysfs import Sysfs

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
"""System calls' numbers (kernel 5.2), the same on every architecture."""
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_MOUNT_ATTR_RDONLY = 1

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def sysfs_of(netns: NetnsHandle) -> Iterator[Sysfs]:
    """Needs CAP_SYS_ADMIN, as entering the namespace does. BadNetns or Refused where it cannot be had."""
    fd = run_in(netns, lambda: _detached(str(netns.path)))
    try:
        yield Sysfs(PROC / f"self/fd/{fd}")
    finally:
        os.close(fd)


def _detached(whose: str) -> int:
    """sysfs of the calling thread's namespace, read only."""
    what = f"look into /sys as {whose} sees it"
    context = _call(what, _FSOPEN, b"sysfs", _FSOPEN_CLOEXEC)
    try:
        _call(what, _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(what, _FSMOUNT, context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_RDONLY)
    finally:
        os.close(context)


def _call(what: str, number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise refusal(what, ctypes.get_errno())
    return result
