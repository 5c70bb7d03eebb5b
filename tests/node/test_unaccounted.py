"""What a pod sends past the hooks is not counted by BPF, and is told as a number of its own."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kndsim.demo.devices import Devices
from kndsim.netns import in_netns
from kndsim.node import SimNode
from kndsim.waiting import wait_until_async
from tests.kernel.bpf_traffic import ARP_FRAME
from tests.node.node_stage import play, running

pytestmark = pytest.mark.timeout(240)

SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
PAST, SEEN = 300, 40
PATIENCE = 90.0
"""Seconds: interfaces are read every half minute."""


def send(netns: Path, count: int, *, past_the_hooks: bool) -> None:
    def work() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            sock.bind(("net1", 0))
            sock.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, past_the_hooks)
            for _ in range(count):
                sock.send(ARP_FRAME)

    in_netns(netns, work)


def egress(sim: SimNode, name: str) -> float:
    """Of all series of a name, what the pod sent."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(sim.agent.get("/metrics")[1])
        for sample in family.samples
        if sample.name == name and sample.labels["direction"] == "egress"
    )


def test_what_passes_the_hooks_by_is_told_to_the_packet_and_ends_with_the_pod() -> None:
    async def story(sim: SimNode, made: Devices) -> None:
        # First, so that the pod's end has a carrier, and a queue, from the moment that it is up.
        peer = made.wires[0].peer
        made.far.netlink(lambda ipr: ipr.link("set", index=ipr.link_lookup(ifname=peer)[0], state="up"))
        pod = await running(sim, "p", name="net1")
        assert pod.sandbox is not None
        netns = Path(pod.sandbox.netns_path)
        send(netns, SEEN, past_the_hooks=False)
        counted = egress(sim, "knd_pod_network_packets_total")
        send(netns, PAST, past_the_hooks=True)
        assert egress(sim, "knd_pod_network_packets_total") == counted >= SEEN
        await wait_until_async(
            lambda: egress(sim, "knd_pod_unaccounted_packets_total") >= PAST,
            within=PATIENCE,
            what="a series of what passed the hooks by",
        )
        assert egress(sim, "knd_pod_unaccounted_packets_total") == PAST
        # Eight bytes a packet could be its checksum and a tag.
        least = PAST * len(ARP_FRAME) - 8 * (PAST + SEEN)
        assert least <= egress(sim, "knd_pod_unaccounted_bytes_total") <= PAST * len(ARP_FRAME)
        await sim.delete_pod(pod)
        assert egress(sim, "knd_pod_unaccounted_packets_total") == 0
        rows = sim.knd("usage", "--counters", "-o", "csv").stdout.splitlines()
        sent = [row.split(",") for row in rows if ",interface,tx_packets," in row]
        assert [row[1:4] for row in sent] == [["p", "p-nic", sent[0][3]]]
        assert int(sent[0][8]) == PAST + SEEN

    play(1, story)
