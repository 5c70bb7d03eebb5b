"""The guest's disk, kernels and qemu, from Debian packages; no loop mounts, nothing by hand.

Invariant: an image depends on what image_key() digests: package lists, lock, these modules, and the week,
so that a guest is at most seven days behind Debian. It holds nothing of the machine it was made on: packages
and wheels are downloaded outside of it.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kndsim.cache import Cache, digest
from kndsim.guest import debian, kernels
from kndsim.guest.debian import Apt
from kndsim.guest.kernels import Kernel, Unpacked
from kndsim.guest.work import BuildFailed, Work
from kndsim.progress import Progress

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[3]
LISTS = (
    REPOSITORY / "deploy/debian-packages.txt",
    REPOSITORY / "deploy/debian-packages-test.txt",
    HERE / "packages.txt",
)
LOCK = REPOSITORY / "requirements/lock.txt"
VENV = "/opt/knd/venv"
PYTHON = "3.13"
"""Debian 13's."""

BUILD_SECONDS = 1500.0
FREE_MIB = 3072
"""Left on the guest's disk for what runs there; takes no room until it is used."""

_TOOLS = ("make", "gcc-14", "libelf1t64", "libssl3t64", "mawk", "bc")
_QEMU = ("qemu-system-x86", "seabios", "ipxe-qemu")


@dataclass(frozen=True, slots=True)
class Image:
    """Files a guest starts from. qemu is the command and its first arguments."""

    folder: Path
    qemu: tuple[str, ...]
    names: Mapping[Kernel, str]

    @property
    def disk(self) -> Path:
        return self.folder / "root.img"

    def vmlinuz(self, kernel: Kernel) -> Path:
        return self.folder / f"vmlinuz-{kernel}"

    def initrd(self, kernel: Kernel) -> Path:
        return self.folder / f"initrd-{kernel}"


def week(now: datetime | None = None) -> str:
    year, number, _ = (now or datetime.now(UTC)).isocalendar()
    return f"{year}-{number:02}"


def image_key(when: str) -> str:
    modules = sorted(HERE.glob("*.py"))
    made_by = [path for path in modules if path.name in ("cpio.py", "debian.py", "image.py", "kernels.py")]
    return digest([*LISTS, LOCK, *made_by, when])


def qemu_key(when: str) -> str:
    return digest([HERE / "debian.py", *_QEMU, when])


def image(cache: Cache | None = None, progress: Progress | None = None) -> Image:
    """The image for this checkout, built if there is none: about three minutes, and a few hundred MB."""
    if platform.machine() != "x86_64":
        raise BuildFailed(
            f"a guest emulates an x86_64 machine and is built on one, not on {platform.machine()}"
        )
    where, telling, when = cache or Cache(), progress or Progress("guest"), week()
    qemu = where.folder("guest-qemu", qemu_key(when), lambda folder: _build_qemu(folder, telling))
    made = where.folder("guest", image_key(when), lambda folder: _Build(folder, telling).all())
    names = json.loads((made / "kernels.json").read_text())
    return Image(made, _qemu_command(qemu / "root"), {Kernel(key): name for key, name in names.items()})


