"""At most one agent holds the node: the takeover lock, between real processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from driver.errors import DriverError, NotNow
from driver.kubelet.plugin import make_plugin_dir
from driver.kubelet.takeover import TakeoverLock
from driver.paths import Paths

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys, time
from pathlib import Path
from driver.kubelet.takeover import TakeoverLock
from driver.paths import Paths

class Clock:
    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

with TakeoverLock(Paths(root=Path(sys.argv[1])), Clock()) as lock:
    assert lock.try_acquire()
    print("held", flush=True)
    sys.stdin.readline()
print("let go", flush=True)
"""


class Clock:
    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(root=tmp_path)
    make_plugin_dir(paths)
    return paths


@contextmanager
def other_process(paths: Paths) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the lock until it gets a line."""
    command = [sys.executable, "-c", HOLDER, str(paths.root)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def take(lock: TakeoverLock, seconds: float) -> None:
    asyncio.run(lock.acquire(time.monotonic() + seconds))


def test_a_lock_held_by_another_process_is_refused_naming_it(paths: Paths) -> None:
    with other_process(paths) as holder, TakeoverLock(paths, Clock()) as lock:
        with pytest.raises(NotNow) as refused:
            take(lock, 0.2)
        assert not lock.held
    assert f"held by process {holder.pid} on " in str(refused.value)
    assert "stop that one first" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_lock_is_taken_over_when_its_holder_lets_go(paths: Paths) -> None:
    with other_process(paths) as holder, TakeoverLock(paths, Clock()) as lock:

        async def take_over() -> None:
            waiting = asyncio.create_task(lock.acquire(time.monotonic() + 20))
            await asyncio.sleep(0)
            assert not lock.held
            assert holder.stdin is not None
            holder.stdin.write("go\n")
            holder.stdin.flush()
            await waiting

        asyncio.run(take_over())
        assert lock.held
        assert lock.holder().startswith(f"process {os.getpid()} on ")


def test_the_lock_of_a_killed_process_is_free(paths: Paths) -> None:
    with other_process(paths) as holder, TakeoverLock(paths, Clock()) as lock:
        holder.kill()
        holder.wait(timeout=20)
        take(lock, 20)
        assert lock.held


def test_two_locks_in_one_process_exclude_each_other(paths: Paths) -> None:
    with TakeoverLock(paths, Clock()) as first, TakeoverLock(paths, Clock()) as second:
        assert first.try_acquire()
        assert first.try_acquire()
        assert not second.try_acquire()
        first.release()
        assert second.try_acquire()


def test_the_lock_file_survives_and_names_nobody_after_release(paths: Paths) -> None:
    with TakeoverLock(paths, Clock()) as lock:
        assert lock.try_acquire()
        assert paths.takeover_lock.stat().st_mode & 0o777 == 0o600
    assert paths.takeover_lock.exists()
    assert lock.holder() == ""


def test_a_removed_lock_file_is_not_what_the_next_one_locks(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TakeoverLock(paths, Clock()) as lock:
        really_open = os.open

        def open_then_lose(path: Path, flags: int, mode: int = 0o777) -> int:
            fd = really_open(path, flags, mode)
            if not (paths.plugin_dir / "lost").exists():
                (paths.plugin_dir / "lost").touch()
                paths.takeover_lock.unlink()
            return fd

        monkeypatch.setattr(os, "open", open_then_lose)
        assert lock.try_acquire()
        monkeypatch.undo()
        with TakeoverLock(paths, Clock()) as other:
            assert not other.try_acquire()


def test_a_program_that_the_agent_starts_does_not_get_the_lock(paths: Paths) -> None:
    with TakeoverLock(paths, Clock()) as lock:
        assert lock.try_acquire()
        with subprocess.Popen(
            ["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
        ) as child:
            try:
                assert child.stdin is not None
                assert child.stdout is not None
                child.stdin.write(b"x")
                child.stdin.flush()
                assert child.stdout.read(1) == b"x"
                open_files = [os.readlink(fd) for fd in Path(f"/proc/{child.pid}/fd").iterdir()]
            finally:
                child.kill()
    assert open_files
    assert str(paths.takeover_lock) not in open_files


def test_release_frees_the_lock_even_while_a_copy_of_its_file_is_open(paths: Paths) -> None:
    with TakeoverLock(paths, Clock()) as lock, TakeoverLock(paths, Clock()) as other:
        assert lock.try_acquire()
        (fd,) = (
            int(link.name)
            for link in Path("/proc/self/fd").iterdir()
            if os.path.lexists(link) and os.readlink(link) == str(paths.takeover_lock)
        )
        copy = os.dup(fd)
        try:
            lock.release()
            assert other.try_acquire()
        finally:
            os.close(copy)


def test_a_lock_that_cannot_be_opened_says_what_to_do(tmp_path: Path) -> None:
    paths = Paths(root=tmp_path)
    with TakeoverLock(paths, Clock()) as lock, pytest.raises(DriverError, match="check that kubelet's root"):
        lock.try_acquire()
    make_plugin_dir(paths)
    paths.takeover_lock.symlink_to("/etc/hostname")
    with TakeoverLock(paths, Clock()) as lock, pytest.raises(DriverError, match="cannot be used"):
        lock.try_acquire()


def test_what_another_process_wrote_is_shown_as_one_harmless_line(paths: Paths) -> None:
    paths.takeover_lock.write_bytes(b"\x1b[2Jevil\nline\xff" + b"x" * 5000)
    holder = TakeoverLock(paths, Clock()).holder()
    assert holder.isprintable()
    assert len(holder) <= 200
