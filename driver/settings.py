"""What the agent is told at start, validated once.

Invariant: after this module nobody looks at flags or the environment.
"""

from __future__ import annotations

import argparse
import enum
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from driver.model import NodeName
from driver.paths import Paths

_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


class HookChoice(enum.StrEnum):
    AUTO = "auto"
    TCX = "tcx"
    CLSACT = "clsact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """slots bounds how many devices can be prepared at once; a slot costs 1 KiB per possible CPU."""

    node: NodeName
    paths: Paths
    policy: Path | None
    kubeconfig: Path | None
    hook: HookChoice
    metrics_port: int
    slots: int
    log_level: str

    def __post_init__(self) -> None:
        if not self.node:
            raise ValueError("no node name: give --node-name or set NODE_NAME")
        if len(self.node) > 253 or not _SUBDOMAIN.fullmatch(self.node):
            raise ValueError(f"--node-name {self.node!r} is not a node's name: it is a DNS subdomain")
        if len(self.paths.driver) > 63 or not _SUBDOMAIN.fullmatch(self.paths.driver):
            raise ValueError(
                f"--driver {self.paths.driver!r} is not a DNS subdomain of at most 63 characters"
            )
        if not 1 <= self.slots <= 65536:
            raise ValueError(f"--slots {self.slots} is not between 1 and 65536")
        if not 0 <= self.metrics_port <= 65535:
            raise ValueError(f"--metrics-port {self.metrics_port} is not a port")
        self.paths.check_sockets()


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which agent of which machine is meant; every command has them."""
    parser.add_argument("--driver", default="knd.internal", help="DRA driver name (default %(default)s)")
    parser.add_argument("--root", type=Path, default=Path("/"), help="folder all state is below (default /)")


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    add_place_arguments(parser)
    parser.add_argument("--node-name", default="", help="this node's name in the cluster ($NODE_NAME)")
    parser.add_argument("--policy", type=Path, help="node policy file; none: physical devices are offered")
    parser.add_argument("--kubeconfig", type=Path, help="how to reach the API server; none: as a pod does")
    parser.add_argument("--hook", type=HookChoice, choices=list(HookChoice), default=HookChoice.AUTO)
    parser.add_argument("--metrics-port", type=int, default=9467, help="on loopback; 0 picks a free one")
    parser.add_argument("--slots", type=int, default=512, help="devices that can be prepared at once")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])


def paths_from(arguments: argparse.Namespace) -> Paths:
    return Paths(driver=arguments.driver, root=arguments.root.absolute())


def settings_from(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """ValueError with one sentence for the first thing that is wrong."""
    return Settings(
        node=NodeName(
            arguments.node_name or environment.get("NODE_NAME", "") or socket.gethostname().lower()
        ),
        paths=paths_from(arguments),
        policy=arguments.policy,
        kubeconfig=arguments.kubeconfig,
        hook=arguments.hook,
        metrics_port=arguments.metrics_port,
        slots=arguments.slots,
        log_level=arguments.log_level,
    )


def parse(argv: Sequence[str]) -> Settings:
    """Settings from an agent's command line; for entry points that are not the `knd` command."""
    parser = argparse.ArgumentParser()
    add_agent_arguments(parser)
    return settings_from(parser.parse_args(argv), os.environ)
