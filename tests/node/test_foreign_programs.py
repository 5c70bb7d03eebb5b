"""Programs of others on a device: off while a pod has it, kept, or told of, as the policy says; and at their
place when it is home, whatever was killed. What could not be put back is not taken off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from bpf import sys, xdp
from bpf.attach import RETURN_UNSPEC
from kndsim.demo.devices import Devices
from kndsim.kubelet import PrepareFailed
from kndsim.links import netns
from kndsim.netns import in_netns, in_thread
from kndsim.node import SimNode
from tests.kernel.test_bpf_foreign import PASS_XDP
from tests.node import seen_outside
from tests.node.crash_stage import Stage, devices_that_survive, find, killed, point_of, stage
from tests.node.node_stage import claim, devices, play, running
from tests.node.test_tenant_leaks import and_home, into, quarantined

pytestmark = pytest.mark.timeout(240)

HOOKS = (sys.AttachType.TCX_EGRESS, sys.AttachType.TCX_INGRESS)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is at a device's hooks, in the order of running."""

    tcx: tuple[tuple[sys.Attached, ...], ...]
    xdp: dict[xdp.XdpMode, sys.ProgramId]

    @property
    def programs(self) -> set[sys.ProgramId]:
        return {each.program for hook in self.tcx for each in hook} | set(self.xdp.values())

    @property
    def links(self) -> list[set[sys.LinkId]]:
        return [{each.link for each in hook} for hook in self.tcx]


def seen(ifindex: int, netns: Path | None = None) -> Seen:
    def look() -> Seen:
        found = tuple(sys.prog_query(ifindex, hook) for hook in HOOKS)
        return Seen(found, xdp.attached_programs(ifindex))

    return look() if netns is None else in_netns(netns, look)


@contextlib.contextmanager
def theirs(ifindex: int) -> Iterator[Seen]:
    """Links of somebody who lives on, at both tcx hooks and at XDP."""
    with contextlib.ExitStack() as stack:
        for hook in HOOKS:
            with sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="theirs") as program:
                stack.enter_context(sys.link_create(program, ifindex, hook))
        flags = sys.XDP_FLAGS_SKB_MODE
        with sys.prog_load(sys.ProgramType.XDP, PASS_XDP, name="theirs") as program:
            stack.enter_context(sys.link_create(program, ifindex, sys.AttachType.XDP, flags=flags))
        yield seen(ifindex)


async def start(sim: SimNode, choice: str) -> None:
    sim.policy_file.write_text(f"{sim.policy_file.read_text()}\nforeignPrograms: {choice}\n")
    await sim.start_agent()


def leave_one(ifindex: int, netns: Path) -> None:
    """As a tenant with a bpffs does: a program that outlives it."""

    def attach() -> None:
        with sys.prog_load(sys.ProgramType.SCHED_CLS, RETURN_UNSPEC, name="tenant") as program:
            sys.prog_attach(program, ifindex, HOOKS[0])

    in_netns(netns, attach)


def doctors_words(sim: SimNode) -> dict[str, str]:
    """What `knd doctor` says of programs of others, by check."""
    found = json.loads(sim.knd("doctor", "-o", "json").stdout)["rows"]
    return {row["check"]: row["said"] for row in found if row["subject"] == "foreign"}


