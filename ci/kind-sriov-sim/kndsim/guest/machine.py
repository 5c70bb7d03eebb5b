"""The machine a guest is: qemu's command line and the files its first program finds, from what was asked for.

Invariant: nothing here does anything: the same request gives the same command line and the same bytes.
No KVM, no host network: what is in the guest stays there, but for the ports that are forwarded on loopback.
"""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kndsim.guest.cpio import Entry, pack
from kndsim.guest.image import Image
from kndsim.guest.inside.agent import PORT
from kndsim.guest.kernels import Kernel

INSIDE = Path(__file__).resolve().parent / "inside"
PROJECT_TAG = "project"
PROJECT_PATH = PurePosixPath("/run/knd-guest/project")
HOST_LINK = "52:54:00:00:00:f0"
"""MAC address of the link that forwarded ports end at."""

MONITOR = "monitor.sock"
IGB_PORTS = 4
IGB_MEMORY_LEAST = 512
_KERNEL = (
    "console=ttyS0 quiet mitigations=off rcupdate.rcu_expedited=1 random.trust_cpu=on tsc=reliable "
    "no_timer_check audit=0 panic=-1"
)


class Topology(enum.StrEnum):
    """What is on the guest's buses."""

    PLAIN = "plain"
    """Nothing but the disk."""
    IGB = "igb"
    """Two NUMA nodes, each with a PCIe root of its own. Four SR-IOV ports (igb, 7 VFs each) on one wire: a
    card with two on node 0, two cards on node 1. An IOMMU in pass-through mode."""


@dataclass(frozen=True, slots=True)
class Share:
    """A folder of the host in the guest."""

    tag: str
    host: Path
    guest: PurePosixPath
    writable: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", self.tag) or self.tag == PROJECT_TAG:
            raise ValueError(f"share tag {self.tag!r}: lower case letters, digits and -, not {PROJECT_TAG!r}")
        if not self.host.is_dir():
            raise ValueError(f"share {self.tag}: {self.host} is no folder")
        if not self.guest.is_absolute() or re.search(r"\s", str(self.guest)):
            raise ValueError(f"share {self.tag}: {self.guest} is not an absolute path without blanks")


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw disk, /dev/vdb and on. kept: what the guest writes to it stays, also if its power is cut."""

    file: Path
    kept: bool = False

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise ValueError(f"disk {self.file} is no file")


@dataclass(frozen=True, slots=True)
class Forward:
    """A TCP port of the guest's on the host's loopback."""

    host: int
    guest: int

    def __post_init__(self) -> None:
        for port in (self.host, self.guest):
            if not 0 < port < 65536:
                raise ValueError(f"no TCP port: {port}")


@dataclass(frozen=True, slots=True)
class Terminal:
    """For a shell on the serial console."""

    kind: str
    rows: int
    columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What guest() was asked for."""

    kernel: Kernel = Kernel.NEWEST
    topology: Topology = Topology.IGB
    name: str = "guest"
    memory: int = 2048
    cpus: int = 2
    shares: Sequence[Share] = ()
    forwards: Sequence[Forward] = ()
    disks: Sequence[Disk] = ()
    append: str = ""
    terminal: Terminal | None = None
    own_time: bool = False
    """Its clock goes by the instructions that it has run, 500 million a second, and not by the host's: what
    else the host does makes no timer late. Its processors take turns, so it needs longer for the same."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", self.name):
            raise ValueError(f"guest name {self.name!r} is no host name of lower case letters")
        if self.memory < IGB_MEMORY_LEAST or self.cpus < 1:
            raise ValueError(f"{self.memory} MiB and {self.cpus} processors are too few for a guest")
        if len({share.tag for share in self.shares}) != len(self.shares):
            raise ValueError("two shares have the same tag")


def boot_files(request: Request) -> bytes:
    """What goes behind an image's own initrd: our programs, and what this guest is to be."""
    settings = {
        "HOSTNAME": request.name,
        "HOST_LINK": HOST_LINK if request.forwards else "",
        "SHELL_TERM": request.terminal.kind if request.terminal else "",
        "SHELL_ROWS": str(request.terminal.rows if request.terminal else 0),
        "SHELL_COLUMNS": str(request.terminal.columns if request.terminal else 0),
    }
    shell = "".join(f"{key}={shlex.quote(value)}\n" for key, value in settings.items())
    # The host may change what is shared while the guest reads it; what nobody changes is worth caching.
    mounts = [f"{PROJECT_TAG} {PROJECT_PATH} ro,cache=loose\n"]
    mounts += [
        f"{share.tag} {share.guest} {'rw,cache=none' if share.writable else 'ro,cache=loose'}\n"
        for share in request.shares
    ]
    ours = [
        Entry(f"knd-guest/{path.name}", path.read_bytes(), 0o755 if path.suffix == ".sh" else 0o644)
        for path in sorted(INSIDE.iterdir())
        if path.is_file() and path.name not in ("__init__.py", "initrd.sh")
    ]
    return pack(
        [
            Entry("init", (INSIDE / "initrd.sh").read_bytes(), 0o755),
            *ours,
            Entry("knd-guest/settings", shell.encode()),
            Entry("knd-guest/shares", "".join(mounts).encode()),
        ]
    )


