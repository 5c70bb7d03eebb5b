"""The journal lost, cut off, put back old, or on a full disk: nothing is swept, nothing is lost."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from kndsim.demo.devices import Devices, changes, dump
from kndsim.kubelet import PrepareFailed
from kndsim.netns import in_thread
from kndsim.node import SimNode, SimPod, unmount
from kndsim.runtime import SimSandbox
from tests.node import seen_outside as seen
from tests.node.node_stage import claim, play
from tests.node.traffic_stage import Station, Traffic, counted, knd, station, stations, traffic

pytestmark = pytest.mark.timeout(180)

PODS = 8


def state(sim: SimNode) -> Path:
    return sim.root / "var/lib/knd"


def files(sim: SimNode, name: str) -> list[Path]:
    return sorted(state(sim).glob(f"{name}.sqlite*"))


def delete(sim: SimNode, name: str = "journal") -> None:
    for path in files(sim, name):
        path.unlink()


def keep(sim: SimNode, to: Path) -> None:
    to.mkdir()
    for path in files(sim, "journal"):
        shutil.copy(path, to)


def offered(sim: SimNode) -> dict[str, dict[str, Any]]:
    return {
        device["name"]: device
        for each in sim.api.slices(sim.driver, sim.name)
        for device in each["spec"].get("devices") or []
    }


class Scene:
    """Pods with traffic on a node, and what must not change however the journal is treated."""

    def __init__(self, sim: SimNode, pods: list[Station], flows: Traffic) -> None:
        self.sim = sim
        self.pods = pods
        self.flows = flows
        self.specs, self.live = seen.specs(sim), seen.live_files(sim)
        self.offered = offered(sim)

    async def untouched(self) -> None:
        sim = self.sim
        assert [each.device for each in self.pods if not seen.is_attached(sim, each.pod)] == []
        assert seen.specs(sim) == self.specs
        assert seen.live_files(sim) == self.live
        assert offered(sim) == self.offered
        before = await self.flows.mark()
        await seen.until(
            lambda: seen.metric(sim, "knd_pod_network_bytes_total") > sum(before.values()), "still counting"
        )

    async def again(self, harm: Callable[[], None]) -> None:
        """The agent is killed, the harm is done, and it comes back."""
        await self.sim.kill_agent()
        harm()
        await self.sim.start_agent()
        await self.untouched()

    def said(self, text: str) -> bool:
        return text in self.sim.agent.log.read_text()


async def all_home(sim: SimNode, scene: Scene, before: object) -> None:
    sent = await scene.flows.end()
    for each in scene.pods:
        await sim.delete_pod(each.pod)
    assert counted(sim) == sent
    assert seen.specs(sim) == seen.live_files(sim) == {}
    await seen.until(lambda: not changes(before, dump()), "every device home as before")  # type: ignore[arg-type]
    await seen.until(lambda: offered(sim) == scene.offered, "offered as before")


def held(sim: SimNode) -> set[str]:
    """Devices that the journal on the disk has a claim of."""
    return {row["device"] for row in json.loads(knd(sim, "pods", "-o", "json"))["rows"]}


def given(pod: SimPod) -> set[str]:
    return {each.device for devices in pod.devices.values() for each in devices}


def changes_of(before: Mapping[str, Mapping[str, Any]], station: Station) -> list[str]:
    """How a pod's device at home differs from before."""
    index = str(seen.index_of(station.device))
    return changes({index: before[index]}, {key: value for key, value in dump().items() if key == index})


def test_a_journal_that_is_lost_cut_off_or_old_costs_nothing(tmp_path: Path) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        old = tmp_path / "old"
        keep(sim, old)
        pods = await stations(sim, made, PODS)
        async with traffic(made, pods) as flows:
            scene = Scene(sim, pods, flows)
            journal = state(sim) / "journal.sqlite"

            def cut(length: int) -> None:
                with journal.open("r+b") as file:
                    file.truncate(length)
                for side in ("-wal", "-shm"):
                    journal.with_name(journal.name + side).unlink(missing_ok=True)

            def put_back() -> None:
                delete(sim)
                for path in old.iterdir():
                    shutil.copy(path, state(sim))

            await scene.again(lambda: delete(sim))
            assert scene.said("is missing, and its mirror says there was one")
            for length in (0, 50, 4096, 6000):
                await scene.again(lambda length=length: cut(length))  # type: ignore[misc]
            assert scene.said("is empty")
            await scene.again(put_back)
            assert scene.said("a copy was put back")
            await all_home(sim, scene, before)

    play(PODS + 1, story)