@pytest.mark.parametrize("choice", ["keep", "report", "detach"])
def test_the_owner_finds_its_programs_as_they_were_and_a_tenants_are_gone(choice: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        ifindex = socket.if_nametoindex(made.wires[0].device)
        with theirs(ifindex) as before:
            await start(sim, choice)
            assert doctors_words(sim)["programs"].count("'theirs'") == 3
            pod = await running(sim, "p")
            assert pod.sandbox is not None
            netns = Path(pod.sandbox.netns_path or "")
            there = seen(ifindex, netns)
            # Places are theirs all the while; whether their programs are in them is the policy's choice.
            assert all(ours > owners for ours, owners in zip(there.links, before.links, strict=True))
            kept = there.programs & before.programs
            assert kept == (set() if choice == "detach" else before.programs)
            leave_one(ifindex, netns)
            assert doctors_words(sim)["off" if choice == "detach" else "along"].count("'theirs'") == 3
            await sim.kill_agent()
            await sim.start_agent()
            await sim.delete_pod(pod)
            assert seen(ifindex) == before
            assert list((sim.bpffs / "knd/foreign").iterdir()) == []
            assert doctors_words(sim).keys() == {"programs"}
            told = [each["message"] for each in sim.api.events() if each["reason"] == "ForeignPrograms"]
            words = {"keep": [], "report": ["go into the pod"], "detach": ["are off until"]}[choice]
            assert [word for word in words if word in told[0]] == words if words else told == []

    play(1, story, start=False)


def is_about_them(line: str) -> bool:
    """Of both plans that know of them, up to where one has begun and from where the other ends."""
    plan, act, _ = point_of(line)
    return plan in ("prepare", "unprepare") and "foreign" in act


def test_the_owner_finds_its_programs_wherever_the_agent_dies(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    async def story(on: Stage, ifindex: int, before: Seen) -> None:
        policy = on.sim.policy_file
        policy.write_text(f"{policy.read_text()}\nforeignPrograms: detach\n")
        await on.kill_and_start()
        await on.wait_ready()
        lines = await killed(on, on.life)
        assert seen(ifindex) == before
        dying = [line for line in dict.fromkeys(lines) if is_about_them(line)]
        assert len(dying) == 8, dying
        for line in dying:
            await killed(on, on.life, line)
            assert seen(ifindex) == before, line
        # It is undone where the prepare fails, by the same agent or the one after it.
        for more in ((), (find(lines, "prepare", "note-foreign-programs", "after-act"),)):
            await killed(on, on.life, *more, fail="arm-programs")
            assert seen(ifindex) == before, more

    async def played(made: Devices, ifindex: int, before: Seen) -> None:
        async with stage(made, "tcx", short_tmp) as on:
            await story(on, ifindex, before)

    with devices(1) as made, devices_that_survive(monkeypatch):
        ifindex = socket.if_nametoindex(made.wires[0].device)
        with theirs(ifindex) as before:
            asyncio.run(played(made, ifindex, before))


@pytest.mark.parametrize("hidden", [False, True])
def test_what_a_tenant_left_on_a_device_that_an_older_release_gave_it_is_gone(hidden: bool) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        ifindex = socket.if_nametoindex(made.wires[0].device)
        await sim.start_agent()
        with netns() as nested:
            pod = await running(sim, "p")
            assert pod.sandbox is not None
            leave_one(ifindex, Path(pod.sandbox.netns_path or ""))
            if hidden:
                into(pod, ifindex, nested)
                await sim.delete_pod(pod)
                await seen_outside.until(lambda: bool(quarantined(sim)), "it is withheld")
            await sim.kill_agent()
            # It noted nothing.
            shutil.rmtree(sim.bpffs / "knd/foreign")
            await sim.start_agent()
            if hidden:
                in_thread(lambda: and_home(ifindex, nested))
                await seen_outside.until(lambda: not quarantined(sim), "clean at last")
            else:
                await sim.delete_pod(pod)
        assert seen(ifindex).programs == set()

    play(1, story, hook="tcx", start=False)


def test_the_first_agent_after_a_reboot_has_it_as_the_policy_says_for_what_is_prepared() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        ifindex = socket.if_nametoindex(made.wires[0].device)
        await start(sim, "detach")
        pod = await sim.prepare(sim.schedule("p", [claim("p-nic")]))
        await sim.kill_agent()
        # What is pinned does not outlive a boot; what others attach in the next one is there before us.
        shutil.rmtree(sim.bpffs / "knd")
        with theirs(ifindex) as before:
            assert len(before.programs) == 3
            await sim.start_agent()
            assert not seen(ifindex).programs & before.programs
            pod = await sim.run_sandbox(pod)
            assert pod.sandbox is not None
            assert not seen(ifindex, Path(pod.sandbox.netns_path or "")).programs & before.programs
            await sim.delete_pod(pod)
            assert seen(ifindex) == before

    play(1, story, hook="tcx", start=False)


def add_clsact(ifindex: int) -> None:
    with IPRoute() as ipr:
        ipr.tc("add", "clsact", index=ifindex)


def qdiscs(ifindex: int) -> list[str]:
    with IPRoute() as ipr:
        return [each.get_attr("TCA_KIND") for each in ipr.get_qdiscs(index=ifindex)]


def test_a_device_whose_tc_filters_the_move_would_drop_is_refused_and_left_as_it_is() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        ifindex = socket.if_nametoindex(made.wires[0].device)
        in_thread(lambda: add_clsact(ifindex))
        with theirs(ifindex) as before:
            await start(sim, "detach")
            warned = doctors_words(sim)["filters"]
            assert "claims for it are refused" in warned
            pod = sim.schedule("p", [claim("p-nic")])
            with pytest.raises(PrepareFailed, match=r"tc filters of others \(clsact\).*keep or report"):
                await sim.prepare(pod)
            assert seen(ifindex) == before
            assert "clsact" in in_thread(lambda: qdiscs(ifindex))

    play(1, story, start=False)
