"""`python -m kndsim.kind`: a kind cluster up or down; exit 0 if it is done, 1 with a sentence if not."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kndsim.agent_image import NAME, REPOSITORY
from kndsim.cluster import NotUp
from kndsim.cluster.binaries import BuildFailed, binaries
from kndsim.cluster.conf import GATES
from kndsim.cluster.images import ImageFailed, base_images
from kndsim.cluster.kind import KindCluster, read_description
from kndsim.deployed import NotReady, deploy_agent
from kndsim.kind.config import BadSpec, KindSpec
from kndsim.kind.engine import Engine, EngineFailed, NoEngine, find_engine
from kndsim.kind.ground import CannotGive
from kndsim.kind.keeper import keep
from kndsim.kind.namespaces import CannotMove, NodeAway
from kndsim.kind.netdevsim import NoNetdevsim
from kndsim.kind.plan import BadFile
from kndsim.kind.up import AGENT_IMAGE, FOLDER, Tools, UpFailed, Wanted, down, up
from kndsim.place import CommandFailed
from kndsim.progress import Progress

TOLD = (
    BadFile,
    BadSpec,
    BuildFailed,
    CannotGive,
    CannotMove,
    CommandFailed,
    EngineFailed,
    ImageFailed,
    NoEngine,
    NoNetdevsim,
    NodeAway,
    NotReady,
    NotUp,
    UpFailed,
)
"""Failures that are sentences."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "keep":
            keep(arguments.folder)
        else:
            # As an interrupt: what is half made is taken down on the way out.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            (_up if arguments.command == "up" else _down)(arguments)
    except TOLD as error:
        print(f"python -m kndsim.kind {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kndsim.kind", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    upward = commands.add_parser("up", help="a cluster with devices and agents")
    upward.add_argument("--kubernetes", choices=sorted(GATES), default="1.37")
    upward.add_argument("--workers", type=int, default=2, help="beside the control plane (%(default)s)")
    upward.add_argument("--image", default="", help="another node image than kind's own for that version")
    upward.add_argument(
        "--rdma",
        choices=["", "rxe"],
        default=os.environ.get("KND_KIND_RDMA", ""),
        help="rxe: soft RoCE on every device (KND_KIND_RDMA)",
    )
    upward.add_argument(
        "--lend", nargs="*", default=[], metavar="PCI", help="functions of this machine to give to the nodes"
    )
    commands.add_parser("down", help="all of it, gone")
    keeping = commands.add_parser("keep", help="make the devices of a plan and hand them back, until SIGTERM")
    keeping.add_argument("folder", type=Path, help="holds plan.json; gets ground.json when all stands")
    return parser


def _up(arguments: argparse.Namespace) -> None:
    spec = KindSpec(kubernetes=arguments.kubernetes, workers=arguments.workers, image=arguments.image)
    progress = Progress("kind")
    engine = find_engine(os.environ.get("KND_ENGINE", ""))
    if shutil.which("kubectl") is None:
        raise UpFailed("kubectl is not installed: put one in PATH")
    tools = Tools(
        engine=engine,
        kind=_kind(progress),
        images=lambda folder: _images(engine, folder),
        deploy=lambda cluster: deploy_agent(cluster, image=cluster.description.folder / AGENT_IMAGE),
    )
    wanted = Wanted(rdma=bool(arguments.rdma), lend=tuple(arguments.lend))
    cluster = up(spec, wanted, tools, progress)
    print(progress.table(), file=sys.stderr)
    _tell(cluster)


def _images(engine: Engine, folder: Path) -> list[Path]:
    """The agent's image, by the engine that is there anyway, and the tool image."""
    agent = folder / AGENT_IMAGE
    engine.build(REPOSITORY / "deploy/image/Dockerfile", REPOSITORY, NAME, agent)
    _, tool = base_images()
    return [agent, tool]


def _kind(progress: Progress) -> str:
    """Built from the pin, since node images fit the kind they were made for; KND_KIND names another."""
    return os.environ.get("KND_KIND") or str(binaries("kind", progress) / "kind")


def _tell(cluster: KindCluster) -> None:
    for name, node in cluster.nodes.items():
        print(f"{name}: {', '.join(node.devices.netdevs)}; macvlans on {node.devices.uplink}")
    print(f"export KUBECONFIG={cluster.kubeconfig}")
    print("`make kind-test` runs the end-to-end suite on it, `make kind-down` removes all of it")


def _down(arguments: argparse.Namespace) -> None:
    progress = Progress("kind")
    try:
        known = read_description(FOLDER)
    except NotUp:
        # Of a run that did not get as far as its description, or none at all.
        if not FOLDER.exists():
            print("there is no kind cluster of ours")
            return
        engine, program, name = (
            find_engine(os.environ.get("KND_ENGINE", "")),
            _kind(progress),
            KindSpec().name,
        )
    else:
        engine, program, name = Engine(known.engine), known.kind, known.name
    down(name, engine, program, progress)


if __name__ == "__main__":
    sys.exit(main())
