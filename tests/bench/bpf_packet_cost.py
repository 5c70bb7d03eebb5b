"""What counting costs per packet, beside what else counts or shapes.

Invariant: what is compared was measured within the same few milliseconds. Each configuration has a veth of
its own, all at once; a turn sends a burst through each, in an order that moves on with every turn, and a cost
is the median of the differences within turns. A machine that is fast and slow by turns moves both of a pair.

The datagrams are the same everywhere: 64 bytes to the RoCEv2 port in the last of the eight classes, to a MAC
address that nobody has, so that the receiver drops them early. The CPU time is the sender's own, the
receiver's softirq included. The kernel's switches for hooks are on for all of them, also for `none`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from bpf import sys
from bpf.accounting import Accounting
from bpf.cache import ProgramCache
from bpf.layout import Slot
from kndsim.links import SimNetns, netns, private_host, veth_pair
from tests.bench import blast
from tests.bpf.bpffs import mounted_bpffs

TURNS = 2000
BURST = 10 * blast.BATCH
PAYLOAD, PORT, DSCP = 64, 4791, 56
NOBODYS_MAC = "02:00:00:00:00:99"
NONE = "none"
_EMPTY = struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)
_EGRESS_PARENT = 0xFFFFFFF3
"""clsact's egress side."""


class Lacking(Exception):
    """This machine cannot do a configuration; the text is why."""


@dataclass(frozen=True, slots=True)
class Found:
    """samples: nanoseconds per packet of each turn, by configuration. skipped: why, by configuration."""

    samples: Mapping[str, tuple[float, ...]]
    skipped: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Wire:
    """A veth that one configuration has to itself."""

    host: SimNetns
    name: str
    device: int
    accounting: Accounting


Configuration = Callable[[Wire], contextlib.AbstractContextManager[None]]


def none(wire: Wire) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def tcx(wire: Wire, program: sys.ProgramFd) -> Iterator[None]:
    with program:
        try:
            link = sys.link_create(program, wire.device, sys.AttachType.TCX_EGRESS)
        except sys.CallRefused as error:
            raise Lacking(str(error)) from error
        with link:
            yield


def tcx_empty(wire: Wire) -> contextlib.AbstractContextManager[None]:
    return tcx(wire, empty_program())


def tcx_accounting(wire: Wire) -> contextlib.AbstractContextManager[None]:
    return tcx(wire, wire.accounting.load(Slot(0), 0))


@contextlib.contextmanager
def clsact(wire: Wire, program: sys.ProgramFd) -> Iterator[None]:
    def add(ipr: IPRoute) -> None:
        ipr.tc("add", "clsact", index=wire.device)
        ipr.tc(
            "add-filter",
            "bpf",
            index=wire.device,
            fd=program.fd,
            name="knd",
            parent=_EGRESS_PARENT,
            classid=0x10001,
            direct_action=True,
            handle=1,
        )

    with program:
        wire.host.netlink(add)
        yield


def clsact_empty(wire: Wire) -> contextlib.AbstractContextManager[None]:
    return clsact(wire, empty_program())


def clsact_accounting(wire: Wire) -> contextlib.AbstractContextManager[None]:
    return clsact(wire, wire.accounting.load(Slot(1), 0))


def empty_program() -> sys.ProgramFd:
    return sys.prog_load(sys.ProgramType.SCHED_CLS, _EMPTY, name="empty")


@contextlib.contextmanager
def nft(wire: Wire, declared: str, rule: str) -> Iterator[None]:
    """Ends with the namespace."""
    if shutil.which("nft") is None:
        raise Lacking("nft is not installed (Debian package nftables)")
    chain = f"chain out {{ type filter hook egress device {wire.name} priority 0;\n{rule}\n}}"
    text = f"table netdev {wire.name} {{\n{declared}\n{chain}\n}}"
    done = subprocess.run(["nft", "-f", "-"], input=text, text=True, capture_output=True)
    if done.returncode:
        raise Lacking(" ".join(done.stderr.split())[:200])
    yield


