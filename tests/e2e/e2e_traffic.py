"""Traffic between pods whose amount is known from the sender alone, and the agents' word on it.

Invariant: the frames are of a traffic class that nothing else here uses, so neighbour discovery and the
like are never mixed up with them; sender and sink run in the pods themselves and need neither kubelet nor
the API server while they run.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kndsim.cluster import Cluster
from tests.e2e.e2e_agents import Agents, Count
from tests.e2e.e2e_objects import nic
from tests.e2e.e2e_space import LivePod, Space

CLASS, DSCP = "roce-data", 26
KIND = "ip"
PORT = 5001
HEADERS = 14 + 20 + 8
"""Ethernet, IPv4, UDP: what a datagram is on the wire beside its data."""
RATE = 2000
"""Datagrams a second: far below what a slow machine loses."""
_WORDS = re.compile(r"([a-z]+)=([0-9]+)")

Amounts = Mapping[tuple[str, str], tuple[int, int]]
"""Pod and direction to packets and bytes on the wire."""


@dataclass(frozen=True, slots=True)
class Station:
    """A running pod with one NIC, net1."""

    pod: LivePod
    address: str


@dataclass(frozen=True, slots=True)
class Sent:
    """So many frames of so many bytes on the wire each, all of which arrived."""

    sender: str
    receiver: str
    frames: int
    frame: int


def two_stations(
    space: Space, cluster: Cluster, *, apart: bool, mtu: int = 1400, first_class: str = ""
) -> tuple[Station, Station]:
    """On two nodes, or both on one. first_class: of the first one's device; "": the ground's."""
    nodes = list(cluster.nodes)
    where = (nodes[0], nodes[1] if apart else nodes[0])
    classes = (first_class, "")
    pods = [
        space.nic_pod(
            name, nic("net1", f"198.18.1.{number}/24", mtu=mtu), node=node, device_class=device_class
        )
        for number, (name, node, device_class) in enumerate(
            zip(("one", "two"), where, classes, strict=True), 1
        )
    ]
    one, two = (Station(pod.running(), f"198.18.1.{number}") for number, pod in enumerate(pods, 1))
    _reach(one, two)
    return one, two


def _reach(one: Station, two: Station) -> None:
    """Neighbours known on both sides: frames that wait for an answer to ARP may be lost."""
    one.pod.space.until(
        lambda: one.pod.exec("ping", "-c", "1", "-W", "1", two.address).code == 0,
        15,
        lambda: f"{two.address} answers {one.address}: {one.pod.links()} {two.pod.links()}",
    )


def send(sender: Station, receiver: Station, *, frames: int, size: int) -> Sent:
    """Exactly so many datagrams with so many bytes of data; returns when all have arrived."""
    with sinking(receiver, str(frames)):
        out = sender.pod.out(
            *("knd-tool", "send", receiver.address, str(PORT), str(frames), str(size), str(DSCP), str(RATE)),
            within=15 + frames / RATE,
        )
        assert _numbers(out)["sent"] == frames
        receiver.pod.space.until(
            lambda: _numbers(receiver.pod.out("cat", "/got")).get("received") == frames,
            10,
            lambda: f"{frames} frames of {sender.pod.name} arrive: {receiver.pod.out('cat', '/got')}",
        )
    return Sent(sender.pod.name, receiver.pod.name, frames, size + HEADERS)


@contextlib.contextmanager
def sinking(station: Station, *count: str) -> Iterator[None]:
    """A sink in the pod; what it says is in /got."""
    _start(station, "sink", f"knd-tool sink {PORT} {' '.join(count)} >/got 2>&1")
    station.pod.space.until(
        lambda: "listening" in station.pod.out("cat", "/got"), 10, f"{station.pod.name} listens"
    )
    try:
        yield
    finally:
        station.pod.exec("sh", "-c", "kill $(cat /sink)")


def _start(station: Station, name: str, command: str) -> None:
    """In the background, as a child of the container's first process; its pid is in /NAME."""
    station.pod.out("sh", "-c", f": >/got; exec </dev/null; {command} & echo $! >/{name}")


class Stream:
    """Frames that flow from one pod to another until they are stopped."""

    def __init__(self, sender: Station, receiver: Station, size: int = 200, rate: int = 200) -> None:
        self.sender = sender
        self.receiver = receiver
        self._size = size
        self._rate = rate

    @contextlib.contextmanager
    def flowing(self) -> Iterator[list[Sent]]:
        """The list holds what was sent, once the body is done."""
        result: list[Sent] = []
        with sinking(self.receiver):
            command = f"knd-tool send {self.receiver.address} {PORT} 1000000 {self._size} {DSCP} {self._rate}"
            _start(self.sender, "sender", f"{command} >/sent 2>&1")
            try:
                yield result
            finally:
                self.sender.pod.exec("sh", "-c", "kill $(cat /sender)")
            said = self.sender.pod.space.until(
                lambda: _numbers(self.sender.pod.out("cat", "/sent")), 10, "the sender says what it sent"
            )
        got = self.receiver.pod.space.until(
            lambda: _numbers(self.receiver.pod.out("cat", "/got")).get("received"),
            10,
            "the sink says what came",
        )
        assert said["sent"] > 0
        assert got == said["sent"], "frames were lost on the way"
        result.append(Sent(self.sender.pod.name, self.receiver.pod.name, said["sent"], self._size + HEADERS))


def _numbers(text: str) -> Mapping[str, int]:
    return {word: int(number) for word, number in _WORDS.findall(text) if word in ("sent", "received")}


# --- the agents' word -------------------------------------------------------------------------------


def expected(sent: Iterable[Sent]) -> Amounts:
    packets: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for each in sent:
        for key in ((each.sender, "egress"), (each.receiver, "ingress")):
            packets[key] += each.frames
            size[key] += each.frames * each.frame
    return {key: (packets[key], size[key]) for key in packets}


def amounts(counts: Iterable[Count]) -> Amounts:
    """Of the frames' own class, whatever they were taken for: a frame counted as another kind shows."""
    packets: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for each in counts:
        if each.traffic_class == CLASS:
            assert each.kind == KIND, each
            packets[each.pod, each.direction] += each.packets
            size[each.pod, each.direction] += each.bytes
    return {key: (packets[key], size[key]) for key in packets}


def counts_are(agents: Agents, space: Space, sent: Sequence[Sent]) -> None:
    """The metrics of the pods that live say exactly what was sent, neither less nor more."""
    nodes = list(agents.cluster.nodes)

    def now() -> Amounts:
        return amounts(count for node in nodes for count in agents.counted(node, space.name))

    wanted = expected(sent)
    agents.until(lambda: now() == wanted, 5, lambda: f"counted {now()}, sent {wanted}")


def accounts_are(agents: Agents, space: Space, sent: Sequence[Sent]) -> None:
    """The ledgers say the same, of pods that are gone."""
    nodes = list(agents.cluster.nodes)

    def now() -> Amounts:
        return amounts(count for node in nodes for count in agents.usage(node, space.name))

    wanted = expected(sent)
    agents.until(lambda: now() == wanted, 10, lambda: f"accounted {now()}, sent {wanted}")
