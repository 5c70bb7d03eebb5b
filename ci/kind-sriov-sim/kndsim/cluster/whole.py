"""The cluster as a whole: everything built, started in order, usable, and gone at the end.

Invariant: cluster() yields only when every node is Ready and a pod could be made; what it started is gone
when its context ends, and so is it when the process that drives it dies.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kndsim.cluster import conf, control_plane, images, kubectl, machine, pki
from kndsim.cluster.binaries import binaries
from kndsim.cluster.control_plane import API_SERVER, ApiClient
from kndsim.cluster.ground import Ground
from kndsim.cluster.node import Node, Programs
from kndsim.place import Done
from kndsim.progress import Progress

API_WITHIN = 300.0
NODES_WITHIN = 300.0
KUBECTL_PIN = "kubernetes-1.37"
"""kubectl is taken from the newest alone: it serves the older servers too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What to start. kubernetes, containerd: names of pins, ci/kind-sriov-sim/pins/kubernetes-1.37.

    images: further tars to load on every node. shared: folders that the nodes see by the same paths.
    """

    kubernetes: str = "1.37"
    containerd: str = "2.4"
    nodes: int = 1
    images: Sequence[Path] = ()
    shared: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 9:
            raise ValueError(f"a cluster has 1 to 9 nodes, not {self.nodes}")
        if self.kubernetes not in conf.GATES:
            known = ", ".join(conf.GATES)
            raise ValueError(f"no Kubernetes {self.kubernetes!r} is pinned: choose from {known}")

    @property
    def pins(self) -> tuple[str, ...]:
        wanted = (f"kubernetes-{self.kubernetes}", f"containerd-{self.containerd}", "runc", "etcd", "cni")
        return wanted if KUBECTL_PIN in wanted else (*wanted, KUBECTL_PIN)

    @property
    def node_names(self) -> list[str]:
        return [f"node-{number}" for number in range(1, self.nodes + 1)]


class Cluster:
    """A running one. nodes by name, the control plane's first; kubeconfig is the administrator's."""

    def __init__(
        self, nodes: Sequence[Node], kubeconfig: Path, kubectl: Path, api: ApiClient, loaded: Sequence[Path]
    ) -> None:
        """loaded: the tars whose images every node has."""
        self.nodes: Mapping[str, Node] = {node.name: node for node in nodes}
        self.kubeconfig = kubeconfig
        self.api = api
        self._kubectl = kubectl
        self._loaded = {tar.resolve() for tar in loaded}
        self.versions: Mapping[str, str] = {}

    def kubectl(self, *args: str, stdin: str = "", check: bool = True, timeout: float = 60.0) -> Done:
        """Run here, as the administrator: files are this machine's. CommandFailed unless check is false."""
        program = str(self._kubectl)
        return kubectl.run(program, self.kubeconfig, args, stdin=stdin, check=check, timeout=timeout)

    def load_image(self, tar: Path) -> None:
        """On every node that has not got it from its start on."""
        if tar.resolve() in self._loaded:
            return
        for node in self.nodes.values():
            node.load_image(tar)

    def node_is_ready(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            status, body = self.api.get(f"/api/v1/nodes/{name}")
            if status == 200:
                conditions = json.loads(body)["status"].get("conditions", [])
                return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
        return False

    def ask_versions(self) -> dict[str, str]:
        """As the running programs say."""
        _, body = self.api.get("/version")
        said = {"API server": str(json.loads(body)["gitVersion"])}
        for name, node in self.nodes.items():
            said |= {f"{program} on {name}": text for program, text in node.versions().items()}
        return said


@contextlib.contextmanager
def cluster(spec: ClusterSpec | None = None, progress: Progress | None = None) -> Iterator[Cluster]:
    """A cluster on this machine. NotUp, BuildFailed, MachineFailed or ImageFailed say why there is none."""
    spec, progress = spec or ClusterSpec(), progress or Progress("cluster")
    folders = {pin: binaries(pin, progress) for pin in spec.pins}
    first = images.tool() / "knd-tool"
    tars = [*images.base_images(), *spec.images]
    shared = [*folders.values(), *{tar.parent for tar in tars}, *spec.shared]
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="knd-cluster."))
        with progress.phase("namespaces"):
            grounds = stack.enter_context(machine.grounds(spec.node_names, folder, shared, first))
        yield stack.enter_context(cluster_on(grounds, spec, Programs(folders), tars, folder, progress))


