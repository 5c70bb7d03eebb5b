"""The real agent on VFs that it made itself, and tenants that come and go; run in a guest with igb ports.

Invariant: what a VF is set to is judged by what ip(8) says of its PF and its netdev, and by what its pod
sends and receives; the agent is never asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

from kndsim.demo.devices import changes, dump
from kndsim.kubelet import PrepareFailed, UnprepareFailed
from kndsim.netns import in_netns
from kndsim.node import ClaimSpec, SimNode, SimPod
from kndsim.runtime import RuntimeMode
from kndsim.waiting import wait_until_async
from tests.node.crash_stage import Nursery
from tests.vm.provisioning_story import BUS, borrow_udev, name_of
from tests.vm.vf_settings_inside import in_pod, ip

NEAR, NEAR_2, FAR, FAR_2 = "0000:21:00.0", "0000:21:00.1", "0000:41:00.0", "0000:42:00.0"
PATIENCE = 300.0
STORY = 1500.0
"""Seconds for what is played at one go."""
MAC = "02:00:5e:00:01:{:02x}"
IN_POD = "net1"
_ETH_P_ALL = 3
_OUTGOING = 4


def policy(vfs: Mapping[str, int], more: str = "") -> str:
    rules = "".join(f'  - {{match: {{addresses: ["{pf}"]}}, vfs: {count}}}\n' for pf, count in vfs.items())
    return f"""apiVersion: knd.internal/v1alpha1
kind: NodePolicy
sriov:
{rules}claims:
  allow: [interface.hardwareAddress, vf.vlan, vf.trust, vf.spoofCheck]
{more}"""


Place = tuple[str, int]
"""A VF: its PF's address and its index."""
Picture = tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Mapping[int, Mapping[str, Any]]]]
"""Links by their keys, and what each PF says of each of its VFs."""


def vf_address(pf: str, vf: int) -> str:
    return (BUS / pf / f"virtfn{vf}").resolve().name


def device_name(place: Place) -> str:
    return f"pci-{vf_address(*place)}".replace(":", "-").replace(".", "-")


def held(pf: str) -> dict[int, dict[str, Any]]:
    """What a PF says of its VFs, but for their counters."""
    (link,) = ip("link", "show", name_of(pf) or "")
    return {
        info["vf"]: {key: value for key, value in info.items() if key not in ("vf", "stats")}
        for info in link.get("vfinfo_list", ())
    }


