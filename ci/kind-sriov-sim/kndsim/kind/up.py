"""`make kind-up` and `make kind-down`: a kind cluster with devices and agents, and its end.

Invariant: whatever step fails, all that was made is taken down again, and the sentence says which step and
what to do. What runs when this returns (the cluster's containers, the keeper) is known from files in one
folder, so that another process takes it down.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from kndsim.cluster.kind import Description, KindCluster, load_image, write_description
from kndsim.kind import netdevsim
from kndsim.kind.config import KindSpec, cluster_config
from kndsim.kind.engine import Engine
from kndsim.kind.keeper import GROUND, LOG, PID, PLAN, REGISTER, born
from kndsim.kind.model import DeviceId, Home
from kndsim.kind.namespaces import CONTAINER
from kndsim.kind.place import EnginePlace
from kndsim.kind.plan import Lent, Plan, read_ground, write_plan
from kndsim.progress import Progress
from kndsim.waiting import TooLate, wait_until

FOLDER = Path("/run/knd-kind")
AGENT_IMAGE = "agent.tar"
PORTS, VFS, VETHS = 4, 4, 8
_CONFIG, _MODULES = "kind.yaml", "modules"
_CREATE_SECONDS = 900.0
_KEEPER_SECONDS = 90.0

# Node containers have none: systemd leaves it out in a container. One of its own for each node, since
# pins of two agents in one file system would be taken for each other's.
_BPFFS = """
[ "$(stat --file-system --format=%T /sys/fs/bpf)" = bpf_fs ] || mount -t bpf bpf /sys/fs/bpf
"""


class UpFailed(Exception):
    """A sentence for the reader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The engine, the kind program, and what is loaded and deployed with them."""

    engine: Engine
    kind: str
    images: Callable[[Path], list[Path]]
    """Tars of the images that pods use, with AGENT_IMAGE among them; the folder is for those made now."""
    deploy: Callable[[KindCluster], None]
    """Applies the manifests and waits for the agents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Beside the cluster itself. lend: PCI addresses of this machine's functions, dealt out in turn."""

    rdma: bool = False
    lend: tuple[str, ...] = ()


def up(
    spec: KindSpec, wanted: Wanted, tools: Tools, progress: Progress, folder: Path = FOLDER
) -> KindCluster:
    """All of it, ready. UpFailed."""
    if (folder / _CONFIG).exists():
        raise UpFailed(f"a kind cluster is there already ({folder}): `make kind-down` removes it")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UpFailed(f"{folder} cannot be made ({error.strerror}): run this as root") from error
    with _down_unless_done(spec.name, tools, progress, folder):
        with progress.phase("images"):
            tars = tools.images(folder)
        with progress.phase("kind create cluster"):
            _create(spec, tools, folder)
        description = Description(
            folder=folder,
            name=spec.name,
            engine=tools.engine.command,
            kind=tools.kind,
            kubernetes=spec.kubernetes,
            nodes=spec.nodes,
        )
        with progress.phase("bpffs of each node"):
            for node in spec.nodes:
                EnginePlace(tools.engine, node).run(["sh", "-c", _BPFFS])
        with progress.phase("images into the nodes"):
            for tar in tars:
                load_image(description, tar)
        with progress.phase("devices"):
            _start_keeper(spec, wanted, tools.engine, progress, folder)
        write_description(description)
        ground = read_ground(folder / GROUND)
        for note in ground.notes:
            progress.say(note)
        cluster = KindCluster(description, ground)
        with progress.phase("agents"):
            tools.deploy(cluster)
    return cluster


