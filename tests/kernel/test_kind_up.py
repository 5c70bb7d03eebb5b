"""`make kind-up` and `make kind-down`, with stand-ins for the engine and for kind; devices are real.

Invariant: what a container engine would do is a process in namespaces of its own for each node. Nothing
outside of those and of the test's folder is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from kndsim.cluster.kind import KindCluster, NotUp, devices_of, running
from kndsim.kind import up as up_module
from kndsim.kind.config import KindSpec
from kndsim.kind.engine import Engine
from kndsim.kind.keeper import PID, born
from kndsim.kind.namespaces import links
from kndsim.kind.plan import read_ground
from kndsim.kind.up import AGENT_IMAGE, Tools, UpFailed, Wanted, down, up
from kndsim.progress import Progress
from kndsim.waiting import wait_until
from tests.contract.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
SPEC = KindSpec(name="fake", workers=1)
_KIND = """#!/bin/bash
echo "$*" >>{folder}/kind.asked
echo "$KIND_EXPERIMENTAL_PROVIDER" >>{folder}/provider
case "$1 $2" in
    "$(cat {folder}/kind.fails)") echo 'ERROR: no such luck' >&2; exit 1 ;;
    'create cluster') touch "${{4#--kubeconfig=}}" ;;
esac
"""


@dataclass(frozen=True, slots=True)
class World:
    """Two nodes, stand-ins, and the folder that a cluster is kept in."""

    scratch: Path
    fake: FakeEngine
    pids: dict[str, int]
    deployed: list[KindCluster]

    @property
    def folder(self) -> Path:
        return self.scratch / "run"

    @property
    def kind(self) -> str:
        return str(self.scratch / "kind")

    @property
    def tools(self) -> Tools:
        return Tools(
            engine=self.fake.engine,
            kind=self.kind,
            images=lambda folder: [folder / AGENT_IMAGE, self.scratch / "tool.tar"],
            deploy=self.deployed.append,
        )

    def up(self, wanted: Wanted = Wanted()) -> KindCluster:  # noqa: B008 - frozen
        return up(SPEC, wanted, self.tools, Progress("test"), self.folder)

    def down(self) -> None:
        down(SPEC.name, self.fake.engine, self.kind, Progress("test"), self.folder)

    def fail(self, command: str) -> None:
        (self.scratch / "kind.fails").write_text(command)

    def asked(self) -> list[str]:
        return (self.scratch / "kind.asked").read_text().splitlines()

    def links(self, node: str) -> set[str]:
        return {link.name for link in links(Path(f"/proc/{self.pids[node]}/ns/net"))} - {"lo"}


@contextlib.contextmanager
def container() -> Iterator[int]:
    """A process in namespaces of its own, as the first process of a node container is."""
    command = ["unshare", "--mount", "--net", "--propagation=private", "sh", "-c", "echo ready; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid


@pytest.fixture
def world(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "ci/kind-sriov-sim"))
    # This kernel may have it: that it is used then is shown in a guest.
    monkeypatch.setattr(up_module, "_has_module", lambda *_: False)
    (short_tmp / "kind").write_text(_KIND.format(folder=short_tmp))
    (short_tmp / "kind").chmod(0o755)
    (short_tmp / "kind.fails").touch()
    with contextlib.ExitStack() as stack:
        pids = {node: stack.enter_context(container()) for node in SPEC.nodes}
        made = World(short_tmp, FakeEngine(short_tmp, **pids), pids, [])
        try:
            yield made
        finally:
            made.fail("")
            made.down()


def keeper(world: World) -> int:
    return int((world.folder / PID).read_text().split()[0])


def test_a_cluster_comes_up_with_devices_and_all_of_it_goes_down(world: World) -> None:
    world.up()
    assert [cluster.nodes.keys() for cluster in world.deployed] == [dict.fromkeys(SPEC.nodes).keys()]
    config, kubeconfig = world.folder / "kind.yaml", world.folder / "kubeconfig"
    assert world.asked() == [
        f"create cluster --config={config} --kubeconfig={kubeconfig} --wait=300s",
        f"load image-archive {world.folder}/agent.tar --name=fake",
        f"load image-archive {world.scratch}/tool.tar --name=fake",
    ]
    assert (world.scratch / "provider").read_text() == "docker\n" * 3
    assert yaml.safe_load(config.read_text())["name"] == "fake"
    names = {f"net-{number}" for number in range(8)} | {"mac-0"}
    assert [world.links(node) for node in SPEC.nodes] == [names, names]
    pid = keeper(world)
    world.down()
    assert not world.folder.exists()
    assert born(pid) == ""
    wait_until(lambda: not any(map(world.links, SPEC.nodes)), what="the devices are gone")
    assert world.asked()[-1] == f"delete cluster --name=fake --kubeconfig={kubeconfig}"


def test_another_process_finds_the_cluster_by_its_folder(world: World) -> None:
    with pytest.raises(NotUp, match="run `make kind-up`"), running(world.folder):
        pass
    world.up()
    with running(world.folder) as cluster:
        node = cluster.nodes["fake-worker"]
        assert node.devices.netdevs == tuple(f"net-{number}" for number in range(8))
        assert node.devices.uplink == "mac-0"
        assert f"/proc/{world.pids['fake-worker']}/root" == str(node.root)
        assert "mac-0" in node.place.run(["ip", "-o", "link"]).out
        assert devices_of(read_ground(world.folder / "ground.json"), "other").netdevs == ()


def test_each_node_has_a_bpffs_of_its_own(world: World) -> None:
    world.up()
    with running(world.folder) as cluster:
        one, other = (node.place for node in cluster.nodes.values())
        assert one.run(["stat", "-f", "-c", "%T", "/sys/fs/bpf"]).out == "bpf_fs\n"
        one.run(["mkdir", "/sys/fs/bpf/mine"])
        assert "mine" in one.run(["ls", "/sys/fs/bpf"]).out.split()
        assert "mine" not in other.run(["ls", "/sys/fs/bpf"]).out.split()


@pytest.mark.parametrize("command", ["create cluster", "load image-archive"])
def test_whatever_fails_leaves_nothing(world: World, command: str) -> None:
    world.fail(command)
    with pytest.raises((UpFailed, NotUp), match="no such luck"):
        world.up()
    assert not world.folder.exists()
    assert world.asked()[-1].startswith("delete cluster ")
    assert [world.links(node) for node in SPEC.nodes] == [set(), set()]


def test_devices_that_cannot_be_made_are_told_with_the_reason(world: World) -> None:
    world.fake.set(**{**world.pids, "fake-worker": 0})
    with pytest.raises(Exception, match="container fake-worker is not running"):
        world.up()
    assert not world.folder.exists()


def test_agents_that_do_not_come_up_take_the_devices_along(world: World) -> None:
    def deploy(cluster: KindCluster) -> None:
        raise NotUp("the agents are not ready")

    tools = Tools(engine=world.fake.engine, kind=world.kind, images=lambda _: [], deploy=deploy)
    with pytest.raises(NotUp, match="the agents are not ready"):
        up(SPEC, Wanted(), tools, Progress("test"), world.folder)
    assert not world.folder.exists()
    wait_until(lambda: not any(map(world.links, SPEC.nodes)), what="the devices are gone")


def test_a_second_cluster_is_refused_and_the_first_one_stays(world: World) -> None:
    world.up()
    with pytest.raises(UpFailed, match="is there already"):
        world.up()
    assert born(keeper(world))


def test_down_takes_away_what_a_killed_keeper_left(world: World) -> None:
    world.up()
    os.kill(keeper(world), 9)
    world.down()
    assert not world.folder.exists()


def test_down_leaves_alone_a_process_that_got_the_keepers_number(world: World) -> None:
    world.up()
    path = world.folder / PID
    pid, ticks = path.read_text().split()
    path.write_text(f"{pid} {int(ticks) - 1}")
    world.down()
    assert born(int(pid)) == ticks
    os.kill(int(pid), 15)
    wait_until(lambda: not born(int(pid)), 20, "the keeper ends")


def test_an_engine_that_is_away_is_told_in_a_sentence(world: World) -> None:
    missing = Tools(engine=Engine("/none/docker"), kind="/none/kind", images=lambda _: [], deploy=print)
    with pytest.raises(UpFailed, match="/none/kind cannot be run: No such file"):
        up(SPEC, Wanted(), missing, Progress("test"), world.folder)
    with contextlib.suppress(UpFailed):
        world.down()


def test_the_description_is_one_that_other_programs_can_read(world: World) -> None:
    world.up()
    assert json.loads((world.folder / "cluster.json").read_text()) == {
        "name": "fake",
        "engine": str(world.fake.program),
        "kind": world.kind,
        "kubernetes": "1.37",
        "nodes": list(SPEC.nodes),
    }
