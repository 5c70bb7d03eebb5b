"""A pod that wants far more than its limit, and another pod of the same host that wants what it may have."""

from __future__ import annotations

import socket

from kndsim.waiting import wait_until
from tests.kernel.limit_traffic import udp
from tests.kernel.limited_pair import Pair

DATAGRAMS, PAYLOAD = 500, 1000
_HEADERS = 42


def nothing_lost_beside_a_flood(flooding: Pair, other: Pair) -> None:
    """The other's datagrams, at a rate below its limit, all arrive and are counted as its own; the flood is
    cut meanwhile."""
    flooding.limit(egress=2)
    other.limit(egress=100)
    dropped = flooding.accounting.limits.dropped
    with (
        udp(flooding.pod, flooding.host, flooding.host_address),
        other.pod.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender,
        other.host.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sink,
    ):
        sink.bind((other.host_address, 9))
        sink.settimeout(20)
        sender.connect((other.host_address, 9))
        before, counted = dropped([flooding.slot])[flooding.slot], other.egress_bytes()
        for number in range(DATAGRAMS):
            content = number.to_bytes(4, "big").ljust(PAYLOAD, b"-")
            sender.send(content)
            # The next one waits for it: far below the limit, whatever the machine does.
            assert sink.recv(2 * PAYLOAD) == content
        wait_until(
            lambda: dropped([flooding.slot])[flooding.slot].packets[0] > before.packets[0],
            within=60.0,
            what="a flood that is cut",
        )
        assert dropped([other.slot])[other.slot].packets == (0, 0)
        mine = other.egress_bytes() - counted
        # ARP and IPv6 say a little of their own meanwhile.
        assert 0 <= mine - DATAGRAMS * (PAYLOAD + _HEADERS) < 2000
