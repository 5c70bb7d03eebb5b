"""What can go wrong with BPF, split by who must act.

BpfError
├── CallRefused         the kernel refused a bpf(2) call; carries errno and the verifier's log, if any
├── BpffsMissing        the directory for pins is not on a bpffs; whoever runs the agent must mount one
├── LayoutMismatch      a pinned object is not what this version makes; `knd cleanup` removes it
├── CompilerMissing     bcc is not installed and no prebuilt programs were shipped
├── CompileFailed       bcc is there and refused the source; carries its text
└── Ambiguous           nothing was done, since what would be hit might be another pod's
"""

from __future__ import annotations

import errno as errno_names
import os

_HINTS = {
    errno_names.EPERM: "the agent needs CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN",
    errno_names.ENOSYS: "this kernel is built without CONFIG_BPF_SYSCALL",
}
_FIGURES = ("processed ", "verification time ", "stack depth ")
_REASON = 200
"""Characters of it; a line of state can be much longer."""
LOG_TAIL = 2000
"""Characters of a verifier log or compiler output that go into a message."""


def verdict(log: str) -> str:
    """The verifier's reason: its last line but the figures that all logs end with. "" without a log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line[:_REASON] for line in reversed(lines) if not line.startswith(_FIGURES)), "")


class BpfError(Exception):
    """Base of everything that bpf raises on purpose. The text is for the reader."""


class CallRefused(BpfError):
    """A bpf(2) call failed. errno is positive, as in errno(3); log is the verifier's, or ""."""

    def __init__(self, what: str, errno: int, log: str = "") -> None:
        self.what = what
        self.errno = errno
        self.log = log
        name = errno_names.errorcode.get(errno, str(errno))
        parts = (f"{what}: {name} ({os.strerror(errno)})", verdict(log), _HINTS.get(errno, ""))
        text = "; ".join(part for part in parts if part)
        super().__init__(text + (f"\n{log[-LOG_TAIL:]}" if log else ""))


class BpffsMissing(BpfError):
    """path, or its nearest existing parent, is not on a BPF filesystem."""

    def __init__(self, path: object) -> None:
        super().__init__(
            f"{path} is not on a BPF filesystem: mount one on the host "
            "(mount -t bpf bpf /sys/fs/bpf) and give it to the agent; the agent mounts nothing itself"
        )


class LayoutMismatch(BpfError):
    """A pinned object differs from what this version would make."""


class CompilerMissing(BpfError):
    """No bcc, and nothing prebuilt that fits."""


class CompileFailed(BpfError):
    """bcc ran and made no programs; its output is in the text."""


class Ambiguous(BpfError):
    """What was asked cannot be done without risk to a device that was not meant."""
