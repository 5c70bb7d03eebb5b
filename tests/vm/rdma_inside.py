"""Run in a guest by test_rdma_life: the real agent, real VFs of igb, and the soft RoCE that it makes on them.

Invariant: what is where is judged by what rdma(8) says here and by verbs programs that talk to each other,
never by the agent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kndsim import netns
from kndsim.agent import wait_until
from kndsim.demo.choice import PhysicalFunction
from kndsim.demo.devices import Devices, changes, dump
from kndsim.demo.sriov import make_vfs
from kndsim.kubelet import PrepareFailed, UnprepareFailed
from kndsim.node import ClaimSpec, SimNode, SimPod
from kndsim.runtime import ContainerFailed, SandboxFailed
from tests.node.crash_stage import Nursery
from tests.node.node_stage import node
from tests.vm.vf_settings_inside import PF, Loop, in_pod, offered, pf_name

pytestmark = pytest.mark.timeout(900)

VFS = 2
PATIENCE = 180.0
"""Seconds for what takes a few where nothing else runs."""
ROUNDS = 100
POLICY = "rdma: {mode: exclusive, software: rxe}\n"
ACTS = ("make-rdma", "move-rdma-in", "find-rdma-files", "remove-rdma")
FAILURES = (PrepareFailed, UnprepareFailed, SandboxFailed, ContainerFailed)
SPARE = "0000:21:00.1"
"""A port that no pod has anything of."""


class Stage:
    """One node for all tests here: each start of an agent takes its time in a guest."""

    def __init__(self, loop: Loop, sim: SimNode, made: Devices, nursery: Nursery, control: Path):
        self._loop = loop
        self.sim = sim
        self.nursery = nursery
        self.control = control
        self.made = made
        self.links = dump(made.compared)

    def run(self, story: Any) -> Any:
        return self._loop.run(story)

    def start_agent(self) -> None:
        agent = self.sim.agent
        agent.process = self.nursery.new()  # type: ignore[assignment]
        agent.wait_ready(PATIENCE)

    def start(self, name: str, number: int, **rdma: Any) -> SimPod:
        return self.run(self.sim.start_pod(self.schedule(name, number, **rdma), seconds=2 * PATIENCE))  # type: ignore[no-any-return]

    def schedule(self, name: str, number: int, **rdma: Any) -> SimPod:
        parameters = {
            "apiVersion": "knd.internal/v1alpha1",
            "kind": "NetworkDeviceConfig",
            "interface": {"name": "net1", "addresses": [f"198.18.0.{number + 1}/24"]},
            "rdma": rdma,
        }
        return self.sim.schedule(name, [ClaimSpec(name=f"{name}-nic", parameters={"": parameters})])

    def delete(self, *pods: SimPod) -> None:
        for pod in pods:
            self.run(self.sim.delete_pod(pod))

    def end(self, pod: SimPod) -> None:
        """Of a pod that may have got nowhere."""
        for sandbox in [each for each in self.sim.runtime.sandboxes if each.pod.uid == pod.spec.uid]:
            self.run(self.sim.runtime.stop_pod(sandbox))
            self.run(self.sim.runtime.remove_pod(sandbox))
        self.run(self.sim.kubelet.unprepare(self.sim.driver, pod.claims, pod=pod.spec.uid))
        self.sim.api.delete("pods", pod.spec.name, pod.spec.namespace)
        for claim in pod.claims:
            self.sim.api.delete("resourceclaims", claim.name, claim.namespace)

    def wait_as_before(self, when: str) -> None:
        def unlike() -> list[str]:
            return [*changes(self.links, dump(self.made.compared)), *map(str, rdma_devices())]

        try:
            wait_until(lambda: not unlike(), when, PATIENCE)
        except TimeoutError:
            pytest.fail(f"{when}: {'; '.join(unlike())}\n{self.sim.agent.tail()}")


def rdma_devices(pod: SimPod | None = None) -> list[str]:
    """Names of those that the host's, or a pod's, namespace has."""
    argv = ["rdma", "-j", "dev", "show"]
    done = (
        in_pod(pod, *argv)
        if pod is not None
        else subprocess.run(argv, capture_output=True, text=True, check=True)
    )
    return [device["ifname"] for device in json.loads(done.stdout or "[]")]


def environment(pod: SimPod) -> Mapping[str, str]:
    """Of its container, without the devices' own names at the ends."""
    (container,) = pod.containers
    ends = {device.device.upper().replace("-", "_") for each in pod.devices.values() for device in each}
    (end,) = ends
    return {name.removesuffix(f"_{end}"): value for name, value in container.env.items()}


