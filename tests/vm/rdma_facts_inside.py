"""Run in a guest by test_rdma_facts: what is told of RDMA devices by netlink, sysfs and libibverbs, held
against each other and against what rdma(8) and the kernel's files say; moves and counters as they really are.

Invariant: the devices are soft RoCE on an igb VF pair, a veth and a netdevsim port, and siw on the veth's
other end. The kernel's mode is set before there is any namespace beside the first.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hw.errors import Busy, NotFound, Refused, Unsupported
from hw.model import DeviceKind, IfName, RdmaIndex, RdmaName
from hw.monitor import RESCAN, LinkMonitor
from hw.netlink import LinkSocket
from hw.netns import NetnsHandle, host_netns, open_netns
from hw.rdma import details, verbs
from hw.rdma.details import Source
from hw.rdma.gids import gid_table
from hw.rdma.netlink import RdmaSocket, rdma_if_any
from hw.rdma.nldev import CharacterDeviceKind, PortState
from hw.rdma.tracking import ResourceKind
from hw.scan import scan, uplinks_of
from hw.sysfs import Sysfs
from kndsim.links import netns
from kndsim.waiting import wait_until

pytestmark = pytest.mark.timeout(600)

PF = Path("/sys/bus/pci/devices/0000:21:00.0")
SYSFS = Sysfs(Path("/sys"))
PATIENCE = 30.0
ADDRESS = "198.18.7.{}"
SENDS = 300
BYTES = 4096


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Stage:
    rdma: RdmaSocket
    made_on: dict[str, str]
    """RDMA device to netdev, as it was asked for."""

    def index(self, name: str) -> RdmaIndex:
        found = self.rdma.by_name(RdmaName(name))
        assert found, f"no {name}"
        return found.index


@pytest.fixture(scope="module")
def before() -> str:
    """What a look at a kernel without RDMA loads of it."""
    assert not Path("/sys/class/infiniband").exists()
    with rdma_if_any() as nothing:
        assert nothing is None
    with LinkMonitor() as monitor:
        monitor.read()
    return Path("/proc/modules").read_text()


@pytest.fixture(scope="module")
def stage(before: str) -> Iterator[Stage]:
    run("modprobe", "-a", "ib_core", "ib_uverbs", "rdma_ucm", "rdma_rxe", "siw", "netdevsim")
    with RdmaSocket(None) as rdma:
        assert not rdma.exclusive()
        rdma.set_exclusive(True)
        yield from _stage(rdma)


def _stage(rdma: RdmaSocket) -> Iterator[Stage]:
    pf = next((PF / "net").iterdir()).name
    run("ip", "link", "set", pf, "up")
    (PF / "sriov_numvfs").write_text("2")
    Path("/sys/bus/netdevsim/new_device").write_text("7 1")
    run("ip", "link", "add", "rva", "type", "veth", "peer", "name", "rvb")
    run("udevadm", "settle")
    vfs = [next((PF / f"virtfn{number}/net").iterdir()).name for number in range(2)]
    port = next(Path("/sys/bus/netdevsim/devices/netdevsim7/net").iterdir()).name
    made_on = {"rxe_vf0": vfs[0], "rxe_vf1": vfs[1], "rxe_sim": port, "rxe_veth": "rva", "siw_veth": "rvb"}
    for number, (name, netdev) in enumerate(made_on.items(), 1):
        run("ip", "address", "add", f"{ADDRESS.format(number)}/24", "dev", netdev)
        run("ip", "link", "set", netdev, "up")
        rdma.add_link(name.partition("_")[0], RdmaName(name), IfName(netdev))
    wait_until(lambda: _settled(made_on), within=PATIENCE, what="each device's GID of its own IPv4 address")
    try:
        yield Stage(rdma, made_on)
    finally:
        for name in made_on:
            with suppress(NotFound, AssertionError):
                rdma.delete_link(Stage(rdma, made_on).index(name))
        run("ip", "link", "delete", "rva")
        Path("/sys/bus/netdevsim/del_device").write_text("7")
        (PF / "sriov_numvfs").write_text("0")
        run("ip", "link", "set", pf, "down")


def _settled(made_on: dict[str, str]) -> bool:
    tables = [gid_table(SYSFS, RdmaName(name), 1) for name in made_on if name.startswith("rxe")]
    return all(any(gid.address.ipv4_mapped for gid in table) for table in tables)


@contextmanager
def pod() -> Iterator[tuple[NetnsHandle, RdmaSocket]]:
    with netns() as made, open_netns(made.path) as handle, RdmaSocket(handle) as socket:
        yield handle, socket


def test_looking_at_a_kernel_without_rdma_loads_nothing_of_it(before: str, stage: Stage) -> None:
    assert "ib_core" not in before
    assert "ib_core" in Path("/proc/modules").read_text()


def test_netlink_agrees_with_the_rdma_tool(stage: Stage) -> None:
    told = {row["ifname"]: row for row in json.loads(run("rdma", "-j", "dev"))}
    links = {row["ifname"]: row for row in json.loads(run("rdma", "-j", "link"))}
    devices = {device.name: device for device in stage.rdma.devices()}
    assert devices.keys() == told.keys() == stage.made_on.keys()
    for name, device in devices.items():
        assert (device.index, device.protocol) == (told[name]["ifindex"], told[name]["protocol"])
        assert device.node_guid == told[name]["node_guid"]
        (port,) = stage.rdma.ports(device.index)
        assert (port.state.name, port.netdev_name) == (links[name]["state"], stage.made_on[name])
        assert port.netdev_index == links[name]["netdev_index"]


def test_verbs_sysfs_and_netlink_say_the_same(stage: Stage) -> None:
    assert verbs.why_not() == ""
    by_verbs = verbs.devices()
    assert by_verbs.keys() == stage.made_on.keys()
    told = {device.name: device for device in stage.rdma.devices()}
    for name, device in by_verbs.items():
        assert replace(device, source=Source.SYSFS) == details.by_sysfs(SYSFS, name)
        assert device.node_guid == told[name].node_guid
        assert device.sys_image_guid == told[name].sys_image_guid
        for port, netlink in zip(device.ports, stage.rdma.ports(told[name].index), strict=True):
            assert (port.number, port.state, port.phys_state) == (
                netlink.number,
                netlink.state,
                netlink.phys_state,
            )
            assert {gid.netdev for gid in port.gids} <= {netlink.netdev_name}


def test_without_pyverbs_the_same_devices_are_found(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = details.every_device(SYSFS, verbs.devices)
    assert {device.source for device in whole} == {Source.VERBS}
    monkeypatch.setitem(__import__("sys").modules, "pyverbs.device", None)
    without, problems = details.every_device(SYSFS, verbs.devices)
    assert problems == ()
    assert without == tuple(replace(device, source=Source.SYSFS) for device in whole)


def test_every_netdev_has_the_device_that_is_made_on_it(stage: Stage) -> None:
    with LinkSocket(None) as links:
        found = scan(SYSFS, links.dump(), uplinks_of(links), asked=stage.rdma)
    by_netdev = {device.link.name: device for device in found if device.link and device.rdma}
    assert {name: device.rdma and device.rdma.name for name, device in by_netdev.items()} == {
        netdev: name for name, netdev in stage.made_on.items()
    }
    vf = by_netdev[IfName(stage.made_on["rxe_vf0"])]
    assert vf.kind is DeviceKind.VF
    assert vf.rdma
    assert vf.rdma.software
    assert vf.rdma.index == stage.index("rxe_vf0")


def test_files_are_those_of_dev(stage: Stage) -> None:
    for name in stage.made_on:
        file = stage.rdma.character_device(stage.index(name), CharacterDeviceKind.UVERBS)
        number = os.stat(f"/dev/infiniband/{file.name}").st_rdev
        assert (os.major(number), os.minor(number)) == (file.major, file.minor)
    manager = stage.rdma.character_device(stage.index("rxe_veth"), CharacterDeviceKind.RDMA_CM)
    assert os.stat("/dev/infiniband/rdma_cm").st_rdev == os.makedev(manager.major, manager.minor)
    with pytest.raises(Unsupported):
        stage.rdma.character_device(stage.index("siw_veth"), CharacterDeviceKind.UMAD, port=1)


def pingpong(device: str, *more: str) -> subprocess.Popen[str]:
    argv = ["ibv_rc_pingpong", "-d", device, "-g", "1", "-n", str(SENDS), "-s", str(BYTES), *more]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def listening(port: int) -> bool:
    lines = Path("/proc/net/tcp6").read_text() + Path("/proc/net/tcp").read_text()
    return f":{port:04X} " in lines


def test_counters_and_resources_are_those_of_the_traffic(stage: Stage) -> None:
    index = stage.index("rxe_vf0")
    before = stage.rdma.statistics(index, 1)
    server = pingpong("rxe_vf0")
    wait_until(lambda: listening(18515), within=PATIENCE, what="ibv_rc_pingpong to listen")
    (context,) = stage.rdma.resources(ResourceKind.CTX, index)
    assert (context.pid, context.comm) == (server.pid, "ibv_rc_pingpong")
    assert server.pid in {qp.pid for qp in stage.rdma.resources(ResourceKind.QP, index)}
    assert stage.rdma.summary(index)["ctx"] == 1
    client = pingpong("rxe_vf0", "127.0.0.1")
    outs = [process.communicate(timeout=120)[0] for process in (server, client)]
    assert (server.returncode, client.returncode) == (0, 0), outs
    after = stage.rdma.statistics(index, 1)
    grown = {name: after[name] - before[name] for name in after}
    assert (grown["rdma_sends"], grown["rdma_recvs"]) == (2 * SENDS, 2 * SENDS)
    assert grown["sent_pkts"] == grown["rcvd_pkts"] >= 2 * SENDS * BYTES // 1024
    assert grown["sent_bytes"] == grown["rcvd_bytes"] > 2 * SENDS * BYTES
    assert [one.name for one in stage.rdma.counter_status(index, 1)] == list(after)
    assert stage.rdma.summary(index)["ctx"] == 0


def test_a_device_moves_into_a_pod_and_home_and_is_seen_in_one_place(stage: Stage) -> None:
    index = stage.index("rxe_veth")
    (here,) = stage.rdma.ports(index)
    with pod() as (handle, inside):
        assert inside.devices() == ()
        stage.rdma.move(index, handle)
        assert [device.index for device in inside.devices()] == [index]
        assert stage.rdma.by_name(RdmaName("rxe_veth")) is None
        with pytest.raises(NotFound, match="not there"):
            stage.rdma.ports(index)
        with host_netns() as home:
            with pytest.raises(NotFound, match="not there"):
                stage.rdma.move(index, home)
            (there,) = inside.ports(index)
            assert (there.state, there.netdev_index) == (PortState.ACTIVE, None)
            assert inside.statistics(index, 1)
            inside.move(index, home)
        assert inside.devices() == ()
    (again,) = stage.rdma.ports(index)
    assert again == here


def test_the_folder_of_a_device_that_is_away_stays_in_sysfs(stage: Stage) -> None:
    """What a function's being capable of RDMA is told by while a pod has its device."""
    folder = Path("/sys/devices/virtual/infiniband")
    with pod() as (handle, _):
        for name in ("rxe_veth", "rxe_sim"):
            stage.rdma.move(stage.index(name), handle)
        assert sorted(path.name for path in folder.iterdir()) == ["rxe_vf0", "rxe_vf1", "siw_veth"]
        assert not (Path("/sys/class/infiniband") / "rxe_sim").exists()
    for name in ("rxe_veth", "rxe_sim"):
        wait_until(
            lambda name=name: stage.rdma.by_name(RdmaName(name)) is not None,
            within=PATIENCE,
            what=f"the kernel to bring {name} home from a namespace that is gone",
        )


