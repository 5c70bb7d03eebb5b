"""The story of the demo, in order. Everything it claims is returned as a Result, judged elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from kndsim.agent import dying_with_parent, wait_until
from kndsim.demo.devices import Devices, changes, dump
from kndsim.links import SimNetns
from kndsim.netns import in_netns
from kndsim.node import ClaimSpec, SimNode, SimPod, any_device, interface
from kndsim.runtime import RuntimeMode
from kndsim.traffic import Flow, encode

BEFORE_KILL, WITHOUT_AGENT, AFTER_RESTART = 1.5, 1.0, 1.5
"""Seconds of traffic in each part."""
PATIENCE = 60.0
"""Seconds for what follows by itself, on a slow machine with real devices."""


@dataclass(frozen=True, slots=True)
class TrafficClass:
    """What a flow is sent as, and what it must be counted as."""

    name: str
    kind: str
    dscp: int
    port: int
    payload: int


CLASSES = (
    TrafficClass("best-effort", "ip", 0, 9000, 600),
    TrafficClass("bulk", "ip", 8, 9001, 1400),
    TrafficClass("roce-data", "roce", 26, 4791, 1000),
    TrafficClass("cnp", "roce", 48, 4791, 64),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. kind `rest` holds what was counted and not sent by the generator."""

    pod: str
    claim: str
    device: str
    interface: str
    direction: str
    traffic_class: str
    kind: str
    sent_bytes: int
    counted_bytes: int
    sent_while_down: int

    @property
    def equal(self) -> bool:
        return self.sent_bytes == self.counted_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    rows: tuple[Row, ...]
    device_changes: tuple[str, ...]
    slice_changes: tuple[str, ...]
    agent_restarts: int
    hook: str
    surprises: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A device in a pod: where it is, and the addresses of its wire's two ends."""

    pod: SimPod
    claim: str
    device: str
    ifname: str
    peer: str
    number: int
    netns: Path

    @property
    def address(self) -> str:
        return f"198.18.{self.number}.2"

    @property
    def peer_address(self) -> str:
        return f"198.18.{self.number}.1"


Say = Callable[[str], None]

PODS: tuple[tuple[str, int], ...] = (("trainer-0", 1), ("trainer-1", 2), ("loader-0", 1))
"""Name, and how many devices its claim asks for."""
DEVICES_NEEDED = sum(count for _, count in PODS)


async def play(
    devices: Devices,
    *,
    mode: RuntimeMode,
    hook: str,
    entry: Sequence[str] | None,
    hook_seconds: float,
    unsent: int,
    say: Say,
) -> Result:
    """hook_seconds: what the runtime allows for an answer. unsent: frames added to the generator's word, to
    see that a difference is noticed."""
    before = dump(devices.compared)
    async with SimNode(
        mode=mode,
        policy=devices.policy,
        hook=hook,
        entry=entry,
        udev=devices.udev,
        request_timeout=hook_seconds,
    ) as node:
        say(f"simulated node in {node.root}: kubelet, {mode} runtime, API server")
        await node.start_agent(seconds=4 * PATIENCE)
        say("agent started: registered with kubelet and the runtime, slices published")
        offered = _offered(node)
        pods = [await _start(node, name, count, say) for name, count in PODS]
        ports = _ports(devices, pods)
        for port in ports:
            _set_neighbours(port, devices.far)
            has_link, what = partial(_has_link, port), f"a link on {port.ifname} of {port.pod.spec.name}"
            await asyncio.to_thread(wait_until, has_link, what, PATIENCE)
        marks = await _traffic(node, ports, devices.far, say)
        say("removing the pods")
        for pod in pods:
            await node.delete_pod(pod)
        usage = json.loads(node.knd("usage", "-o", "json").stdout)

        def as_before() -> bool:
            return not changes(before, dump(devices.compared)) and _offered(node) == offered

        await _until(as_before, devices.patience)
        after, offered_after = dump(devices.compared), _offered(node)
        if changes(before, after) or offered_after != offered:
            for line in node.agent.tail(200).splitlines():
                if " WARNING " in line or " ERROR " in line:
                    say(f"agent: {line}")
        code = await node.stop_agent()
        surprises = [*node.runtime.violations]
        if code != 0:
            surprises.append(f"the agent ended with exit code {code}: {node.agent.tail(5)}")
        return Result(
            rows=_rows(ports, marks, usage["rows"], unsent),
            device_changes=tuple(changes(before, after)),
            slice_changes=tuple(_slice_changes(offered, offered_after)),
            agent_restarts=node.agent.starts - 1,
            hook=str(usage["rows"][0]["source"]) if usage["rows"] else "",
            surprises=tuple(surprises),
        )


