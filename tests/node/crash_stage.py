"""A node whose agent dies where it is told to and is started again at once, and what it is judged by.

Invariant: the judgement comes from this process's own reads: netlink, the bpffs, folders, the two SQLite
files and the API server's objects. The agent is never asked, but for whether it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kndsim import netns
from kndsim.agent import wait_until
from kndsim.demo.devices import Devices, changes, dump
from kndsim.kubelet import PrepareFailed, UnprepareFailed
from kndsim.node import SimNode, SimPod
from kndsim.runtime import ContainerFailed, SandboxFailed, StopFailed
from tests.node.node_stage import claim, node

PATIENCE = 10.0
"""Seconds from the agent's next readiness to a node that agrees with itself."""
FRAMES, PAYLOAD = 7, 100
FRAME_BYTES = 14 + 20 + 8 + PAYLOAD
FAR = "198.18.0.1"
CLAIMED = {"name": "net1", "mtu": 1400, "hardwareAddress": "02:00:5e:10:00:01"}
ADDRESS = "198.18.0.2"
FAILURES = (PrepareFailed, SandboxFailed, ContainerFailed)
DIRECTIONS = ("egress", "ingress")
"""By their numbers in the ledger."""
_IFF_UP = 1
_REPEATS = 3
"""How often a death is played again whose point was not passed: which of two threads is first may differ."""

Story = Callable[[], Coroutine[Any, Any, None]]


class NotConverged(AssertionError):
    """The node is not as it should be, though it was given the time."""


