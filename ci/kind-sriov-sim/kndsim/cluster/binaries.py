"""The programs of a cluster, built from the Go modules that ci/kind-sriov-sim/pins names and hashes.

Invariant: what runs is what the pins say: every module is checked against go.sum, and each program reports
the version its pin has. A finished build is kept (kndsim.cache); an interrupted one goes on where it was,
since Go keeps what it compiled in its own cache.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kndsim.cache import Cache, digest
from kndsim.cluster.toolchain import NoGo, toolchain
from kndsim.progress import Progress

PINS = Path(__file__).resolve().parents[2] / "pins"


class BuildFailed(Exception):
    """A sentence for the reader: which pin, what happened, what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One go.mod: the commands it names, and the version of the module they are in."""

    name: str
    go: str
    version: str
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the commands of a pin are built. limit: seconds that the slowest machine may take."""

    version_symbol: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    """Command to the program's file name, where Go would choose another."""
    cgo: bool = False
    tags: str = ""
    linker: str = ""
    limit: float = 600.0


_KUBERNETES = Recipe(version_symbol="k8s.io/component-base/version.gitVersion", limit=3600.0)
_CONTAINERD = Recipe(version_symbol="github.com/containerd/containerd/v2/version.Version")
RECIPES: Mapping[str, Recipe] = {
    "kubernetes": _KUBERNETES,
    "containerd": _CONTAINERD,
    "etcd": Recipe(names={"go.etcd.io/etcd/server/v3": "etcd"}),
    "cni": Recipe(
        version_symbol="github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion"
    ),
    "kind": Recipe(),
    # The only one in C as well: it enters namespaces before Go's runtime has threads. Static, so that it
    # runs whatever libc the node has; with seccomp, or RuntimeDefault profiles would be refused.
    "runc": Recipe(cgo=True, tags="seccomp netgo osusergo", linker="-extldflags -static"),
}


def read_pin(name: str, pins: Path = PINS) -> Pin:
    """The pin of that folder name; BuildFailed if there is none or it names no command."""
    try:
        text = (pins / name / "go.mod").read_text()
    except FileNotFoundError:
        known = ", ".join(sorted(path.name for path in pins.iterdir()))
        raise BuildFailed(f"there is no pin {name!r}: known are {known}") from None
    text = re.sub(r"//.*", "", text)
    blocks = re.findall(r"^(\w+) \((.*?)^\)", text, re.MULTILINE | re.DOTALL)
    lines = [(word, line.strip()) for word, block in blocks for line in block.splitlines() if line.strip()]
    lines += re.findall(r"^(\w+) ([^(\n]*[^(\s]) *$", text, re.MULTILINE)
    commands = tuple(sorted(line for word, line in lines if word == "tool"))
    if not commands:
        raise BuildFailed(f"{pins / name / 'go.mod'} has no `tool` line: it says nothing to build")
    versions = {line.split()[0]: line.split()[1] for word, line in lines if word == "require"}
    module = max((path for path in versions if _within(commands[0], path)), key=len, default="")
    if not module:
        raise BuildFailed(f"{pins / name / 'go.mod'} requires no module that has {commands[0]}")
    go = next((line for word, line in lines if word == "go"), "")
    return Pin(name=name, go=go, version=versions[module], commands=commands)


def _within(package: str, module: str) -> bool:
    return package == module or package.startswith(f"{module}/")


def recipe_of(pin: str) -> Recipe:
    """kubernetes-1.37 is built as kubernetes is; what needs nothing special has none of its own."""
    return RECIPES.get(re.sub(r"-[\d.]+$", "", pin), Recipe())


def program_names(pin: Pin) -> dict[str, str]:
    """Command to the file name of its program."""
    names = recipe_of(pin.name).names
    return {command: names.get(command, command.rpartition("/")[2]) for command in pin.commands}


def build_arguments(pin: Pin, command: str, to: Path) -> list[str]:
    """Of `go`."""
    recipe = recipe_of(pin.name)
    linker = ["-s", "-w"]
    if recipe.version_symbol:
        linker += ["-X", f"{recipe.version_symbol}={pin.version}"]
    if recipe.linker:
        linker.append(recipe.linker)
    argv = ["build", "-mod=readonly", "-buildvcs=false", "-trimpath", "-ldflags", " ".join(linker)]
    if recipe.tags:
        argv += ["-tags", recipe.tags]
    return [*argv, "-o", str(to / program_names(pin)[command]), command]


def binaries(name: str, progress: Progress, cache: Cache | None = None) -> Path:
    """The folder with the programs of a pin, built if there is none yet for exactly this pin and recipe."""
    pin = read_pin(name)
    recipe = recipe_of(name)
    try:
        go = toolchain(PINS / name)
    except NoGo as error:
        raise BuildFailed(str(error)) from None
    files = [PINS / name / "go.mod", PINS / name / "go.sum"]

    def make(folder: Path) -> None:
        for command in pin.commands:
            with progress.phase(f"building {name}: {program_names(pin)[command]}"):
                _build(pin, [go.command, *build_arguments(pin, command, folder)], recipe, go.env)

    return (cache or Cache()).folder(name, digest([*files, repr(recipe), go.version]), make)


def _build(pin: Pin, argv: Sequence[str], recipe: Recipe, more: Mapping[str, str]) -> None:
    env = {**os.environ, **more, "CGO_ENABLED": "1" if recipe.cgo else "0"}
    # A group of its own, so that the compilers end with it.
    with subprocess.Popen(
        argv,
        cwd=PINS / pin.name,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=recipe.limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildFailed(
                    f"building {argv[-1]} of {pin.name} took longer than {recipe.limit:g} s; "
                    "what was compiled is kept by Go, so a second try goes on from there"
                ) from None
            raise
    if process.returncode != 0:
        raise BuildFailed(_explained(pin, argv, said))


_CAUSES = (
    ("cannot find -lseccomp", "install Debian's libseccomp-dev (deploy/debian-packages-e2e.txt)"),
    ("seccomp.h: No such file", "install Debian's libseccomp-dev (deploy/debian-packages-e2e.txt)"),
    ("gcc", "install Debian's gcc and libc6-dev (deploy/debian-packages-e2e.txt)"),
    ("not found", "the module proxy does not serve a module of the pin: see GOPROXY"),
    ("dial tcp", "the module proxy is out of reach: see GOPROXY"),
    ("missing go.sum entry", "the pin is not whole: run `go mod tidy` in its folder"),
    ("No space left", "make room: a Kubernetes build wants 5 GB in Go's cache"),
)


def _explained(pin: Pin, argv: Sequence[str], said: str) -> str:
    advice = next((text for sign, text in _CAUSES if sign in said), "the lines above say why")
    end = "\n".join(said.strip().splitlines()[-20:])
    return f"building {argv[-1]} of pin {pin.name} failed:\n{end}\n{advice}"
