"""The guest's kernels: which, from where, with which modules, and with simulated devices built for each.

Invariant: names and versions are looked up when an image is built, never written here. A module that a
kernel lacks is built from that kernel's own source.
"""

from __future__ import annotations

import enum
import shutil
from dataclasses import dataclass
from pathlib import Path

from kndsim.guest.cpio import Entry, pack
from kndsim.guest.debian import Apt
from kndsim.guest.work import BuildFailed, Work


class Kernel(enum.StrEnum):
    """Debian's kernels that a node may run."""

    NEWEST = "newest"
    """Debian 13's backports."""
    STABLE = "stable"
    """Debian 13's own."""
    DEBIAN12 = "debian12"
    """Debian 12's own, below the same Debian 13."""


_SUITE = {Kernel.NEWEST: "trixie-backports", Kernel.STABLE: "trixie", Kernel.DEBIAN12: "bookworm"}

BUILT = {"netdevsim": "drivers/net/netdevsim", "siw": "drivers/infiniband/sw/siw"}
"""Modules that Debian does not build, and where their sources are."""
_SWITCHES = ("CONFIG_NETDEVSIM=m", "CONFIG_RDMA_SIW=m", "CONFIG_DEBUG_INFO_BTF_MODULES=")
"""The last one: type information of these modules would take the kernel's own debug package."""

_EARLY = ("virtio_pci", "virtio_blk", "ext4")
"""What finds the root file system."""

_USELESS = (
    "sound drivers/{accel,accessibility,ata,auxdisplay,bluetooth,char/agp,comedi,cpufreq,edac,extcon,"
    "firewire,gnss,gpu,greybus,hid,iio,input,isdn,leds,macintosh,mailbox,md,media,memstick,message,mfd,misc/mei,"
    "mmc,mtd,mux,nfc,nvme,parport,pcmcia,platform,power,rapidio,regulator,rpmsg,rtc,scsi,slimbus,soundwire,"
    "spi,ssb,staging,target,thermal,thunderbolt,tty,ufs,usb,video,w1,watchdog} "
    "drivers/net/{arcnet,can,fddi,fjes,hamradio,ieee802154,plip,slip,thunderbolt,usb,wan,wireless,wwan} "
    "drivers/infiniband/ulp fs/{afs,affs,bcachefs,befs,btrfs,ceph,cifs,coda,ecryptfs,f2fs,gfs2,hfs,hfsplus,"
    "jffs2,jfs,minix,nfs,nfsd,nilfs2,ntfs3,ocfs2,orangefs,reiserfs,smb,ubifs,udf,ufs,xfs,zonefs} "
    "net/{6lowpan,appletalk,ax25,batman-adv,bluetooth,can,ceph,dccp,ieee802154,lapb,mac80211,mac802154,netrom,"
    "nfc,phonet,rds,rose,rxrpc,sctp,smc,sunrpc,tipc,wireless,x25}"
)
"""Folders of modules no test needs; i2c and hwmon stay, igb hangs on them."""


@dataclass(frozen=True, slots=True)
class Release:
    """A kernel as the archive has it now."""

    kernel: Kernel
    name: str
    """As uname -r says it."""
    version: str
    """Of the Debian package."""

    @property
    def series(self) -> str:
        return ".".join(self.name.split("-")[0].split("+")[0].split(".")[:2])


