"""The agent's image as one tar, made without a container engine: `python -m kndsim.agent_image` prints where.

Invariant: the recipe is the scripts in deploy/image, the same that the Dockerfile runs. What changes seldom
(Debian's packages, the Python packages) is made once and kept by what it is made from; a change of the
product costs seconds.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kndsim import oci
from kndsim.cache import Cache, digest
from kndsim.debian_root import RootFailed, make_root, run_in
from kndsim.progress import Progress

REPOSITORY = Path(__file__).resolve().parents[3]
NAME = "localhost/knd:dev"
SUITE = "trixie"
PRODUCT = (
    "driver",
    "bpf",
    "hw",
    "deploy",
    "LICENSE",
    "LICENSES",
    "README.md",
    "pyproject.toml",
)
"""What the last part of the recipe reads."""
_LAYER = "layer.tar.gz"
_THIS = (Path(__file__), Path(__file__).with_name("debian_root.py"), Path(oci.__file__))
_ENVIRONMENT = {
    "PATH": "/opt/knd/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def agent_image(
    progress: Progress | None = None, *, repository: Path = REPOSITORY, cache: Cache | None = None
) -> Path:
    """The image's tar, under NAME; made now unless it is there. RootFailed with the end of what failed."""
    cache = cache or Cache()
    progress = progress or Progress("agent image")
    with tempfile.TemporaryDirectory() as scratch:
        # A copy: what is digested and what is built must be the same, whoever is editing.
        source = Path(scratch) / "source"
        _copy(repository, source)
        base = _base(cache, progress, source)
        venv = _venv(cache, progress, source, base)

        def make(folder: Path) -> None:
            with progress.phase("the product"), tempfile.TemporaryDirectory() as out:
                run_in(
                    venv / "root",
                    ["/src/deploy/image/product.sh", "/out"],
                    binds={source: "/src", Path(out): "/out"},
                )
                product = oci.pack(folder / _LAYER, Path(out))
                image = oci.Image(name=NAME, entrypoint=["knd"], command=["agent"], env=_ENVIRONMENT)
                layers = [oci.Layer.kept(base / _LAYER), oci.Layer.kept(venv / _LAYER), product]
                oci.write_layers(folder / "knd.tar", image, layers)

        key = digest([venv.name, source, *_THIS])
        return cache.folder("agent-image", key, make) / "knd.tar"


def _base(cache: Cache, progress: Progress, source: Path) -> Path:
    deploy = source / "deploy"

    def make(folder: Path) -> None:
        with progress.phase(f"Debian {SUITE} with the agent's packages"):
            make_root(folder / "root", SUITE)
            script = "/src/deploy/image/base.sh"
            run_in(folder / "root", [script], binds={deploy: "/src/deploy"}, packages=True)
            oci.pack(folder / _LAYER, folder / "root")

    parts = ["image/base.sh", "install-packages.sh", "debian-packages-image.txt"]
    return cache.folder("agent-base", digest([SUITE, *(deploy / part for part in parts), *_THIS]), make)


def _venv(cache: Cache, progress: Progress, source: Path, base: Path) -> Path:
    def make(folder: Path) -> None:
        with progress.phase("the Python packages"):
            root = folder / "root"
            subprocess.run(["cp", "-a", base / "root", root], check=True)
            run_in(root, ["/src/deploy/image/venv.sh"], binds={source: "/src"}, packages=True)
            oci.pack(folder / _LAYER, root, "opt/knd")

    parts = ["deploy/image/venv.sh", "deploy/debian-packages-image-build.txt", "requirements/runtime.txt"]
    key = digest([base.name, *(source / part for part in parts)])
    return cache.folder("agent-venv", key, make)


def _copy(repository: Path, to: Path) -> None:
    ignored = shutil.ignore_patterns(
        "__pycache__", "*.pyc", "*.egg-info", "examples", "manifests", "prebuilt"
    )
    for name in (*PRODUCT, "requirements"):
        if (repository / name).is_dir():
            shutil.copytree(repository / name, to / name, ignore=ignored)
        else:
            shutil.copy2(repository / name, to / name)


def main() -> int:
    try:
        print(agent_image())
    except RootFailed as error:
        print(f"the agent's image could not be made: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
