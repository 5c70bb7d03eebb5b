"""Keys and certificates of one cluster: made with openssl, used for as long as it stands.

Invariant: private keys are readable by root alone; every certificate but the CA's own is signed by the one
CA, and says who its holder is in the words Kubernetes authorizes by (common name and organization).
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_DAYS = "30"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who a certificate speaks for. alt_names as openssl writes them: "IP:10.0.0.1", "DNS:localhost"."""

    file: str
    common_name: str
    organization: str = ""
    alt_names: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        group = f"/O={self.organization}" if self.organization else ""
        return f"{group}/CN={self.common_name}"


ADMIN = Holder(file="admin", common_name="knd-admin", organization="system:masters")
CONTROLLER_MANAGER = Holder(file="controller-manager", common_name="system:kube-controller-manager")
SCHEDULER = Holder(file="scheduler", common_name="system:kube-scheduler")
KUBELET_CLIENT = Holder(
    file="apiserver-kubelet-client",
    common_name="kube-apiserver-kubelet-client",
    organization="system:masters",
)


def api_server(addresses: Iterable[str]) -> Holder:
    names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
    return Holder(
        file="apiserver",
        common_name="kube-apiserver",
        alt_names=(*(f"DNS:{name}" for name in names), *(f"IP:{address}" for address in addresses)),
    )


def kubelet(node: str, address: str) -> Holder:
    """For both directions: the Node authorizer and NodeRestriction know a node by this name and group."""
    return Holder(
        file=f"kubelet-{node}",
        common_name=f"system:node:{node}",
        organization="system:nodes",
        alt_names=(f"DNS:{node}", f"IP:{address}"),
    )


def make(folder: Path, holders: Sequence[Holder]) -> None:
    """ca, sa (service account tokens) and a key and certificate for each holder, as FILE.key and FILE.crt."""
    folder.mkdir(mode=0o700)
    _key(folder, "ca")
    _openssl(
        "req", "-x509", "-new", "-key", folder / "ca.key", "-out", folder / "ca.crt", "-days", _DAYS,
        "-subj", "/CN=knd-cluster-ca", "-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature",
    )  # fmt: skip
    _key(folder, "sa")
    _openssl("pkey", "-in", folder / "sa.key", "-pubout", "-out", folder / "sa.pub")
    for holder in holders:
        _issue(folder, holder)


def _key(folder: Path, name: str) -> None:
    target = folder / f"{name}.key"
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", target)
    target.chmod(0o600)


def _issue(folder: Path, holder: Holder) -> None:
    _key(folder, holder.file)
    request, extensions = folder / f"{holder.file}.csr", folder / f"{holder.file}.ext"
    lines = ["keyUsage=critical,digitalSignature", "extendedKeyUsage=serverAuth,clientAuth"]
    if holder.alt_names:
        lines.append(f"subjectAltName={','.join(holder.alt_names)}")
    extensions.write_text("\n".join(lines))
    _openssl("req", "-new", "-key", folder / f"{holder.file}.key", "-subj", holder.subject, "-out", request)
    _openssl(
        "x509", "-req", "-in", request, "-CA", folder / "ca.crt", "-CAkey", folder / "ca.key",
        "-CAcreateserial", "-days", _DAYS, "-extfile", extensions, "-out", folder / f"{holder.file}.crt",
    )  # fmt: skip


def _openssl(*args: str | Path) -> None:
    argv = ["openssl", *map(str, args)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("openssl is missing: install it (deploy/debian-packages-e2e.txt)") from None
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
