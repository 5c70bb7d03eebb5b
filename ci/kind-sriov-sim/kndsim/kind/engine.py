"""The container engine that kind uses: docker or podman, by its own client.

Invariant: nothing is remembered of a container: each call asks the engine, so a node that was restarted is
found where it is now.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINES = ("docker", "podman")
_PATIENCE = 60.0


class NoEngine(Exception):
    """A sentence for the reader: what is missing, and what to do."""


class EngineFailed(Exception):
    """The engine itself failed, not what ran in a container."""


@dataclass(frozen=True, slots=True)
class Engine:
    """command: the client, by name or by path."""

    command: str

    @property
    def for_kind(self) -> dict[str, str]:
        """Environment that makes every command of kind use this engine: kind itself would prefer docker."""
        name = "podman" if "podman" in os.path.basename(self.command) else "docker"
        return {"KIND_EXPERIMENTAL_PROVIDER": name}

    def ask(self, *argv: str) -> str:
        """stdout of the client; EngineFailed with what it said."""
        try:
            done = subprocess.run(
                [self.command, *argv],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineFailed(f"`{self.command} {argv[0]}` gave no answer in {_PATIENCE:g} s") from error
        except OSError as error:
            raise EngineFailed(f"{self.command} cannot be run: {error.strerror}") from error
        if done.returncode != 0:
            raise EngineFailed(f"`{self.command} {' '.join(argv)}` failed: {done.stderr.strip()[-500:]}")
        return done.stdout

    def build(self, dockerfile: Path, context: Path, name: str, tar: Path) -> None:
        """Build an image and save it; EngineFailed with the end of what was said."""
        for argv in (
            ["build", "--file", str(dockerfile), "--tag", name, str(context)],
            ["save", "--output", str(tar), name],
        ):
            done = subprocess.run(
                [self.command, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise EngineFailed(f"`{self.command} {' '.join(argv)}` failed: {done.stderr.strip()[-2000:]}")

    def pid(self, container: str) -> int:
        """The container's first process, as this machine counts; EngineFailed if it is not running."""
        state = self._state(container)
        if not state.get("Running") or not state.get("Pid"):
            raise EngineFailed(f"container {container} is not running ({state.get('Status', 'unknown')})")
        return int(state["Pid"])

    def _state(self, container: str) -> dict[str, Any]:
        said = self.ask("container", "inspect", container)
        try:
            (found,) = json.loads(said)
            return dict(found["State"])
        except (ValueError, KeyError, TypeError) as error:
            what = f"{self.command} says of {container} what is not understood"
            raise EngineFailed(f"{what}: {error}") from error


def find_engine(wanted: str = "", engines: Sequence[str] = ENGINES) -> Engine:
    """The engine that answers; `wanted` alone if it is given."""
    failures = []
    for command in (wanted,) if wanted else engines:
        if shutil.which(command) is None:
            failures.append(f"{command} is not installed")
            continue
        engine = Engine(command)
        try:
            engine.ask("version", "--format", "json")
        except EngineFailed as error:
            failures.append(str(error))
        else:
            return engine
    raise NoEngine(
        f"a kind cluster needs a container engine: {'; '.join(failures)}. Start one, or name its client in "
        "KND_ENGINE. Without one, `python -m kndsim.cluster up` makes a cluster of this machine's own"
    )
