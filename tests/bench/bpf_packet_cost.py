"""What counting costs per packet, beside what else counts or shapes.

Every configuration sends the same datagrams over a veth in a netns of its own: 64 bytes to the RoCEv2 port
in the last of the eight classes, to a MAC address that nobody has, so that the receiver drops them early. The
CPU time is the sender's own, the receiver's softirq included. Within a round all configurations follow one
another, in an order that turns with every round, and a configuration's cost is the median of its differences
to `none` of the same round; so the machine's moods cancel out. Needs root and about two seconds a round.

    python tests/bench/bpf_packet_cost.py [ROUNDS]
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import struct
import subprocess
import sys as python
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for entry in (ROOT, ROOT / "ci/kind-sriov-sim"):
    if str(entry) not in python.path:
        python.path.insert(0, str(entry))

from pyroute2 import IPRoute

from bpf import sys
from bpf.accounting import Accounting
from bpf.cache import ProgramCache
from bpf.layout import Slot
from kndsim.links import SimNetns, netns, private_host, veth_pair
from tests.bpf.bpffs import mounted_bpffs

BLAST = Path(__file__).resolve().parent / "blast.py"
PACKETS = 100_000
PAYLOAD, PORT, DSCP = 64, 4791, 56
NOBODY, NOBODYS_MAC = "10.77.0.99", "02:00:00:00:00:99"
DEVICE = "kdev"
ROUNDS = 7
_EMPTY = struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)
_EGRESS_PARENT = 0xFFFFFFF3
"""clsact's egress side."""


class Lacking(Exception):
    """This machine cannot do a configuration; the text is why."""


@dataclass(frozen=True, slots=True)
class Row:
    """Nanoseconds per packet. cost is over `none`, lowest the least of all rounds; None with a reason in
    skipped. samples has one entry a round."""

    name: str
    total: float | None = None
    lowest: float | None = None
    cost: float | None = None
    skipped: str = ""
    samples: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Bench:
    host: SimNetns
    device: int
    accounting: Accounting


