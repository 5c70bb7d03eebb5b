"""A traffic generator that knows exactly what it sent.

Invariant: it counts frames times length at its own send calls; it opens no BPF object and reads no
statistics, so what it says can be held against what the agent counted.

Run as a process of its own: `python -m kndsim.traffic` reads one JSON line, the list of flows, and then
commands, a line each, answered by a JSON line:

    mark   the frames sent of each flow so far
    stop   end sending, then the same
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

UDP_OVERHEAD = {4: 14 + 20 + 8, 6: 14 + 40 + 8}
"""Bytes of a frame before the payload: Ethernet, IP without options, UDP."""
_CLONE_NEWNET = 0x40000000
_PAUSE = 0.004
"""Seconds between rounds: about 250 frames a second and flow, slow enough that nothing is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One class of traffic one way: UDP from a netns to an address in another."""

    name: str
    sender: Path
    receiver: Path
    source: str
    destination: str
    port: int
    dscp: int
    payload: int

    @property
    def version(self) -> int:
        return 6 if ":" in self.destination else 4

    @property
    def frame(self) -> int:
        """Bytes of one frame on the wire, without preamble and checksum."""
        return UDP_OVERHEAD[self.version] + self.payload


def socket_in(netns: Path, version: int) -> socket.socket:
    """A UDP socket opened inside a netns by a thread that enters it and ends."""
    made: list[socket.socket] = []
    problems: list[OSError] = []

    def body() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with netns.open("rb") as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                problems.append(OSError(ctypes.get_errno(), f"setns {netns}"))
                return
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        made.append(socket.socket(family, socket.SOCK_DGRAM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]
    return made[0]


def open_sinks(flows: list[Flow]) -> list[socket.socket]:
    """A bound socket for every place that flows go to, never read: a full buffer drops quietly, where a
    closed port would answer with ICMP, which nobody counted."""
    sinks = []
    for receiver, destination, port in sorted({(f.receiver, f.destination, f.port) for f in flows}):
        sink = socket_in(receiver, 6 if ":" in destination else 4)
        sink.bind((destination, port))
        sinks.append(sink)
    return sinks


class Sender:
    """One flow's socket and count."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.frames = 0
        self._socket = socket_in(flow.sender, flow.version)
        if flow.version == 6:
            self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, flow.dscp << 2)
        else:
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, flow.dscp << 2)
        self._socket.bind((flow.source, 0))
        self._socket.connect((flow.destination, flow.port))
        self._payload = os.urandom(flow.payload)

    def send(self) -> None:
        self._socket.send(self._payload)
        self.frames += 1

    def close(self) -> None:
        self._socket.close()


def main() -> None:
    flows = [
        Flow(**{**item, "sender": Path(item["sender"]), "receiver": Path(item["receiver"])})
        for item in json.loads(sys.stdin.readline())
    ]
    sinks = open_sinks(flows)
    senders = [Sender(flow) for flow in flows]
    print(json.dumps({"ready": len(senders)}), flush=True)
    try:
        while True:
            for sender in senders:
                sender.send()
            readable, _, _ = select.select([sys.stdin], [], [], _PAUSE)
            if not readable:
                continue
            command = sys.stdin.readline().strip()
            print(json.dumps(report(senders)), flush=True)
            if command != "mark":
                return
    finally:
        for sender in senders:
            sender.close()
        for sink in sinks:
            sink.close()


def report(senders: list[Sender]) -> dict[str, object]:
    return {
        "at": time.monotonic(),
        "frames": {sender.flow.name: sender.frames for sender in senders},
    }


def encode(flows: list[Flow]) -> str:
    """The first line such a process reads."""
    return json.dumps(
        [{**asdict(flow), "sender": str(flow.sender), "receiver": str(flow.receiver)} for flow in flows]
    )


if __name__ == "__main__":
    main()
