"""Run in a guest by test_vf_tenants: tenants of VFs that the agent made, one after and beside the other.

Invariant: a device that was a tenant's goes to another one as it was made, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyroute2 import IPRoute

from kndsim.links import SimNetns, netns
from kndsim.netns import delete_netns, in_netns
from kndsim.node import SimPod
from tests.vm.provisioning_story import BUS
from tests.vm.tenants_stage import (
    FAR,
    IN_POD,
    MAC,
    NEAR,
    PATIENCE,
    STORY,
    Capture,
    Picture,
    Place,
    Tenants,
    device_name,
    held,
    reach,
    tenants,
    vf_address,
)
from tests.vm.vf_settings_inside import Loop, in_pod

pytestmark = pytest.mark.timeout(1600)

VFS = {NEAR: 4, FAR: 4}
LISTENING = (0, 1, 2)
"""The first pod of each VLAN: what the others send first is seen by it."""
DIES_PREPARING = 5
DIES_DETACHING, DIES_UNPREPARING, FIRST_TO_GO = 0, 1, 7
ARP = 0x0806


def settings(number: int) -> dict[str, Any]:
    """Of the pod of this number: the odd ones are trusted, the first half of each PF is not spoof checked."""
    return {
        "vlan": {"id": vlan(number)},
        "maxRate": f"{10 * (number + 1)}M",
        "trust": number % 2 == 1,
        "spoofCheck": number % 4 >= 2,
    }


def vlan(number: int) -> int:
    """Three VLANs, each with VFs of one PF and of both."""
    return 101 + number % 3


def mates(number: int) -> set[int]:
    return {other for other in range(8) if vlan(other) == vlan(number)}


def place(number: int) -> Place:
    return (NEAR, number) if number < 4 else (FAR, number - 4)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    with contextlib.closing(Loop()) as opened:
        yield opened


@pytest.fixture(scope="module")
def stage(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    opened = tenants(tmp_path_factory.mktemp("control"), VFS)
    try:
        yield loop.run(opened.__aenter__(), STORY)
    finally:
        loop.run(opened.__aexit__(None, None, None))


# --- eight pods -------------------------------------------------------------------------------------


class Eight:
    """Eight pods come and go while the agent is killed in each part of their life."""

    def __init__(self, stage: Tenants) -> None:
        self.stage = stage
        self.pods: dict[int, SimPod] = {}
        self.captures: dict[int, Capture] = {}
        self.frames: dict[int, list[tuple[str, str, int]]] = {number: [] for number in LISTENING}
        self.first_answered: dict[int, bool] = {}
        self.seen = SimpleNamespace()

    async def play(self) -> None:
        stage, seen = self.stage, self.seen
        seen.before = stage.picture()
        for number in range(8):
            await self.begin(number)
        seen.attached = {pf: held(pf) for pf in VFS}
        seen.links = {number: link_in(pod) for number, pod in self.pods.items()}
        pairs = [(a, b) for a in range(8) for b in range(8) if a != b]
        seen.reached = await reach(self.pods, pairs)
        await stage.kill_and_start()
        seen.after_kill = {pf: held(pf) for pf in VFS}
        seen.links_after_kill = {number: link_in(pod) for number, pod in self.pods.items()}
        seen.reached_after_kill = await reach(self.pods, [(a, b) for a, b in pairs if a < 4 <= b])
        self.gather_frames()
        self.close()
        await self.end()
        await stage.until_as(seen.before, "after eight pods")
        seen.published = stage.published()

    async def begin(self, number: int) -> None:
        stage = self.stage
        given = settings(number)
        pod = stage.schedule(f"p{number}", place(number), mac=MAC.format(number), number=number, **given)
        if number == DIES_PREPARING:
            line = stage.visited("prepare", "set-on-pf", "after-act")
            self.pods[number] = await stage.dying_at(line, stage.start(pod))
        else:
            self.pods[number] = await stage.start(pod)
        await stage.until(f"a link in pod {number}", lambda: carrier(self.pods[number]))
        if number in LISTENING:
            self.captures[number] = Capture(self.pods[number])
        else:
            listener = min(mates(number))
            self.first_answered[number] = bool(await reach(self.pods, [(number, listener)]))
        self.gather_frames()

    def gather_frames(self) -> None:
        for number, capture in self.captures.items():
            self.frames[number] += capture.frames()

    def close(self) -> None:
        """An open socket would keep its namespace, and the device in it, beyond the pod's end."""
        for capture in self.captures.values():
            capture.close()

    async def end(self) -> None:
        stage = self.stage
        await stage.delete(self.pods[FIRST_TO_GO])
        # As that pod passed them: what is made up for after a death passes them on another way.
        deaths = {
            DIES_DETACHING: stage.visited("detach", "move-home", "after-intent"),
            DIES_UNPREPARING: stage.visited("unprepare", "restore-on-pf", "after-act"),
        }
        for number, line in deaths.items():
            await stage.dying_at(line, stage.delete(self.pods[number]))
        gone = (FIRST_TO_GO, DIES_DETACHING, DIES_UNPREPARING)
        await asyncio.gather(*(stage.delete(pod) for number, pod in self.pods.items() if number not in gone))


