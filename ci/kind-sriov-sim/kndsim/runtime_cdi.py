"""What a container runtime does with CDI ids: find the specs, inject, run the createRuntime hooks.

Invariant: an id that no readable spec defines, or that two specs define, is unresolvable, and then the
container is not made.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ID = re.compile(
    r"(?P<kind>[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_-]*)=(?P<device>[A-Za-z0-9_.:-]+)"
)


class InjectionFailed(Exception):
    """The container cannot be made."""


class HookFailed(Exception):
    """A createRuntime hook said no; the text is what it wrote on standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OciHook:
    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """What the specs put into one container. devices are paths inside the container."""

    env: Mapping[str, str]
    devices: tuple[str, ...]
    hooks: tuple[OciHook, ...]


def inject(folder: Path, ids: Sequence[str]) -> Injection:
    """The edits of all ids, from folder's specs as they are now. InjectionFailed names what is missing."""
    specs = _read_specs(folder)
    edits: list[Mapping[str, Any]] = []
    used: list[Path] = []
    unresolved = []
    for id_ in ids:
        found = _find(specs, id_)
        if found is None:
            unresolved.append(id_)
            continue
        path, device_edits = found
        if path not in used:
            used.append(path)
            edits.append(specs[path].get("containerEdits", {}))
        edits.append(device_edits)
    if unresolved:
        raise InjectionFailed(
            f"CDI device injection failed: unresolvable CDI devices {', '.join(unresolved)}"
        )
    return Injection(
        env=dict(entry.partition("=")[::2] for edit in edits for entry in edit.get("env", ())),
        devices=tuple(_device(node) for edit in edits for node in edit.get("deviceNodes", ())),
        hooks=tuple(
            _hook(hook)
            for edit in edits
            for hook in edit.get("hooks", ())
            if hook["hookName"] == "createRuntime"
        ),
    )


def run_hooks(hooks: Sequence[OciHook], container: str, pid: int, bundle: Path) -> None:
    """Run each with the container's OCI state on standard input. HookFailed at the first that fails."""
    state = {"ociVersion": "1.2.0", "id": container, "status": "creating", "pid": pid, "bundle": str(bundle)}
    for number, hook in enumerate(hooks):
        what = f"error running createRuntime hook #{number}"
        try:
            done = subprocess.run(
                hook.args or (hook.path,),
                executable=hook.path,
                env=dict(entry.partition("=")[::2] for entry in hook.env),
                input=json.dumps(state).encode(),
                capture_output=True,
                timeout=hook.timeout,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HookFailed(f"{what}: {error}") from error
        if done.returncode != 0:
            said = (done.stdout + done.stderr).decode(errors="replace").strip()
            raise HookFailed(f"{what}: exit status {done.returncode}, stdout and stderr: {said}")


def _read_specs(folder: Path) -> dict[Path, dict[str, Any]]:
    specs = {}
    for path in sorted(folder.glob("*.json")):
        try:
            spec = json.loads(path.read_text())
        except (OSError, ValueError):
            # A broken spec costs only its own devices.
            continue
        if isinstance(spec, dict) and isinstance(spec.get("kind"), str) and "cdiVersion" in spec:
            specs[path] = spec
    return specs


def _find(specs: Mapping[Path, Mapping[str, Any]], id_: str) -> tuple[Path, Mapping[str, Any]] | None:
    match = _ID.fullmatch(id_)
    if match is None:
        return None
    found = [
        (path, device.get("containerEdits", {}))
        for path, spec in specs.items()
        if spec["kind"] == match["kind"]
        for device in spec.get("devices", ())
        if device.get("name") == match["device"]
    ]
    return found[0] if len(found) == 1 else None


def _device(node: Mapping[str, Any]) -> str:
    """The node's path in the container, checked against the host's device as far as the spec leaves it to
    the runtime."""
    path = str(node["path"])
    host = node.get("hostPath", path)
    if {"type", "major", "minor"} <= node.keys():
        return path
    try:
        mode = os.stat(host).st_mode
    except OSError as error:
        raise InjectionFailed(f"CDI device injection failed: {host}: {error.strerror}") from error
    if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
        raise InjectionFailed(f"CDI device injection failed: {host} is not a device node")
    return path


def _hook(hook: Mapping[str, Any]) -> OciHook:
    return OciHook(
        path=str(hook["path"]),
        args=tuple(hook.get("args", ())),
        env=tuple(hook.get("env", ())),
        timeout=hook.get("timeout"),
    )