@contextlib.contextmanager
def devices_that_survive(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Netns whose end sends our devices to the host's, as the kernel does with physical ones.

    A veth would be destroyed; so just before the runtime lets go of a netns, its veths are moved home
    under the name they have, down, with all their other settings: what default_device_exit_net() does.
    """
    delete = netns.delete_netns

    def send_home_and_delete(path: Path) -> None:
        if path.exists():
            home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                netns.in_netns(path, lambda: _send_home(home))
            finally:
                os.close(home)
        delete(path)

    with monkeypatch.context() as patched:
        patched.setattr(netns, "delete_netns", send_home_and_delete)
        yield


def _send_home(home: int) -> None:
    with IPRoute() as ipr:
        for link in ipr.get_links():
            info = link.get_attr("IFLA_LINKINFO")
            if info is None or info.get_attr("IFLA_INFO_KIND") != "veth":
                continue
            index = link["index"]
            with contextlib.suppress(NetlinkError):
                # It may leave while we look: the agent brings it home at the same time.
                ipr.link("set", index=index, state="down")
                try:
                    ipr.link("set", index=index, net_ns_fd=home)
                except NetlinkError:
                    ipr.link("set", index=index, net_ns_fd=home, ifname=f"dev{index}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """How the node was before there was any pod."""

    links: Any
    pins: list[str]
    offered: Any


class Stage:
    """One node through many lives of its agent."""

    def __init__(self, sim: SimNode, made: Devices, control: Path, nursery: Nursery) -> None:
        self.sim = sim
        self._nursery = nursery
        self.made = made
        self.control = control
        self.mortal = False
        """Whether devices die with the netns they are in."""
        self.parts = False
        """Whether what a pod gets is made for its claim, on a device that stays: until then there is none at
        home."""
        self.deaths = 0
        self.ready_at = 0.0
        self.pod: SimPod | None = None
        self._orders: list[str] = []
        self._before: Before
        self._pods = 0
        self._may_start = asyncio.Event()
        self._may_start.set()

    # --- orders -------------------------------------------------------------------------------------

    def order(self, *lines: str, fail: str = "") -> None:
        """Die at these points, one per life of the agent; make one act fail."""
        self.lines()
        self._orders = list(lines)
        self._next_order()
        if fail:
            self._write("fail", fail)

    def left(self) -> list[str]:
        """Orders that were not carried out."""
        return [name for name in ("kill", "fail") if (self.control / name).exists()] + self._orders

    def withdraw(self) -> None:
        self._orders = []
        for name in ("kill", "fail"):
            (self.control / name).unlink(missing_ok=True)

    def lines(self) -> list[str]:
        """The points passed since this was last asked."""
        return self._drain("visited")

    def planned(self) -> set[str]:
        return set(self._drain("planned"))

    def _next_order(self) -> None:
        if self._orders:
            self._write("kill", self._orders.pop(0))

    def _write(self, name: str, text: str) -> None:
        building = self.control / f"{name}.new"
        building.write_text(text)
        building.rename(self.control / name)

    def _drain(self, name: str) -> list[str]:
        path = self.control / name
        lines = path.read_text().splitlines() if path.exists() else []
        if path.exists():
            os.truncate(path, 0)
        return lines

    # --- the agent ----------------------------------------------------------------------------------

    async def begin(self) -> None:
        await self._start()
        self._look()

    def _look(self) -> None:
        self._before = Before(links=dump(), pins=self._pins(), offered=self._offered())

    async def supervised(self, story: Coroutine[Any, Any, None]) -> None:
        """Run story while the agent is started again whenever it is gone, as a DaemonSet's is; whichever
        of the two goes wrong first is raised."""
        tasks = [asyncio.create_task(story), asyncio.create_task(self._supervise())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _supervise(self) -> None:
        while True:
            if not self.sim.agent.alive():
                self.deaths += 1
                await self.sim.kill_agent()
                self._next_order()
                await self._may_start.wait()
                if await self._start():
                    await self.within(self._halfway, "after the start")
            await asyncio.sleep(0.02)

    async def _start(self, *, wait: bool = True) -> bool:
        """Start it and wait until it is ready. False if it died on the way there, as it was told to."""
        agent = self.sim.agent
        agent.process = self._nursery.new()  # type: ignore[assignment]
        if not wait:
            return False
        give_up = time.monotonic() + PATIENCE
        while not await asyncio.to_thread(agent.ready):
            if not agent.alive() and not (self.control / "kill").exists():
                return False
            if not agent.alive() or time.monotonic() > give_up:
                raise NotConverged(f"the agent does not become ready: {agent.get('/readyz')}\n{agent.tail()}")
            await asyncio.sleep(0.02)
        self.ready_at = time.monotonic()
        return True

    # --- a pod's life -------------------------------------------------------------------------------

    async def life(self) -> None:
        """A pod comes, sends, goes, each call repeated as kubelet repeats it; judged while it runs and
        when it is gone."""
        pod = await self._start_pod(self._schedule())
        # No patience here: a container that runs has its device.
        if problems := self._attached():
            raise NotConverged(f"a container runs and {problems}")
        await asyncio.to_thread(send, pod)
        await self.delete(pod)
        self.pod = None
        await self.within(lambda: self._over(pod.spec.name, FRAMES), "when the pod was gone")

    async def short_life(self) -> None:
        """A pod whose sandbox is stopped again before the agent, killed in its attach, is back."""
        self._may_start.clear()
        try:
            pod = await self.sim.prepare(self._schedule())
            pod = await self.sim.run_sandbox(pod)
            assert pod.sandbox is not None
            await self.sim.runtime.stop_pod(pod.sandbox)
        finally:
            self._may_start.set()
        await self.delete(pod)
        if not self.mortal:
            await self.within(lambda: self._over(pod.spec.name, 0), "when the pod was gone")
            return
        await self.within(lambda: [*self._records_left(), *self._unlike_home()], "when the pod was gone")
        self._look()

    def _schedule(self) -> SimPod:
        self._pods += 1
        self.pod = None
        name = f"p{self._pods}"
        return self.sim.schedule(name, [claim(f"{name}-nic", addresses=[f"{ADDRESS}/24"], **CLAIMED)])

    async def _start_pod(self, pod: SimPod) -> SimPod:
        """sim.start_pod, but the sandbox is known here as soon as it is: the supervisor judges it."""
        give_up = time.monotonic() + 3 * PATIENCE
        while True:
            with contextlib.suppress(*FAILURES):
                if not pod.devices:
                    pod = await self.sim.prepare(pod)
                if pod.sandbox is None:
                    pod = await self.sim.run_sandbox(pod)
                    self.pod = pod
                return await self.sim.create_container(pod)
            if time.monotonic() > give_up:
                raise NotConverged(f"the pod does not start\n{self.sim.agent.tail()}")
            await asyncio.sleep(0.05)

    async def delete(self, pod: SimPod) -> None:
        """sim.delete_pod, repeated until the driver has let go of the claims."""
        give_up = time.monotonic() + 3 * PATIENCE
        while True:
            try:
                await self.sim.delete_pod(pod)
                return
            except (UnprepareFailed, StopFailed) as error:
                if time.monotonic() > give_up:
                    raise NotConverged(f"the pod does not go: {error}\n{self.sim.agent.tail()}") from error
            await asyncio.sleep(0.05)

    # --- judging --------------------------------------------------------------------------------------

    async def within(self, problems: Callable[[], list[str]], when: str) -> None:
        """No problems at some moment before the patience is over, counted from the last readiness."""
        while found := await asyncio.to_thread(problems):
            if time.monotonic() > self.ready_at + PATIENCE and self.sim.agent.alive():
                raise NotConverged(f"{when}: {'; '.join(found)}\n{self.sim.agent.tail()}")
            await asyncio.sleep(0.02)

    async def kill_and_start(self) -> None:
        """No order, no waiting: SIGKILL now, and the next agent."""
        await self.sim.kill_agent()
        self.deaths += 1
        await self._start(wait=False)

    async def wait_ready(self) -> None:
        await asyncio.to_thread(self.sim.agent.wait_ready)
        self.ready_at = time.monotonic()

    def _halfway(self) -> list[str]:
        """Either wholly in the pod or wholly at home."""
        there = self._attached()
        lasting = frozenset(self._before.links) if self.parts else None
        here = changes(self._before.links, dump(lasting))
        return [] if not there or not here else [*there, *here]

    def _attached(self) -> list[str]:
        """What the pod's device lacks of what was claimed."""
        pod = self.pod
        if pod is None or pod.sandbox is None or pod.sandbox.netns_path is None:
            return ["there is no pod"]
        try:
            found = netns.in_netns(pod.sandbox.netns_path, look)
        except OSError as error:
            return [f"its netns cannot be entered: {error}"]
        wanted = (CLAIMED["hardwareAddress"], CLAIMED["mtu"], True, [ADDRESS])
        link = found.get("net1")
        return [] if link == wanted else [f"its net1 is {link}, not {wanted}"]

    def _over(self, pod: str, frames: int) -> list[str]:
        """Everything that is not as it was before the pod, or not counted as it was sent."""
        counted = self.counted().get(pod, {}).get("egress", (0, 0))
        problems = self.leftovers()
        if counted != (frames * FRAME_BYTES, frames):
            problems.append(f"sent {frames} frames of {FRAME_BYTES} bytes, counted {counted}")
        return problems

    def leftovers(self) -> list[str]:
        """Everything that is not as it was before there was any pod; gaps, and accounts still open."""
        problems = changes(self._before.links, dump()) + self._records_left()
        if self._offered() != self._before.offered:
            problems.append(f"the slices say {self._offered()}")
        return problems

    def _unlike_home(self) -> list[str]:
        """Where the slices offer anything but the veths that are at home."""
        home = {f"veth-{index}" for index, link in dump().items() if link["IFLA_IFNAME"].startswith("port")}
        offered = {device["name"] for each in self._offered() for device in each["spec"]["devices"]}
        return [] if offered == home else [f"offered are {offered}, at home {home}"]

    def _records_left(self) -> list[str]:
        folders = {name: os.listdir(self.sim.root / name) for name in ("var/run/cdi", "run/knd/live")}
        tables = {name: self.journal(f"SELECT * FROM {name}") for name in ("records", "steps")}
        problems = [f"{name} holds {left}" for name, left in (folders | tables).items() if left]
        # A device that died took along what it counted itself; what BPF counted is in the maps still.
        bpf = " WHERE COALESCE(source, '') = ''" if self.mortal else ""
        problems += [f"gap {row}" for row in self._ledger(f"SELECT * FROM gaps{bpf}")]
        if self._pins() != self._before.pins:
            problems.append(f"pins: {self._pins()}")
        if rows := self._ledger("SELECT id FROM attachments WHERE ended IS NULL"):
            problems.append(f"accounts still open: {rows}")
        return problems

    def counted(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Bytes and packets by pod and direction."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for pod, direction, size, packets in self._ledger(
            "SELECT a.pod_name, u.direction, sum(u.bytes - u.base_bytes), sum(u.packets - u.base_packets)"
            " FROM usage u JOIN attachments a ON a.id = u.attachment GROUP BY 1, 2"
        ):
            found.setdefault(pod, {})[DIRECTIONS[direction]] = (size, packets)
        return found

    def journal(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.sim.root / "var/lib/knd/journal.sqlite", statement)

    def _ledger(self, statement: str) -> list[tuple[Any, ...]]:
        return query(self.sim.root / "var/lib/knd/ledger.sqlite", statement)

    def _pins(self) -> list[str]:
        return sorted(str(path.relative_to(self.sim.bpffs)) for path in self.sim.bpffs.rglob("*"))

    def _offered(self) -> Any:
        """The slices with their versions: attach, detach and a restart write none."""
        return self.sim.api.slices(self.sim.driver, self.sim.name)


def query(path: Path, statement: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(statement).fetchall()


def look() -> dict[str, tuple[str, int, bool, list[str]]]:
    """MAC, MTU, up and addresses of every link of the calling thread's netns, by name."""
    with IPRoute() as ipr:
        addresses: dict[int, list[str]] = {}
        for address in ipr.get_addr():
            addresses.setdefault(address["index"], []).append(address.get_attr("IFA_ADDRESS"))
        return {
            link.get_attr("IFLA_IFNAME"): (
                link.get_attr("IFLA_ADDRESS"),
                link.get_attr("IFLA_MTU"),
                bool(link["flags"] & _IFF_UP),
                addresses.get(link["index"], []),
            )
            for link in ipr.get_links()
        }


def send(pod: SimPod) -> None:
    """Exactly FRAMES frames out of the pod's device, and nothing else: the far end is a static neighbour."""
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None

    def body() -> None:
        with IPRoute() as ipr:
            index = ipr.link_lookup(ifname="net1")[0]
            ipr.neigh("replace", dst=FAR, lladdr="02:00:5e:00:00:fe", ifindex=index, state="permanent")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            for _ in range(FRAMES):
                out.sendto(bytes(PAYLOAD), (FAR, 9))

    netns.in_netns(pod.sandbox.netns_path, body)


class Agent:
    """A process that another one forked, with as much of Popen as AgentProcess uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        return 0 if select.select([self._pidfd], [], [], 0)[0] else None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """To be called once."""
        select.select([self._pidfd], [], [])
        os.close(self._pidfd)
        return 0


class Nursery:
    """The process that agents are forked off: see crash_entry."""

    def __init__(self, sim: SimNode, control: Path, *, patience: float = PATIENCE) -> None:
        self._path = control / "nursery"
        self._patience = patience
        sim.agent.start([sys.executable, "-m", "tests.node.crash_entry", str(control)])
        self.process, sim.agent.process = sim.agent.process, None
        try:
            wait_until(self._path.exists, "the nursery is open", patience)
        except TimeoutError:
            self.close()
            raise

    def new(self) -> Agent:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(self._patience)
            asking.connect(str(self._path))
            return Agent(int(asking.recv(16)))

    def close(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextlib.asynccontextmanager
async def stage(made: Devices, hook: str, control: Path) -> AsyncIterator[Stage]:
    """A node, its agent ready, the far ends of the wires up."""
    for wire in made.wires:
        index = made.far.link_index(wire.peer)
        made.far.netlink(lambda ipr, index=index: ipr.link("set", index=index, state="up"))
    async with node(made, hook=hook, start=False) as sim:
        with contextlib.closing(Nursery(sim, control)) as nursery:
            made_stage = Stage(sim, made, control, nursery)
            await made_stage.begin()
            yield made_stage
            await sim.kill_agent()
        assert list(sim.runtime.violations) == []


def point_of(line: str) -> tuple[str, str, str]:
    plan, act, point, _ = line.split("\t")
    return plan, act, point


def find(lines: Iterable[str], plan: str, act: str, point: str) -> str:
    return next(line for line in lines if point_of(line) == (plan, act, point))


async def killed(on: Stage, story: Story, *lines: str, fail: str = "") -> list[str]:
    """The story with a death at each of these points; the lines that the last agent passed."""
    for _ in range(_REPEATS):
        on.order(*lines, fail=fail)
        try:
            await on.supervised(story())
        except NotConverged as error:
            raise NotConverged(f"killed at {lines}: {error}") from error
        passed = on.lines()
        left = on.left()
        on.withdraw()
        if not left:
            return passed
    raise NotConverged(f"not passed in {_REPEATS} runs: {left}")