async def _start(node: SimNode, name: str, count: int, say: Say) -> SimPod:
    number = sum(n for other, n in PODS[: [each for each, _ in PODS].index(name)])
    parameters = {
        f"nic-{k}": interface(
            name=f"net{k + 1}",
            mtu=1500 - 20 * (number + k),
            hardwareAddress=f"02:00:5e:00:00:{number + k + 1:02x}",
            addresses=[f"198.18.{number + k}.2/24"],
        )
        for k in range(count)
    }
    requests = dict.fromkeys(parameters, any_device)
    claim = ClaimSpec(name=f"{name}-nics", requests=requests, parameters=parameters)
    pod = node.schedule(name, [claim])
    started = await node.start_pod(pod, seconds=PATIENCE)
    given = ", ".join(d.device for ds in started.devices.values() for d in ds)
    say(f"pod {name} is running with {given}")
    return started


def _ports(devices: Devices, pods: Sequence[SimPod]) -> list[Port]:
    ports: list[Port] = []
    for pod in pods:
        assert pod.sandbox is not None
        assert pod.sandbox.netns_path is not None
        (given,) = pod.devices.values()
        for k, device in enumerate(given):
            number = len(ports)
            ifname = f"net{k + 1}"
            ports.append(
                Port(
                    pod=pod,
                    claim=pod.claims[0].name,
                    device=device.device,
                    ifname=ifname,
                    peer=devices.peer_of(pod.sandbox.netns_path, ifname),
                    number=number,
                    netns=pod.sandbox.netns_path,
                )
            )
    return ports


def _set_neighbours(port: Port, far: SimNetns) -> None:
    """Addresses at the far end and static neighbours at both: no ARP, so nothing but the flows is sent."""

    def address_of(ipr: IPRoute, name: str) -> tuple[int, str]:
        index = int(ipr.link_lookup(ifname=name)[0])
        return index, str(ipr.get_links(index)[0].get_attr("IFLA_ADDRESS"))

    def near() -> str:
        with IPRoute() as ipr:
            return address_of(ipr, port.ifname)[1]

    near_mac = in_netns(port.netns, near)

    def set_far(ipr: IPRoute) -> str:
        index, mac = address_of(ipr, port.peer)
        ipr.addr("add", index=index, address=port.peer_address, prefixlen=24)
        ipr.link("set", index=index, state="up")
        ipr.neigh("replace", dst=port.address, lladdr=near_mac, ifindex=index, state="permanent")
        return mac

    far_mac = far.netlink(set_far)

    def set_near() -> None:
        with IPRoute() as ipr:
            index, _ = address_of(ipr, port.ifname)
            ipr.neigh("replace", dst=port.peer_address, lladdr=far_mac, ifindex=index, state="permanent")

    in_netns(port.netns, set_near)


def _has_link(port: Port) -> bool:
    """A VF may take seconds to say so, and receives nothing before; that nobody could count."""

    def carrier() -> bool:
        with IPRoute() as ipr:
            return bool(ipr.get_links(ipr.link_lookup(ifname=port.ifname)[0])[0].get_attr("IFLA_CARRIER"))

    return in_netns(port.netns, carrier)


# --- traffic ------------------------------------------------------------------------------------------


def _flow(port: Port, direction: str, each: TrafficClass, far: Path) -> Flow:
    out = direction == "egress"
    return Flow(
        name=f"{port.number}/{direction}/{each.name}",
        sender=port.netns if out else far,
        receiver=far if out else port.netns,
        source=port.address if out else port.peer_address,
        destination=port.peer_address if out else port.address,
        port=each.port,
        dscp=each.dscp,
        payload=each.payload,
    )


def _flows(ports: Sequence[Port], far: Path) -> list[tuple[Port, str, TrafficClass, Flow]]:
    return [
        (port, direction, each, _flow(port, direction, each, far))
        for port in ports
        for direction in ("egress", "ingress")
        for each in CLASSES
    ]


