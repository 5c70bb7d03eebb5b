"""Which device goes back to which node, which ports are joined, and the files that say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kndsim.kind.model import DeviceId, Home, SeenLink, Stray, strays
from kndsim.kind.netdevsim import Register, cables
from kndsim.kind.plan import (
    BadFile,
    Given,
    Ground,
    Lent,
    Plan,
    read_ground,
    read_plan,
    write_ground,
    write_plan,
)

P1 = DeviceId("netdevsim", "netdevsim5000", "p1")
VF0 = DeviceId("netdevsim", "netdevsim5001", "pf0vf0")
IGB = DeviceId("pci", "0000:21:10.0")
HOMES = {P1: Home("worker", "sim0"), VF0: Home("worker2", "simv0"), IGB: Home("worker2", "lent0")}


# --- deciding -----------------------------------------------------------------------------------------


def test_a_device_goes_back_to_its_own_node_whatever_it_is_called() -> None:
    seen = [SeenLink(7, "eth0", VF0), SeenLink(9, "sim0", IGB), SeenLink(3, "dev9", P1)]
    assert strays(seen, HOMES) == (
        [
            Stray(3, "dev9", P1, HOMES[P1]),
            Stray(7, "eth0", VF0, HOMES[VF0]),
            Stray(9, "sim0", IGB, HOMES[IGB]),
        ],
        [],
    )


def test_what_belongs_to_no_node_is_left_alone_though_it_has_a_devices_name() -> None:
    seen = [
        SeenLink(1, "lo", None),
        SeenLink(2, "sim0", None),
        SeenLink(3, "simv0", DeviceId("netdevsim", "netdevsim10", "p1")),
        SeenLink(4, "eth0", DeviceId("netdevsim", "netdevsim5000", "p2")),
        SeenLink(5, "eth1", DeviceId("pci", "netdevsim5000", "p1")),
    ]
    assert strays(seen, HOMES) == ([], [])


def test_of_two_links_that_say_to_be_one_device_neither_is_moved() -> None:
    seen = [SeenLink(7, "a", IGB), SeenLink(8, "b\n", IGB), SeenLink(3, "c", P1)]
    found, problems = strays(seen, HOMES)
    assert [stray.id for stray in found] == [P1]
    assert problems == [r"pci/0000:21:10.0 is left where it is: it is each of 'a', 'b\n'"]


# --- cables -------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(0, 8))
def test_no_port_has_two_cables_and_neighbours_are_joined_port_by_port(nodes: int, ports: int) -> None:
    names = [f"n{number}" for number in range(nodes)]
    pairs = cables(names, ports)
    ends = [end for pair in pairs for end in pair]
    assert len(set(ends)) == len(ends)
    assert all(node in names and 1 <= port <= ports for node, port in ends)
    paired = set(names[: nodes - nodes % 2])
    assert {end for end in ends if end[0] in paired} == {(n, p + 1) for n in paired for p in range(ports)}
    assert all(a[1] == b[1] for a, b in pairs if a[0] in paired)


def test_a_node_without_a_neighbour_has_its_ports_joined_in_twos() -> None:
    assert cables(["one"], 5) == [(("one", 1), ("one", 2)), (("one", 3), ("one", 4))]


# --- files --------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = Plan(
        nodes={"worker": "container:knd-worker", "worker2": "/run/netns/x"},
        engine="podman",
        ports=4,
        vfs=2,
        veths=1,
        lent=(Lent(IGB, HOMES[IGB]),),
        rdma=True,
    )
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan


def test_the_ground_is_read_as_it_was_written_and_says_who_has_what(tmp_path: Path) -> None:
    devices = (
        Given(HOMES[P1], "netdevsim-port", P1),
        Given(Home("worker", "net-0"), "veth", None),
    )
    write_ground(tmp_path / "ground.json", Ground(devices, ("a note",)))
    ground = read_ground(tmp_path / "ground.json")
    assert ground == Ground(devices, ("a note",))
    assert ground.homes() == {P1: HOMES[P1]}
    assert [path.name for path in tmp_path.iterdir()] == ["ground.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nodes": {}, "lent": [], "more": 1}', '{"lent": [{}]}'])
def test_a_plan_that_is_none_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(BadFile, match=r"plan\.json"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"devices": [{}], "notes": []}', '{"devices": 1}'])
def test_a_ground_that_is_none_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "ground.json").write_text(text)
    with pytest.raises(BadFile, match=r"ground\.json"):
        read_ground(tmp_path / "ground.json")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"none\.json is not there"):
        read_plan(tmp_path / "none.json")


# --- what was made ------------------------------------------------------------------------------------


def test_after_a_crash_what_was_made_is_deleted_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = tmp_path / "bus"
    for number in (10, 5001):
        (bus / f"devices/netdevsim{number}").mkdir(parents=True)
    (bus / "del_device").touch()
    monkeypatch.setattr("kndsim.kind.netdevsim.BUS", bus)
    register = Register(tmp_path / "netdevsim")
    register.note(5000)
    register.note(5001)
    assert Register(tmp_path / "netdevsim").delete_all() == [5001]
    assert (bus / "del_device").read_text() == "5001"
    assert Register(tmp_path / "netdevsim").delete_all() == []
