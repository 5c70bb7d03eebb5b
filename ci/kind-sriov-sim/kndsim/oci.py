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
import tempfile
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A packed layer: the file at path, its digest, and the digest of what is packed in it."""

    path: Path
    digest: str
    diff_id: str

    @classmethod
    def kept(cls, path: Path) -> Layer:
        """One that pack() made at path earlier. OSError or ValueError if there is none."""
        noted = json.loads(_note(path).read_text())
        return cls(path=path, digest=noted["digest"], diff_id=noted["diff_id"])


def pack(to: Path, root: Path, below: str = "") -> Layer:
    """Make `to` a layer of the tree at root, or of the folder `below` in it; with a note beside it."""
    inner, outer = hashlib.sha256(), hashlib.sha256()
    with to.open("wb") as file:
        packed = _Counted(file.write, outer)
        with gzip.GzipFile("", "wb", 1, fileobj=packed, mtime=0) as squeezed:
            _tree(_Counted(squeezed.write, inner), root, below)
    layer = Layer(path=to, digest=outer.hexdigest(), diff_id=inner.hexdigest())
    _note(to).write_text(json.dumps({"digest": layer.digest, "diff_id": layer.diff_id}))
    return layer


def write(to: Path, image: Image, root: Path) -> None:
    """Make `to` an image whose only layer is the tree at root; files belong to the owners they have there."""
    with tempfile.TemporaryDirectory(dir=to.parent) as scratch:
        write_layers(to, image, [pack(Path(scratch, "layer"), root)])


def write_layers(to: Path, image: Image, layers: Sequence[Layer]) -> None:
    """Make `to` an image of these layers, the lowest first."""
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
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.diff_id}" for layer in layers]},
        "history": [{"created": _EPOCH} for _ in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": blob(_CONFIG, _json(config)),
        "layers": [
            {
                "mediaType": _LAYER,
                "digest": f"sha256:{layer.digest}",
                "size": layer.path.stat().st_size,
            }
            for layer in layers
        ],
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
    texts = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": _json(index)}
    texts |= {_blob_path(name): data for name, data in sorted(blobs.items())}
    with tarfile.open(to, "w") as out:
        for path, data in texts.items():
            out.addfile(_member(path, len(data)), io.BytesIO(data))
        for layer in {layer.digest: layer for layer in layers}.values():
            with layer.path.open("rb") as packed:
                out.addfile(_member(_blob_path(layer.digest), layer.path.stat().st_size), packed)


def _blob_path(digest: str) -> str:
    return f"blobs/sha256/{digest}"


def _member(path: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.size, member.mode = size, 0o644
    return member


def _note(packed: Path) -> Path:
    return packed.with_name(f"{packed.name}.json")


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _architecture() -> str:
    """The machine in the words of Go, which the image-spec uses."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


class _Counted:
    """A stream to write to that takes the digest of what goes through."""

    def __init__(self, write: Callable[[bytes], object], digest: hashlib._Hash) -> None:
        self._write = write
        self._digest = digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""


def _tree(to: _Counted, root: Path, below: str) -> None:
    with tarfile.open(fileobj=to, mode="w|", format=tarfile.PAX_FORMAT) as out:  # type: ignore[call-overload]
        for parent in reversed(Path(below).parents[:-1]):
            _add(out, root / parent, root)
        if below:
            _add(out, root / below, root)
        for folder, folders, files in os.walk(root / below):
            folders.sort()
            for name in sorted([*files, *folders]):
                _add(out, Path(folder, name), root)


def _add(out: tarfile.TarFile, path: Path, root: Path) -> None:
    info = out.gettarinfo(path, str(path.relative_to(root)))
    info.mtime, info.uname, info.gname = 0, "", ""
    if info.isreg():
        with path.open("rb") as data:
            out.addfile(info, data)
    else:
        out.addfile(info)