def newest(apt: Apt, kernel: Kernel) -> Release:
    version = apt.newest("linux-image-amd64", _SUITE[kernel])
    for needed in apt.needs("linux-image-amd64", version):
        if needed.startswith("linux-image-"):
            return Release(kernel, needed.removeprefix("linux-image-"), version)
    raise BuildFailed(f"linux-image-amd64 {version} of {_SUITE[kernel]} names no kernel")


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Downloaded and unpacked for one kernel: image and modules, headers, sources of what is to be built."""

    release: Release
    image: Path
    headers: Path
    sources: Path

    @property
    def modules(self) -> Path:
        for below in ("usr/lib/modules", "lib/modules"):
            if (found := self.image / below / self.release.name).is_dir():
                return found
        raise BuildFailed(f"the packages of {self.release.name} have no modules")

    @property
    def vmlinuz(self) -> Path:
        for path in (self.image / "boot" / f"vmlinuz-{self.release.name}", self.modules / "vmlinuz"):
            if path.is_file():
                return path
        raise BuildFailed(f"the packages of {self.release.name} have no kernel")


def fetch(work: Work, apt: Apt, release: Release, folder: Path) -> Unpacked:
    name = release.name
    got = Unpacked(release, folder / "image", folder / "headers", folder / "sources")
    # Some releases put a kernel into one package, others into several that the one depends on.
    image = [f"linux-image-{name}", *_parts(apt, f"linux-image-{name}", name)]
    headers = [f"linux-headers-{name}", *_parts(apt, f"linux-headers-{name}", "")]
    for packages, into in ((image, got.image), (headers, got.headers)):
        for deb in apt.download(packages, folder / "debs"):
            work.run(["dpkg-deb", "--extract", str(deb), str(into)])
    (source,) = apt.download([f"linux-source-{release.series}"], folder / "debs")
    _unpack_sources(work, source, got.sources, release.series)
    return got


def _parts(apt: Apt, package: str, ending: str) -> list[str]:
    wanted = ("linux-base-", "linux-binary-", "linux-modules-", "linux-headers-", "linux-kbuild-")
    return [name for name in apt.needs(package) if name.startswith(wanted) and name.endswith(ending)]


def _unpack_sources(work: Work, deb: Path, into: Path, series: str) -> None:
    into.mkdir()
    name = f"linux-source-{series}"
    script = 'dpkg-deb --fsys-tarfile "$1" | tar -xO "./usr/src/$2.tar.xz" | tar -xJ -C "$3" "${@:4}"'
    folders = [f"{name}/{folder}" for folder in BUILT.values()]
    work.run(["bash", "-euo", "pipefail", "-c", script, "unpack", str(deb), name, str(into), *folders])
    (into / name).rename(into / "linux")
    deb.unlink()


def build_modules(work: Work, tools: Path, got: Unpacked) -> dict[str, Path]:
    """The modules of BUILT that this kernel's source gives, by name; built in the tools' root."""
    name = got.release.name
    # Debian's headers find each other by absolute paths. Debian 12's packages know /lib as a folder.
    copy = 'tar -C "$1" -c . | tar -C "$2" -x --keep-directory-symlink'
    work.run(["bash", "-euo", "pipefail", "-c", copy, "copy", str(got.headers), str(tools)])
    place = tools / "build" / name
    built = {}
    for module, folder in BUILT.items():
        shutil.copytree(got.sources / "linux" / folder, place / module)
        make = ["make", "-s", "-j2", "-C", f"/usr/src/linux-headers-{name}", f"M=/build/{name}/{module}"]
        work.inside(tools, [*make, *_SWITCHES, "CC=gcc-14", "modules"])
        work.inside(tools, ["strip", "--strip-debug", f"/build/{name}/{module}/{module}.ko"])
        built[module] = place / module / f"{module}.ko"
    return built


def install(work: Work, root: Path, got: Unpacked, built: dict[str, Path]) -> None:
    """Modules into the guest's root: without those no test needs, uncompressed, with those built here."""
    name = got.release.name
    home = root / "usr/lib/modules" / name
    home.parent.mkdir(parents=True, exist_ok=True)
    drop = f'cd "$1/kernel" && rm -rf {_USELESS}'
    work.run(["bash", "-euc", drop, "drop", str(got.modules)])
    unpack = 'find "$1" -name "*.ko.xz" -print0 | xargs -0 -r -n 64 -P 2 xz --decompress'
    work.run(["bash", "-euc", unpack, "unpack", str(got.modules)])
    work.run(["cp", "-a", str(got.modules), str(home)])
    for left in ("build", "source", "vmlinuz", "System.map"):
        (home / left).unlink(missing_ok=True)
    (home / "updates").mkdir()
    for path in built.values():
        shutil.copy2(path, home / "updates")
    work.inside(root, ["depmod", name])


def initrd(work: Work, root: Path, release: Release) -> bytes:
    """What mounts the root file system and hands over to it: see inside/initrd.sh."""
    shown = work.inside(root, ["modprobe", "--set-version", release.name, "--all", "--show-depends", *_EARLY])
    order = dict.fromkeys(line.split()[1] for line in shown.splitlines() if line.startswith("insmod "))
    files = [Entry(f"modules/{Path(path).name}", (root / path.lstrip("/")).read_bytes()) for path in order]
    names = "".join(f"{Path(path).name}\n" for path in order)
    busybox = (root / "usr/bin/busybox").read_bytes()
    empty = [Entry(f"{folder}/.keep", b"") for folder in ("dev", "disk")]
    return pack(
        [Entry("bin/busybox", busybox, 0o755), Entry("modules/order", names.encode()), *files, *empty]
    )