@contextlib.contextmanager
def cluster_on(
    grounds: Sequence[Ground],
    spec: ClusterSpec,
    programs: Programs,
    tars: Sequence[Path],
    folder: Path,
    progress: Progress,
    unpacked: Sequence[Path] = (),
) -> Iterator[Cluster]:
    """A cluster on grounds that are there already. folder: of this machine, for keys and the kubeconfig.
    tars: images to load. unpacked: tars whose images are on the grounds already."""
    nodes = [Node(each, number, spec.kubernetes, programs) for number, each in enumerate(grounds, 1)]
    head = nodes[0]
    server = f"https://{head.conf.address}:{conf.API_PORT}"
    with ExitStack() as stack:
        with progress.phase("keys and certificates"):
            keys = folder / "pki"
            _make_keys(keys, nodes)
            control_plane.lay_files(head, keys, server)
        control_plane.start_api_server(head)
        with progress.phase("containerd and images"), ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: _start_runtime(node, tars), nodes))
        port = stack.enter_context(head.ground.forward(conf.API_PORT))
        api = ApiClient(keys, lambda: port)
        with progress.phase("API server"):
            ready = "the API server says it is ready"
            head.services.wait(API_SERVER, lambda: api.answers("/readyz"), API_WITHIN, ready)
        kubeconfig = _admin_kubeconfig(folder, keys, port)
        made = Cluster(nodes, kubeconfig, Path(programs.find("kubectl")), api, [*tars, *unpacked])
        with progress.phase("nodes"):
            _join(made, keys, server)
        made.versions = made.ask_versions()
        for name, text in made.versions.items():
            progress.say(f"{name}: {text}")
        yield made


def _make_keys(folder: Path, nodes: Sequence[Node]) -> None:
    addresses = ("127.0.0.1", conf.SERVICE_ADDRESS, nodes[0].conf.address)
    fixed = (pki.ADMIN, pki.CONTROLLER_MANAGER, pki.SCHEDULER, pki.KUBELET_CLIENT)
    kubelets = [pki.kubelet(node.name, node.conf.address) for node in nodes]
    pki.make(folder, [pki.api_server(addresses), *fixed, *kubelets])


def _start_runtime(node: Node, tars: Sequence[Path]) -> None:
    node.start_containerd()
    for tar in tars:
        node.load_image(tar)


def _admin_kubeconfig(folder: Path, keys: Path, port: int) -> Path:
    ca, certificate, key = (
        (keys / name).read_bytes() for name in ("ca.crt", f"{pki.ADMIN.file}.crt", f"{pki.ADMIN.file}.key")
    )
    path = folder / "kubeconfig"
    path.touch(0o600)
    path.write_text(conf.kubeconfig(f"https://127.0.0.1:{port}", ca, certificate, key))
    return path


def _join(made: Cluster, keys: Path, server: str) -> None:
    head = next(iter(made.nodes.values()))
    control_plane.start_controllers(head)
    for node in made.nodes.values():
        node.start_kubelet(keys, server)
    for name, node in made.nodes.items():
        node.services.wait(
            "kubelet", partial(made.node_is_ready, name), NODES_WITHIN, f"node {name} is Ready"
        )
    head.services.wait(
        "kube-controller-manager",
        lambda: made.api.answers("/api/v1/namespaces/default/serviceaccounts/default"),
        NODES_WITHIN,
        "the default service account is there",
    )
