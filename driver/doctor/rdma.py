"""Whether pods can use the RDMA that this node gives them.

Invariant: reads only; asks the kernel for no module. A node without RDMA is fine: nobody is promised any.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from driver.doctor.model import Finding, Place, Subject, ok, warn
from driver.policy.rdma import RdmaRules
from driver.rdma import AT_BOOT, RdmaMode
from driver.running import policy_in_force
from hw.devlink import Devlink
from hw.devlink_codec import DevlinkParam
from hw.errors import HwError, Unsupported
from hw.rdma import verbs
from hw.rdma.netlink import RdmaSocket
from hw.sysfs import Sysfs

OFF_SWITCHES = ("enable_rdma", "enable_roce", "enable_iwarp")
"""Of devlink, networking/devlink/devlink-params."""
RUNTIMES = ("containerd", "crio")
LEAST_LOCKED = 1 << 30
"""Bytes. What a job registers with a device is locked; a small one has buffers of some hundred MiB."""


@dataclass(frozen=True, slots=True)
class Rdma:
    """mode None: no RDMA in this kernel. locked: by runtime, the bytes its containers may lock; None for no
    limit."""

    rules: RdmaRules
    mode: RdmaMode | None
    devices: tuple[str, ...]
    modules: frozenset[str]
    locked: tuple[tuple[str, int | None], ...]
    no_verbs: str = ""
    """Why libibverbs cannot be asked; "" if it can."""
    off: tuple[str, ...] = ()
    """Devices and parameters by which their driver is told to make no RDMA device, as devlink writes them."""


def look(place: Place) -> Rdma:
    paths = place.paths
    sysfs = Sysfs(paths.sysfs)
    mode: RdmaMode | None = None
    devices: tuple[str, ...] = ()
    # Without RDMA in the kernel it is as it stands.
    with contextlib.suppress(Unsupported), RdmaSocket(None, proc=paths.proc) as socket:
        mode = _mode(socket)
        devices = tuple(device.name for device in socket.devices())
    wanted = ("ib_uverbs", "rdma_ucm", "rdma_rxe", "siw")
    return Rdma(
        rules=policy_in_force(paths, place.policy).rdma,
        mode=mode,
        devices=devices,
        modules=frozenset(name for name in wanted if sysfs.names(f"module/{name}") is not None),
        locked=tuple(_locked(paths.proc)),
        no_verbs=verbs.why_not(),
        off=_turned_off(),
    )


def _turned_off() -> tuple[str, ...]:
    # Without devlink in the kernel nothing can be turned off by it.
    with contextlib.suppress(HwError), Devlink() as devlink:
        return turned_off(devlink.params())
    return ()


def turned_off(params: Iterable[DevlinkParam]) -> tuple[str, ...]:
    """`enable_rdma` and its kin are generic parameters: drivers that have them mean the same by them."""
    return tuple(
        sorted(
            f"{each.handle} {each.name}"
            for each in params
            if each.name in OFF_SWITCHES and False in each.values.values()
        )
    )


def _mode(socket: RdmaSocket) -> RdmaMode:
    try:
        return RdmaMode.EXCLUSIVE if socket.exclusive() else RdmaMode.SHARED
    except Unsupported:
        return RdmaMode.SHARED


def _locked(proc: Path) -> Iterator[tuple[str, int | None]]:
    """Of the runtimes that run here. Containers have what their runtime's service has."""
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            name = (folder / "comm").read_text().strip()
            if name not in RUNTIMES:
                continue
            limits = (folder / "limits").read_text()
        except OSError:
            # It ended while we looked.
            continue
        found = re.search(r"^Max locked memory +(\d+|unlimited) ", limits, re.MULTILINE)
        if found is not None:
            yield name, None if found[1] == "unlimited" else int(found[1])


def judge(rdma: Rdma) -> Iterator[Finding]:
    software = rdma.rules.software.kind
    yield from _judge_switches(rdma)
    if software is None and not rdma.devices:
        yield ok("rdma", "no RDMA device is here, and the policy makes none")
        return
    yield ok(
        "rdma", f"RDMA devices here: {', '.join(rdma.devices) or 'none'}; they are {rdma.mode or 'unknown'}"
    )
    yield from _judge_mode(rdma)
    wanted = ["ib_uverbs", "rdma_ucm", *([software.module] if software is not None else [])]
    missing = [name for name in wanted if name not in rdma.modules]
    if missing and not rdma.rules.load_modules:
        yield warn(
            "rdma-modules",
            f"{' and '.join(missing)} not loaded: pods get no RDMA, or no connection manager",
            f"modprobe -a {' '.join(missing)}, and name them in /etc/modules-load.d",
        )
    if rdma.devices and rdma.no_verbs:
        yield warn(
            "libibverbs",
            f"{rdma.no_verbs}: `knd devices` reads ports and GIDs from sysfs alone, as the agent does anyway",
            f"install {verbs.PACKAGE}, if devices do not say all in sysfs",
        )
    yield from _judge_locked(rdma)


def _judge_switches(rdma: Rdma) -> Iterator[Finding]:
    if rdma.off:
        yield warn(
            "rdma-off",
            f"RDMA is turned off on {len(rdma.off)} devices: {', '.join(rdma.off[:4])}",
            "if pods are to have it: devlink dev param set DEVICE name NAME value true cmode driverinit, and "
            "then devlink dev reload DEVICE",
        )


def _judge_mode(rdma: Rdma) -> Iterator[Finding]:
    wanted = rdma.rules.mode.mode
    if wanted is not None and rdma.mode is not wanted:
        yield warn(
            "rdma-mode",
            f"the policy wants RDMA devices {wanted}, and no RDMA is given away until they are",
            AT_BOOT.format(int(wanted is RdmaMode.SHARED)),
        )


def _judge_locked(rdma: Rdma) -> Iterator[Finding]:
    for name, most in rdma.locked:
        if most is not None and most < LEAST_LOCKED:
            yield warn(
                "memlock",
                f"containers of {name} may lock {most >> 10} KiB of memory, and RDMA locks what it registers",
                f"set LimitMEMLOCK=infinity for {name}'s service and restart it, or give pods CAP_IPC_LOCK",
            )
        else:
            amount = "any amount" if most is None else f"{most >> 20} MiB"
            yield ok("memlock", f"containers of {name} may lock {amount} of memory")


SUBJECT = Subject("rdma", look, judge)
