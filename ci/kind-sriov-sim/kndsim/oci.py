"""OCI images without a registry or an engine: one tar that `ctr images import` and `kind load` take.

Invariant: the same inputs give the same bytes (owners, times and order are fixed), so an image can be
cached by what it is made from. Source: the OCI image-spec v1.1, image layout and config.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_INDEX = "application/vnd.oci.image.index.v1+json"
_EPOCH = "1970-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What runs. name has a tag: "localhost/pause:1"."""

    name: str
    entrypoint: Sequence[str] = ()
    command: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = ""

    def __post_init__(self) -> None:
        if ":" not in self.name.rpartition("/")[2]:
            raise ValueError(f"image name {self.name!r} has no tag")


def write(to: Path, image: Image, root: Path) -> None:
    """Make `to` an image whose only layer is the tree at root; files belong to the owners they have there."""
    layer = _layer(root)
    packed = gzip.compress(layer, 1, mtime=0)
    blobs: dict[str, bytes] = {}

    def blob(media: str, data: bytes) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        blobs[name] = data
        return {"mediaType": media, "digest": f"sha256:{name}", "size": len(data)}

    config = {
        "created": _EPOCH,
        "architecture": _architecture(),
        "os": "linux",
        "config": {
            "Entrypoint": list(image.entrypoint),
            "Cmd": list(image.command),
            "Env": [f"{key}={value}" for key, value in sorted(image.env.items())],
            "User": image.user,
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        "history": [{"created": _EPOCH}],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": blob(_CONFIG, _json(config)),
        "layers": [blob(_LAYER, packed)],
    }
    names = {
        "io.containerd.image.name": image.name,
        "org.opencontainers.image.ref.name": image.name.rpartition(":")[2],
    }
    entry = {
        **blob(_MANIFEST, _json(manifest)),
        "platform": {"architecture": _architecture(), "os": "linux"},
        "annotations": names,
    }
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [entry]}
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": _json(index)}
    files |= {f"blobs/sha256/{name}": data for name, data in sorted(blobs.items())}
    with tarfile.open(to, "w") as out:
        for path, data in files.items():
            entry_of = tarfile.TarInfo(path)
            entry_of.size, entry_of.mode = len(data), 0o644
            out.addfile(entry_of, io.BytesIO(data))


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _architecture() -> str:
    """The machine in the words of Go, which the image-spec uses."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _layer(root: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as out:
        for folder, folders, files in os.walk(root):
            folders.sort()
            for name in sorted([*files, *folders]):
                path = Path(folder, name)
                info = out.gettarinfo(path, str(path.relative_to(root)))
                info.mtime, info.uname, info.gname = 0, "", ""
                if info.isreg():
                    with path.open("rb") as data:
                        out.addfile(info, data)
                else:
                    out.addfile(info)
    return buffer.getvalue()