def link_in(pod: SimPod) -> tuple[int, str]:
    """ifindex and address of its device, as its own namespace has them."""
    (link,) = json.loads(in_pod(pod, "ip", "-j", "link", "show", IN_POD).stdout)
    return link["ifindex"], link["address"]


def carrier(pod: SimPod) -> bool:
    return "LOWER_UP" in in_pod(pod, "ip", "link", "show", IN_POD).stdout


@pytest.fixture(scope="module")
def eight(stage: Tenants, loop: Loop) -> Eight:
    played = Eight(stage)
    try:
        loop.run(played.play(), STORY)
    finally:
        played.close()
    return played


def test_every_setting_is_told_by_the_pf_while_the_pod_has_the_vf_and_after_a_kill(eight: Eight) -> None:
    for number in range(8):
        pf, vf = place(number)
        for told in (eight.seen.attached[pf][vf], eight.seen.after_kill[pf][vf]):
            given = settings(number)
            assert [(each["vlan"], each.get("protocol", "802.1Q")) for each in told["vlan_list"]] == [
                (vlan(number), "802.1Q")
            ]
            assert told["address"] == MAC.format(number)
            assert told["rate"] == {"max_tx": 10 * (number + 1), "min_tx": 0}
            assert (told["trust"], told["spoofchk"]) == (given["trust"], given["spoofCheck"])


def test_traffic_flows_inside_a_vlan_and_nowhere_else(eight: Eight) -> None:
    wanted = {(a, b) for a in range(8) for b in mates(a) if a != b}
    assert eight.seen.reached == wanted
    assert eight.seen.reached_after_kill == {(a, b) for a, b in wanted if a < 4 <= b}


def test_what_a_pod_sends_first_is_from_its_address_and_is_answered(eight: Eight) -> None:
    assert eight.first_answered == dict.fromkeys(range(3, 8), True)
    for listener, frames in eight.frames.items():
        others = {MAC.format(number) for number in mates(listener) if number != listener}
        # qemu's igb hands a VF's broadcasts back to it too.
        frames = [frame for frame in frames if frame[0] != MAC.format(listener)]
        assert {source for source, *_ in frames} == others, listener
        first = {}
        for source, _, ethertype in frames:
            first.setdefault(source, ethertype)
        assert set(first.values()) == {ARP}


def test_a_kill_of_the_agent_changes_no_device_in_a_pod(eight: Eight) -> None:
    assert eight.stage.deaths >= 4
    assert eight.seen.links_after_kill == eight.seen.links
    assert [address for _, address in eight.seen.links.values()] == [MAC.format(n) for n in range(8)]


def test_all_of_them_are_offered_again_as_they_were_made(eight: Eight) -> None:
    assert [eight.seen.published.get(device_name(each)) for each in eight.stage.places] == [[]] * 8


# --- no dirty and no double hand-over ----------------------------------------------------------------

GIVEN = {"vlan": {"id": 111}, "trust": True, "maxRate": "33M"}
ASKED = MAC.format(0xAA)
ODD = ("a-name-that-is-longer-than-15-bytes", "net-of-a-tenant")
"""Alternative names that a tenant leaves on its device."""


def test_a_claim_that_tolerates_every_taint_gets_no_vf_that_is_not_clean(stage: Tenants, loop: Loop) -> None:
    """Its last pod hid it in a namespace of its own, and is over for everybody but the kernel."""

    async def story() -> None:
        before, one = stage.picture(), (NEAR, 1)
        with netns() as hidden:
            pod = await stage.start(stage.schedule("hides", one, mac=ASKED, **GIVEN))
            await asyncio.to_thread(hide, pod, hidden)
            await stage.delete(pod)
            await stage.until("a taint", lambda: stage.published()[device_name(one)])
            assert held(NEAR)[1]["vlan_list"][0]["vlan"] == 111
            eager = stage.schedule("eager", one, tolerate=True)
            assert "withheld until it is clean" in await stage.refusal(eager)
            other = stage.schedule("other", (NEAR, 2), mac=ASKED)
            assert "cannot have the address" in await stage.refusal(other)
        await stage.until_as(before, "when what was left of the pod had ended")
        await hand_over(stage, before, one, eager)
        await stage.delete(await stage.start(other))
        await stage.until_as(before, "in the end")

    loop.run(story(), STORY)