def nft_counter(wire: Wire) -> contextlib.AbstractContextManager[None]:
    return nft(wire, "", "counter")


def nft_map(wire: Wire) -> contextlib.AbstractContextManager[None]:
    counters = "\n".join(f"counter class{n} {{ }}" for n in range(8))
    elements = ", ".join(f'{dscp:#x} : "class{dscp >> 3}"' for dscp in range(64))
    return nft(wire, counters, f"counter name ip dscp map {{ {elements} }}")


@contextlib.contextmanager
def htb(wire: Wire) -> Iterator[None]:
    def tc(before: str, after: str) -> None:
        argv = ["tc", *before.split(), wire.name, *after.split()]
        done = subprocess.run(argv, text=True, capture_output=True)
        if done.returncode:
            raise Lacking(" ".join(done.stderr.split())[:200])

    if shutil.which("tc") is None:
        raise Lacking("tc is not installed (Debian package iproute2)")
    tc("qdisc add dev", "root handle 1: htb default 1")
    for number in range(1, 9):
        tc("class add dev", f"parent 1: classid 1:{number} htb rate 100gbit")
        match = f"match ip dsfield {(number - 1) << 5:#x} 0xe0 flowid 1:{number}"
        tc("filter add dev", f"parent 1: protocol ip prio 1 u32 {match}")
    yield


CONFIGURATIONS: Mapping[str, Configuration] = {
    NONE: none,
    "tcx, empty program": tcx_empty,
    "tcx, accounting": tcx_accounting,
    "clsact, empty program": clsact_empty,
    "clsact, accounting": clsact_accounting,
    "nft, one counter": nft_counter,
    "nft, map of DSCP to 8 counters": nft_map,
    "htb, 8 classes by u32": htb,
}


def run(turns: int = TURNS) -> Found:
    """Measure all configurations; samples are in the order of CONFIGURATIONS."""
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="knd-bench-"))
        host = stack.enter_context(private_host())
        far = stack.enter_context(netns())
        pins = stack.enter_context(mounted_bpffs()) / "knd"
        programs = ProgramCache(Path(folder)).ensure()
        accounting = stack.enter_context(Accounting.open(pins, programs, slots=2))
        sockets = {}
        for number, (name, configuration) in enumerate(CONFIGURATIONS.items()):
            wire = stack.enter_context(made_wire(host, far, number, accounting))
            try:
                stack.enter_context(configuration(wire))
            except Lacking as error:
                skipped[name] = str(error)
                continue
            sockets[name] = stack.enter_context(blast.open_socket(f"10.77.{number}.99", PORT, DSCP))
        stack.enter_context(on_one_cpu())
        samples: dict[str, list[float]] = {name: [] for name in sockets}
        for turn in range(turns):
            names = list(sockets)
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                samples[name].append(blast.blast(sockets[name], BURST, PAYLOAD) / BURST * 1e9)
    return Found({name: tuple(found) for name, found in samples.items()}, skipped)


@contextlib.contextmanager
def made_wire(host: SimNetns, far: SimNetns, number: int, accounting: Accounting) -> Iterator[Wire]:
    name = f"kdev{number}"
    with veth_pair(name, f"kwire{number}", peer_where=far) as (device, peer):

        def set_up(ipr: IPRoute) -> None:
            ipr.link("set", index=device, state="up")
            ipr.addr("add", index=device, address=f"10.77.{number}.1", prefixlen=24)
            nobody = f"10.77.{number}.99"
            ipr.neigh("add", dst=nobody, lladdr=NOBODYS_MAC, ifindex=device, state=0x80)

        far.netlink(lambda ipr: ipr.link("set", index=peer, state="up"))
        host.netlink(set_up)
        yield Wire(host, name, device, accounting)


@contextlib.contextmanager
def on_one_cpu() -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
