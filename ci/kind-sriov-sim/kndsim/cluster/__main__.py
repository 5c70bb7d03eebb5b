"""`python -m kndsim.cluster up`: a cluster that stays until Ctrl-C. `build`: only its programs."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kndsim.cluster import Cluster, ClusterSpec, NotUp, cluster, conf
from kndsim.cluster.binaries import BuildFailed, binaries
from kndsim.cluster.images import ImageFailed
from kndsim.cluster.machine import MachineFailed, MachineGround
from kndsim.progress import Progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kndsim.cluster", description=__doc__)
    parser.add_argument(
        "what", choices=("up", "shell", "build"), help="shell: up, with a shell that has kubectl"
    )
    parser.add_argument("--kubernetes", default="1.37", choices=sorted(conf.GATES))
    parser.add_argument("--containerd", default="2.4")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--image", type=Path, action="append", default=[], help="a further OCI tar to load")
    return parser


def _usage(made: Cluster) -> str:
    head = next(iter(made.nodes.values()))
    lines = [f"export KUBECONFIG={made.kubeconfig}", f"alias kubectl={head.programs.find('kubectl')}"]
    for node in made.nodes.values():
        if isinstance(node.ground, MachineGround):
            lines.append(f"# {node.name}: {node.ground.enter}")
        lines.append(f"#   its files: {node.root}")
        lines.append(f"#   for pods: {' '.join(node.devices.netdevs)}, uplink {node.devices.uplink}")
    return "\n".join(lines)


def _wait_for_end() -> None:
    print("Ctrl-C ends it", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


def _shell(made: Cluster) -> None:
    head = next(iter(made.nodes.values()))
    path = f"{Path(head.programs.find('kubectl')).parent}:{os.environ.get('PATH', os.defpath)}"
    shell = os.environ.get("SHELL", "/bin/sh")
    subprocess.run([shell], env={**os.environ, "KUBECONFIG": str(made.kubeconfig), "PATH": path}, check=False)


def main(args: Sequence[str] | None = None) -> int:
    told = _parser().parse_args(args)
    progress = Progress("cluster")
    try:
        spec = ClusterSpec(
            kubernetes=told.kubernetes, containerd=told.containerd, nodes=told.nodes, images=told.image
        )
        if told.what == "build":
            for pin in spec.pins:
                print(binaries(pin, progress))
            return 0
        # A request to end is an end like any other: everything is taken down.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with cluster(spec, progress) as made:
            print(_usage(made), flush=True)
            if told.what == "shell":
                _shell(made)
            else:
                _wait_for_end()
    except (BuildFailed, ImageFailed, MachineFailed, NotUp, ValueError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