@contextlib.contextmanager
def small_disk(sim: SimNode) -> Iterator[Callable[[bool], None]]:
    """A tmpfs of its own for the agent's state; call what this yields to fill it up or make room."""
    folder = state(sim)
    helper = (folder / "bin/knd-netns-check").read_bytes()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "knd-test", str(folder)], check=True)
    filler = folder / "filler"

    def fill(full: bool) -> None:
        if not full:
            filler.unlink()
            return
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    try:
        (folder / "bin").mkdir()
        (folder / "bin/knd-netns-check").write_bytes(helper)
        (folder / "bin/knd-netns-check").chmod(0o755)
        yield fill
    finally:
        unmount(folder)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_on_a_full_disk_nothing_new_is_taken_on_and_what_leaves_leaves(how: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        with small_disk(sim) as fill:
            await sim.start_agent()
            pods = await stations(sim, made, 3)
            idle = await sim.prepare(sim.schedule("idle", [claim("idle-nic")]))
            async with traffic(made, pods) as flows:
                scene = Scene(sim, pods, flows)
                fill(True)
                await scene.untouched()
                late = sim.schedule("late", [claim("late-nic")])
                with pytest.raises(PrepareFailed, match="make room"):
                    await sim.prepare(late)
                if how == "killed":
                    await sim.kill_agent()
                else:
                    assert await sim.stop_agent() == 0
                fill(False)
                fill(True)
                await sim.start_agent()
                await scene.untouched()
                with pytest.raises(PrepareFailed, match="make room"):
                    await sim.prepare(late)
                sent = await flows.end()
                leaving = pods[0]
                await sim.delete_pod(leaving.pod)
                await sim.delete_pod(idle)
                assert changes_of(before, leaving) == []

                fill(False)
                await seen.until(
                    lambda: counted(sim).get((leaving.pod.spec.name, "egress")), "it goes on by itself"
                )
                await seen.until(lambda: held(sim) == {each.device for each in pods[1:]}, "and lets go")
                late = await sim.start_pod(late)
                assert held(sim) == {*(each.device for each in pods[1:]), *given(late)}
                await sim.kill_agent()
                await sim.start_agent()
                assert seen.is_attached(sim, late)
                await sim.delete_pod(late)
                for each in pods[1:]:
                    await sim.delete_pod(each.pod)
                assert {key: value for key, value in counted(sim).items() if key[0] != "late"} == sent
                await seen.until(lambda: not changes(before, dump()), "every device home as before")
                await seen.until(lambda: offered(sim) == scene.offered, "offered as before")
                assert held(sim) == set()
            assert await sim.stop_agent() == 0

    play(6, story, start=False)


@pytest.mark.parametrize("hook", ["tcx", "clsact"])
def test_with_journal_and_mirror_gone_pods_keep_their_devices_and_nothing_dirty_is_offered(hook: str) -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = {index: link.name for index, link in seen.links_at_home().items()}
        pods = await stations(sim, made, 3)
        async with traffic(made, pods) as flows:
            specs, live, devices = seen.specs(sim), seen.live_files(sim), set(offered(sim))
            lost = {each.device for each in pods}
            for _ in range(2):  # the second start knows it from what the first one wrote down
                await sim.kill_agent()
                if not sim.agent.log.read_text().count("its mirror are missing"):
                    delete(sim)
                    shutil.rmtree(sim.root / "run/knd/mirror")
                await sim.start_agent()
                assert [each.device for each in pods if not seen.is_attached(sim, each.pod)] == []
                assert (seen.specs(sim), seen.live_files(sim)) == (specs, live)
            assert "its mirror are missing, though 3 claims have CDI specs" in sim.agent.log.read_text()
            one = await sim.create_container(pods[0].pod, "restarted")
            assert seen.runs(one.containers[-1])

            # Who comes now is counted apart from those nobody knows.
            fresh = await station(sim, made, PODS, "fresh")
            assert fresh.device not in lost
            async with traffic(made, [fresh]) as more:
                late = await more.end()
            await sim.delete_pod(fresh.pod)
            assert {key: value for key, value in counted(sim).items() if key[0] == "fresh"} == late

            sent = await flows.end()
            back = pods[0]
            seen.send_home(pod_sandbox(back), [seen.index_of(back.device)])
            in_thread(lambda: rename(seen.index_of(back.device), before[seen.index_of(back.device)]))
            for each in pods:
                await sim.delete_pod(each.pod)
            if hook == "tcx":
                assert {key: value for key, value in counted(sim).items() if key[0] != "fresh"} == sent
            else:
                assert "the records were lost" in knd(sim, "usage")
        assert seen.specs(sim) == seen.live_files(sim) == {}
        home, gone = {back.device}, lost - {back.device}
        await seen.until(lambda: quarantined(sim) == home, "withheld")
        await seen.until(lambda: set(offered(sim)) == devices - gone, "offered again")
        shown = {row["device"]: row for row in devices_shown(sim)}
        assert all("records were lost" in shown[name]["why_not"] for name in home)

        assert await sim.stop_agent() == 0
        # The kernel takes namespaces apart when it gets to it, and only tcx links tell when it has.
        await seen.until(
            lambda: len(made.far.link_names()) == 1 + len(devices - gone), "destroyed", seconds=60
        )
        done = sim.knd("cleanup", "--force", f"--policy={sim.policy_file}")
        said = {name for name in lost if f"{name}: it was in a pod when the records were lost" in done.stdout}
        assert (done.returncode, said) == ((0, set()) if hook == "tcx" else (1, gone))
        await sim.start_agent()
        await seen.until(lambda: quarantined(sim) == set(), "taken as they are")

    play(5, story, hook=hook)


def devices_shown(sim: SimNode) -> list[dict[str, Any]]:
    rows = json.loads(knd(sim, "devices", "-o", "json", f"--policy={sim.policy_file}"))["rows"]
    return list(rows)


def rename(index: int, name: str) -> None:
    with IPRoute() as ipr:
        ipr.link("set", index=index, ifname=name)


def pod_sandbox(station: Station) -> SimSandbox:
    assert station.pod.sandbox is not None
    return station.pod.sandbox


def quarantined(sim: SimNode) -> set[str]:
    return {name for name, device in offered(sim).items() if device.get("taints")}


def test_a_lost_ledger_costs_no_byte_of_who_still_lives() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        gone = await station(sim, made, 0, "gone")
        await sim.delete_pod(gone.pod)
        pods = await stations(sim, made, 2)
        async with traffic(made, pods) as flows:
            scene = Scene(sim, pods, flows)
            await scene.again(lambda: delete(sim, "ledger"))
            shown = {row["pod"] for row in json.loads(knd(sim, "usage", "-o", "json"))["rows"]}
            assert "gone" not in shown
            assert "is missing" in knd(sim, "usage"), "history is lost, and that is said"
            await all_home(sim, scene, before)

    play(3, story)


def test_before_the_runtime_was_asked_nothing_is_taken_on_and_what_runs_runs() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        before = dump()
        pods = await stations(sim, made, 2)
        late = sim.schedule("late", [claim("late-nic")])
        async with traffic(made, pods) as flows:
            scene = Scene(sim, pods, flows)
            await sim.kill_agent()
            delete(sim)
            away = sim.runtime.socket.with_suffix(".away")
            sim.runtime.socket.rename(away)
            sim.agent.start()
            await seen.until(
                lambda: "journal: the journal" in sim.agent.get("/readyz")[1], "not ready, and why"
            )
            await sim.kubelet.wait_registered(sim.driver)
            await scene.untouched()
            assert seen.metric(sim, "knd_journal_recovery") == 1
            with pytest.raises(PrepareFailed, match="compares the node with its records first"):
                await sim.prepare(late)
            again = await sim.create_container(pods[0].pod, "restarted")
            assert seen.runs(again.containers[-1])

            away.rename(sim.runtime.socket)
            await seen.until(sim.agent.ready, "ready by itself")
            assert seen.metric(sim, "knd_journal_recovery") == 0
            await scene.untouched()
            late = await sim.start_pod(late)
            await sim.delete_pod(late)
            await all_home(sim, scene, before)

    play(3, story)
