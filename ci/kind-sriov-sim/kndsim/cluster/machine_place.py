"""kndsim.place.Place in namespaces of this machine, over nsenter(1).

Invariant: whatever is started here runs in the node's namespaces, so it ends with the first process there;
and nothing is read or written by a path that would mean the machine's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from kndsim.hostguard import RUN_MARK
from kndsim.place import CommandFailed, Done
from kndsim.waiting import wait_until


class NamespacePlace:
    """kndsim.place.Place over nsenter(1)."""

    def __init__(self, name: str, pid: int, logs: Path, path: Sequence[Path]) -> None:
        self.name = name
        self.pid = pid
        self._logs = logs
        self._path = ":".join([*map(str, path), "/usr/sbin:/usr/bin:/sbin:/bin"])
        self._services: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def root(self) -> Path:
        """The node's root as this machine's processes reach it, mounts included."""
        return Path(f"/proc/{self.pid}/root")

    def _argv(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *argv]

    def _env(self, env: Mapping[str, str] | None) -> dict[str, str]:
        basic = {"PATH": self._path, "HOME": "/", "LANG": "C.UTF-8"}
        # By it the guard of a test run finds what the run left behind.
        mark = {RUN_MARK: os.environ[RUN_MARK]} if RUN_MARK in os.environ else {}
        return {**basic, **mark, **(env or {})}

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 60.0,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> Done:
        started = time.monotonic()
        # A session of its own, so that nsenter and what it started are killed together.
        with subprocess.Popen(
            self._argv(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._env(env),
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(stdin.encode(), timeout)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    what = f"{' '.join(argv)} on {self.name} did not end within {timeout:g} s"
                    raise TimeoutError(what) from None
                raise
        done = Done(
            argv=tuple(argv),
            code=process.returncode,
            out=out.decode(errors="backslashreplace"),
            err=err.decode(errors="backslashreplace"),
            seconds=time.monotonic() - started,
        )
        if check and done.code != 0:
            raise CommandFailed(done, self.name)
        return done

    def start(self, service: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        if self.alive(service):
            raise ValueError(f"{service} runs already on {self.name}")
        # Its number inside is written down by itself: nsenter's own is another process's.
        wrapped = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self._pid_file(service)), *argv]
        with self._log_file(service).open("ab") as log:
            self._services[service] = subprocess.Popen(
                self._argv(wrapped),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env(env),
                start_new_session=True,
            )

    def signal(self, service: str, number: int) -> None:
        if self.alive(service):
            wait_until(lambda: self._number(service), what=f"{service} starts on {self.name}")
            self.run(["sh", "-c", f"kill -{number} {self._number(service)}"], check=False)

    def _number(self, service: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.read(self._pid_file(service)).decode().strip()
        return ""

    def alive(self, service: str) -> bool:
        process = self._services.get(service)
        if process is None:
            return False
        if process.poll() is None:
            return True
        with contextlib.suppress(FileNotFoundError):
            self._outside(self._pid_file(service)).unlink()
        return False

    def log(self, service: str) -> str:
        return self._log_file(service).read_text(errors="backslashreplace")

    def write(self, path: PurePosixPath, data: bytes, mode: int = 0o644) -> None:
        target = self._outside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        target.chmod(mode)

    def read(self, path: PurePosixPath) -> bytes:
        return self._outside(path).read_bytes()

    def _outside(self, path: PurePosixPath) -> Path:
        if path.is_relative_to("/proc/sys") or ".." in path.parts:
            # /proc/sys/net shows the namespace of the process that opens it: that would be the machine's.
            raise ValueError(f"{path} cannot be reached from outside of {self.name}: use run()")
        return self.root / str(path).lstrip("/")

    def _pid_file(self, service: str) -> PurePosixPath:
        return PurePosixPath(f"/run/knd-service-{service}.pid")

    def _log_file(self, service: str) -> Path:
        return self._logs / f"{service}.log"

    def close(self) -> None:
        """Wait for what ended with the namespaces."""
        for process in self._services.values():
            process.wait()
