"""No dirty and no double hand-over, whatever the scheduler thinks: the next claim is prepared from a device
that is home and clean, or not at all."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kndsim.demo.devices import Devices, changes, dump
from kndsim.kubelet import PrepareFailed
from kndsim.links import netns
from kndsim.netns import in_netns, in_thread
from kndsim.node import SimNode, SimPod
from tests.node import seen_outside as seen
from tests.node.crash_stage import look
from tests.node.node_stage import claim, play, running
from tests.node.test_tenant_leaks import CLAIMED, and_home, into, quarantined

pytestmark = pytest.mark.timeout(120)


def tolerant(sim: SimNode, name: str) -> SimPod:
    """A pod whose claim tolerates every taint, and which asks nothing of its device."""
    return sim.schedule(name, [replace(claim(f"{name}-nic"), tolerate=True)])


async def refused(sim: SimNode, pod: SimPod, words: str) -> None:
    with pytest.raises(PrepareFailed, match=words):
        await sim.prepare(pod)


Picture = Mapping[str, Mapping[str, Any]]


async def as_made(sim: SimNode, pod: SimPod, before: Picture) -> None:
    """The pod gets the device with the name, address and MTU that it has at home, and gives it back."""
    pod = await sim.start_pod(pod)
    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    inside = in_netns(pod.sandbox.netns_path, look)
    (own,) = [link for link in before.values() if link["IFLA_IFNAME"] in inside.keys() - {"lo"}]
    mac, mtu, up, addresses = inside[own["IFLA_IFNAME"]]
    assert (mac, mtu, up, addresses) == (own["IFLA_ADDRESS"], own["IFLA_MTU"], True, [])
    await sim.delete_pod(pod)


def test_a_claim_that_tolerates_every_taint_gets_no_device_that_is_not_clean() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        with netns() as nested:
            pod = await running(sim, "hides", **CLAIMED)
            (index,) = seen.indexes(pod)
            into(pod, index, nested)
            await sim.delete_pod(pod)
            await seen.until(lambda: bool(quarantined(sim)), "the taint")
            eager = tolerant(sim, "eager")
            # A look in between finds it nowhere: a virtual device in a namespace that nobody tells of.
            await refused(sim, eager, "withheld until it is clean|has no device")
            in_thread(lambda: and_home(index, nested))
            await as_made(sim, eager, before)
        await seen.until(lambda: changes(before, dump()) == [], "as before")

    play(1, story, hook="tcx")


def test_a_device_of_a_pod_that_was_deleted_by_force_is_its_until_its_sandbox_has_ended() -> None:
    """For the API server pod and claim are gone, so the device is free and the scheduler gives it away."""

    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        old = await running(sim, "old", **CLAIMED)
        assert old.sandbox is not None
        sim.api.delete("pods", old.spec.name, old.spec.namespace)
        sim.api.delete("resourceclaims", old.claims[0].name, old.claims[0].namespace)
        new = sim.schedule("new", [claim("new-nic")])
        await refused(sim, new, "is held by claim default/old-nic")
        assert seen.is_attached(sim, old)
        waiting = asyncio.create_task(as_made(sim, new, before))
        await sim.runtime.stop_pod(old.sandbox)
        await sim.kubelet.unprepare(sim.driver, old.claims, pod=old.spec.uid)
        await sim.runtime.remove_pod(old.sandbox)
        await waiting
        await seen.until(lambda: changes(before, dump()) == [], "as before")

    play(1, story)


def test_an_unprepare_that_is_answered_before_the_device_is_clean_withholds_it(tmp_path: Path) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pod = await running(sim, "slow", **CLAIMED)
        stall = tmp_path / "stall"
        stall.write_text("after-intent disarm-programs")
        await sim.delete_pod(pod)
        assert (tmp_path / "stalled").exists()
        await seen.until(lambda: bool(quarantined(sim)), "the taint")
        eager = tolerant(sim, "eager")
        await refused(sim, eager, "withheld until it is clean: it did not come home in time")
        stall.unlink()
        await seen.until(lambda: not quarantined(sim), "clean at last")
        await as_made(sim, eager, before)
        await seen.until(lambda: changes(before, dump()) == [], "as before")

    play(1, story, hook="tcx", entry=[sys.executable, "-m", "tests.node.stalled_entry", str(tmp_path)])
