"""The devices of a kind cluster's nodes: made or lent, given to each node, gone or back home at the end.

Invariant: what is yielded stands in its node under its name. Whatever fails, all that was made is deleted
and what was lent is where it was, as far as its user has given it back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kndsim.kind import netdevsim
from kndsim.kind.model import DeviceId, Home
from kndsim.kind.namespaces import (
    FIRST,
    CannotMove,
    NodeAway,
    Nodes,
    add_bridge,
    add_veth,
    drop_altname,
    find,
    move,
    set_up,
)
from kndsim.kind.plan import Given, Ground, Lent, Plan
from kndsim.links import netns

UPLINK = "mac-0"
NO_LINK = "this kernel does not join netdevsim ports (it does from 6.9 on): they carry no traffic"


class CannotGive(Exception):
    """A sentence: which device, which node."""


@contextlib.contextmanager
def made(plan: Plan, nodes: Nodes, register: netdevsim.Register) -> Iterator[Ground]:
    """All that the plan says, standing."""
    with contextlib.ExitStack() as stack:
        devices: list[Given] = []
        notes: list[str] = []
        if plan.ports:
            devices += _ports(stack, plan, nodes, register, notes)
        if plan.vfs:
            for node in plan.nodes:
                number = stack.enter_context(netdevsim.device(register, 1, plan.vfs))
                # The node's agent names a VF by its PF.
                devices.append(_give(nodes, netdevsim.port(number, 1), Home(node, "simpf"), "netdevsim-pf"))
                for index in range(plan.vfs):
                    home = Home(node, f"simv{index}")
                    devices.append(_give(nodes, netdevsim.vf(number, index), home, "netdevsim-vf"))
        if plan.veths:
            devices += stack.enter_context(_veths(plan, nodes))
        for lent in plan.lent:
            devices.append(stack.enter_context(_lent(nodes, lent)))
        yield Ground(tuple(devices), tuple(notes))


def _ports(
    stack: contextlib.ExitStack, plan: Plan, nodes: Nodes, register: netdevsim.Register, notes: list[str]
) -> list[Given]:
    numbers = {node: stack.enter_context(netdevsim.device(register, plan.ports)) for node in plan.nodes}
    try:
        for (node, index), (other, other_index) in netdevsim.cables(tuple(plan.nodes), plan.ports):
            netdevsim.join(netdevsim.port(numbers[node], index), netdevsim.port(numbers[other], other_index))
    except netdevsim.NoNetdevsim as error:
        if (netdevsim.BUS / "link_device").exists():
            raise
        notes.append(f"{NO_LINK} ({error})")
    return [
        _give(nodes, netdevsim.port(number, index), Home(node, f"sim{index - 1}"), "netdevsim-port")
        for node, number in numbers.items()
        for index in range(1, plan.ports + 1)
    ]


def _give(nodes: Nodes, id: DeviceId, home: Home, kind: str) -> Given:
    link = find(id)
    if link is None:
        raise CannotGive(f"{id} is not among the links of this namespace: {home.node} does not get it")
    try:
        move(link.ifindex, nodes.path(home.node), home.name)
    except (CannotMove, NodeAway) as error:
        raise CannotGive(f"{home.node} does not get {id}: {error}") from error
    return Given(home, kind, id)


@contextlib.contextmanager
def _veths(plan: Plan, nodes: Nodes) -> Iterator[list[Given]]:
    """The far ends and their bridge stand in a namespace that lives as long as this process at most."""
    given = []
    with netns() as wire:
        bridge = add_bridge("wire", wire.path)
        for number, node in enumerate(plan.nodes):
            for name in [*(f"net-{index}" for index in range(plan.veths)), UPLINK]:
                try:
                    path = nodes.path(node)
                    add_veth(f"n{number}-{name}", wire.path, name, path, bridge)
                    if name == UPLINK:
                        set_up(name, path)
                except (CannotMove, NodeAway) as error:
                    raise CannotGive(f"{node} does not get {name}: {error}") from error
                given.append(Given(Home(node, name), "uplink" if name == UPLINK else "veth", None))
        yield given


@contextlib.contextmanager
def _lent(nodes: Nodes, lent: Lent) -> Iterator[Given]:
    before = find(lent.id)
    given = _give(nodes, lent.id, lent.home, "lent")
    assert before is not None
    try:
        yield given
    finally:
        # A node that is gone has given it back already; a pod that has it gives it back when it ends.
        with contextlib.suppress(NodeAway, CannotMove):
            path = nodes.path(lent.home.node)
            link = find(lent.id, path)
            if link is not None:
                # udev, which saw it between two users, may have kept its name as another name of it.
                drop_altname(link.ifindex, before.name, path)
                move(link.ifindex, FIRST, before.name, source=path)
