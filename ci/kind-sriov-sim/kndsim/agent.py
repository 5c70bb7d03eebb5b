"""The real agent as a process beside the simulated peers.

Invariant: an agent started here ends with whoever started it, also when that one is killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

AGENT = (sys.executable, "-m", "driver", "agent")


def dying_with_parent(argv: Sequence[str]) -> list[str]:
    """The same command, as a process that the kernel kills when its parent ends.

    Not by a preexec_fn: that makes Popen fork a process in which gRPC has threads, whose handlers now and
    then hang the child.
    """
    return ["setpriv", "--pdeathsig", "KILL", "--", *argv]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Poll until it holds; TimeoutError naming what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.01)


class AgentProcess:
    """`knd agent` with a private root. entry is the command before the agent's own flags; a test gives
    one of its own to pass an observer in. The log of all its lives goes to one file."""

    def __init__(
        self,
        root: Path,
        *,
        node: str,
        kubeconfig: Path,
        policy: Path,
        driver: str = "knd.internal",
        hook: str = "auto",
        entry: Sequence[str] = AGENT,
        extra: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.root = root
        self.port = free_port()
        self.log = root / "agent.log"
        self._environment = {**os.environ, **(environment or {})}
        self._flags = [
            f"--root={root}",
            f"--node-name={node}",
            f"--kubeconfig={kubeconfig}",
            f"--policy={policy}",
            f"--driver={driver}",
            f"--hook={hook}",
            f"--metrics-port={self.port}",
            *extra,
        ]
        self.entry = tuple(entry)
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self, entry: Sequence[str] | None = None) -> None:
        assert self.process is None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                dying_with_parent([*(entry or self.entry), *self._flags]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        self.starts += 1

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as an OOM killer would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self, seconds: float = 25.0) -> int:
        """SIGTERM; returns the exit code."""
        if self.process is None:
            return 0
        self.process.terminate()
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self.process = None
        return code

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of the agent's HTTP endpoint; (0, reason) if there is no answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except (OSError, HTTPException) as error:
            # The second where it ended in the middle of an answer.
            return 0, str(error)

    def ready(self) -> bool:
        return self.get("/readyz")[0] == 200

    def wait_ready(self, seconds: float = 30.0) -> None:
        """TimeoutError with the agent's own reasons and the end of its log."""

        def is_ready() -> bool:
            if not self.alive():
                raise RuntimeError(f"the agent ended by itself:\n{self.tail()}")
            return self.ready()

        try:
            wait_until(is_ready, "agent ready", seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.get('/readyz')}\n{self.tail()}") from error

    def tail(self, lines: int = 40) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""
