"""The keeper of a kind cluster's devices as a process, with network namespaces for nodes.

Invariant: what this kernel cannot show, a physical device that falls into the first namespace, is shown in a
guest (tests/vm/test_kind_host_helper.py); here a veth is said to be one, and its move is real.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kndsim.agent import dying_with_parent
from kndsim.kind import keeper
from kndsim.kind.keeper import GROUND, PLAN, hand_back
from kndsim.kind.model import DeviceId, Home, SeenLink
from kndsim.kind.namespaces import Nodes, links
from kndsim.kind.plan import Given, Ground, Plan, read_ground, write_plan
from kndsim.links import SimNetns, netns, private_host, veth_pair
from kndsim.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nodes() -> Iterator[dict[str, SimNetns]]:
    with netns() as one, netns() as other:
        yield {"one": one, "other": other}


@contextlib.contextmanager
def keeping(folder: Path, plan: Plan) -> Iterator[subprocess.Popen[str]]:
    """`python -m kndsim.kind keep` in a namespace that plays the machine's first."""
    write_plan(folder / PLAN, plan)
    with netns() as first:
        command = ["nsenter", f"--net={first.path}", sys.executable, "-m", "kndsim.kind", "keep", str(folder)]
        with subprocess.Popen(
            dying_with_parent(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "ci/kind-sriov-sim")},
        ) as process:
            try:
                yield process
            finally:
                process.kill()


def names(node: SimNetns) -> set[str]:
    return set(node.link_names()) - {"lo"}


def plan_of(nodes: dict[str, SimNetns], veths: int) -> Plan:
    return Plan(nodes={name: str(node.path) for name, node in nodes.items()}, veths=veths)


def address(node: SimNetns, link: str, text: str) -> None:
    index = node.link_index(link)
    node.netlink(lambda ipr: ipr.addr("add", index=index, address=text, prefixlen=24))
    node.netlink(lambda ipr: ipr.link("set", index=index, state="up"))


def test_nodes_get_nics_that_reach_each_other_and_all_is_gone_at_the_end(
    nodes: dict[str, SimNetns], tmp_path: Path
) -> None:
    with keeping(tmp_path, plan_of(nodes, 2)) as process:
        wait_until((tmp_path / GROUND).exists, 20, "the ground stands")
        assert [(given.home.node, given.home.name) for given in read_ground(tmp_path / GROUND).devices] == [
            (node, name) for node in nodes for name in ("net-0", "net-1", "mac-0")
        ]
        assert [names(node) for node in nodes.values()] == [{"net-0", "net-1", "mac-0"}] * 2
        address(nodes["one"], "net-0", "192.0.2.1")
        address(nodes["other"], "net-1", "192.0.2.2")

        def receiver() -> socket.socket:
            bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            bound.bind(("192.0.2.2", 4000))
            return bound

        def send() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"hello", ("192.0.2.2", 4000))

        with nodes["other"].run(receiver) as heard:
            nodes["one"].run(send)
            heard.settimeout(10)
            assert heard.recv(100) == b"hello"
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
    assert (process.returncode, said.splitlines()[-1][9:]) == (0, "the devices are gone")
    wait_until(lambda: not any(names(node) for node in nodes.values()), what="the veths are gone")
    assert not (tmp_path / GROUND).exists()


def test_a_keeper_that_is_killed_takes_its_veths_along(nodes: dict[str, SimNetns], tmp_path: Path) -> None:
    with keeping(tmp_path, plan_of(nodes, 1)) as process:
        wait_until((tmp_path / GROUND).exists, 20, "the ground stands")
        process.kill()
    wait_until(lambda: not any(names(node) for node in nodes.values()), what="the veths are gone")


def test_a_node_that_is_not_there_is_told_and_nothing_is_left(
    nodes: dict[str, SimNetns], tmp_path: Path
) -> None:
    plan = plan_of(nodes, 1)
    gone = Plan(nodes={**plan.nodes, "gone": str(tmp_path / "none")}, veths=1)
    with keeping(tmp_path, gone) as process:
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert said.strip() == (
        "python -m kndsim.kind keep: gone does not get net-0: "
        f"node gone has no network namespace at {tmp_path / 'none'}"
    )
    wait_until(lambda: not any(names(node) for node in nodes.values()), what="the veths are gone")


def test_a_name_that_a_node_has_already_is_told(nodes: dict[str, SimNetns], tmp_path: Path) -> None:
    with (
        veth_pair("net-0", "x", where=nodes["other"], peer_where=nodes["other"]),
        keeping(tmp_path, plan_of(nodes, 1)) as process,
    ):
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "other does not get net-0: there will be no veth net-0 at" in said


# --- handing back -------------------------------------------------------------------------------------

PORT = DeviceId("netdevsim", "netdevsim5000", "p1")
HERE = Ground((Given(Home("one", "sim0"), "netdevsim-port", PORT),))


@pytest.fixture
def came_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A veth of the first namespace, called as its last user called it, that is said to be PORT."""

    def seen() -> list[SeenLink]:
        return [SeenLink(link.ifindex, link.name, PORT if link.name == "eth0" else None) for link in links()]

    monkeypatch.setattr(keeper, "links", seen)
    with private_host(), veth_pair("eth0", "far") as (index, _):
        yield index


def test_a_device_that_came_here_is_back_in_its_node_under_its_own_name(
    nodes: dict[str, SimNetns], came_here: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hand_back(HERE, Nodes({"one": str(nodes["one"].path)}), pytest.fail) == 0
    assert names(nodes["one"]) == {"sim0"}
    assert [link.name for link in links()] == ["lo", "far"]
    assert "netdevsim/netdevsim5000/p1 came here as 'eth0': back on one as sim0" in capsys.readouterr().out
    assert hand_back(HERE, Nodes({"one": "/none"}), pytest.fail) == 0


def test_a_device_whose_node_is_away_waits_and_is_tried_again(
    nodes: dict[str, SimNetns], came_here: int
) -> None:
    told: list[str] = []
    assert hand_back(HERE, Nodes({"one": "/none"}), told.append) == 1
    assert told == [f"{PORT} waits here for one: node one has no network namespace at /none"]
    assert [link.ifindex for link in links() if link.name == "eth0"] == [came_here]
    assert hand_back(HERE, Nodes({"one": str(nodes["one"].path)}), pytest.fail) == 0


def test_a_name_that_is_taken_in_the_node_leaves_the_device_here(
    nodes: dict[str, SimNetns], came_here: int
) -> None:
    told: list[str] = []
    with veth_pair("sim0", "x", where=nodes["one"], peer_where=nodes["one"]):
        assert hand_back(HERE, Nodes({"one": str(nodes["one"].path)}), told.append) == 1
    assert told[0].endswith("which has a sim0 already")
    assert [link.ifindex for link in links() if link.name == "eth0"] == [came_here]
