"""What a node test sees without asking the agent: netlink, processes, files, API objects, metrics text."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from kndsim.links import SimNetns
from kndsim.netns import in_netns, in_thread
from kndsim.node import SimNode, SimPod
from kndsim.runtime import ContainerFailed, HookOutcome, SandboxFailed, SimContainer, SimSandbox

HOME = "home"
HERE = Path("/proc/self/ns/net")


@dataclass(frozen=True, slots=True)
class SeenLink:
    name: str
    up: bool
    addresses: tuple[str, ...]


def links_here() -> dict[int, SeenLink]:
    """All links of the calling thread's namespace."""
    with IPRoute() as ipr:
        addresses: dict[int, list[str]] = {}
        for address in ipr.get_addr():
            text = f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}"
            addresses.setdefault(address["index"], []).append(text)
        return {
            link["index"]: SeenLink(
                link.get_attr("IFLA_IFNAME"),
                bool(link["flags"] & 1),
                tuple(sorted(addresses.get(link["index"], ()))),
            )
            for link in ipr.get_links()
        }


def links_in(netns: Path) -> Mapping[int, SeenLink]:
    """All links of a network namespace by ifindex; none where it is gone."""
    return in_netns(netns, links_here) if netns.exists() else {}


def links_at_home() -> Mapping[int, SeenLink]:
    return in_thread(links_here)


def index_of(device: str) -> int:
    """The ifindex a veth keeps for life, from its device's name."""
    return int(device.rpartition("-")[2])


def indexes(pod: SimPod) -> tuple[int, ...]:
    return tuple(index_of(each.device) for devices in pod.devices.values() for each in devices)


def where(sim: SimNode, ifindex: int) -> frozenset[str]:
    """Sandbox ids, or HOME, of all the namespaces that a link is in."""
    places = {HOME} if ifindex in links_at_home() else set()
    for sandbox in sim.runtime.sandboxes:
        if sandbox.netns_path is not None and ifindex in links_in(sandbox.netns_path):
            places.add(sandbox.id)
    return frozenset(places)


def is_attached(sim: SimNode, pod: SimPod) -> bool:
    """Every device of the pod is in its sandbox and up, and nowhere else."""
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    inside = links_in(pod.sandbox.netns_path)
    return bool(indexes(pod)) and all(
        index in inside and inside[index].up and where(sim, index) == {pod.sandbox.id}
        for index in indexes(pod)
    )


def container_has(pod: SimPod, container: SimContainer, name: str, address: str) -> None:
    """The container's own process stands beside the device, with all that the claim says."""
    inside = in_netns(Path(f"/proc/{container.pid}/ns/net"), links_here)
    (index,) = indexes(pod)
    assert inside[index] == SeenLink(name, True, (address,))


def runs(container: SimContainer) -> bool:
    return Path(f"/proc/{container.pid}/exe").exists()


def specs(sim: SimNode) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((sim.root / "var/run/cdi").glob("*.json"))}


def live_files(sim: SimNode) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((sim.root / "run/knd/live").glob("*"))}


def events(sim: SimNode, reason: str, about: str) -> list[Mapping[str, Any]]:
    """Events of a reason about an object of this UID."""
    return [
        each
        for each in sim.api.events()
        if each["reason"] == reason and each["involvedObject"]["uid"] == about
    ]


def metric(sim: SimNode, name: str, **labels: str) -> float:
    """Sum of the series of this name that have these labels, from the metrics text."""
    status, text = sim.agent.get("/metrics")
    assert status == 200
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith((f"{name} ", f"{name}{{")) and all(each in line for each in wanted)
    )


async def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait beside the peers, whose event loop is this one. AssertionError naming what was waited for."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.02)


async def until_attached(sim: SimNode, pod: SimPod, seconds: float = 10.0) -> None:
    try:
        await until(lambda: is_attached(sim, pod), "attached", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{sim.agent.tail()}") from error


def fresh(pod: SimPod) -> SimPod:
    """The pod as kubelet has it when its sandbox has died: prepared, and nothing else."""
    return replace(pod, sandbox=None, containers=())


def only(pods: Sequence[SimPod]) -> SimPod:
    (pod,) = pods
    return pod


async def refused(
    sim: SimNode, pod: SimPod, *, name: str = "main", with_claims: bool = True
) -> ContainerFailed:
    """Try to start a container and see it fail."""
    try:
        await sim.create_container(pod, name, with_claims=with_claims)
    except ContainerFailed as error:
        return error
    raise AssertionError(f"container {name} of {pod.spec.name} started")


async def sandbox_refused(sim: SimNode, pod: SimPod) -> SandboxFailed:
    try:
        await sim.run_sandbox(pod)
    except SandboxFailed as error:
        return error
    raise AssertionError(f"the sandbox of {pod.spec.name} started")


def never_late(sim: SimNode) -> None:
    """No event of the runtime went unanswered while the agent was connected."""
    assert [each for each in sim.runtime.log if each.outcome is HookOutcome.TIMEOUT_OPEN] == []


def prepares(sim: SimNode) -> int:
    """How often the driver was asked to prepare, by kubelet's own log."""
    return sum(each.event.name == "PREPARED" for each in sim.kubelet.log)


def raise_peers(far: SimNetns) -> None:
    """The far ends up, so that devices have a carrier."""

    def up(ipr: IPRoute) -> None:
        for link in ipr.get_links():
            ipr.link("set", index=link["index"], state="up")

    far.netlink(up)


def send_home(sandbox: SimSandbox, ifindexes: Sequence[int]) -> None:
    """Do with links what the kernel does with physical ones when their namespace dies: they come to the
    first namespace, down, under the names they have. (It destroys virtual ones, such as these.)"""
    assert sandbox.netns_path is not None
    home = os.open(HERE, os.O_RDONLY | os.O_CLOEXEC)

    def move() -> None:
        with IPRoute() as ipr:
            for index in ifindexes:
                ipr.link("set", index=index, state="down")
                ipr.link("set", index=index, net_ns_fd=home)

    try:
        in_netns(sandbox.netns_path, move)
    finally:
        os.close(home)


async def until_async(say: Callable[[], Awaitable[str]], pattern: str, seconds: float = 10.0) -> None:
    """Ask until the answer has the pattern in it."""
    deadline = time.monotonic() + seconds
    while not re.search(pattern, said := await say()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {pattern!r} in {said!r}"
        await asyncio.sleep(0.05)
