"""A Go that can build a pin: the machine's own, or the one its go.mod asks for, fetched as a Go module.

Invariant: nothing is installed; what is fetched is checked against Go's checksum database and kept in Go's
own module cache. From 1.21 on a Go fetches the newer one it needs by itself; an older one is helped to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FETCHED = "go1.26.8"
"""What a Go that is too old to fetch a newer one by itself is replaced by."""
_FETCHES_ITSELF = (1, 21)
_LIMIT = 600.0


class NoGo(Exception):
    """A sentence for the reader: what is missing or too old, what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """command: what to run; env: on top of this process's; version: "go1.26.8"."""

    command: str
    env: Mapping[str, str]
    version: str


def toolchain(folder: Path) -> Toolchain:
    """The one for the go.mod in folder; NoGo if there is none and none can be had."""
    if shutil.which("go") is None:
        raise NoGo(
            "the cluster's programs are built from Go modules, and there is no `go` here: install Debian's "
            "golang-go (deploy/debian-packages-go.txt), or put another Go first in PATH"
        )
    own = _ask("go", {}, Path("/"), "env", "GOVERSION")
    found = re.match(r"go(\d+)\.(\d+)", own)
    old = found is not None and (int(found[1]), int(found[2])) < _FETCHES_ITSELF
    command, env = _fetch(own) if old else ("go", {})
    return Toolchain(command=command, env=env, version=_ask(command, env, folder, "env", "GOVERSION"))


def _ask(command: str, env: Mapping[str, str], folder: Path, *args: str) -> str:
    done = subprocess.run(
        [command, *args],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=_LIMIT,
    )
    if done.returncode != 0:
        raise NoGo(
            f"no Go that can build {folder.name}: {done.stderr.strip()}. "
            "Install a newer Go, or set GOTOOLCHAIN=auto so that this one may fetch it"
        )
    return done.stdout.strip()


def _fetch(own: str) -> tuple[str, dict[str, str]]:
    architecture = _ask("go", {}, Path("/"), "env", "GOARCH")
    module = f"golang.org/toolchain@v0.0.1-{FETCHED}.linux-{architecture}"
    try:
        # -mod=mod: outside of a module an older Go has none to be read-only.
        answer = _ask("go", {"GOFLAGS": "-mod=mod"}, Path("/"), "mod", "download", "-json", module)
    except NoGo as error:
        raise NoGo(f"{own} is too old, and fetching {FETCHED} with it failed: {error}") from None
    home = Path(json.loads(answer)["Dir"])
    # A module has no executable files, so a toolchain in one is made so by whoever unpacks it.
    for folder in ("bin", "pkg/tool"):
        for path in (home / folder).rglob("*"):
            if path.is_file():
                path.chmod(0o755)
    return str(home / "bin/go"), {"GOROOT": str(home), "GOTOOLCHAIN": "local"}
