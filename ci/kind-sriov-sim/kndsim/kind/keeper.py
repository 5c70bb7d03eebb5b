"""The process beside a kind cluster that owns its devices and hands them back to their nodes.

Invariant: it runs in the machine's first network namespace, which is where the kernel puts a physical device
whose namespace is gone. A device of a node that turns up there goes back to that node under its own name,
or is tried again until the node is there; what belongs to no node is never touched. When the keeper ends,
the devices end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kndsim.kind.engine import Engine
from kndsim.kind.ground import made
from kndsim.kind.model import strays
from kndsim.kind.namespaces import FIRST, CannotMove, NodeAway, Nodes, links, move
from kndsim.kind.netdevsim import Register
from kndsim.kind.plan import Given, Ground, Plan, read_plan, write_ground, write_whole

PLAN, GROUND, REGISTER, PID, LOG = "plan.json", "ground.json", "netdevsim", "keeper.pid", "keeper.log"
"""Files in a cluster's folder."""

_RTMGRP_LINK = 1
_AGAIN_SECONDS = 1.0
"""Between two tries for a device whose node is away."""
_RDMA_SECONDS = 5.0
"""Between two looks whether a device that came home needs its soft RoCE device again."""

Complain = Callable[[str], None]
"""Tells a reader, who is not told the same thing each second."""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def born(pid: int) -> str:
    """When a process was started, in the kernel's ticks, by which it is told from a later one of the same
    number; "" if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def keep(folder: Path) -> None:
    """Make what folder's plan says, say so in its ground file, and hand back until SIGTERM or SIGINT."""
    write_whole(folder / PID, f"{os.getpid()} {born(os.getpid())}")
    plan = read_plan(folder / PLAN)
    nodes = Nodes(plan.nodes, Engine(plan.engine) if plan.engine else None)
    with (
        _stopped() as stop,
        made(plan, nodes, Register(folder / REGISTER)) as ground,
        # Before the ground is told: what happens from then on is heard.
        _listening() as events,
    ):
        write_ground(folder / GROUND, ground)
        say(f"{len(ground.devices)} devices stand; handing back what comes here")
        try:
            _serve(plan, ground, nodes, events, stop)
        finally:
            (folder / GROUND).unlink()
    say("the devices are gone")


def _serve(plan: Plan, ground: Ground, nodes: Nodes, events: socket.socket, stop: int) -> None:
    said: set[str] = set()

    def complain(text: str) -> None:
        if text not in said:
            say(text)
        said.add(text)

    while True:
        failed = hand_back(ground, nodes, complain)
        if not failed and (not plan.rdma or not soft_roce(ground, nodes, complain)):
            said.clear()
        patience = _AGAIN_SECONDS if failed else _RDMA_SECONDS if plan.rdma else None
        ready, _, _ = select.select([events.fileno(), stop], [], [], patience)
        if stop in ready:
            return
        _drain(events)


def hand_back(ground: Ground, nodes: Nodes, complain: Complain) -> int:
    """Give the nodes what is theirs and stands here; how many devices could not be given."""
    found, problems = strays(links(), ground.homes())
    for problem in problems:
        complain(problem)
    failed = 0
    for stray in found:
        try:
            move(stray.ifindex, nodes.path(stray.home.node), stray.home.name)
        except (NodeAway, CannotMove, OSError) as error:
            # OSError: the namespace is just being made, and its file is there before it, or it goes now.
            failed += 1
            complain(f"{stray.id} waits here for {stray.home.node}: {error}")
        else:
            say(f"{stray.id} came here as {stray.name!a}: back on {stray.home.node} as {stray.home.name}")
    return failed


def soft_roce(ground: Ground, nodes: Nodes, complain: Complain) -> int:
    """A soft RoCE device for each device that is at home and has none, since one is lost with every move;
    how many could not be made."""
    failed = 0
    try:
        there = _rdma_links()
    except RdmaFailed as error:
        complain(f"the soft RoCE devices cannot be listed: {error}")
        return 1
    for number, given in enumerate(ground.devices):
        name, what = f"kndrxe{number}", f"{given.home.name} of {given.home.node}"
        if name in there or given.kind in ("netdevsim-pf", "uplink"):
            continue
        try:
            path = nodes.path(given.home.node)
            if _is_home(given, path):
                _rdma("link", "add", name, "type", "rxe", "netdev", given.home.name, where=path)
                say(f"{what} has the soft RoCE device {name}")
        except NodeAway:
            continue
        except RdmaFailed as error:
            failed += 1
            complain(f"{what} has no soft RoCE device: {error}")
    return failed


class RdmaFailed(Exception):
    """What rdma(8) said."""


def _rdma(*argv: str, where: Path = FIRST) -> str:
    command = ["nsenter", f"--net={where}", "rdma", *argv]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RdmaFailed(f"rdma cannot be run: {error}") from error
    if done.returncode != 0:
        raise RdmaFailed(done.stderr.strip() or f"rdma ended with {done.returncode}")
    return done.stdout


def _rdma_links() -> frozenset[str]:
    """In the kernel's shared mode those of all namespaces."""
    return frozenset(str(link["ifname"]) for link in json.loads(_rdma("-j", "link", "show") or "[]"))


def _is_home(given: Given, path: Path) -> bool:
    return any(
        link.name == given.home.name and (given.id is None or link.id == given.id) for link in links(path)
    )


@contextlib.contextmanager
def _listening() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as heard:
        heard.bind((0, _RTMGRP_LINK))
        heard.setblocking(False)
        yield heard


def _drain(events: socket.socket) -> None:
    """Events only say that it is time to look; one lost to a full buffer says so too."""
    while True:
        try:
            events.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise


@contextlib.contextmanager
def _stopped() -> Iterator[int]:
    """A file that can be read from once SIGTERM or SIGINT came."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield reader
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
