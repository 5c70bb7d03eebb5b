"""Commands of a build: in sequence or side by side, all within one time limit.

Invariant: when run() is left, however, the command and what it started are gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from kndsim.agent import dying_with_parent

_CLEAN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8"}

Step = Callable[[], None]


class BuildFailed(Exception):
    """A command of the build, and the end of what it said."""


class Work:
    """A build that may take so many seconds in all."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._given_up = False

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """What it said on stdout; BuildFailed unless it ended with 0."""
        if self._given_up:
            raise BuildFailed(f"not started, since another part of the build failed: {argv[0]}")
        process = subprocess.Popen(
            dying_with_parent(argv),
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8"} if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=max(0.1, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise BuildFailed(f"not done within {self._seconds:g} s: {_short(argv)}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()
        if process.returncode != 0:
            said = (err.strip() or out.strip())[-3000:]
            raise BuildFailed(f"{_short(argv)} ended with {process.returncode}:\n{said}")
        return out

    def inside(self, root: Path, argv: Sequence[str], **env: str) -> str:
        """Run in a root file system with a /proc of its own and nothing of this machine's environment."""
        script = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
        enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(root)]
        return self.run([*enter, *argv], env={**_CLEAN, **env})

    def together(self, *steps: Step) -> None:
        """All of them side by side; the first failure keeps the others from starting more, and is raised."""
        with ThreadPoolExecutor(len(steps)) as pool:
            running: list[Future[None]] = [pool.submit(step) for step in steps]
            try:
                done, _ = wait(running, return_when=FIRST_EXCEPTION)
                for future in done:
                    if error := future.exception():
                        raise error
            except BaseException:
                self._given_up = True
                raise


def _short(argv: Sequence[str]) -> str:
    text = " ".join(argv)
    return text if len(text) < 300 else f"{text[:300]} ..."
