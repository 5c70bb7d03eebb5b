"""A node's images unpacked ahead: a disk with containerd's store on it, made once on this machine.

Invariant: what is on the disk was put there by the containerd and the ctr that the node runs, from the same
tars; only where and when differ. Emulated processors take minutes for what this machine does in seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kndsim.agent import dying_with_parent
from kndsim.cache import Cache, digest
from kndsim.cluster.node import IMPORT, Programs
from kndsim.waiting import TooLate, wait_until

STORE = "/var/lib/containerd"
"""Where the disk belongs: its whole content is containerd's root."""
FREE_MIB = 1024
"""For what pods write, and for their logs."""
_DISK = "store.img"
_WITHIN = 60.0
_CONFIG = """version = 3
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri"]
[grpc]
address = "{socket}"
"""


class UnpackFailed(Exception):
    """A sentence for the reader: what of containerd's failed, and what it said last."""


def unpacked(
    tars: Sequence[Path], programs: Programs, cache: Cache | None = None, *, release: str = ""
) -> Path:
    """An ext4 disk with these images, for STORE. release: of containerd. UnpackFailed if there is none."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            root = Path(scratch, "root")
            _fill(root, Path(scratch), tars, programs)
            used = int(_run(["du", "-sm", str(root)]).split()[0])
            form = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0"]
            _run([*form, "-d", str(root), str(folder / _DISK), f"{used * 5 // 4 + FREE_MIB}M"])

    key = digest([release, *tars, Path(__file__)])
    return (cache or Cache()).folder("unpacked", key, make) / _DISK


def _fill(root: Path, scratch: Path, tars: Sequence[Path], programs: Programs) -> None:
    socket, config, log = scratch / "socket", scratch / "config.toml", scratch / "log"
    config.write_text(_CONFIG.format(root=root, state=scratch / "state", socket=socket))
    # It mounts what it unpacks into: in a namespace of its own, so that nothing stays mounted here.
    alone = ["unshare", "--mount", "--propagation", "private"]
    argv = dying_with_parent([*alone, programs.find("containerd"), "--config", str(config)])
    env = {"PATH": programs.path}
    ctr = [programs.find("ctr"), "--address", str(socket), "--namespace", "k8s.io"]
    with log.open("wb") as said, subprocess.Popen(argv, stdout=said, stderr=said, env=env) as process:
        try:
            wait_until(lambda: _answers(process, ctr), _WITHIN, "containerd answers")
            for tar in tars:
                _run([*ctr, *IMPORT, str(tar)], env)
        except (TooLate, UnpackFailed) as error:
            raise UnpackFailed(f"{error}. containerd said last:\n{log.read_text()[-2000:]}") from None
        finally:
            process.send_signal(signal.SIGTERM)


def _answers(process: subprocess.Popen[bytes], ctr: Sequence[str]) -> bool:
    if process.poll() is not None:
        raise UnpackFailed(f"containerd ended with status {process.returncode}")
    return subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode == 0


def _run(argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    if done.returncode != 0:
        raise UnpackFailed(f"{Path(argv[0]).name} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
