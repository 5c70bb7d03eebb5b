"""Run in a guest by test_fq: fq keeps what the programs say of a limited pod's packets.

Invariant: a rate is judged over a time that begins when traffic is as it will be; being above, by what the
far end's interface took in. The guest has a clock of its own, so what is told is of fq and of us: what else
the host does is in no figure. How idle the processors were is told beside each.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bpf.cache import ProgramCache
from bpf.limits import Dropped
from driver.doctor import kernel
from driver.qos import EgressShaper
from hw.qdisc import ROOT_HANDLE, QueueStats
from kndsim.demo.devices import Devices
from kndsim.links import SimNetns
from kndsim.waiting import wait_until
from tests.kernel.limit_traffic import TCP_SHARE, Counted, echo, round_trips, tcp, udp
from tests.kernel.limited_pair import HOST_ADDRESS, SLOT, Pair, limited_pair, limited_pairs
from tests.kernel.limits_apart import nothing_lost_beside_a_flood
from tests.node.departing_pod import asking, kept_by
from tests.node.node_stage import devices, node

pytestmark = pytest.mark.timeout(600)

RATES = (20, 50, 100, 300)
"""Mb/s."""
ABOVE = 1.01
"""Times the limit, over SECONDS: what may leave at once after a pause comes on top."""
NEAR = 0.95
"""Of the payload that the limit has room for."""
WAIT = 0.010
"""Seconds that nine questions in ten wait at most for their answers, beside traffic at a limit of WAIT_FROM
or more."""
WAIT_FROM = 100
SECONDS = 2.0
QUESTIONS = 40
PATIENCE = 240.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with limited_pair(ProgramCache(tmp_path_factory.mktemp("programs")).ensure()) as made:
        yield made


def begin(pair: Pair, shaper: EgressShaper = EgressShaper.FQ) -> None:
    """What keeps a limit is chosen when there is none."""
    pair.limit()
    pair.policy = replace(pair.policy, shaper=shaper)


def root(pair: Pair) -> QueueStats:
    assert pair.target.pod is not None
    found = pair.target.pod.shaping.root(pair.ifindex)
    assert found is not None
    return found


def dropped(pair: Pair) -> Dropped:
    return pair.accounting.limits.dropped([SLOT])[SLOT]


def wire_rate(pair: Pair, arriving: Counted, seconds: float = SECONDS) -> float:
    """Mb/s that leave the pod from now on, as a veth counts: a packet of many has the headers of one."""
    started, before = time.monotonic(), pair.on_wire()
    arriving.stop.wait(seconds)
    return (pair.on_wire() - before) * 8 / 1e6 / (time.monotonic() - started)


def told_of_congestion(where: SimNetns) -> int:
    """Packets that came in marked with it (IpExt InCEPkts)."""
    text = where.run(Path("/proc/thread-self/net/netstat").read_text)
    names, values = [line.split()[1:] for line in text.splitlines() if line.startswith("IpExt:")]
    return int(dict(zip(names, values, strict=True))["InCEPkts"])


def set_ecn(where: SimNetns, asked: bool) -> None:
    where.run(lambda: Path("/proc/sys/net/ipv4/tcp_ecn").write_text(f"{int(asked)}"))


@dataclass(frozen=True, slots=True)
class Processors:
    """Ticks of all processors since the start."""

    idle: int
    all: int

    @classmethod
    def now(cls) -> Processors:
        ticks = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return cls(ticks[3], sum(ticks))

    def idle_since(self, before: Processors) -> float:
        return (self.idle - before.idle) / (self.all - before.all)


def say(what: str) -> None:
    print(f"[fq] {what}, {os.cpu_count()} emulated processors, kernel {os.uname().release}")


def test_the_doctor_tells_of_fq() -> None:
    assert kernel._try_fq() == ""


@dataclass(frozen=True, slots=True)
class Seen:
    """Of TCP at a limit: Mb/s of payload and on the wire, the idle share of the processors, packets that were
    dropped and marked, and the seconds that most questions (nine in ten) waited for less than, meanwhile."""

    goodput: float
    wire: float
    idle: float
    dropped: int
    marked: int
    usual: float
    most: float

    def __str__(self) -> str:
        return (
            f"{self.goodput:.1f}, {self.dropped} dropped, {self.marked} marked, a question waits "
            f"{self.usual * 1e3:.1f} ms, nine in ten at most {self.most * 1e3:.1f} ms, idle {self.idle:.0%}"
        )


def tcp_seen(pair: Pair, flows: int) -> Seen:
    with tcp(pair.pod, pair.host, HOST_ADDRESS, flows) as arriving:
        wait_until(lambda: arriving.bytes > 0, within=60.0, what="the first byte")
        arriving.stop.wait(SECONDS)
        lost, marked, processors = dropped(pair).packets[0], told_of_congestion(pair.host), Processors.now()
        goodput = arriving.rate(SECONDS) / 1e6
        idle = Processors.now().idle_since(processors)
        lost, marked = dropped(pair).packets[0] - lost, told_of_congestion(pair.host) - marked
        wire = wire_rate(pair, arriving)
        with echo(pair.host, HOST_ADDRESS):
            waited = round_trips(pair.pod, HOST_ADDRESS, QUESTIONS)
    return Seen(goodput, wire, idle, lost, marked, statistics.median(waited), waited[QUESTIONS * 9 // 10 - 1])


@pytest.mark.parametrize(
    ("shaper", "rate"), [*((EgressShaper.FQ, rate) for rate in RATES), (EgressShaper.HTB, WAIT_FROM)]
)
@pytest.mark.parametrize("flows", [1, 4, 32])
def test_tcp_has_its_limit_and_never_more(pair: Pair, rate: int, flows: int, shaper: EgressShaper) -> None:
    """HTB is there to be compared with."""
    begin(pair, shaper)
    pair.limit(egress=rate)
    assert (root(pair).kind, root(pair).handle) == (shaper.value, ROOT_HANDLE)
    assert pair.shaper.is_shaped(pair.target)
    seen = tcp_seen(pair, flows)
    share = seen.goodput / rate / TCP_SHARE
    say(f"{shaper} tcp {flows} at {rate}M: {share:.1%} of its share, {seen}")
    assert 0 < seen.wire < rate * ABOVE
    assert share >= NEAR
    assert rate < WAIT_FROM or seen.most <= WAIT


@pytest.mark.parametrize("shaper", [EgressShaper.FQ, EgressShaper.HTB])
@pytest.mark.parametrize("rate", [2, 5, 20])
def test_udp_is_never_above_its_limit(pair: Pair, rate: int, shaper: EgressShaper) -> None:
    begin(pair, shaper)
    pair.limit(egress=rate)
    with udp(pair.pod, pair.host, HOST_ADDRESS) as arriving:
        wait_until(lambda: arriving.bytes > 0, within=60.0, what="the first byte")
        arriving.stop.wait(1.0)
        started, handed_over = time.monotonic(), pair.egress_bytes()
        wire = wire_rate(pair, arriving)
        offered = (pair.egress_bytes() - handed_over) * 8 / 1e6 / (time.monotonic() - started)
    say(f"{shaper} udp at {rate}M: {wire:.2f} on the wire of {offered:.2f} sent")
    assert 0 < wire < rate * ABOVE


def test_congestion_is_told_to_who_listens_before_anything_is_dropped(pair: Pair) -> None:
    begin(pair)
    pair.limit(egress=WAIT_FROM)
    found: dict[bool, Seen] = {}
    for asked in (False, True):
        for end in (pair.pod, pair.host):
            set_ecn(end, asked)
        found[asked] = tcp_seen(pair, 4)
        say(f"tcp 4 at {WAIT_FROM}M, ECN {asked}: {found[asked]}")
        assert found[asked].goodput >= NEAR * WAIT_FROM * TCP_SHARE
        assert found[asked].most <= WAIT
    assert found[False].marked == 0
    assert found[True].marked > 0
    assert found[True].dropped <= found[False].dropped


def test_a_limit_changes_in_place_within_a_second_and_nothing_counted_is_lost(pair: Pair) -> None:
    begin(pair)
    pair.limit(egress=RATES[0])
    with udp(pair.pod, pair.host, HOST_ADDRESS) as arriving:
        wait_until(lambda: arriving.bytes > 0, within=60.0, what="the first byte")
        for rate in (RATES[1], 5, RATES[0]):
            lost, counted, queue = dropped(pair).packets[0], pair.egress_bytes(), root(pair)
            pair.limit(egress=rate)
            arriving.stop.wait(1.0)
            got = wire_rate(pair, arriving)
            say(f"changed to {rate}M: {got:.2f} after a second")
            assert got < rate * ABOVE
            assert dropped(pair).packets[0] >= lost
            assert pair.egress_bytes() > counted
            assert root(pair).drops >= queue.drops
            assert pair.shaper.is_shaped(pair.target)
    pair.limit()
    assert pair.target.pod is not None
    found = pair.target.pod.shaping.root(pair.ifindex)
    assert found is None or found.handle != ROOT_HANDLE


def test_every_byte_is_counted_and_either_leaves_or_is_among_the_dropped(pair: Pair) -> None:
    begin(pair)
    pair.limit(egress=1)
    sender = pair.pod.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sink = pair.host.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with sender, sink:
        sink.bind((HOST_ADDRESS, 9))
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        sender.connect((HOST_ADDRESS, 9))
        before, wire, lost = pair.egress_bytes(), pair.on_wire(), dropped(pair).bytes[0]
        sent = sum(sender.send(bytes(1000)) + 42 for _ in range(2000))
        wait_until(lambda: root(pair).backlog == 0, within=30.0, what="an empty queue")
    counted, gone = pair.egress_bytes() - before, dropped(pair).bytes[0] - lost
    assert gone > 0
    # ARP and IPv6 say a little of their own meanwhile.
    assert 0 <= counted - sent < 2000
    assert abs(pair.on_wire() - wire + gone - counted) < 2000
    assert root(pair).drops == 0


def test_a_pod_far_above_its_limit_costs_another_no_packet(tmp_path: Path) -> None:
    with limited_pairs(ProgramCache(tmp_path).ensure(), 2) as pairs:
        for each in pairs:
            begin(each)
        nothing_lost_beside_a_flood(*pairs)
        assert [root(each).kind for each in pairs] == ["fq", "fq"]


def test_a_pod_that_takes_its_queue_off_has_no_more_and_is_seen(pair: Pair) -> None:
    begin(pair)
    pair.limit(egress=RATES[0])
    assert pair.target.pod is not None
    pair.target.pod.shaping.unshape(pair.ifindex)
    assert not pair.shaper.is_shaped(pair.target)
    with udp(pair.pod, pair.host, HOST_ADDRESS) as arriving:
        wait_until(lambda: arriving.bytes > 0, within=60.0, what="the first byte")
        assert wire_rate(pair, arriving) < RATES[0] * ABOVE
    pair.shaper.shape(pair.target)
    assert pair.shaper.is_shaped(pair.target)
    assert root(pair).kind == "fq"


def test_an_agent_keeps_a_claim_s_limit_by_fq_from_the_pod_s_start_to_its_end() -> None:
    async def story(made: Devices) -> None:
        async with node(made, start=False, request_timeout=30.0) as sim:
            await sim.start_agent(seconds=PATIENCE)
            assert await kept_by(sim, made, PATIENCE) == "fq"

    with devices(1) as made:
        asyncio.run(story(asking(made)))
