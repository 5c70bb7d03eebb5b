"""Run in a guest by test_vf_tenants: many devices at once, and ports that belong together.

Invariant: as vf_tenants_inside's; what is counted and recorded is read from the agent's files, not asked for.
KND_CROWD sets how many pods are deleted at once: all VFs that the guest can have, and veths for the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from kndsim.links import netns, veth_pair
from kndsim.node import ClaimSpec, SimPod, interface
from kndsim.runtime import HookOutcome
from tests.node.crash_stage import query
from tests.vm.provisioning_story import number, write
from tests.vm.tenants_stage import (
    FAR,
    FAR_2,
    IN_POD,
    MAC,
    NEAR,
    NEAR_2,
    PATIENCE,
    STORY,
    Tenants,
    name_of,
    policy,
    tenants,
)
from tests.vm.vf_settings_inside import Loop, in_pod

pytestmark = pytest.mark.timeout(1600)

FIRST = {NEAR: 2, FAR: 2}
ALL = {NEAR: 7, NEAR_2: 7, FAR: 7, FAR_2: 7}
VETHS = max(0, int(os.environ.get("KND_CROWD", "40")) - sum(ALL.values()))
VETHS_TOO = """netdevs:
  - kinds: [veth]
    names: ["crowd*"]
"""
PODS = sum(ALL.values()) + VETHS
PINGS = 3


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    with contextlib.closing(Loop()) as opened:
        yield opened


@pytest.fixture(scope="module")
def stage(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    opened = tenants(tmp_path_factory.mktemp("control"), FIRST)
    try:
        yield loop.run(opened.__aenter__(), STORY)
    finally:
        loop.run(opened.__aexit__(None, None, None))


# --- ports of a bond ----------------------------------------------------------------------------------


@contextlib.contextmanager
def bond(*ports: str) -> Iterator[None]:
    """The host's uplink is a bond of these."""
    run("modprobe", "bonding")
    run("ip", "link", "add", "uplink0", "type", "bond", "mode", "active-backup", "miimon", "100")
    try:
        for port in ports:
            run("ip", "link", "set", port, "down")
            run("ip", "link", "set", port, "master", "uplink0")
        run("ip", "link", "set", "uplink0", "up")
        run("ip", "address", "add", "198.51.100.1/24", "dev", "uplink0")
        yield
    finally:
        run("ip", "link", "delete", "uplink0")


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def with_bond(allowed: tuple[str, ...], vfs: int = 2) -> str:
    """Of the first VFs and the bond's ports, some of which may be changed though the host uses them."""
    text = policy(FIRST)
    for port in (NEAR_2, FAR_2):
        uplink = ", allowHostUplink: true" if port in allowed else ""
        rule = f'  - {{match: {{addresses: ["{port}"]}}, vfs: {vfs}{uplink}}}\n'
        text = text.replace("sriov:\n", f"sriov:\n{rule}")
    return text


def test_ports_of_the_hosts_bond_change_together_and_only_if_the_policy_says_so(
    stage: Tenants, loop: Loop
) -> None:
    async def why() -> dict[str, str]:
        flags = (f"--policy={stage.sim.policy_file}", "-o", "json")
        done = await asyncio.to_thread(stage.sim.knd, "devices", *flags)
        return {row["port"]: row["why_not"] or "" for row in json.loads(done.stdout)["ports"]}

    async def told(words: str, times: int) -> None:
        def is_told() -> bool:
            return sum(words in line for line in stage.sim.agent.tail(400).splitlines()) >= times

        await stage.until(f"word that {words}", is_told)

    async def story() -> None:
        file = stage.sim.policy_file
        slaves = [name_of(NEAR_2) or "", name_of(FAR_2) or ""]
        with bond(*slaves):
            file.write_text(with_bond(()))
            await told("is left alone: it is", 2)
            file.write_text(with_bond((NEAR_2,)))
            await told("changes together with the other ports of its bond", 1)
            reasons = await why()
            assert "changes together" in reasons[NEAR_2]
            assert "allowHostUplink: true makes VFs all the same" in reasons[FAR_2]
            assert (number(NEAR_2), number(FAR_2)) == (0, 0)
            file.write_text(with_bond((NEAR_2, FAR_2)))
            stage.vfs = FIRST | {NEAR_2: 2, FAR_2: 2}
            await stage.until_offered(2 * PATIENCE)
            masters = run("ip", "-o", "link", "show", "master", "uplink0")
            assert all(f"{name}:" in masters for name in slaves)
            assert "198.51.100.1/24" in run("ip", "-o", "-4", "address", "show", "dev", "uplink0")
            file.write_text(with_bond((NEAR_2, FAR_2), vfs=0))
            stage.vfs = dict(FIRST)
            await stage.until("none on either", lambda: (number(NEAR_2), number(FAR_2)) == (0, 0))
        file.write_text(policy(FIRST))
        await stage.until_offered()

    loop.run(story(), STORY)


