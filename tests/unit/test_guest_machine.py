"""What a guest is made of, without one: qemu's command line, its first files, the archives' addresses, keys.

Invariant: a request that makes no sense is refused before anything is started.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pytest

from kndsim.guest import cpio, debian
from kndsim.guest.image import Image
from kndsim.guest.kernels import Kernel, Release
from kndsim.guest.machine import Disk, Forward, Request, Share, Terminal, Topology, boot_files, command
from kndsim.guest.vm import remove_left

# The package has a function of the module's name.
image_module = importlib.import_module(Image.__module__)

MADE = Image(Path("/images"), ("qemu", "-L", "firmware"), {kernel: f"9-{kernel}" for kernel in Kernel})


def line(request: Request) -> str:
    return " ".join(command(request, MADE, Path("/tmp/a,b"), Path("/checkout")))


# --- qemu -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", Kernel)
def test_each_kernel_is_started_with_its_own_files_and_never_writes_the_disk(kernel: Kernel) -> None:
    told = line(Request(kernel=kernel))
    assert told.startswith("qemu -L firmware ")
    assert f"-kernel /images/vmlinuz-{kernel} " in told
    assert "file=/images/root.img,format=raw,if=none,id=disk,cache=unsafe,aio=threads,snapshot=on " in told
    assert "-accel tcg," in told
    assert "kvm" not in told


def test_further_disks_come_behind_the_first_and_are_written_only_where_they_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "more.img"
    file.touch()
    told = line(Request(disks=[Disk(file), Disk(file, kept=True)]))
    first, second = re.findall(r"-drive (file=\S*more\.img\S*)", told)
    assert told.index(first) > told.index("file=/images/root.img")
    assert ("snapshot=on" in first, "snapshot=on" in second) == (True, False)
    assert "-device virtio-blk-pci,drive=disk0," in told


def test_a_disk_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"disk .*none\.img is no file"):
        Disk(tmp_path / "none.img")


def test_a_guest_has_no_network_of_the_hosts() -> None:
    assert "-netdev user" not in line(Request())
    assert "-nodefaults" in line(Request())


def test_forwarded_ports_are_on_loopback_and_lead_nowhere_else() -> None:
    told = line(Request(forwards=[Forward(7000, 80), Forward(7001, 443)]))
    rules = "hostfwd=tcp:127.0.0.1:7000-:80,hostfwd=tcp:127.0.0.1:7001-:443"
    assert f"-netdev user,id=host,restrict=on,{rules} " in told


def test_shares_are_read_only_unless_they_were_asked_to_be_writable(tmp_path: Path) -> None:
    shares = [
        Share("seen", tmp_path, PurePosixPath("/mnt/a")),
        Share("kept", tmp_path, PurePosixPath("/mnt/b"), writable=True),
    ]
    told = line(Request(shares=shares))
    assert told.count("readonly=on") == 2, "the checkout is the other one"
    assert "id=share-kept," in told
    assert "readonly=on" not in told.split("id=share-kept,")[1].split()[0]
    first = boot_files(Request(shares=shares))
    assert b"seen /mnt/a ro,cache=loose\n" in first
    assert b"kept /mnt/b rw,cache=none\n" in first


def test_a_comma_in_a_path_is_no_new_option() -> None:
    assert "path=/tmp/a,,b/agent.sock," in line(Request())


@pytest.mark.parametrize(
    ("cpus", "smp", "nodes"),
    [
        (1, "1", ["cpus=0-0", ""]),
        (2, "2,sockets=2,cores=1", ["cpus=0-0", "cpus=1-1"]),
        (3, "3", ["cpus=0-1", "cpus=2-2"]),
        (4, "4,sockets=2,cores=2", ["cpus=0-1", "cpus=2-3"]),
    ],
)
def test_processors_and_memory_are_split_over_both_nodes(cpus: int, smp: str, nodes: list[str]) -> None:
    told = line(Request(cpus=cpus, memory=1025))
    assert f"-smp {smp} " in told
    assert "id=memory0,size=512M" in told
    assert "id=memory1,size=513M" in told
    found = [word for word in told.split() if word.startswith("node,nodeid=")]
    assert [(node.split("memdev=")[1].partition(",")[2]) for node in found] == nodes


def test_a_plain_guest_has_no_ports_and_no_nodes() -> None:
    told = line(Request(topology=Topology.PLAIN))
    assert "igb" not in told
    assert "numa" not in told
    assert "iommu" not in told
    assert line(Request()).count("-device igb,") == 4


def test_a_guest_with_a_clock_of_its_own_is_late_for_nothing_that_its_host_does() -> None:
    told = line(Request(own_time=True))
    assert "-accel tcg,thread=single," in told
    assert " -icount shift=1,sleep=off " in told
    assert "icount" not in line(Request())


def test_a_terminal_makes_the_console_a_socket_and_is_told_to_the_guest() -> None:
    request = Request(terminal=Terminal("xterm'; reboot", 24, 80))
    assert "id=console,path=/tmp/a,,b/console.sock" in line(request)
    assert b"""SHELL_TERM='xterm'"'"'; reboot'\n""" in boot_files(request)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: Request(name="Not a host"), "is no host name"),
        (lambda: Request(name=""), "is no host name"),
        (lambda: Request(memory=64), "too few"),
        (lambda: Request(cpus=0), "too few"),
        (lambda: Forward(0, 80), "no TCP port: 0"),
        (lambda: Forward(80, 70000), "no TCP port: 70000"),
        (lambda: Share("a b", Path("/tmp"), PurePosixPath("/mnt")), "share tag 'a b'"),
        (lambda: Share("project", Path("/tmp"), PurePosixPath("/mnt")), "not 'project'"),
        (lambda: Share("a", Path("/no/such"), PurePosixPath("/mnt")), "/no/such is no folder"),
        (lambda: Share("a", Path("/tmp"), PurePosixPath("mnt")), "not an absolute path"),
        (lambda: Share("a", Path("/tmp"), PurePosixPath("/m t")), "without blanks"),
        (
            lambda: Request(shares=[Share("a", Path("/tmp"), PurePosixPath(f"/{n}")) for n in "xy"]),
            "same tag",
        ),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(wrong, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        wrong()


# --- first files ------------------------------------------------------------------------------------


def test_an_archive_is_what_other_programs_take_it_for(tmp_path: Path) -> None:
    tool = shutil.which("busybox") or shutil.which("bsdtar") or shutil.which("cpio")
    if tool is None:
        pytest.skip("neither busybox, bsdtar nor cpio is installed: a guest's start shows the same")
    archive = cpio.pack([cpio.Entry("a/b/run", b"#!", 0o755), cpio.Entry("c", bytes(7))])
    extract = [tool, "-xf", "-"] if tool.endswith("bsdtar") else [tool, "cpio", "-id"]
    extract = [tool, "-id"] if tool.endswith("cpio") else extract
    subprocess.run(extract, input=archive, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "a/b/run").read_bytes() == b"#!"
    assert (tmp_path / "a/b/run").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "c").read_bytes() == bytes(7)


def test_archives_are_aligned_so_that_another_can_follow() -> None:
    archive = cpio.pack([cpio.Entry("name", b"odd")])
    assert len(archive) % 512 == 0
    assert archive == cpio.pack([cpio.Entry("name", b"odd")])
    at = archive.index(b"TRAILER!!!") - 110
    assert at % 4 == 0
    assert archive[at : at + 6] == b"070701"


# --- Debian -----------------------------------------------------------------------------------------

STANZAS = """\
# a comment
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /keys/debian.gpg

