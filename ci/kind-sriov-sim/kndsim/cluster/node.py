"""One node: containerd and kubelet on a Ground, whatever that is.

Invariant: a node is touched through its Ground alone. A service that was started is answered for: whoever
waits for a node gets it ready, or an error with the end of the log that says why not.
"""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from kndsim.cluster import conf, images
from kndsim.cluster.ground import Devices, Ground
from kndsim.place import Place
from kndsim.waiting import TooLate, wait_until

STOPPING = 20.0
TAIL = 25
IMPORT = ("images", "import", "--local", "--label", "io.cri-containerd.pinned=pinned")
"""ctr's words before a tar. Pinned, so that kubelet never removes it: it could not be pulled again."""
IMPORT_WITHIN = 900.0
"""Of an image: seconds on a machine, minutes where the processors are emulated and busy."""
KUBELET_PORT = 10250


class NotUp(Exception):
    """A sentence for the reader: what did not come up, and what it said last."""


class Programs:
    """Where the node finds each program, by its name."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        """folders: pin to the folder its programs are in, the same here and there."""
        self._folders = folders

    def find(self, name: str) -> str:
        for folder in self._folders.values():
            if (folder / name).exists():
                return str(folder / name)
        raise NotUp(f"no pin of this cluster has a program {name}")

    @property
    def path(self) -> str:
        return ":".join([*map(str, self._folders.values()), "/usr/sbin:/usr/bin:/sbin:/bin"])


class Services:
    """Lasting programs of one node, with what they were started with, so that they can be again."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._known: dict[str, tuple[list[str], dict[str, str]]] = {}

    def add(self, name: str, argv: list[str], env: Mapping[str, str] | None = None) -> None:
        self._known[name] = (argv, dict(env or {}))
        self.start(name)

    def start(self, name: str) -> None:
        argv, env = self._of(name)
        self.place.start(name, argv, env=env)

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Returns when it has ended; nothing happens if it had before."""
        self._of(name)
        self.place.signal(name, number)
        wait_until(lambda: not self.place.alive(name), STOPPING, f"{name} on {self.place.name} ends")

    def _of(self, name: str) -> tuple[list[str], dict[str, str]]:
        if name not in self._known:
            known = ", ".join(sorted(self._known))
            raise ValueError(f"{self.place.name} has no service {name!r}: it has {known}")
        return self._known[name]

    def wait(self, name: str, ready: Callable[[], object], within: float, what: str) -> None:
        """Until ready() is true; NotUp with the end of name's log if it ends before, or takes longer."""

        def look() -> bool:
            if not self.place.alive(name):
                raise NotUp(self._told(name, f"{name} ended before {what}"))
            return bool(ready())

        try:
            wait_until(look, within, what)
        except TooLate:
            raise NotUp(self._told(name, f"{what}: not within {within:g} s")) from None

    def _told(self, name: str, what: str) -> str:
        end = "\n".join(self.place.log(name).splitlines()[-TAIL:])
        return f"on {self.place.name}: {what}. {name} said last:\n{end}"