def pingpong(server: SimPod, client: SimPod, address: str) -> str:
    """What the client of rdma-core's example says, each side told by its container's environment alone."""
    argv = {}
    for pod in (server, client):
        told = environment(pod)
        argv[pod.spec.name] = [
            *("ibv_rc_pingpong", "-d", told["KND_RDMA_DEVICE"], "-i", told["KND_RDMA_PORT"]),
            *("-g", told["KND_RDMA_GID_INDEX"], "-n", str(ROUNDS)),
        ]
    assert server.sandbox is not None
    enter = ["nsenter", f"--net={server.sandbox.netns_path}"]
    with subprocess.Popen([*enter, *argv[server.spec.name]], stdout=subprocess.PIPE, text=True) as waiting:
        try:
            wait_until(
                lambda: "LISTEN" in in_pod(server, "ss", "-Hltn", "sport = :18515").stdout, "it listens", 30
            )
            done = in_pod(client, *argv[client.spec.name], address)
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                waiting.wait(30)
            waiting.kill()
    return done.stdout + done.stderr


def can_talk(one: SimPod, other: SimPod) -> None:
    said = pingpong(one, other, "198.18.0.1")
    assert f"{ROUNDS} iters" in said, said


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    control = tmp_path_factory.mktemp("control")
    pf = PhysicalFunction(address=PF, name=pf_name(), total_vfs=7)
    with make_vfs(pf, VFS) as made, contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(Loop()))
        made = replace(made, policy=made.policy + POLICY)
        open_node = node(made, start=False, request_timeout=30.0)
        sim = loop.run(open_node.__aenter__())
        stack.callback(lambda: loop.run(open_node.__aexit__(None, None, None)))
        nursery = stack.enter_context(contextlib.closing(Nursery(sim, control, patience=PATIENCE)))
        stage = Stage(loop, sim, made, nursery, control)
        stage.start_agent()
        wait_until(lambda: len(offered(sim)) == VFS, "the VFs are offered", PATIENCE)
        yield stage


def test_two_pods_talk_verbs_over_what_was_made_for_them_and_nothing_is_left(stage: Stage) -> None:
    pods = [stage.start("one", 0, nccl=True, ucx=True), stage.start("two", 1)]
    assert rdma_devices() == []
    for pod in pods:
        told = environment(pod)
        assert rdma_devices(pod) == [told["KND_RDMA_DEVICE"]]
        assert told["KND_RDMA_DEVICE"].startswith("rxe_pci_0000_21_")
        assert set(pod.containers[0].devices) >= {"/dev/infiniband/rdma_cm"}
    assert pods[0].containers[0].devices != pods[1].containers[0].devices
    told = environment(pods[0])
    assert told["NCCL_IB_HCA"] == f"={told['KND_RDMA_DEVICE']}:1"
    assert told["NCCL_SOCKET_IFNAME"] == "=net1"
    assert told["NCCL_IB_GID_INDEX"] == told["KND_RDMA_GID_INDEX"]
    assert told["UCX_NET_DEVICES"] == f"{told['KND_RDMA_DEVICE']}:1"
    assert "NCCL_IB_HCA" not in environment(pods[1])
    can_talk(*pods)
    stage.delete(*pods)
    stage.wait_as_before("after two pods")


