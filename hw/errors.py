"""What can go wrong below the driver, split by who must act.

HwError
├── NotFound        the device, file or namespace is not there (any more)
├── Refused         the kernel said no; carries errno and, where it gave one, extack
│   ├── Unsupported the driver or kernel cannot do this at all; asking again is pointless
│   └── Busy        it may work later
└── BadNetns        a path or fd that is not a pod's network namespace
"""

from __future__ import annotations

import errno as errno_names


class HwError(Exception):
    """Base of everything that hw raises on purpose. The text is one sentence for the reader."""


class NotFound(HwError):
    """The thing named in the text does not exist (any more)."""


class BadNetns(HwError):
    """Not a network namespace, or one that must never be given a device."""


class Refused(HwError):
    """A netlink or sysfs request was refused.

    errno is positive, as in errno(3); extack is the kernel's own words, or "".
    """

    def __init__(self, what: str, errno: int, extack: str = "") -> None:
        self.what = what
        self.errno = errno
        self.extack = extack
        name = "ENOTSUPP" if errno == _ENOTSUPP else errno_names.errorcode.get(errno, str(errno))
        super().__init__(f"{what}: {name}" + (f" ({extack})" if extack else ""))


class Unsupported(Refused):
    """EOPNOTSUPP and its kin: this device or kernel cannot do it."""


class Busy(Refused):
    """EBUSY and its kin: it may work later."""


_ENOTSUPP = 524
"""The kernel's own, which some drivers let out; it has no name in user space."""
_UNSUPPORTED = frozenset(
    {
        errno_names.EOPNOTSUPP,
        errno_names.EPROTONOSUPPORT,
        errno_names.EAFNOSUPPORT,
        errno_names.ENOSYS,
        _ENOTSUPP,
    }
)
_BUSY = frozenset({errno_names.EBUSY, errno_names.EAGAIN, errno_names.ENOBUFS})
_ABSENT = frozenset({errno_names.ENODEV, errno_names.ENXIO, errno_names.ESRCH})


def refusal(what: str, errno: int, extack: str = "") -> HwError:
    """The error for an errno (positive) of the kernel, by who must act. what begins its text."""
    if errno in _ABSENT:
        return NotFound(f"{what}: the device is not there (any more)")
    if errno in _UNSUPPORTED:
        return Unsupported(what, errno, extack)
    if errno in _BUSY:
        return Busy(what, errno, extack)
    return Refused(what, errno, extack)