@dataclass(frozen=True, slots=True)
class Marks:
    """Frames by flow: when the agent was killed, when it was started again, and at the end."""

    killed: Mapping[str, int]
    back: Mapping[str, int]
    end: Mapping[str, int]


async def _traffic(node: SimNode, ports: Sequence[Port], far: SimNetns, say: Say) -> Marks:
    generator = await asyncio.create_subprocess_exec(
        *dying_with_parent([sys.executable, "-m", "kndsim.traffic"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    to, back_from = generator.stdin, generator.stdout
    assert to is not None
    assert back_from is not None

    async def ask(line: str) -> Mapping[str, Any]:
        to.write(line.encode() + b"\n")
        await to.drain()
        return dict(json.loads(await asyncio.wait_for(back_from.readline(), PATIENCE)))

    try:
        ready = await ask(encode([flow for _, _, _, flow in _flows(ports, far.path)]))
        say(f"sending {ready['ready']} flows: {len(CLASSES)} classes each way on {len(ports)} devices")
        await asyncio.sleep(BEFORE_KILL)
        await node.kill_agent()
        killed = await ask("mark")
        say("agent killed with SIGKILL; traffic goes on")
        await asyncio.sleep(WITHOUT_AGENT)
        back = await ask("mark")
        await node.start_agent(seconds=4 * PATIENCE)
        say("agent started again; traffic goes on")
        await asyncio.sleep(AFTER_RESTART)
        end = await ask("stop")
        await generator.wait()
    finally:
        if generator.returncode is None:
            generator.kill()
            await generator.wait()
    say("traffic ended")
    return Marks(killed["frames"], back["frames"], end["frames"])


# --- judging ------------------------------------------------------------------------------------------


def _rows(
    ports: Sequence[Port], marks: Marks, counted: Sequence[Mapping[str, Any]], unsent: int
) -> tuple[Row, ...]:
    left = {
        (row["pod"], row["device"], row["direction"], row["class"], row["kind"]): int(row["bytes"])
        for row in counted
    }
    rows = []
    for port, direction, each, flow in _flows(ports, Path()):
        key = (port.pod.spec.name, port.device, direction, each.name, each.kind)
        frames = marks.end[flow.name] + unsent
        unsent = 0
        rows.append(
            Row(
                pod=port.pod.spec.name,
                claim=port.claim,
                device=port.device,
                interface=port.ifname,
                direction=direction,
                traffic_class=each.name,
                kind=each.kind,
                sent_bytes=frames * flow.frame,
                counted_bytes=left.pop(key, 0),
                sent_while_down=(marks.back[flow.name] - marks.killed[flow.name]) * flow.frame,
            )
        )
    by_device = {port.device: port for port in ports}
    for (pod, device, direction, name, _), size in sorted(left.items()):
        port = by_device[device]
        rows.append(
            Row(
                pod=pod,
                claim=port.claim,
                device=device,
                interface=port.ifname,
                direction=direction,
                traffic_class=name,
                kind="rest",
                sent_bytes=0,
                counted_bytes=size,
                sent_while_down=0,
            )
        )
    return tuple(rows)


def _offered(node: SimNode) -> dict[str, Any]:
    """What a scheduler sees: device name to the published device."""
    return {
        device["name"]: device
        for each in node.api.slices(node.driver, node.name)
        for device in each["spec"].get("devices") or []
    }


def _slice_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            lines.append(f"slice: {name} {'appeared' if old is None else 'is gone'}")
        elif old != new:
            was, now = _flat(old), _flat(new)
            lines += [
                f"slice: {name}: {key} was {was.get(key)}, is {now.get(key)}"
                for key in sorted(was.keys() | now.keys())
                if was.get(key) != now.get(key)
            ]
    return lines


def _flat(device: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes and capacities by name, and whatever else a published device has."""
    rest = {key: value for key, value in device.items() if key not in ("attributes", "capacity")}
    return {**rest, **device.get("attributes", {}), **device.get("capacity", {})}


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    """Give what follows by itself a little time; whether it happened is judged after."""
    with contextlib.suppress(TimeoutError):
        await asyncio.to_thread(wait_until, condition, "", seconds)