def hide(pod: SimPod, hidden: SimNetns) -> None:
    """Move its device on into a namespace that no runtime knows, under names of the tenant's own."""
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None

    def move() -> None:
        with IPRoute() as ipr:
            index = ipr.link_lookup(ifname=IN_POD)[0]
            ipr.link("set", index=index, state="down")
            ipr.link("property_add", index=index, altname=list(ODD))
            ipr.link("set", index=index, net_ns_fd=hidden.fd, ifname="hidden0")

    in_netns(pod.sandbox.netns_path, move)


async def hand_over(stage: Tenants, before: Picture, where: Place, pod: SimPod) -> None:
    """A VF that was another's goes to a pod that asks for nothing, and is as it was made."""
    pf, vf = where
    pod = await stage.start(pod)
    assert held(pf)[vf] == before[1][pf][vf]
    assert link_in(pod)[1] == before[1][pf][vf]["address"]
    await stage.delete(pod)


def test_a_vf_of_a_pod_that_was_deleted_by_force_is_its_until_its_sandbox_has_ended(
    stage: Tenants, loop: Loop
) -> None:
    async def story() -> None:
        before, one, sim = stage.picture(), (FAR, 1), stage.sim
        old = await stage.start(stage.schedule("old", one, mac=ASKED, **GIVEN))
        assert old.sandbox is not None
        sim.api.delete("pods", old.spec.name, old.spec.namespace)
        sim.api.delete("resourceclaims", old.claims[0].name, old.claims[0].namespace)
        link = link_in(old)
        new = stage.schedule("new", one)
        assert "is held by claim default/old-nic" in await stage.refusal(new)
        assert link_in(old) == link
        assert held(FAR)[1]["vlan_list"][0]["vlan"] == 111
        waiting = asyncio.create_task(hand_over(stage, before, one, new))
        await sim.runtime.stop_pod(old.sandbox)
        await sim.kubelet.unprepare(sim.driver, old.claims, pod=old.spec.uid)
        await sim.runtime.remove_pod(old.sandbox)
        await waiting
        await stage.until_as(before, "after both")

    loop.run(story(), STORY)


def test_an_unprepare_that_cannot_wait_for_a_reset_withholds_the_vf_until_it_is_clean(
    stage: Tenants, loop: Loop, tmp_path: Path
) -> None:
    async def story() -> None:
        before, one, sim = stage.picture(), (FAR, 2), stage.sim
        await sim.kill_agent()
        await sim.start_agent(
            [sys.executable, "-m", "tests.node.stalled_entry", str(tmp_path)], seconds=PATIENCE
        )
        pod = await stage.start(stage.schedule("slow", one, mac=ASKED, **GIVEN))
        stall = tmp_path / "stall"
        stall.write_text("after-intent take-from-driver")
        await sim.delete_pod(pod)
        assert (tmp_path / "stalled").exists()
        assert held(FAR)[2]["vlan_list"][0]["vlan"] == 111
        await stage.until("a taint", lambda: stage.published()[device_name(one)])
        eager = stage.schedule("eager", one, tolerate=True)
        assert "did not come home in time" in await stage.refusal(eager)
        stall.unlink()
        await stage.until_as(before, "when the driver had let go at last")
        await hand_over(stage, before, one, eager)
        await sim.kill_agent()
        await asyncio.to_thread(stage.start_agent)
        await stage.until_as(before, "in the end")

    loop.run(story(), STORY)


def test_a_vf_whose_netns_died_is_known_by_its_place_whatever_its_tenant_called_it(
    stage: Tenants, loop: Loop
) -> None:
    """It comes home under another name than its pod's, for one at home has that: the kernel finds it one."""

    async def story() -> None:
        before, one, sim = stage.picture(), (NEAR, 3), stage.sim
        pod = await stage.start(stage.schedule("dies", one, mac=ASKED, **GIVEN))
        assert pod.sandbox is not None
        assert pod.sandbox.netns_path is not None
        at_home = next((BUS / vf_address(NEAR, 2) / "net").iterdir()).name
        script = (
            f"ip link property add dev {IN_POD} altname {ODD[0]} altname {at_home}; ip link set {IN_POD} down"
        )
        in_pod(pod, "sh", "-c", f"{script}; ip link set {IN_POD} name {at_home}x; ip link set {at_home}x up")
        for container in pod.containers:
            await sim.runtime.stop_container(container)
        await sim.runtime.kill_pause(pod.sandbox)
        await asyncio.to_thread(delete_netns, pod.sandbox.netns_path)
        await stage.until("home", lambda: (BUS / vf_address(*one) / "net").is_dir())
        await stage.delete(pod)
        await stage.until_as(before, "after the netns had died")

    loop.run(story(), STORY)
