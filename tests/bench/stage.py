"""A node to measure on: many veths, and a simulated node whose /run is in memory, as on a real one.

Invariant: all of it is in namespaces (network and mount) of this process, and gone with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from pyroute2 import IPRoute

from kndsim.demo.devices import POLICY, disable_ipv6
from kndsim.links import SimNetns, netns, private_host
from kndsim.node import SimNode, unmount
from kndsim.runtime import RuntimeMode

IN_MEMORY = ("run/knd", "var/run/cdi")
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def wired_host(count: int, *, also: Sequence[str] = ()) -> Iterator[SimNetns]:
    """port0, port1, ... at home in a private host, down, their peers in a netns of their own. also: names
    of more, which the agent does not offer. They go with the namespaces, not one by one."""
    with private_host() as host, netns() as far:
        host.run(disable_ipv6)
        far.run(disable_ipv6)
        names = [f"port{number}" for number in range(count)] + list(also)

        def add(ipr: IPRoute) -> None:
            for number, name in enumerate(names):
                peer = {"ifname": f"peer{number}", "net_ns_fd": far.fd}
                ipr.link("add", ifname=name, kind="veth", peer=peer)

        host.netlink(add)
        yield host


@contextlib.asynccontextmanager
async def bench_node(*agent_flags: str) -> AsyncIterator[SimNode]:
    """A simulated node; its agent is not started yet."""
    async with SimNode(mode=RuntimeMode.POD_RPC, policy=POLICY, agent_flags=agent_flags) as node:
        with contextlib.ExitStack() as stack:
            for place in IN_MEMORY:
                stack.enter_context(tmpfs(node.root / place))
            stack.callback(node.agent.kill)
            yield node


@contextlib.contextmanager
def tmpfs(path: Path) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    if _libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"mode=0755") != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mounting a tmpfs at {path}: {os.strerror(number)}")
    try:
        yield
    finally:
        unmount(path)
