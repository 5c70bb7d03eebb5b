"""What a guest promises whoever uses it: commands end, files are whole, failures say why, nothing stays.

Invariant: a small guest of its own for each test that breaks something.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from kndsim.agent import free_port
from kndsim.guest import BootFailed, Forward, Guest, GuestGone, Image, Kernel, Share, Topology, guest
from kndsim.guest.image import REPOSITORY
from kndsim.place import CommandFailed

WaitUntil = Callable[..., object]


@pytest.fixture(scope="module")
def small(made: Image) -> Iterator[Guest]:
    with guest(topology=Topology.PLAIN, name="small", memory=1024, made=made) as running:
        yield running


def machines() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("knd-vm-*")}


def start(*, made: Image, append: str = "", boot_seconds: float = 60) -> None:
    with guest(topology=Topology.PLAIN, memory=768, append=append, boot_seconds=boot_seconds, made=made):
        raise AssertionError("it came up")


def test_a_command_that_hangs_is_killed_in_time_with_all_it_started(small: Guest) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"on small: not done after 1 s: before"):
        small.run(["sh", "-c", "echo before; sleep 8123 & sleep 8123"], timeout=1)
    assert time.monotonic() - started < 20
    assert small.run(["pgrep", "-f", "sleep 8123"], check=False).code == 1


def test_a_command_that_fails_says_where_and_what_it_said(small: Guest) -> None:
    with pytest.raises(CommandFailed, match=r"false-friend on small ended with 127: .*No such file"):
        small.run(["false-friend"])
    with pytest.raises(CommandFailed, match=r"on small ended with 3: why"):
        small.run(["sh", "-c", "echo why >&2; exit 3"])


def test_files_go_both_ways_whole(small: Guest) -> None:
    data, path = os.urandom(3_000_000), PurePosixPath("/var/tmp/new/folder/file")
    small.write(path, data, 0o750)
    assert small.read(path) == data
    assert small.run(["stat", "-c", "%a", str(path)]).out == "750\n"
    with pytest.raises(FileNotFoundError, match="small: No such file"):
        small.read(PurePosixPath("/no/such/file"))


def test_a_service_is_started_told_and_signalled(small: Guest, wait_until: WaitUntil) -> None:
    assert not small.alive("pinger")
    small.start("pinger", ["sh", "-c", "echo $KND_WORD; exec sleep 8124"], env={"KND_WORD": "hello"})
    wait_until(lambda: small.log("pinger") == "hello\n", 20)
    assert small.alive("pinger")
    small.signal("pinger", signal.SIGTERM)
    wait_until(lambda: not small.alive("pinger"), 20)
    small.signal("pinger", signal.SIGTERM)


def test_what_a_guest_writes_stays_in_it(small: Guest, made: Image) -> None:
    before = made.disk.stat().st_mtime_ns
    small.run(["sh", "-c", "echo changed >>/srv/knd/README.md; echo >/etc/left; touch /srv/knd/new; sync"])
    assert small.read(PurePosixPath("/srv/knd/README.md")).endswith(b"changed\n")
    assert not (REPOSITORY / "README.md").read_text().endswith("changed\n")
    assert not (REPOSITORY / "new").exists()
    assert made.disk.stat().st_mtime_ns == before
    refused = small.run(["touch", "/run/knd-guest/project/new"], check=False)
    assert "Read-only" in refused.err


def test_two_guests_live_side_by_side_with_shares_and_ports_of_their_own(
    small: Guest, made: Image, tmp_path: Path, wait_until: WaitUntil
) -> None:
    (tmp_path / "given").write_text("from the host")
    shares = [Share("both", tmp_path, PurePosixPath("/mnt/both"), writable=True)]
    port = free_port()
    with guest(
        topology=Topology.PLAIN,
        name="second",
        memory=768,
        cpus=1,
        shares=shares,
        forwards=[Forward(port, 8080)],
        kernel=Kernel.DEBIAN12,
        made=made,
    ) as second:
        assert (small.run(["hostname"]).out, second.run(["hostname"]).out) == ("small\n", "second\n")
        assert second.run(["uname", "-r"]).out.strip() == made.names[Kernel.DEBIAN12]
        assert second.read(PurePosixPath("/mnt/both/given")) == b"from the host"
        second.write(PurePosixPath("/mnt/both/back"), b"from the guest")
        assert (tmp_path / "back").read_bytes() == b"from the guest"
        second.start("web", ["python", "-m", "http.server", "--directory", "/mnt/both", "8080"])

        def fetched() -> bool:
            get = ["curl", "--silent", "--max-time", "5", f"http://127.0.0.1:{port}/given"]
            return subprocess.run(get, capture_output=True, text=True, check=False).stdout == "from the host"

        wait_until(fetched, 60, "the guest's port on the host's loopback")


def test_a_guest_whose_kernel_gives_up_is_an_error_with_its_last_words(made: Image) -> None:
    with pytest.raises(BootFailed, match=r"(?s)its kernel gave up.*console's end.*Kernel panic") as caught:
        start(append="rdinit=/nothing root=/dev/none", made=made)
    assert not caught.value.slow


def test_a_guest_that_does_not_come_up_is_given_up_after_a_second_try(made: Image) -> None:
    before, started = machines(), time.monotonic()
    with pytest.raises(BootFailed, match=r"(?s)did not answer within 2 s.*The console's end") as caught:
        start(boot_seconds=1, made=made)
    assert caught.value.slow
    assert 3 <= time.monotonic() - started < 30
    assert machines() == before


def test_a_guest_that_dies_ends_what_is_asked_of_it(made: Image) -> None:
    with guest(topology=Topology.PLAIN, memory=768, made=made) as running:
        with pytest.raises(GuestGone, match="machine is gone"):
            running.run(["sh", "-c", "echo b >/proc/sysrq-trigger; sleep 600"], timeout=60)
        with pytest.raises(GuestGone):
            running.run(["true"])


KEEPS_ONE = """
import sys, time
from kndsim.guest import Topology, guest
with guest(topology=Topology.PLAIN, memory=768) as vm:
    print(vm.console_socket.parent, flush=True)
    time.sleep(600)
"""


def test_a_guest_ends_with_whoever_started_it_however_that_ends(made: Image, wait_until: WaitUntil) -> None:
    command = [sys.executable, "-c", KEEPS_ONE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=_paths()) as keeper:
        assert keeper.stdout is not None
        folder = keeper.stdout.readline().strip()
        assert folder
        assert _uses(folder)
        keeper.kill()
    wait_until(lambda: not _uses(folder), 20, "qemu's end")
    # Nobody was left to remove it.
    for path in Path(folder).iterdir():
        path.unlink()
    Path(folder).rmdir()


def _paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": "ci/kind-sriov-sim"}


def _uses(folder: str) -> bool:
    commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.exists())
    return any(folder.encode() in command for command in commands)
