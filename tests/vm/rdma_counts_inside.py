"""Run in a guest by test_rdma_counts: real soft RoCE, whose packets the kernel's stack sees, so that three
counts of the same traffic can be held against each other: the device's, BPF's, and what was billed.

Invariant: what a device counted is judged by what rdma(8) says of it, never by the agent.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driver.execute.meters import NodeMeters
from driver.execute.probe import Host
from driver.execute.target import Target, open_target
from driver.journal.ledger import Ledger
from driver.lifecycle.metering import Metering
from driver.lifecycle.usage import owner_of
from driver.model import Attachment, AttachmentState, BootId, Preparation
from driver.rdma import RdmaBinding, RdmaMode
from hw.model import DeviceKind, RdmaName
from hw.netns import host_netns, open_netns
from hw.rdma.netlink import RdmaSocket
from hw.sysfs import Sysfs
from hw.sysfs_of import sysfs_of
from hw.udev import Udev
from kndsim.agent import wait_until
from kndsim.demo.choice import PhysicalFunction
from kndsim.demo.devices import Devices
from kndsim.demo.sriov import make_vfs
from kndsim.netns import delete_netns
from kndsim.node import ClaimSpec, SimNode, SimPod, interface
from tests.node.node_stage import node
from tests.unit.journal_values import Records, attachment, preparation

pytestmark = pytest.mark.timeout(900)

PF = "0000:21:00.0"
TRAFFIC = ("sent_pkts", "rcvd_pkts", "sent_bytes", "rcvd_bytes", "rdma_sends", "rdma_recvs")
PATIENCE = 240.0
"""Seconds: meters are read every half minute, on a processor that is emulated."""
_SERIES = re.compile(r"^(knd_\w+)\{(.*)\} (\d+)$", re.MULTILINE)


def run(*argv: str, netns: Path | None = None, check: bool = True) -> str:
    entered = ["nsenter", f"--net={netns}", *argv] if netns is not None else list(argv)
    done = subprocess.run(entered, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert not check or done.returncode == 0, f"{entered}: {done.stdout}{done.stderr}"
    return done.stdout


def counted(device: str, netns: Path | None = None) -> dict[str, int]:
    """What rdma(8) says."""
    (port,) = json.loads(run("rdma", "-j", "statistic", "show", "link", f"{device}/1", netns=netns))
    return {name: value for name, value in port.items() if isinstance(value, int)}


def devices(netns: Path | None = None) -> list[str]:
    return [each["ifname"] for each in json.loads(run("rdma", "-j", "dev", netns=netns) or "[]")]


def inside(netns: Path, *argv: str) -> list[str]:
    """A command in a namespace, with the /sys that belongs to it: libibverbs looks there."""
    script = 'mount -t sysfs none /sys && exec "$@"'
    return ["nsenter", f"--net={netns}", "unshare", "-m", "sh", "-c", script, "sh", *argv]


def gid_index(device: str, netns: Path) -> str:
    """Of the RoCE v2 entry of an IPv4 address."""
    script = (
        f"cd /sys/class/infiniband/{device}/ports/1 && for i in $(ls gids); do"
        ' case "$(cat gids/$i)" in *ffff:c612*) grep -q v2 gid_attrs/types/$i 2>/dev/null && echo $i;; esac;'
        " done"
    )
    return run(*inside(netns, "sh", "-c", script)).split()[0]


def ping_pong(server: tuple[str, Path], client: tuple[str, Path], address: str, rounds: int) -> None:
    """ibv_rc_pingpong between two namespaces, of one packet each way."""

    def argv(end: tuple[str, Path], *more: str) -> list[str]:
        device, netns = end
        options = ["-d", device, "-g", gid_index(device, netns), "-n", str(rounds), "-s", "1024", *more]
        return inside(netns, "timeout", f"{PATIENCE:.0f}", "ibv_rc_pingpong", *options)

    one, other = argv(server), argv(client, address)
    waiting = subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_until(lambda: ":18515" in run("ss", "-Htln", netns=server[1]), "a server that listens", PATIENCE)
        done = subprocess.run(other, capture_output=True, text=True, check=False, timeout=2 * PATIENCE)
        said, _ = waiting.communicate(timeout=PATIENCE)
    finally:
        # Not killed: timeout passes the signal on to what it runs.
        waiting.terminate()
        waiting.wait()
    assert done.returncode == 0, f"{done.returncode} {done.stdout}{done.stderr}{said}"


def exposed(sim: SimNode) -> dict[tuple[str, str, str, str], int]:
    """Series by name, pod, direction and kind (or counter), of classes together; of RDMA the driver's own
    counters alone, as port counters tell of the same packets."""
    found: dict[tuple[str, str, str, str], int] = {}
    for name, labels, value in _SERIES.findall(sim.agent.get("/metrics")[1]):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if pairs.get("source") == "rdma-port":
            continue
        kind = pairs.get("kind", pairs.get("counter", ""))
        key = (name, pairs.get("pod", ""), pairs.get("direction", ""), kind)
        found[key] = found.get(key, 0) + int(value)
    return found


@pytest.fixture(scope="module")
def made() -> Iterator[Devices]:
    (name,) = os.listdir(f"/sys/bus/pci/devices/{PF}/net")
    with make_vfs(PhysicalFunction(address=PF, name=name, total_vfs=7), 2) as devices_made:
        policy = f"{devices_made.policy}rdma: {{software: rxe, loadModules: true}}\n"
        yield replace(devices_made, policy=policy)


async def start(sim: SimNode, number: int) -> SimPod:
    config = interface(name="net1", addresses=[f"198.18.0.{number}/24"])
    claim = ClaimSpec(name=f"nic-{number}", parameters={"": config})
    return await sim.start_pod(sim.schedule(f"pod-{number}", [claim]), seconds=PATIENCE)


def netns_of(pod: SimPod) -> Path:
    assert pod.sandbox is not None
    return Path(pod.sandbox.netns_path)


def billed(sim: SimNode, pod: str) -> dict[str, int]:
    with Ledger.open_read_only(sim.root / "var/lib/knd/ledger.sqlite") as ledger:
        return {row.counter: row.total for row in ledger.counters(pod=pod) if row.meter.source == "rdma-hw"}


def agrees(sim: SimNode, name: str, end: tuple[str, Path]) -> bool:
    """Whether the pod's series show what its device has counted by now."""
    now, device = exposed(sim), counted(*end)
    return all(
        now.get(("knd_pod_rdma_packets_total", name, direction, "")) == device[counter]
        for direction, counter in (("egress", "sent_pkts"), ("ingress", "rcvd_pkts"))
    )


