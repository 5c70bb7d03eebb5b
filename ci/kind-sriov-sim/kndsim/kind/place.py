"""A kind node as a Place: commands by the engine's exec, services by their process ids in the node.

Invariant: what the engine failed at is never taken for what the command did. A service is told from a later
process of the same number by when it was born.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from types import TracebackType

from kndsim.kind.engine import Engine, EngineFailed
from kndsim.place import CommandFailed, Done

_FOLDER = PurePosixPath("/run/knd-place")
_GRACE = 20.0
"""Seconds that the engine may take on top of the command's own limit."""
_ABSENT = 66
_KILLED = 137

# Says how it ended on stderr's last line: the engine's own exit status cannot be told from the command's.
_RUN = r"""
limit=$1 mark=$2; shift 2
started=$EPOCHREALTIME
timeout --signal=KILL "$limit" "$@"
code=$?
printf '\n%s %s %s %s\n' "$mark" "$code" "$started" "$EPOCHREALTIME" >&2
"""
_BORN = r"""
born() {
    local stat
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return
    set -- ${stat##*) }
    [ "$1" = Z ] || echo "${20}"
}
live() { { read -r pid at <"$folder/pid"; } 2>/dev/null && [ -n "$at" ] && [ "$(born "$pid")" = "$at" ]; }
"""
_START = (
    _BORN
    + r"""
export KND_PLACE=$1; folder=$2; shift 2; mkdir -p "$folder"
if live; then echo "it runs already" >&2; exit 1; fi
setsid "$@" </dev/null >>"$folder/log" 2>&1 &
echo "$! $(born $!)" >"$folder/pid"
"""
)
_SIGNAL = _BORN + r"""folder=$1; if live; then kill "-$2" "$pid"; fi"""
_ALIVE = _BORN + r"""folder=$1; live"""
# All that bear the mark, also children whose parent has ended; again for those that were forked meanwhile.
_END = r"""
for _ in 1 2 3 4 5; do
    marked=$(grep -lzsx "KND_PLACE=$1" /proc/[0-9]*/environ || true)
    [ -n "$marked" ] || break
    for path in $marked; do path=${path#/proc/}; kill -KILL "${path%/environ}" 2>/dev/null; done
done
rm -rf "$2"
"""
_WRITE = r"""mkdir -p "$(dirname "$1")" && cat >"$1.part" && chmod "$2" "$1.part" && mv "$1.part" "$1" """
_READ = rf"""[ -e "$1" ] || exit {_ABSENT}; cat -- "$1" """


class EnginePlace:
    """Root in a container. A context manager that ends what was started through it."""

    def __init__(self, engine: Engine, container: str, *, folder: PurePosixPath = _FOLDER) -> None:
        """folder: where in the container the logs and numbers of services are kept."""
        self._engine = engine
        self._container = container
        self._folder = folder
        self._mark = secrets.token_hex(8)

    @property
    def name(self) -> str:
        return self._container

    def __enter__(self) -> EnginePlace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all services with their children; those of a node that is gone are gone."""
        with contextlib.suppress(EngineFailed):
            self._script(_END, self._mark, str(self._folder))

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 60.0,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> Done:
        mark = f"knd-{secrets.token_hex(8)}"
        script = ["bash", "-c", _RUN, "knd", f"{timeout:.3f}", mark, *argv]
        out, err, _ = self._exec(script, stdin.encode(), timeout + _GRACE, env)
        said = err.decode(errors="replace")
        ended = re.search(rf"\n{mark} (\d+) (\S+) (\S+)\n", said)
        if ended is None:
            raise EngineFailed(f"{argv[0]} did not run on {self.name}: {said.strip()[-1000:]}")
        started, stopped = (float(ended[group].replace(",", ".")) for group in (2, 3))
        done = Done(
            argv=tuple(argv),
            code=int(ended[1]),
            out=out.decode(errors="replace"),
            err=said[: ended.start()],
            seconds=stopped - started,
        )
        if done.code == _KILLED and done.seconds >= timeout:
            raise TimeoutError(f"{' '.join(argv)} on {self.name} took longer than {timeout:g} s: killed")
        if check and done.code != 0:
            raise CommandFailed(done, self.name)
        return done

    def start(self, service: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        self._script(_START, self._mark, str(self._folder / service), *argv, env=env)

    def signal(self, service: str, number: int) -> None:
        self._script(_SIGNAL, str(self._folder / service), str(number))

    def alive(self, service: str) -> bool:
        argv = ["bash", "-c", _ALIVE, "knd", str(self._folder / service)]
        return self.run(argv, check=False).code == 0

    def log(self, service: str) -> str:
        try:
            return self.read(self._folder / service / "log").decode(errors="replace")
        except FileNotFoundError:
            return ""

    def write(self, path: PurePosixPath, data: bytes, mode: int = 0o644) -> None:
        self._script(_WRITE, str(path), f"{mode:o}", stdin=data)

    def read(self, path: PurePosixPath) -> bytes:
        out, err, code = self._exec(["bash", "-c", _READ, "knd", str(path)], b"", _GRACE * 3, None)
        if code == _ABSENT:
            raise FileNotFoundError(2, f"no such file on {self.name}", str(path))
        if code != 0:
            said = err.decode(errors="replace").strip()
            raise EngineFailed(f"{path} on {self.name} cannot be read: {said}")
        return out

    def _script(
        self, script: str, *argv: str, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> None:
        _, err, code = self._exec(["bash", "-c", script, "knd", *argv], stdin, _GRACE * 3, env)
        if code != 0:
            said = err.decode(errors="replace").strip()[-1000:]
            raise EngineFailed(f"{' '.join(argv)} on {self.name} failed with {code}: {said}")

    def _exec(
        self, argv: Sequence[str], stdin: bytes, limit: float, env: Mapping[str, str] | None
    ) -> tuple[bytes, bytes, int]:
        variables = [word for key, value in (env or {}).items() for word in ("-e", f"{key}={value}")]
        command = [self._engine.command, "exec", "-i", *variables, self._container, *argv]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired as error:
            raise EngineFailed(f"`exec` into {self.name} gave no answer in {limit:g} s") from error
        except OSError as error:
            raise EngineFailed(f"{self._engine.command} cannot be run: {error.strerror}") from error
        return done.stdout, done.stderr, done.returncode