def test_what_cannot_be_moved_or_changed_says_why(stage: Stage) -> None:
    with pod() as (handle, _):
        with pytest.raises(Unsupported, match="disassociate"):
            stage.rdma.move(stage.index("siw_veth"), handle)
        with pytest.raises(Busy, match="shared by all"):
            stage.rdma.set_exclusive(False)
    assert stage.rdma.exclusive()
    with pytest.raises(Refused, match="EEXIST"):
        stage.rdma.add_link("rxe", RdmaName("rxe_two"), IfName("rva"))
    with pytest.raises(NotFound, match="on 'nosuch' of the host"):
        stage.rdma.add_link("rxe", RdmaName("rxe_two"), IfName("nosuch"))
    with pytest.raises(Unsupported, match="counts nothing"):
        stage.rdma.statistics(stage.index("siw_veth"), 1)
    with pytest.raises(Unsupported, match="it has no rdma_tx_bytes"):
        stage.rdma.set_optional_counters(stage.index("rxe_vf0"), 1, ["rdma_tx_bytes"])


def test_devices_that_come_go_and_move_are_heard_of(stage: Stage) -> None:
    def hears(what: str) -> None:
        wait_until(lambda: monitor.read() is RESCAN, within=PATIENCE, what=f"to hear of {what}")

    index = stage.index("rxe_veth")
    with pod() as (handle, inside), host_netns() as home, LinkMonitor() as monitor:
        monitor.read()
        stage.rdma.move(index, handle)
        hears("a device that left")
        inside.move(index, home)
        hears("a device that came home")
        stage.rdma.delete_link(stage.index("siw_veth"))
        hears("a device that is gone")
        stage.rdma.add_link("siw", RdmaName("siw_veth"), IfName("rvb"))
        hears("a device that is new")


def test_the_command_lists_ports_and_gids(stage: Stage) -> None:
    told = json.loads(run("knd", "devices", "-o", "json"))
    ports = {row["rdma"]: row for row in told["rdma"]}
    assert ports.keys() == stage.made_on.keys()
    assert {row["told_by"] for row in ports.values()} == {"verbs"}
    gids = {(row["rdma"], row["gid"]) for row in told["gids"]}
    assert ("rxe_vf0", f"::ffff:{ADDRESS.format(1)}") in gids