# --- all at once --------------------------------------------------------------------------------


def test_pods_that_are_deleted_at_once_all_give_their_devices_back_clean(stage: Tenants, loop: Loop) -> None:
    with contextlib.ExitStack() as stack:
        far = stack.enter_context(netns())
        for n in range(VETHS):
            stack.enter_context(veth_pair(f"crowd{n}", f"far{n}", peer_where=far))
            # A pod's packets pass the device only while the wire has two ends.
            run("nsenter", f"--net={far.path}", "ip", "link", "set", f"far{n}", "up")
        try:
            loop.run(crowd(stage), STORY)
        finally:
            loop.run(stage.sim.kill_agent())
            for pf in ALL:
                write(pf, 0)


async def crowd(stage: Tenants) -> None:
    sim = stage.sim
    stage.vfs = dict(ALL)
    sim.policy_file.write_text(policy(ALL, VETHS_TOO))
    await stage.until_offered(2 * PATIENCE)
    await stage.until("the veths are offered", lambda: len(stage.published()) >= PODS)
    before, links = stage.picture(), crowd_at_home()
    pods = await start_all(stage)
    assert crowd_at_home() == {}
    first = len(sim.runtime.log)
    counted = {pod.spec.name: sent(pod) for pod in pods}
    await asyncio.gather(*(stage.delete(pod) for pod in pods))
    answers = sim.runtime.log[first:]
    assert {each.outcome for each in answers} == {HookOutcome.OK}
    assert list(sim.runtime.violations) == []
    await stage.until_as(before, "after so many deletes")
    await stage.until("the veths are at home", lambda: crowd_at_home() == links)
    assert query(sim.root / "var/lib/knd/journal.sqlite", "SELECT * FROM records") == []
    ledger = sim.root / "var/lib/knd/ledger.sqlite"
    assert query(ledger, "SELECT id FROM attachments WHERE ended IS NULL") == []
    assert query(ledger, "SELECT * FROM gaps") == []
    rows = query(
        ledger,
        "SELECT a.pod_name, sum(u.packets - u.base_packets) FROM usage u JOIN attachments a"
        " ON a.id = u.attachment WHERE u.direction = 0 GROUP BY 1",
    )
    assert {name: packets for name, packets in rows if packets} == {k: v for k, v in counted.items() if v}


async def start_all(stage: Tenants) -> list[SimPod]:
    places = stage.places
    scheduled = [
        stage.schedule(f"vf{n}", place, mac=MAC.format(n), vlan={"id": 201 + n % 5}, trust=n % 2 == 1)
        for n, place in enumerate(places)
    ]
    for n in range(VETHS):
        claim = ClaimSpec(
            name=f"soft{n}-nic",
            requests={"net": lambda device: device["name"].startswith("veth-")},
            parameters={"": interface(name=IN_POD)},
        )
        scheduled.append(stage.sim.schedule(f"soft{n}", [claim]))
    at_once = asyncio.Semaphore(8)

    async def start(pod: SimPod) -> SimPod:
        async with at_once:
            return await stage.sim.start_pod(pod, seconds=2 * PATIENCE)

    pods = await asyncio.gather(*map(start, scheduled))
    assert len(pods) == PODS
    return list(pods)


def sent(pod: SimPod) -> int:
    """Packets that left the pod by its device, as the kernel counts them, after it has sent some."""
    in_pod(pod, "ip", "neigh", "replace", "198.18.1.1", "lladdr", "02:00:5e:00:00:fe", "dev", IN_POD)
    in_pod(pod, "ip", "route", "replace", "198.18.1.1", "dev", IN_POD)
    in_pod(pod, "ping", "-c", str(PINGS), "-i", "0.01", "-W", "1", "198.18.1.1")
    (link,) = json.loads(in_pod(pod, "ip", "-j", "-s", "link", "show", IN_POD).stdout)
    return int(link["stats64"]["tx"]["packets"])


def crowd_at_home() -> dict[str, Any]:
    found = json.loads(run("ip", "-j", "link", "show"))
    kept = ("ifindex", "ifname", "mtu", "address", "flags", "altnames")
    return {
        link["ifname"]: {key: link.get(key) for key in kept}
        for link in found
        if link["ifname"].startswith("crowd")
    }