def command(request: Request, image: Image, folder: Path, project: Path) -> list[str]:
    """qemu's command line. In folder: initrd (read), console.log, agent.sock and console.sock (made)."""
    igb = request.topology is Topology.IGB
    append = [_KERNEL, "intel_iommu=on iommu=pt" if igb else "", request.append]
    return [
        *image.qemu,
        *("-name", request.name),
        *("-machine", "q35"),
        *_clock(request),
        *("-cpu", "max,la57=off"),
        *("-m", str(request.memory)),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-qmp", f"unix:{_quoted(folder / MONITOR)},server=on,wait=off"),
        *("-kernel", str(image.vmlinuz(request.kernel))),
        *("-initrd", str(folder / "initrd")),
        *("-append", " ".join(filter(None, append))),
        *_disk("disk", image.disk, kept=False),
        *(
            part
            for number, disk in enumerate(request.disks)
            for part in _disk(f"disk{number}", disk.file, kept=disk.kept)
        ),
        *_ports(request, folder),
        *("-object", "rng-random,filename=/dev/urandom,id=rng0", "-device", "virtio-rng-pci,rng=rng0"),
        *_shared(PROJECT_TAG, project, writable=False),
        *(
            part
            for share in request.shares
            for part in _shared(share.tag, share.host, writable=share.writable)
        ),
        *_forwarded(request.forwards),
        *(_numa(request) if igb else ("-smp", str(request.cpus))),
        *(_igb() if igb else ()),
    ]


def _clock(request: Request) -> list[str]:
    """With a clock of its own, an idle guest does not wait: the next timer's time has come at once."""
    if request.own_time:
        return ["-accel", "tcg,thread=single,tb-size=512", "-icount", "shift=1,sleep=off"]
    return ["-accel", "tcg,thread=multi,tb-size=512"]


def _disk(name: str, file: Path, *, kept: bool) -> list[str]:
    """Unless kept, nothing that the guest writes reaches the file: it goes to an unlinked one that ends with
    qemu. unsafe: what the guest flushed is in this machine's page cache, which no end of qemu takes away."""
    parts = [f"file={_quoted(file)},format=raw,if=none,id={name}", "cache=unsafe,aio=threads"]
    if not kept:
        parts.append("snapshot=on")
    return ["-drive", ",".join(parts), "-device", f"virtio-blk-pci,drive={name},serial={name}"]


def _ports(request: Request, folder: Path) -> list[str]:
    log = _quoted(folder / "console.log")
    if request.terminal:
        socket = _quoted(folder / "console.sock")
        console = f"socket,id=console,path={socket},server=on,wait=off,logfile={log}"
    else:
        console = f"file,id=console,path={log}"
    agent = f"socket,id=agent,path={_quoted(folder / 'agent.sock')},server=on,wait=off"
    return [
        *("-chardev", console, "-serial", "chardev:console"),
        *("-chardev", agent, "-device", "virtio-serial-pci"),
        *("-device", f"virtserialport,chardev=agent,name={PORT}"),
    ]


def _shared(tag: str, host: Path, *, writable: bool) -> list[str]:
    mode = "" if writable else ",readonly=on"
    folder = f"local,id=share-{tag},path={_quoted(host)},security_model=none,multidevs=remap{mode}"
    return ["-fsdev", folder, "-device", f"virtio-9p-pci,fsdev=share-{tag},mount_tag={tag}"]


def _forwarded(forwards: Sequence[Forward]) -> list[str]:
    if not forwards:
        return []
    rules = "".join(f",hostfwd=tcp:127.0.0.1:{forward.host}-:{forward.guest}" for forward in forwards)
    link = f"virtio-net-pci,netdev=host,mac={HOST_LINK},romfile="
    return ["-netdev", f"user,id=host,restrict=on{rules}", "-device", link]


def _numa(request: Request) -> list[str]:
    halves = (request.memory // 2, request.memory - request.memory // 2)
    near = (request.cpus + 1) // 2
    cpus = [f"0-{near - 1}", f"{near}-{request.cpus - 1}" if request.cpus > near else ""]
    told = [
        "-smp",
        f"{request.cpus},sockets=2,cores={near}" if request.cpus == 2 * near else str(request.cpus),
    ]
    for node, (size, some) in enumerate(zip(halves, cpus, strict=True)):
        told += ["-object", f"memory-backend-ram,id=memory{node},size={size}M"]
        told += ["-numa", f"node,nodeid={node},memdev=memory{node}" + (f",cpus={some}" if some else "")]
    return told


def _igb() -> list[str]:
    """A root for each NUMA node: what hangs on the first bus of all belongs to none."""
    told = ["-device", "intel-iommu"]
    for node in range(2):
        told += ["-device", f"pxb-pcie,id=root{node},bus_nr={32 * (node + 1)},numa_node={node},bus=pcie.0"]
    for number, (root, slot) in enumerate(((0, 0), (1, 0), (1, 1))):
        told += ["-device", f"pcie-root-port,id=port{number},bus=root{root},chassis={number + 1},addr={slot}"]
    # Linux finds the card's second function only if the first one names it.
    places = ("port0,addr=0.0,multifunction=on,x-pcie-ari-nextfn-1=on", "port0,addr=0.1", "port1", "port2")
    for number, place in enumerate(places):
        told += ["-netdev", f"hubport,hubid=1,id=wire{number}"]
        told += ["-device", f"igb,netdev=wire{number},mac=52:54:00:00:00:{16 + number:02x},bus={place}"]
    return told


def _quoted(path: Path) -> str:
    """A comma ends a value in qemu's options, unless it is doubled."""
    return str(path).replace(",", ",,")