def test_a_namespace_that_is_deleted_by_force_leaves_no_rdma_and_gives_its_vf_back(stage: Stage) -> None:
    pod = stage.start("forced", 0)
    assert pod.sandbox is not None
    stage.run(stage.sim.runtime.kill_pause(pod.sandbox))
    os.kill(pod.containers[0].pid, signal.SIGKILL)
    netns.delete_netns(pod.sandbox.netns_path)
    stage.wait_as_before("after a namespace that was deleted by force")
    stage.end(pod)


def test_pods_go_on_talking_while_the_agent_is_dead_and_come_home_to_the_next_one(stage: Stage) -> None:
    pods = [stage.start("one", 0), stage.start("two", 1)]
    stage.run(stage.sim.kill_agent())
    can_talk(*pods)
    stage.start_agent()
    can_talk(*pods)
    stage.run(stage.sim.kill_agent())
    for pod in pods:
        assert pod.sandbox is not None
        stage.run(stage.sim.runtime.stop_pod(pod.sandbox))
    stage.start_agent()
    stage.wait_as_before("after pods that ended without an agent")
    for pod in pods:
        stage.end(pod)


@pytest.mark.parametrize("act", ACTS)
def test_an_agent_killed_after_any_step_of_rdma_leaves_none(stage: Stage, act: str) -> None:
    visited = stage.control / "visited"
    plan = "detach" if act == "remove-rdma" else "attach"
    lines = [
        line for line in visited.read_text().splitlines() if line.split("\t")[:3] == [plan, act, "after-act"]
    ]
    assert lines, f"{plan} never passes {act}"
    (stage.control / "kill").write_text(lines[0])
    pod = stage.schedule("killed", 0)

    async def until_it_dies() -> None:
        with contextlib.suppress(*FAILURES):
            made = await stage.sim.run_sandbox(await stage.sim.prepare(pod))
            assert made.sandbox is not None
            await stage.sim.runtime.stop_pod(made.sandbox)

    stage.run(until_it_dies())
    wait_until(lambda: not stage.sim.agent.alive(), f"it died at {lines[0]!r}", PATIENCE)
    stage.run(stage.sim.kill_agent())
    stage.start_agent()
    stage.end(pod)
    stage.wait_as_before(f"killed at {lines[0]!r}")


def test_a_container_is_not_given_a_file_whose_number_is_anothers_by_now_with_an_agent_or_without(
    stage: Stage,
) -> None:
    pod = stage.start("reordered", 0)
    name = environment(pod)["KND_RDMA_DEVICE"]
    (spare,) = os.listdir(f"/sys/bus/pci/devices/{SPARE}/net")
    in_pod(pod, "rdma", "link", "delete", name)
    subprocess.run(["rdma", "link", "add", "other", "type", "rxe", "netdev", spare], check=True)
    try:
        assert Path("/sys/class/infiniband_verbs/uverbs0/ibdev").read_text().strip() == "other"
        assert "/dev/infiniband/uverbs0" in pod.containers[0].devices
        with pytest.raises(ContainerFailed, match="was given anew"):
            stage.run(stage.sim.create_container(pod, "again"))
        stage.run(stage.sim.kill_agent())
        with pytest.raises(ContainerFailed, match="are not its devices' any more"):
            stage.run(stage.sim.create_container(pod, "again"))
    finally:
        subprocess.run(["rdma", "link", "delete", "other"], check=True)
    stage.start_agent()
    stage.delete(pod)
    stage.wait_as_before("after another's device")


def test_a_claim_for_shared_devices_is_refused_here_with_what_to_do(stage: Stage) -> None:
    pod = stage.schedule("no", 0, mode="shared")
    with pytest.raises(PrepareFailed) as caught:
        stage.run(stage.sim.prepare(pod))
    assert "the claim wants rdma.mode shared" in str(caught.value)
    assert "ib_core.netns_mode=1" in str(caught.value)
    stage.end(pod)
    stage.wait_as_before("after a refusal")