def test_each_pod_is_billed_what_its_device_counted_and_bpf_saw_the_same(made: Devices) -> None:
    async def story() -> None:
        async with node(made, start=False, request_timeout=30.0) as sim:
            await sim.start_agent(seconds=PATIENCE)
            pods = [await start(sim, number) for number in (1, 2)]
            (one,), (two,) = (devices(netns_of(pod)) for pod in pods)
            ends = (one, netns_of(pods[0])), (two, netns_of(pods[1]))
            try:
                await asyncio.to_thread(ping_pong, *ends, "198.18.0.1", 50)
                for number, end in enumerate(ends, start=1):
                    name = f"pod-{number}"
                    await asyncio.to_thread(
                        wait_until, lambda n=name, e=end: agrees(sim, n, e), "series that agree", PATIENCE
                    )
                    now, each = exposed(sim), counted(*end)
                    assert each["sent_pkts"] >= 50
                    assert each["rcvd_pkts"] >= 50
                    assert now["knd_pod_network_packets_total", name, "egress", "roce"] == each["sent_pkts"]
                    assert now["knd_pod_network_packets_total", name, "ingress", "roce"] == each["rcvd_pkts"]
                    assert now.get(("knd_pod_unaccounted_packets_total", name, "egress", ""), 0) == 0

                await sim.kill_agent()
                await asyncio.to_thread(ping_pong, *ends, "198.18.0.1", 30)
                await sim.start_agent(seconds=PATIENCE)
                told = [counted(*end) for end in ends]
                await sim.delete_pod(pods[0])
                bill = billed(sim, "pod-1")
                assert {n: bill.get(n, 0) for n in TRAFFIC} == {n: told[0][n] for n in TRAFFIC}
                assert bill["sent_pkts"] > 80
                assert not [key for key in exposed(sim) if key[1] == "pod-1"]

                assert pods[1].sandbox is not None
                await sim.runtime.kill_pause(pods[1].sandbox)
                os.kill(pods[1].containers[0].pid, signal.SIGKILL)
                delete_netns(pods[1].sandbox.netns_path)
                await asyncio.to_thread(
                    wait_until, lambda: "pod-2" not in sim.agent.get("/metrics")[1], "pod-2's end", PATIENCE
                )
                left = billed(sim, "pod-2")
                assert 0 < left["sent_pkts"] <= told[1]["sent_pkts"]
                with Ledger.open_read_only(sim.root / "var/lib/knd/ledger.sqlite") as ledger:
                    gaps = [gap for gap in ledger.gaps(pod="pod-2") if gap.source == "rdma-hw"]
                assert gaps, "what was not read of pod-2 is no gap"
                await asyncio.to_thread(wait_until, lambda: not devices(), "no device left over", PATIENCE)
                with suppress(Exception):
                    await sim.delete_pod(pods[1])
            except BaseException:
                print(sim.agent.tail(80))
                print([(each, value) for each, value in exposed(sim).items() if each[1]])
                raise

    asyncio.run(story())