class Capture:
    """Frames that reach a pod's device from now on: source, destination, ethertype."""

    def __init__(self, pod: SimPod) -> None:
        assert pod.sandbox is not None
        assert pod.sandbox.netns_path is not None
        self._socket = in_netns(pod.sandbox.netns_path, self._open)

    @staticmethod
    def _open() -> socket.socket:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        opened.bind((IN_POD, 0))
        opened.setblocking(False)
        return opened

    def frames(self) -> list[tuple[str, str, int]]:
        """Those that came since this was last asked."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, (_, _, kind, *_) = self._socket.recvfrom(2048)
                if kind != _OUTGOING:
                    ethertype = int.from_bytes(frame[12:14], "big")
                    found.append((frame[6:12].hex(":"), frame[:6].hex(":"), ethertype))
        return found

    def close(self) -> None:
        self._socket.close()


class Tenants:
    """One node for all that is shown: each start of an agent takes its time in a guest."""

    def __init__(self, sim: SimNode, nursery: Nursery, control: Path, vfs: Mapping[str, int]) -> None:
        self.sim = sim
        self._nursery = nursery
        self.control = control
        self.vfs = dict(vfs)
        self.deaths = 0

    @property
    def places(self) -> list[Place]:
        return [(pf, vf) for pf, count in self.vfs.items() for vf in range(count)]

    def start_agent(self) -> None:
        self.sim.agent.process = self._nursery.new()  # type: ignore[assignment]
        self.sim.agent.wait_ready(PATIENCE)

    async def kill_and_start(self) -> None:
        await self.sim.kill_agent()
        self.deaths += 1
        await asyncio.to_thread(self.start_agent)

    def published(self) -> dict[str, list[str]]:
        """Devices that are offered, each with its taints."""
        slices = self.sim.api.slices(self.sim.driver, self.sim.name)
        return {
            device["name"]: [taint["key"] for taint in device.get("taints") or []]
            for each in slices
            for device in each["spec"].get("devices", ())
        }

    async def until(self, what: str, condition: Any, seconds: float = PATIENCE) -> None:
        try:
            await wait_until_async(condition, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.sim.agent.tail(80)}") from error

    async def until_offered(self, seconds: float = PATIENCE) -> None:
        """Every VF that is to be there, whole and without a taint."""

        def offered() -> bool:
            found = self.published()
            return all((BUS / pf / f"virtfn{vf}/net").is_dir() for pf, vf in self.places) and all(
                found.get(device_name(place)) == [] for place in self.places
            )

        await self.until(f"{len(self.places)} VFs offered", offered, seconds)

    # --- how it was, and how it is --------------------------------------------------------------------

    def picture(self) -> Picture:
        """Links as the kernel has them, and what the PFs hold."""
        functions = frozenset((*self.vfs, *(vf_address(*place) for place in self.places)))
        return dump(functions), {pf: held(pf) for pf in self.vfs}

    def unlike(self, before: Picture) -> list[str]:
        try:
            links, pfs = self.picture()
        except OSError as error:
            return [str(error)]
        found = changes(before[0], links)
        for pf, vf in self.places:
            was, now = before[1][pf][vf], pfs[pf].get(vf, {})
            found += [f"{pf} VF {vf}: {key} is {now.get(key)}" for key in was if now.get(key) != was[key]]
        drivers = {(BUS / vf_address(*place) / "driver").resolve().name for place in self.places}
        return found + ([f"drivers are {drivers}"] if drivers != {"igbvf"} else [])

    async def until_as(self, before: Picture, when: str) -> None:
        try:
            await wait_until_async(lambda: not self.unlike(before), PATIENCE, when)
        except AssertionError:
            unlike = "; ".join(self.unlike(before))
            raise AssertionError(f"{when}: {unlike}\n{self.sim.agent.tail(80)}") from None
        await self.until_offered()

    # --- pods ------------------------------------------------------------------------------------------

    def schedule(
        self, name: str, place: Place, *, tolerate: bool = False, mac: str | None = None, **vf: Any
    ) -> SimPod:
        interface: dict[str, Any] = {"name": IN_POD}
        if "number" in vf:
            interface["addresses"] = [f"198.18.0.{vf.pop('number') + 1}/24"]
        if mac:
            interface["hardwareAddress"] = mac
        kind = {"apiVersion": "knd.internal/v1alpha1", "kind": "NetworkDeviceConfig"}
        wanted = device_name(place)
        claim = ClaimSpec(
            name=f"{name}-nic",
            requests={"net": lambda device: device["name"] == wanted},
            parameters={"": {**kind, "interface": interface, "vf": vf}},
            tolerate=tolerate,
        )
        return self.sim.schedule(name, [claim])

    async def start(self, pod: SimPod) -> SimPod:
        return await self.sim.start_pod(pod, seconds=PATIENCE)

    async def delete(self, pod: SimPod) -> None:
        """As kubelet does it: again until the driver has let go."""
        while True:
            try:
                await self.sim.delete_pod(pod)
                return
            except UnprepareFailed:
                await asyncio.sleep(0.2)

    async def refusal(self, pod: SimPod) -> str:
        try:
            await self.sim.prepare(pod)
        except PrepareFailed as error:
            return str(error)
        raise AssertionError(f"{pod.spec.name} was prepared")

    # --- an agent that dies -----------------------------------------------------------------------------

    def visited(self, plan: str, act: str, point: str) -> str:
        """The newest line of the points passed so far that is about this, as an order to die there."""
        lines = (self.control / "visited").read_text().splitlines()
        return next(line for line in reversed(lines) if line.split("\t")[:3] == [plan, act, point])

    async def dying_at(self, line: str, story: Coroutine[Any, Any, Any]) -> Any:
        """Run story, in which the agent dies there and is started again, as a DaemonSet's is."""
        (self.control / "kill").write_text(line)
        running = asyncio.create_task(story)
        before = self.deaths
        while not running.done():
            if not self.sim.agent.alive():
                await self.kill_and_start()
            await asyncio.wait({running}, timeout=0.1)
        assert self.deaths == before + 1, f"not killed at {line!r}"
        return running.result()


@contextlib.asynccontextmanager
async def tenants(control: Path, vfs: Mapping[str, int]) -> AsyncIterator[Tenants]:
    """The agent has made its VFs and offers them."""
    flags = {"mode": RuntimeMode.POD_RPC, "policy": policy(vfs), "request_timeout": 30.0}
    async with SimNode(**flags) as sim:  # type: ignore[arg-type]
        borrow_udev(sim.root)
        with contextlib.closing(Nursery(sim, control, patience=PATIENCE)) as nursery:
            stage = Tenants(sim, nursery, control, vfs)
            await asyncio.to_thread(stage.start_agent)
            await stage.until_offered()
            try:
                yield stage
            finally:
                await sim.kill_agent()
                for pf in (NEAR, NEAR_2, FAR, FAR_2):
                    (BUS / pf / "sriov_numvfs").write_text("0")


async def reach(pods: Mapping[int, SimPod], pairs: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Which of the pairs, by pods' numbers, the first can ping the second of."""
    at_once = asyncio.Semaphore(8)

    async def one(pair: tuple[int, int]) -> tuple[int, int] | None:
        async with at_once:
            target = f"198.18.0.{pair[1] + 1}"
            done = await asyncio.to_thread(in_pod, pods[pair[0]], *("ping", "-c", "1", "-W", "3", target))
            return pair if done.returncode == 0 else None

    return {pair for pair in await asyncio.gather(*map(one, pairs)) if pair is not None}
