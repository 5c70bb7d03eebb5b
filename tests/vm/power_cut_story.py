"""A node whose power is cut while its pods send (`before`), and the same node when it is up again (`after`):
two guests, one after the other, that have nothing in common but the disk with the agent's records.

Invariant: what a pod sent is counted here, frame by frame; the agent is asked for its ledger alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kndsim.demo.choice import PhysicalFunction
from kndsim.demo.sriov import make_vfs
from kndsim.kubelet_model import SimClaim
from kndsim.netns import in_netns
from kndsim.node import ClaimSpec, SimNode, SimPod, interface
from kndsim.runtime import RuntimeMode
from kndsim.waiting import wait_until_async

PF = "0000:21:00.0"
DISK = "/dev/vdb"
MOUNTED = Path("/mnt/records")
CLAIMS = MOUNTED / "claims.json"
"""As kubelet has what is prepared on disk, so that it can let go of it after a restart."""
PATIENCE = 240.0
IN_POD = "net1"
READ, UNREAD, YOUNG, AFTER = 500, 70, 30, 40
"""Frames: read before the cut, sent after that reading, by a pod that began then, by one after the cut."""
_FRAME = bytes.fromhex("ffffffffffff 02005e000001 88b5") + bytes(86)
"""Of a local experimental ethertype (IEEE 802): nothing answers it."""


def tell(**said: Any) -> None:
    print(json.dumps(said), flush=True)


async def start(sim: SimNode, name: str) -> SimPod:
    claim = ClaimSpec(name=f"{name}-nic", parameters={"": interface(name=IN_POD)})
    return await sim.start_pod(sim.schedule(name, [claim]), seconds=PATIENCE)


def send(pod: SimPod, frames: int) -> None:
    def body() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as opened:
            opened.bind((IN_POD, 0))
            for _ in range(frames):
                opened.send(_FRAME)

    assert pod.sandbox is not None
    assert pod.sandbox.netns_path is not None
    in_netns(pod.sandbox.netns_path, body)


def ledger(sim: SimNode) -> dict[str, Any]:
    done = sim.knd("usage", "-o", "json", "--by", "pod,attachment")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def sent(usage: dict[str, Any], pod: str) -> int:
    rows = [row for row in usage["rows"] if row["pod"] == pod and row["direction"] == "egress"]
    return sum(int(row["packets"]) for row in rows)


async def before(sim: SimNode) -> None:
    old = await start(sim, "old")
    send(old, READ)
    await wait_until_async(lambda: sent(ledger(sim), "old") >= READ, PATIENCE, "a checkpoint")
    read = time.time()
    send(old, UNREAD)
    young = await start(sim, "young")
    send(young, YOUNG)
    with CLAIMS.open("w") as file:
        json.dump([asdict(claim) for pod in (old, young) for claim in pod.claims], file)
        file.flush()
        os.fsync(file.fileno())
    tell(read=read, cut=time.time())
    await asyncio.Event().wait()


async def after(sim: SimNode) -> None:
    found = ledger(sim)
    held = [SimClaim(**claim) for claim in json.loads(CLAIMS.read_text())]
    await sim.kubelet.unprepare(sim.driver, held, force=True)
    pod = await start(sim, "after")
    send(pod, AFTER)
    await sim.delete_pod(pod)
    tell(up=time.time(), found=found, later=ledger(sim))


async def story(what: str) -> None:
    state = MOUNTED / "knd"
    state.mkdir(exist_ok=True)
    (name,) = os.listdir(f"/sys/bus/pci/devices/{PF}/net")
    with make_vfs(PhysicalFunction(address=PF, name=name, total_vfs=7), 3) as made:
        async with SimNode(mode=RuntimeMode.POD_RPC, policy=made.policy, udev=True, state=state) as sim:
            try:
                await sim.start_agent(seconds=PATIENCE)
                await {"before": before, "after": after}[what](sim)
            except BaseException:
                print(sim.agent.tail(), file=sys.stderr, flush=True)
                raise


if __name__ == "__main__":
    MOUNTED.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", DISK, str(MOUNTED)], check=True)
    asyncio.run(story(sys.argv[1]))
