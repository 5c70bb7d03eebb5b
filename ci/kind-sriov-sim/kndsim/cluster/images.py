"""Images of the cluster's own, made without a registry: pause, and a tool image for tests.

Invariant: the same sources give the same image; nothing in them comes from elsewhere than this repository's
C source and Debian's static busybox.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from kndsim import oci
from kndsim.cache import Cache, digest

TOOL_SOURCE = Path(__file__).resolve().parents[2] / "tool" / "knd-tool.c"
PAUSE = "localhost/pause:1"
TOOL = "localhost/knd-tool:1"
_BUSYBOX = Path("/bin/busybox")
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-static", "-s")


class ImageFailed(Exception):
    """A sentence for the reader: what is missing, where it comes from."""


def tool(cache: Cache | None = None) -> Path:
    """The folder with the program knd-tool."""

    def make(folder: Path) -> None:
        argv = ["gcc", *_FLAGS, "-o", str(folder / "knd-tool"), str(TOOL_SOURCE)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ImageFailed("gcc is missing: install it (deploy/debian-packages-e2e.txt)") from None
        if done.returncode != 0:
            raise ImageFailed(f"compiling {TOOL_SOURCE.name} failed: {done.stderr.strip()}")

    return (cache or Cache()).folder("tool", digest([TOOL_SOURCE, *_FLAGS]), make)


def base_images(cache: Cache | None = None) -> list[Path]:
    """Tars of the pause and the tool image."""
    if not _BUSYBOX.exists():
        raise ImageFailed("busybox is missing: install busybox-static (deploy/debian-packages-e2e.txt)")
    program = tool(cache) / "knd-tool"

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="knd-image.") as scratch:
            pause, tools = Path(scratch, "pause"), Path(scratch, "tool")
            pause.mkdir()
            shutil.copy(program, pause)
            image = oci.Image(name=PAUSE, entrypoint=("/knd-tool", "sleep"), user="65535:65535")
            oci.write(folder / "pause.tar", image, pause)
            _lay_tool_root(tools, program)
            oci.write(
                folder / "tool.tar",
                oci.Image(name=TOOL, command=("knd-tool", "sleep"), env={"PATH": "/bin"}),
                tools,
            )

    key = digest([program, _BUSYBOX, Path(__file__), Path(oci.__file__)])
    folder = (cache or Cache()).folder("images", key, make)
    return [folder / "pause.tar", folder / "tool.tar"]


def _lay_tool_root(root: Path, program: Path) -> None:
    for name in ("bin", "etc", "root", "proc", "sys", "dev", "run", "var"):
        (root / name).mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    shutil.copy(program, root / "bin")
    shutil.copy(_BUSYBOX, root / "bin/busybox")
    listed = subprocess.run([str(_BUSYBOX), "--list"], capture_output=True, text=True, check=True).stdout
    for applet in listed.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
