"""A kind cluster in the words of this package, so that what runs on the machine's cluster runs on it.

Invariant: nothing is made or removed here (kndsim.kind does that): it reads what `make kind-up` left, and
reaches nodes through the engine's client.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kndsim.cluster import kubectl
from kndsim.cluster.ground import Devices
from kndsim.cluster.node import NotUp
from kndsim.kind.engine import Engine
from kndsim.kind.place import EnginePlace
from kndsim.kind.plan import Ground, read_ground
from kndsim.place import Done
from kndsim.waiting import wait_until

API_SERVER = "kube-apiserver"
_MANIFEST = PurePosixPath("/etc/kubernetes/manifests/kube-apiserver.yaml")
_AWAY = PurePosixPath("/etc/kubernetes/kube-apiserver.yaml")
_UNITS = ("kubelet", "containerd")
_PATIENCE = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What `make kind-up` writes when all stands; folder holds the kubeconfig and the ground too."""

    folder: Path
    name: str
    engine: str
    kind: str
    kubernetes: str
    nodes: tuple[str, ...]

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"


def write_description(description: Description) -> None:
    fields = {
        "name": description.name,
        "engine": description.engine,
        "kind": description.kind,
        "kubernetes": description.kubernetes,
        "nodes": list(description.nodes),
    }
    (description.folder / "cluster.json").write_text(json.dumps(fields, indent=1))


def read_description(folder: Path) -> Description:
    """NotUp if there is none."""
    path = folder / "cluster.json"
    try:
        fields = json.loads(path.read_text())
        return Description(folder=folder, **{**fields, "nodes": tuple(fields["nodes"])})
    except FileNotFoundError:
        raise NotUp(f"there is no kind cluster ({path} is not there): run `make kind-up`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise NotUp(f"{path} does not describe a kind cluster ({error}): run `make kind-down`") from error


class KindNode:
    """A node container. devices: what stands in it for knd."""

    def __init__(
        self, engine: Engine, name: str, devices: Devices, load: Callable[[Path, str], None]
    ) -> None:
        self._engine = engine
        self._load = load
        self.devices = devices
        self.place = EnginePlace(engine, name)

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def root(self) -> Path:
        """The node's file tree for processes of this machine."""
        return Path(f"/proc/{self._engine.pid(self.name)}/root")

    def log(self, service: str) -> str:
        return self.place.run(["journalctl", "--no-pager", "--output=cat", f"--unit={service}"]).out

    def load_image(self, tar: Path) -> None:
        self._load(tar, self.name)

    def stop(self, service: str, number: int = signal.SIGTERM) -> None:
        """ "kubelet", "containerd", or the control plane's "kube-apiserver"; returns when it has ended."""
        if service == API_SERVER:
            self.place.run(["mv", str(_MANIFEST), str(_AWAY)])
            wait_until(lambda: not self._api_server(), _PATIENCE, f"{service} on {self.name} ends")
            return
        if number != signal.SIGTERM:
            self.place.run(["systemctl", "kill", f"--signal={int(number)}", _unit(service)])
        self.place.run(["systemctl", "stop", _unit(service)])

    def start(self, service: str) -> None:
        """Returns when it answers."""
        if service == API_SERVER:
            self.place.run(["mv", str(_AWAY), str(_MANIFEST)])
            wait_until(self._api_server, _PATIENCE, f"{service} on {self.name} runs")
            return
        self.place.run(["systemctl", "start", _unit(service)])
        wait_until(lambda: self._answers(service), _PATIENCE, f"{service} on {self.name} answers")

    def restart(self, service: str) -> None:
        self.stop(service)
        self.start(service)

    def _api_server(self) -> bool:
        argv = ["crictl", "ps", "--quiet", "--state=Running", f"--name={API_SERVER}"]
        done = self.place.run(argv, check=False)
        return done.code == 0 and bool(done.out.strip())

    def _answers(self, service: str) -> bool:
        asked = {
            "containerd": ["crictl", "info"],
            "kubelet": ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/10248"],
        }
        return self.place.run(asked[service], check=False).code == 0


def _unit(service: str) -> str:
    if service not in _UNITS:
        raise ValueError(f"a kind node has no service {service!r}: it has {', '.join((*_UNITS, API_SERVER))}")
    return f"{service}.service"


class KindCluster:
    """The cluster that `make kind-up` made. nodes: by name, the control plane first."""

    def __init__(self, description: Description, ground: Ground) -> None:
        self.description = description
        self.kubeconfig = description.kubeconfig
        engine = Engine(description.engine)
        self.nodes: Mapping[str, KindNode] = {
            name: KindNode(engine, name, devices_of(ground, name), self._load) for name in description.nodes
        }

    def kubectl(self, *args: str, stdin: str = "", check: bool = True, timeout: float = 60.0) -> Done:
        """Run here, as the administrator: files are this machine's. CommandFailed unless check is false."""
        program = shutil.which("kubectl")
        if program is None:
            raise NotUp("kubectl is not installed: put one in PATH")
        return kubectl.run(program, self.kubeconfig, args, stdin=stdin, check=check, timeout=timeout)

    def load_image(self, tar: Path) -> None:
        """Into all nodes."""
        self._load(tar, "")

    @property
    def versions(self) -> Mapping[str, str]:
        """As the programs of each node say."""
        asked = {"kubelet": ["kubelet", "--version"], "containerd": ["containerd", "--version"]}
        return {
            f"{program} on {name}": node.place.run(argv).out.splitlines()[0]
            for name, node in self.nodes.items()
            for program, argv in asked.items()
        }

    def _load(self, tar: Path, node: str) -> None:
        load_image(self.description, tar, node)

    def close(self) -> None:
        for node in self.nodes.values():
            node.place.close()


def load_image(description: Description, tar: Path, node: str = "") -> None:
    """An image tar into one node, or into all."""
    command = [description.kind, "load", "image-archive", str(tar), f"--name={description.name}"]
    if node:
        command.append(f"--nodes={node}")
    environment = {**os.environ, **Engine(description.engine).for_kind}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise NotUp(f"`{' '.join(command)}` failed: {done.stderr.strip()[-1000:]}")


def devices_of(ground: Ground, node: str) -> Devices:
    """What a node has to give away, and what macvlans stand on."""
    mine = [given for given in ground.devices if given.home.node == node]
    uplinks = [given.home.name for given in mine if given.kind == "uplink"]
    return Devices(
        netdevs=tuple(given.home.name for given in mine if given.kind not in ("uplink", "netdevsim-pf")),
        uplink=uplinks[0] if uplinks else None,
    )


@contextlib.contextmanager
def running(folder: Path) -> Iterator[KindCluster]:
    """The cluster described in folder; what was started on its nodes ends with the context. NotUp."""
    description = read_description(folder)
    made = KindCluster(description, read_ground(folder / "ground.json"))
    try:
        yield made
    finally:
        made.close()