# --- shared, by what reads and writes in the agent -----------------------------------------------------


class Shared:
    """Two attachments of one soft RoCE device at home, and what the agent counts them with."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self.name, self.ledger = name, ledger
        self.preparations: dict[Any, Preparation] = {}
        self.attachments: dict[str, Attachment] = {}
        with RdmaSocket(None) as socket:
            found = socket.by_name(RdmaName(name))
        assert found is not None
        binding = RdmaBinding(
            name=RdmaName(name),
            mode=RdmaMode.SHARED,
            index=found.index,
            node_guid=found.node_guid or "",
        )
        for number in (1, 2):
            prepared = replace(preparation(number), rdma=binding, kind=DeviceKind.RDMA)
            self.preparations[prepared.key] = prepared
        book: Any = Records(self.attachments, self.preparations)
        clock: Any = SimpleNamespace(wall=iter(range(1, 10_000)).__next__)
        host = Host(Sysfs(Path("/sys")), Udev(Path("/run/udev")))
        meters = NodeMeters(host, BootId("boot"), lambda target: {}, lambda target: None)
        self.metering = Metering(book, ledger, clock, meters, lambda slot: ())

    @contextmanager
    def target(self, held: Attachment) -> Iterator[Target]:
        with (
            host_netns() as home,
            open_target(self.preparations[held.preparation], held, home, None) as found,
        ):
            yield found

    def attach(self, number: int) -> None:
        held = attachment(number, state=AttachmentState.ATTACHED)
        self.attachments[held.id] = held
        self.ledger.begin(owner_of(held, self.preparations[held.preparation], 0.0))
        with self.target(held) as target:
            self.metering.begin(target)

    def detach(self, number: int) -> None:
        held = self.attachments[f"attachment-{number}"]
        self.attachments[held.id] = replace(held, state=AttachmentState.DETACHING)
        with self.target(held) as target:
            self.metering.leave(target)
        del self.attachments[held.id]

    def sums(self) -> dict[str, int]:
        return {
            row.owner.pod.name if row.owner else "the device": row.total
            for row in self.ledger.counters()
            if row.counter == "sent_pkts"
        }


@contextmanager
def soft_roce(name: str) -> Iterator[None]:
    run("ip", "link", "add", "rx-a", "type", "veth", "peer", "name", "rx-b")
    try:
        run("ip", "address", "add", "198.18.9.1/24", "dev", "rx-a")
        for end in ("rx-a", "rx-b"):
            run("ip", "link", "set", end, "up")
        run("rdma", "link", "add", name, "type", "rxe", "netdev", "rx-a")
        yield
    finally:
        run("ip", "link", "del", "rx-a")


def talk(name: str, rounds: int) -> None:
    """To itself."""
    here = Path("/proc/self/ns/net")
    ping_pong((name, here), (name, here), "198.18.9.1", rounds)


def test_the_sum_billed_of_a_shared_device_is_never_more_than_it_counted(tmp_path: Path) -> None:
    run("modprobe", "-a", "rdma_rxe", "ib_uverbs")
    with soft_roce("soft0"), Ledger.open(tmp_path / "state" / "ledger.sqlite") as ledger:
        talk("soft0", 20)
        start_at = counted("soft0")["sent_pkts"]
        shared = Shared(ledger, "soft0")
        shared.attach(1)
        talk("soft0", 30)
        alone = counted("soft0")["sent_pkts"] - start_at
        shared.attach(2)
        talk("soft0", 40)
        together = counted("soft0")["sent_pkts"] - start_at - alone
        shared.detach(1)
        talk("soft0", 10)
        last = counted("soft0")["sent_pkts"] - start_at - alone - together
        shared.metering.settle(shared.target, all_known=True)
        assert shared.sums() == {"train-1": alone, "the device": together, "train-2": last}
        assert ledger.gaps() == ()

        # Begun anew while attached: another device under the same name.
        run("rdma", "link", "delete", "soft0")
        shared.metering.settle(shared.target, all_known=True)
        run("rdma", "link", "add", "soft0", "type", "rxe", "netdev", "rx-a")
        talk("soft0", 25)
        anew = counted("soft0")["sent_pkts"]
        shared.detach(2)
        assert sum(shared.sums().values()) <= alone + together + last + anew
        assert "rdma-hw" in {gap.source for gap in ledger.gaps()}


def test_sysfs_of_a_pod_s_netns_tells_what_netlink_tells() -> None:
    """How port counters of a device in a pod are read; soft RoCE has only the driver's own."""
    run("ip", "netns", "add", "pod-x")
    path = Path("/run/netns/pod-x")
    try:
        run("ip", "link", "add", "rx-a", "netns", "pod-x", "type", "veth", "peer", "name", "rx-b")
        run("ip", "address", "add", "198.18.9.1/24", "dev", "rx-a", netns=path)
        run("ip", "link", "set", "rx-b", "up")
        for link in ("lo", "rx-a"):
            run("ip", "link", "set", link, "up", netns=path)
        run("rdma", "link", "add", "soft1", "type", "rxe", "netdev", "rx-a", netns=path)
        with open_netns(path) as pod:
            with RdmaSocket(None) as socket:
                found = socket.by_name(RdmaName("soft1"))
                assert found is not None
                socket.move(found.index, pod)
            ping_pong(("soft1", path), ("soft1", path), "198.18.9.1", 5)
            with RdmaSocket(pod) as socket, sysfs_of(pod) as sysfs:
                told = dict(socket.statistics(found.index, 1))
                folder = "class/infiniband/soft1/ports/1/hw_counters"
                names = set(sysfs.names(folder) or ()) - {"lifespan"}
                assert {name: sysfs.integer(f"{folder}/{name}") for name in names} == told
                assert told["sent_pkts"] >= 10
            assert Sysfs(Path("/sys")).names("class/infiniband/soft1") is None
    finally:
        run("ip", "link", "del", "rx-b", check=False)
        run("ip", "netns", "del", "pod-x")
