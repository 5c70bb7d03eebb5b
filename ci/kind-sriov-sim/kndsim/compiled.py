"""What is compiled for a node, kept from one simulated node to the next: it takes longer than all else that
an agent does at its start.

Invariant: an agent finds files alone, and takes BPF programs only of its own source and compiler.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NETNS_CHECK = Path(__file__).resolve().parents[3] / "deploy/netns-check"
_programs: dict[str, bytes] = {}


@contextlib.contextmanager
def kept_programs(cache: Path) -> Iterator[None]:
    """cache: an agent's own folder of BPF programs, filled with what agents of nodes before made."""
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in _programs.items():
        (cache / name).write_bytes(content)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # Whoever played the node may have taken the folder away.
            _programs.update({path.name: path.read_bytes() for path in cache.glob("acct-*.json")})


@functools.cache
def netns_check() -> bytes:
    """The createRuntime helper, built from source as the image does."""
    with tempfile.TemporaryDirectory(prefix="knd-netns-check-") as folder:
        made = Path(folder, "knd-netns-check")
        subprocess.run(
            ["make", "-s", "-C", str(_NETNS_CHECK), f"OUT={made}"], check=True, stdout=subprocess.DEVNULL
        )
        return made.read_bytes()


def put_netns_check(to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(netns_check())
    to.chmod(0o755)