Configuration = Callable[[Bench], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def none(bench: Bench) -> Iterator[None]:
    yield


@contextlib.contextmanager
def tcx(bench: Bench, program: sys.ProgramFd) -> Iterator[None]:
    with program:
        try:
            link = sys.link_create(program, bench.device, sys.AttachType.TCX_EGRESS)
        except sys.CallRefused as error:
            raise Lacking(str(error)) from error
        with link:
            yield


def tcx_empty(bench: Bench) -> contextlib.AbstractContextManager[None]:
    return tcx(bench, empty_program())


def tcx_accounting(bench: Bench) -> contextlib.AbstractContextManager[None]:
    return tcx(bench, bench.accounting.load(Slot(0), 0))


@contextlib.contextmanager
def clsact(bench: Bench, program: sys.ProgramFd) -> Iterator[None]:
    def add(ipr: IPRoute) -> None:
        ipr.tc("add", "clsact", index=bench.device)
        ipr.tc(
            "add-filter",
            "bpf",
            index=bench.device,
            fd=program.fd,
            name="knd",
            parent=_EGRESS_PARENT,
            classid=0x10001,
            direct_action=True,
            handle=1,
        )

    with program:
        bench.host.netlink(add)
        try:
            yield
        finally:
            bench.host.netlink(lambda ipr: ipr.tc("del", "clsact", index=bench.device))


def clsact_empty(bench: Bench) -> contextlib.AbstractContextManager[None]:
    return clsact(bench, empty_program())


def clsact_accounting(bench: Bench) -> contextlib.AbstractContextManager[None]:
    return clsact(bench, bench.accounting.load(Slot(0), 0))


def empty_program() -> sys.ProgramFd:
    return sys.prog_load(sys.ProgramType.SCHED_CLS, _EMPTY, name="empty")


@contextlib.contextmanager
def nft(rules: str) -> Iterator[None]:
    def run(text: str) -> None:
        done = subprocess.run(["nft", "-f", "-"], input=text, text=True, capture_output=True)
        if done.returncode:
            raise Lacking(" ".join(done.stderr.split())[:200])

    if shutil.which("nft") is None:
        raise Lacking("nft is not installed (Debian package nftables)")
    run(f"table netdev knd {{\n{rules}\n}}")
    try:
        yield
    finally:
        run("delete table netdev knd")


_CHAIN = f"type filter hook egress device {DEVICE} priority 0;"


def nft_counter(bench: Bench) -> contextlib.AbstractContextManager[None]:
    return nft(f"chain out {{ {_CHAIN}\ncounter\n}}")


def nft_map(bench: Bench) -> contextlib.AbstractContextManager[None]:
    counters = "\n".join(f"counter class{n} {{ }}" for n in range(8))
    elements = ", ".join(f'{dscp:#x} : "class{dscp >> 3}"' for dscp in range(64))
    return nft(f"{counters}\nchain out {{ {_CHAIN}\ncounter name ip dscp map {{ {elements} }}\n}}")


@contextlib.contextmanager
def htb(bench: Bench) -> Iterator[None]:
    if shutil.which("tc") is None:
        raise Lacking("tc is not installed (Debian package iproute2)")
    try:
        tc("qdisc add dev", "root handle 1: htb default 1")
        for number in range(1, 9):
            tc("class add dev", f"parent 1: classid 1:{number} htb rate 100gbit")
            tos = (number - 1) << 5
            match = f"match ip dsfield {tos:#x} 0xe0 flowid 1:{number}"
            tc("filter add dev", f"parent 1: protocol ip prio 1 u32 {match}")
        yield
    finally:
        bench.host.netlink(lambda ipr: ipr.link("set", index=bench.device, txqlen=1000))
        subprocess.run(["tc", "qdisc", "del", "dev", DEVICE, "root"], capture_output=True)


def tc(before: str, after: str) -> None:
    done = subprocess.run(["tc", *before.split(), DEVICE, *after.split()], text=True, capture_output=True)
    if done.returncode:
        raise Lacking(" ".join(done.stderr.split())[:200])


CONFIGURATIONS: dict[str, Configuration] = {
    "none": none,
    "tcx, empty program": tcx_empty,
    "tcx, accounting": tcx_accounting,
    "clsact, empty program": clsact_empty,
    "clsact, accounting": clsact_accounting,
    "nft, one counter": nft_counter,
    "nft, map of DSCP to 8 counters": nft_map,
    "htb, 8 classes by u32": htb,
}


@contextlib.contextmanager
def made_bench() -> Iterator[Bench]:
    with (
        tempfile.TemporaryDirectory(prefix="knd-bench-") as folder,
        private_host() as host,
        netns() as peer,
        mounted_bpffs() as bpffs,
        veth_pair(DEVICE, "kwire", peer_where=peer) as (device, peer_device),
        Accounting.open(bpffs / "knd", ProgramCache(Path(folder)).ensure(), slots=1) as accounting,
    ):

        def set_up(ipr: IPRoute) -> None:
            ipr.link("set", index=device, state="up")
            ipr.addr("add", index=device, address="10.77.0.1", prefixlen=24)
            ipr.neigh("add", dst=NOBODY, lladdr=NOBODYS_MAC, ifindex=device, state=0x80)

        host.netlink(set_up)
        peer.netlink(lambda ipr: ipr.link("set", index=peer_device, state="up"))
        yield Bench(host, device, accounting)


def measure(packets: int = PACKETS) -> float:
    """Nanoseconds of CPU per packet of one run."""
    cpu = max(os.sched_getaffinity(0))
    arguments = [NOBODY, PORT, packets, PAYLOAD, DSCP, cpu]
    command = [python.executable, "-I", str(BLAST), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return float(done.stdout.split()[1]) / packets * 1e9


def run(rounds: int = ROUNDS, packets: int = PACKETS) -> list[Row]:
    """Measure all configurations; the rows are in the order of CONFIGURATIONS."""
    samples: dict[str, list[float]] = {name: [] for name in CONFIGURATIONS}
    skipped: dict[str, str] = {}
    with made_bench() as bench:
        for turn in range(rounds):
            names = list(CONFIGURATIONS)
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                if name in skipped:
                    continue
                try:
                    with CONFIGURATIONS[name](bench):
                        samples[name].append(measure(packets))
                except Lacking as error:
                    skipped[name] = str(error)
    base = samples["none"]
    return [_row(name, samples[name], base, skipped.get(name, "")) for name in CONFIGURATIONS]


def _row(name: str, samples: list[float], base: list[float], skipped: str) -> Row:
    if skipped:
        return Row(name, skipped=skipped)
    differences = [one - other for one, other in zip(samples, base, strict=True)]
    cost = statistics.median(differences)
    return Row(name, statistics.median(samples), min(samples), cost, samples=tuple(samples))


def report(rows: list[Row]) -> str:
    """A table: nanoseconds per packet, and the cost as a multiple of what accounting on tcx costs."""
    ours = next(row.cost for row in rows if row.name == "tcx, accounting")
    lines = [f"{'configuration':32} {'ns/packet':>9} {'lowest':>7} {'cost':>6} {'of ours':>8}"]
    for row in rows:
        if row.cost is None:
            lines.append(f"{row.name:32} skipped: {row.skipped}")
            continue
        ratio = f"{row.cost / ours:7.2f}x" if ours and row.name != "none" else ""
        lines.append(f"{row.name:32} {row.total:9.0f} {row.lowest:7.0f} {row.cost:+6.0f} {ratio:>8}")
    return "\n".join(lines)


def main() -> None:
    if os.geteuid() != 0:
        python.exit("this measures in a network namespace of its own, which needs root")
    rounds = int(python.argv[1]) if len(python.argv) > 1 else ROUNDS
    rows = run(rounds)
    print(f"{rounds} rounds of {PACKETS} packets of {PAYLOAD} bytes")
    print(report(rows))
    costs = {row.name: row.cost for row in rows}
    ours, empty = costs["tcx, accounting"], costs["tcx, empty program"]
    if ours is not None and empty is not None:
        print(f"accounting itself: {ours - empty:+.0f} ns over an empty program at the same hook")


if __name__ == "__main__":
    main()
