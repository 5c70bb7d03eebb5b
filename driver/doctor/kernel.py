"""What the kernel can do, found by trying it in a network namespace of the trial's own.

Invariant: features, never versions; the release is shown and decides nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from bpf.attach import in_new_netns, probe_tcx
from bpf.errors import BpfError
from bpf.layout import Hook
from driver.doctor.model import Finding, Place, Subject, fail, ok, warn
from hw.errors import HwError
from hw.model import IfIndex
from hw.netlink import LinkSocket
from hw.netns import socket_cookie
from hw.qdisc import FqQueue
from hw.sysfs import Sysfs


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """hook None: hook_error says why it could not be tried. fq_error: why packets cannot be told
    when to leave."""

    release: str
    cookie_error: str
    hook: Hook | None
    hook_error: str
    fq_error: str
    pci_netdevs: int
    without_parent: tuple[str, ...]
    """Netdevs of PCI functions of which netlink does not tell the function."""


def look(place: Place) -> Kernel:
    hook, hook_error = _try_hook()
    sysfs = Sysfs(place.paths.sysfs)
    on_pci = {
        name
        for name in sysfs.names("class/net") or ()
        if (sysfs.target(f"class/net/{name}/device/subsystem") or "").endswith("/pci")
    }
    with LinkSocket(None) as links:
        told = {link.name for link in links.dump() if link.parent_device is not None}
    return Kernel(
        release=os.uname().release,
        cookie_error=_try_cookie(),
        hook=hook,
        hook_error=hook_error,
        fq_error=_try_fq(),
        pci_netdevs=len(on_pci),
        without_parent=tuple(sorted(on_pci - told)),
    )


def _try_cookie() -> str:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            socket_cookie(sock)
    except (OSError, HwError) as error:
        return str(error)
    return ""


def _try_hook() -> tuple[Hook | None, str]:
    try:
        return probe_tcx(), ""
    except (BpfError, OSError) as error:
        return None, str(error)


def _try_fq() -> str:
    def on_loopback() -> None:
        with LinkSocket(None) as links:
            links.shaping.queue(IfIndex(socket.if_nametoindex("lo")), FqQueue(packets=1000))

    try:
        in_new_netns(on_loopback)
    except (HwError, OSError) as error:
        return str(error)
    return ""


def judge(kernel: Kernel) -> Iterator[Finding]:
    if kernel.cookie_error:
        yield fail(
            "netns-cookie",
            f"kernel {kernel.release} tells no cookie of a network namespace: {kernel.cookie_error}",
            "boot a kernel that has SO_NETNS_COOKIE (5.14 has it)",
        )
    else:
        yield ok("netns-cookie", f"kernel {kernel.release} tells network namespaces apart for good")
    if kernel.hook is None:
        yield fail(
            "bpf",
            f"no BPF program could be attached: {kernel.hook_error}",
            "run as root with CAP_SYS_ADMIN, on a kernel with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF",
        )
    elif kernel.hook is Hook.TCX:
        yield ok("bpf", "counts at tcx: programs stay with a device over moves and restarts")
    else:
        yield warn(
            "bpf",
            "counts at clsact, since there is no tcx: programs are attached anew in each pod, and one with "
            "NET_ADMIN can take them off",
            "boot a kernel with tcx (6.6 has it) for the stronger promise",
        )
    if kernel.fq_error:
        said = f"limits are kept by htb, also where the policy says `shaper: fq`: {kernel.fq_error}"
        yield ok("fq", said)
    else:
        yield ok("fq", "limits can be kept by times of departure: `shaper: fq` of the node policy")
    if kernel.without_parent:
        yield fail(
            "parent-device",
            f"netlink does not tell the PCI function of {', '.join(kernel.without_parent)}",
            "boot a kernel that does (5.14 does), or leave out interfaces whose driver hides it",
        )
    elif kernel.pci_netdevs:
        yield ok("parent-device", f"netlink tells the PCI function of all {kernel.pci_netdevs} that have one")
    else:
        yield ok("parent-device", "there is no netdev of a PCI function to see it by")


SUBJECT = Subject("kernel", look, judge)