def down(name: str, engine: Engine, kind: str, progress: Progress, folder: Path = FOLDER) -> None:
    """Remove all of it: also what a run that was killed left. Nothing happens if there is nothing."""
    with progress.phase("devices"):
        _stop_keeper(folder)
        netdevsim.Register(folder / REGISTER).delete_all()
    with progress.phase("kind delete cluster"):
        _kind(kind, engine, "delete", "cluster", f"--name={name}", f"--kubeconfig={folder / 'kubeconfig'}")
    for module in _read_words(folder / _MODULES):
        subprocess.run(["modprobe", "--remove", module], capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _down_unless_done(name: str, tools: Tools, progress: Progress, folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        log = _end_of(folder / LOG)
        down(name, tools.engine, tools.kind, progress, folder)
        if log:
            progress.say(f"the keeper of the devices said last:\n{log}")
        raise


def _create(spec: KindSpec, tools: Tools, folder: Path) -> None:
    config = folder / _CONFIG
    config.write_text(yaml.safe_dump(cluster_config(spec), sort_keys=False))
    options = (f"--config={config}", f"--kubeconfig={folder / 'kubeconfig'}", "--wait=300s")
    _kind(tools.kind, tools.engine, "create", "cluster", *options)


def _kind(program: str, engine: Engine, *argv: str) -> None:
    environment = {**os.environ, **engine.for_kind}
    try:
        done = subprocess.run(
            [program, *argv],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CREATE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UpFailed(f"`kind {argv[0]} {argv[1]}` took longer than {_CREATE_SECONDS:g} s") from error
    except OSError as error:
        raise UpFailed(f"{program} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise UpFailed(f"`kind {' '.join(argv)}` failed: {done.stderr.strip()[-2000:]}")


def plan_for(spec: KindSpec, wanted: Wanted, engine: str, *, with_netdevsim: bool) -> Plan:
    """The devices of each node: veths always, since only they reach pods of the same node."""
    count = len(spec.nodes)
    return Plan(
        nodes={node: f"{CONTAINER}{node}" for node in spec.nodes},
        engine=engine,
        ports=PORTS if with_netdevsim else 0,
        vfs=VFS if with_netdevsim else 0,
        veths=VETHS,
        lent=tuple(
            Lent(DeviceId("pci", address), Home(spec.nodes[number % count], f"lent{number // count}"))
            for number, address in enumerate(wanted.lend)
        ),
        rdma=wanted.rdma,
    )


def _start_keeper(spec: KindSpec, wanted: Wanted, engine: Engine, progress: Progress, folder: Path) -> None:
    if wanted.rdma and not _has_module("rdma_rxe", Path("/sys/module/rdma_rxe"), folder):
        raise UpFailed("this kernel has no soft RoCE (`modprobe rdma_rxe` failed): leave --rdma away")
    simulated = _has_module("netdevsim", netdevsim.BUS, folder)
    if not simulated:
        progress.say(
            "this kernel has no netdevsim (`modprobe netdevsim` failed; on Ubuntu it is in "
            "linux-modules-extra): veths are the only devices"
        )
    write_plan(folder / PLAN, plan_for(spec, wanted, engine.command, with_netdevsim=simulated))
    with (folder / LOG).open("ab") as log:
        # A child of nobody here: it outlives this process, and whoever ends it need not be this one.
        subprocess.run(
            ["setsid", "--fork", sys.executable, "-m", "kndsim.kind", "keep", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
        )

    def stands() -> bool:
        words = _read_words(folder / PID)
        if words and born(int(words[0])) != words[1] and not (folder / GROUND).exists():
            raise UpFailed(f"the devices were not made: {_end_of(folder / LOG)}")
        return (folder / GROUND).exists()

    try:
        wait_until(stands, _KEEPER_SECONDS, "the devices stand")
    except TooLate as error:
        raise UpFailed(f"{error}: {_end_of(folder / LOG)}") from error


def _stop_keeper(folder: Path) -> None:
    words = _read_words(folder / PID)
    if len(words) != 2:
        return
    pid = int(words[0])

    def runs() -> bool:
        return born(pid) == words[1]

    for number in (signal.SIGTERM, signal.SIGKILL):
        if runs():
            os.kill(pid, number)
            with contextlib.suppress(TooLate):
                wait_until(lambda: not runs(), 30, "the keeper ends")


def _has_module(name: str, sign: Path, folder: Path) -> bool:
    """Load a module unless it is there, and note it, so that it is unloaded again."""
    if sign.exists():
        return True
    with contextlib.suppress(OSError):
        done = subprocess.run(["modprobe", name], capture_output=True, check=False)
        if done.returncode == 0 and sign.exists():
            with (folder / _MODULES).open("a") as file:
                file.write(f"{name}\n")
            return True
    return False


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []


def _end_of(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").strip().splitlines()[-10:])
    except FileNotFoundError:
        return ""
