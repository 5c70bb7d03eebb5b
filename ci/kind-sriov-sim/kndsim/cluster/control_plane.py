"""etcd, API server, controller manager and scheduler, as services of the first node.

Invariant: each is answered for: start() returns with an API server that says it is ready, or raises NotUp
with the end of the log that says why not.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
from collections.abc import Callable
from pathlib import Path

from kndsim.cluster import conf, pki
from kndsim.cluster.node import Node

API_SERVER = "kube-apiserver"
_CLIENTS = (pki.CONTROLLER_MANAGER, pki.SCHEDULER)


class ApiClient:
    """Reads from the API server as the administrator, through a port of this machine's loopback."""

    def __init__(self, folder: Path, port: Callable[[], int]) -> None:
        self._port = port
        self._context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        self._context.load_cert_chain(folder / f"{pki.ADMIN.file}.crt", folder / f"{pki.ADMIN.file}.key")

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; OSError or HTTPException while nobody answers."""
        with contextlib.closing(
            http.client.HTTPSConnection("127.0.0.1", self._port(), timeout=10, context=self._context)
        ) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def answers(self, path: str) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.get(path)[0] == http.HTTPStatus.OK
        return False


def lay_files(node: Node, folder: Path, server: str) -> None:
    """Keys, certificates and kubeconfigs of the control plane, on its node."""
    ca = (folder / "ca.crt").read_bytes()
    for name in ("ca.crt", "ca.key", "sa.key", "sa.pub"):
        node.place.write(conf.PKI / name, (folder / name).read_bytes(), 0o600)
    for name in ("apiserver", pki.KUBELET_CLIENT.file):
        for ending in ("crt", "key"):
            node.place.write(conf.PKI / f"{name}.{ending}", (folder / f"{name}.{ending}").read_bytes(), 0o600)
    for holder in _CLIENTS:
        certificate, key = ((folder / f"{holder.file}.{ending}").read_bytes() for ending in ("crt", "key"))
        text = conf.kubeconfig(server, ca, certificate, key)
        node.place.write(conf.CONF / f"{holder.file}.kubeconfig", text.encode(), 0o600)


def start_api_server(node: Node) -> None:
    """And etcd. Returns at once: the server waits for etcd by itself."""
    node.services.add("etcd", [node.programs.find("etcd"), *conf.etcd_flags()])
    flags = conf.api_server_flags(node.kubernetes, node.conf.address)
    node.services.add(API_SERVER, [node.programs.find(API_SERVER), *flags])


def start_controllers(node: Node) -> None:
    flags = {
        "kube-controller-manager": conf.controller_manager_flags(node.kubernetes),
        "kube-scheduler": conf.scheduler_flags(node.kubernetes),
    }
    for name, told in flags.items():
        node.services.add(name, [node.programs.find(name), *told])