class Node:
    """A node of a cluster. root, devices: see Ground."""

    def __init__(self, ground: Ground, number: int, kubernetes: str, programs: Programs) -> None:
        self.ground = ground
        self.kubernetes = kubernetes
        self.programs = programs
        self.services = Services(ground.place)
        self.conf = conf.NodeConf(
            name=ground.place.name,
            index=number,
            address=ground.address,
            cgroup_root=ground.cgroup_root,
            may_raise_oom=ground.may_raise_oom,
            hook_seconds=ground.hook_seconds,
        )

    @property
    def name(self) -> str:
        return self.conf.name

    @property
    def place(self) -> Place:
        return self.ground.place

    @property
    def root(self) -> Path:
        return self.ground.root

    @property
    def devices(self) -> Devices:
        return self.ground.devices

    def log(self, service: str) -> str:
        return self.place.log(service)

    def start(self, service: str) -> None:
        """One that was stopped; kubelet and containerd answer when this returns."""
        self.services.start(service)
        if service in ("kubelet", "containerd"):
            self._answers(service)

    def stop(self, service: str, number: int = signal.SIGTERM) -> None:
        self.services.stop(service, number)

    def restart(self, service: str) -> None:
        self.stop(service)
        self.start(service)

    def load_image(self, tar: Path) -> None:
        self.ctr(*IMPORT, str(self.ground.bring(tar)), timeout=IMPORT_WITHIN)

    def ctr(self, *args: str, timeout: float = 60) -> str:
        argv = [self.programs.find("ctr"), "--address", conf.CONTAINERD_SOCKET, "--namespace", "k8s.io"]
        return self.place.run([*argv, *args], timeout=timeout).out

    def start_containerd(self) -> None:
        runc = PurePosixPath(self.programs.find("runc"))
        cni = PurePosixPath(self.programs.find("bridge")).parent
        config = conf.containerd_config(self.conf, images.PAUSE, runc, cni)
        self.place.write(PurePosixPath("/etc/containerd/config.toml"), config.encode())
        self.place.write(
            PurePosixPath("/etc/cni/net.d/10-pods.conflist"), conf.cni_config(self.conf).encode()
        )
        argv = [self.programs.find("containerd"), "--config", "/etc/containerd/config.toml"]
        self.services.add("containerd", argv, {"PATH": self.programs.path})
        self._answers("containerd")

    def start_kubelet(self, pki: Path, server: str) -> None:
        """Joins over TCP, as a node of its own name. pki: the cluster's folder."""
        ca = (pki / "ca.crt").read_bytes()
        certificate = (pki / f"kubelet-{self.name}.crt").read_bytes()
        key = (pki / f"kubelet-{self.name}.key").read_bytes()
        self.place.write(conf.PKI / "ca.crt", ca)
        self.place.write(conf.PKI / "kubelet.crt", certificate)
        self.place.write(conf.PKI / "kubelet.key", key, 0o600)
        joined = conf.kubeconfig(server, ca, certificate, key)
        self.place.write(conf.CONF / "kubelet.kubeconfig", joined.encode(), 0o600)
        self.place.write(conf.CONF / "kubelet.json", conf.kubelet_config(self.conf).encode())
        self.place.run(["mkdir", "-p", str(conf.MANIFESTS)])
        argv = [self.programs.find("kubelet"), *conf.kubelet_flags(self.kubernetes, self.conf)]
        self.services.add("kubelet", argv, {"PATH": self.programs.path})
        self._answers("kubelet")

    def _answers(self, service: str) -> None:
        ready = {"containerd": self._containerd_answers, "kubelet": self._kubelet_answers}
        self.services.wait(service, ready[service], 120, f"{service} answers")

    def _containerd_answers(self) -> bool:
        argv = [
            self.programs.find("ctr"),
            "--address",
            conf.CONTAINERD_SOCKET,
            "plugins",
            "ls",
            "-d",
            "id==cri",
        ]
        return self.place.run(argv, check=False).code == 0

    def _kubelet_answers(self) -> bool:
        """Its server talks TLS; what it would say to a stranger does not matter."""
        stranger = ssl.create_default_context()
        stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
        with self.ground.forward(KUBELET_PORT) as port:
            try:
                with (
                    socket.create_connection(("127.0.0.1", port), 5) as raw,
                    stranger.wrap_socket(raw) as talk,
                ):
                    return talk.version() is not None
            except OSError:
                return False

    def versions(self) -> dict[str, str]:
        """Of the programs themselves, asked on the node."""
        asked = {
            "containerd": ["containerd", "--version"],
            "runc": ["runc", "--version"],
            "kubelet": ["kubelet", "--version"],
        }
        return {
            name: self.place.run([self.programs.find(argv[0]), *argv[1:]]).out.splitlines()[0]
            for name, argv in asked.items()
        }