Types: deb deb-src
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main contrib

Types: deb
URIs: http://vendor.example/debian
Suites: stable
Components: main

Types: deb
Enabled: no
URIs: http://other.example/debian
Suites: bookworm
Components: main
"""
LINES = """\
deb [arch=amd64 signed-by=/keys/a.gpg] http://mirror.example/debian bookworm main # note
deb-src http://mirror.example/debian bookworm main
deb http://mirror.example/debian-security bookworm-security main
deb http://vendor.example/apt bookworm main
"""


@pytest.mark.parametrize(("name", "text"), [("debian.sources", STANZAS), ("debian.list", LINES)])
def test_only_debians_own_archives_are_taken_and_known_for_what_they_are(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / name).write_text(text)
    found = debian.archives(tmp_path, "bookworm")
    assert [(it.uri.rpartition("/")[2], it.security) for it in found] == [
        ("debian", False),
        ("debian-security", True),
    ]
    assert found[0].signed_by.startswith("/keys/")
    text = debian.sources(found, "trixie", backports=True)
    assert "Suites: trixie trixie-updates trixie-backports\n" in text
    assert "Suites: trixie-security\n" in text
    assert "bookworm" not in text


def test_a_machine_without_debians_archives_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(debian.NoPackages, match="no Debian archive for noble"):
        debian.archives(tmp_path, "noble")


@pytest.mark.parametrize(
    ("name", "series"),
    [("7.3.4+deb13-amd64", "7.3"), ("6.1.0-56-amd64", "6.1"), ("6.12.118+deb13-amd64", "6.12")],
)
def test_a_kernels_source_is_found_by_its_series(name: str, series: str) -> None:
    assert Release(Kernel.NEWEST, name, "1").series == series


# --- keys -------------------------------------------------------------------------------------------


def test_an_image_is_another_one_when_a_week_or_any_input_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = image_module.image_key("2026-47")
    assert key == image_module.image_key("2026-47")
    assert key != image_module.image_key("2026-48")
    changed = tmp_path / "lock.txt"
    changed.write_bytes(image_module.LOCK.read_bytes() + b"\n")
    monkeypatch.setattr(image_module, "LOCK", changed)
    assert key != image_module.image_key("2026-47")


def test_a_week_begins_on_monday_also_over_new_year() -> None:
    def of(*date: int) -> str:
        return image_module.week(datetime(*date, tzinfo=UTC))

    assert of(2026, 12, 31) == of(2027, 1, 3) == "2026-53"
    assert of(2027, 1, 4) == "2027-01"


# --- what killed users left -------------------------------------------------------------------------


def test_only_folders_that_nobody_uses_any_more_are_removed(tmp_path: Path) -> None:
    left, new, used = (tmp_path / f"knd-vm-{name}" for name in ("left", "new", "used"))
    for folder in (left, new, used):
        folder.mkdir()
        (folder / "initrd").touch()
    for folder in (left, used):
        os.utime(folder, (0, 0))
    lock = os.open(used, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_left(tmp_path)
    finally:
        os.close(lock)
    assert sorted(tmp_path.iterdir()) == sorted([new, used])
