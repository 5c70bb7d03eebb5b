"""What a node stands on: the part that differs between namespaces of this machine and a guest.

Invariant: everything else in this package touches a node through its Ground alone, so the same code makes a
node of either. A path below one of the shared folders is the same on the driving machine and on the node.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from kndsim.place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What a node has for knd. netdevs: whole links to give away; uplink: one to put macvlans on."""

    netdevs: tuple[str, ...]
    uplink: str | None


class Ground(Protocol):
    """A machine or something like it, with a network that reaches the other nodes and their pods."""

    @property
    def place(self) -> Place: ...

    @property
    def address(self) -> str:
        """Of the node, for the other nodes."""
        ...

    @property
    def root(self) -> Path:
        """The node's file tree for processes of the driving machine: sockets below it can be connected to."""
        ...

    @property
    def cgroup_root(self) -> str: ...

    @property
    def may_raise_oom(self) -> bool: ...

    @property
    def hook_seconds(self) -> int:
        """That the runtime waits for a plugin: containerd's own 2 on processors that are real."""
        ...

    @property
    def devices(self) -> Devices: ...

    def bring(self, path: Path) -> PurePosixPath:
        """Where the node finds a file of the driving machine; a copy is made if need be."""
        ...

    def forward(self, port: int) -> AbstractContextManager[int]:
        """A port of the driving machine's loopback that leads to a TCP port of the node."""
        ...