def _qemu_command(root: Path) -> tuple[str, ...]:
    """Debian 13's qemu with its own loader and libraries, whatever this machine's are."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    loader = [str(root / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
    firmware = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")
    folders = [part for name in firmware for part in ("-L", str(root / name))]
    return (*loader, str(root / "usr/bin/qemu-system-x86_64"), *folders)


def _build_qemu(folder: Path, progress: Progress) -> None:
    with progress.phase("qemu"):
        work = Work(BUILD_SECONDS)
        debian.make_root(work, folder / "root", _QEMU, debian.archives(), variant="extract")
        said = work.run([*_qemu_command(folder / "root"), "-version"])
        progress.say(said.splitlines()[0])


class _Build:
    """One build, in the folder that becomes the image."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder = folder
        self.scratch = folder / "scratch"
        self.root, self.tools, self.wheels = (self.scratch / name for name in ("guest", "tools", "wheels"))
        self.progress = progress
        self.work = Work(BUILD_SECONDS)
        self.archives = debian.archives()
        self.unpacked: list[Unpacked] = []
        self.built: dict[Kernel, dict[str, Path]] = {}

    def all(self) -> None:
        self.scratch.mkdir()
        self.work.together(self._guest, self._kernels)
        self._install()
        self._disk()
        shutil.rmtree(self.scratch)

    def _guest(self) -> None:
        self._wheels()
        self._root()
        self._venv()

    def _kernels(self) -> None:
        self.work.together(self._tools, self._downloads)
        for got in self.unpacked:
            with self.progress.phase(f"modules for {got.release.name}"):
                self.built[got.release.kernel] = kernels.build_modules(self.work, self.tools, got)

    def _root(self) -> None:
        packages = [package for path in LISTS for package in debian.listed(path)]
        with self.progress.phase("guest's packages"):
            debian.make_root(self.work, self.root, packages, self.archives)
        (self.root / "etc/resolv.conf").unlink(missing_ok=True)

    def _tools(self) -> None:
        with self.progress.phase("compiler"):
            debian.make_root(self.work, self.tools, _TOOLS, self.archives)

    def _downloads(self) -> None:
        with self.progress.phase("kernels: download"):
            known = debian.sources(self.archives, "trixie", backports=True)
            known += "\n" + debian.sources(self.archives, "bookworm")
            apt = Apt(self.work, self.scratch / "apt", known)
            for kernel in Kernel:
                release = kernels.newest(apt, kernel)
                self.progress.say(f"kernel {kernel}: {release.name} ({release.version})")
                self.unpacked.append(kernels.fetch(self.work, apt, release, self.scratch / kernel))

    def _wheels(self) -> None:
        platforms = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 42))]
        tags = [part for name in platforms for part in ("--platform", name)]
        tags += [
            part for name in (f"cp{PYTHON.replace('.', '')}", "abi3", "none") for part in ("--abi", name)
        ]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        only = ["--require-hashes", "--only-binary", ":all:", "--python-version", PYTHON]
        into = ["--dest", str(self.wheels), "-r", str(LOCK)]
        with self.progress.phase("wheels"):
            self.work.run([*pip, *only, "--implementation", "cp", *tags, *into])

    def _venv(self) -> None:
        """As deploy/make-venv.sh makes it, but for the project itself, which is mounted when a guest runs."""
        with self.progress.phase("virtual environment"):
            inside = self.root / "tmp/wheels"
            shutil.copytree(self.wheels, inside)
            shutil.copy2(LOCK, inside / "lock.txt")
            self.work.inside(self.root, ["python3", "-m", "venv", "--system-site-packages", VENV])
            pip = [f"{VENV}/bin/python", "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
            strict = ["--quiet", "--force-reinstall", "--require-hashes", "--only-binary", ":all:"]
            found = ["--no-index", "--find-links", "/tmp/wheels", "-r", "/tmp/wheels/lock.txt"]
            self.work.inside(self.root, [*pip, *strict, *found], PIP_CONFIG_FILE="/dev/null")
            shutil.rmtree(inside)

    def _install(self) -> None:
        with self.progress.phase("kernels into the guest"):
            for got in self.unpacked:
                kernel = got.release.kernel
                kernels.install(self.work, self.root, got, self.built[kernel])
                shutil.copy2(got.vmlinuz, self.folder / f"vmlinuz-{kernel}")
                first = kernels.initrd(self.work, self.root, got.release)
                (self.folder / f"initrd-{kernel}").write_bytes(first)

    def _disk(self) -> None:
        with self.progress.phase("disk"):
            names = {str(got.release.kernel): got.release.name for got in self.unpacked}
            (self.folder / "kernels.json").write_text(json.dumps(names))
            used = int(self.work.run(["du", "-sm", str(self.root)]).split()[0])
            size = f"{used * 5 // 4 + FREE_MIB}M"
            make = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0"]
            self.work.run([*make, "-d", str(self.root), str(self.folder / "root.img"), size])
