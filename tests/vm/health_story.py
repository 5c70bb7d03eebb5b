"""What happens in the guest: an agent, and what is done to its devices. Prints what was seen, as JSON.

Run in a guest with igb ports as `python -m tests.vm.health_story`. Cables are pulled from outside: what is
wanted is written to CABLES, a line each, `PORT pull` or `PORT plug`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kndsim.kubelet_health import Health
from kndsim.netns import in_netns
from kndsim.node import ClaimSpec, SimNode, SimPod, interface
from kndsim.runtime_model import RuntimeMode
from kndsim.waiting import wait_until_async
from tests.vm.provisioning_story import BUS, FAR, NEAR, borrow_udev, name_of, number, sh, write
from tests.vm.story import Told

CABLES = Path("/run/knd-cables")
PATIENCE = 120.0
START = 400.0
"""The programs are compiled first."""
NEAR_PORT = 0
SIMULATED = 7
OWN, NOBODY = "198.18.0.2", "198.18.0.9"
NEAR_VFS = ("pci-0000-21-10-0", "pci-0000-21-10-2")
FAR_VFS = ("pci-0000-41-10-0", "pci-0000-41-10-2")
POLICY = f"""apiVersion: knd.internal/v1alpha1
kind: NodePolicy
sriov:
  - match: {{addresses: ["{NEAR}"]}}
    vfs: 2
    vf: {{spoofCheck: false}}
  - match: {{addresses: ["{FAR}"]}}
    external: true
    vfs: 2
health:
  noCarrier: {{afterSeconds: 1, untilSeconds: 3}}
  noDriver: {{afterSeconds: 1, untilSeconds: 1}}
  gone: {{afterSeconds: 1, untilSeconds: 1}}
  reset: {{untilSeconds: 1}}
  firmware: {{untilSeconds: 1}}
"""


def bind(address: str, *, bound: bool) -> None:
    act = "bind" if bound else "unbind"
    (BUS.parent / f"drivers/igbvf/{act}").write_text(address)


def break_reporter(file: Path) -> None:
    """The kernel refuses the write when the reporter could not be mended at once, as it was told to fail."""
    with contextlib.suppress(OSError):
        file.write_text("broken")


def ask_for_a_neighbour() -> None:
    """Who has that address? Nobody, but the question goes out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.sendto(b"knd", (NOBODY, 9))


def simulate() -> None:
    sh("modprobe", "netdevsim")
    if not Path("/sys/kernel/debug/netdevsim").is_dir():
        sh("mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug")


def address_of(device: str) -> str:
    domain, bus, slot, function = device.removeprefix("pci-").split("-")
    return f"{domain}:{bus}:{slot}.{function}"


class Story(Told):
    async def until(self, what: str, condition: Callable[[], object]) -> None:
        try:
            await wait_until_async(condition, PATIENCE, what)
        except AssertionError as error:
            raise AssertionError(
                f"{self.node.agent.tail(60)}\n{self.taints()}\n"
                f"{self.node.kubelet.health(SimNode.driver)}\n{error}"
            ) from error

    # --- looked at ----------------------------------------------------------------------------------

    def taints(self) -> dict[str, list[str]]:
        """Of every published device, without the driver's name."""
        slices = self.node.api.slices(SimNode.driver, self.node.name)
        return {
            device["name"]: sorted(t["key"].removeprefix("knd.internal/") for t in device.get("taints", ()))
            for each in slices
            for device in each["spec"].get("devices", ())
        }

    def health(self, device: str) -> Health:
        known = self.node.kubelet.health(SimNode.driver)
        return known.get((self.node.name, device), Health(status="Unknown"))

    def events(self, kind: str, name: str) -> list[str]:
        """Reasons, by when each was told first."""
        return [
            each["reason"]
            for each in sorted(self.node.api.events(), key=lambda event: event["firstTimestamp"])
            if (each["involvedObject"]["kind"], each["involvedObject"]["name"]) == (kind, name)
        ]

    def conditions(self, claim: str) -> dict[str, str]:
        devices = self.node.api.claim("default", claim).get("status", {}).get("devices", [])
        return {c["type"]: c["status"] for each in devices for c in each.get("conditions", ())}

    def slice_writes(self) -> int:
        """Of those with devices in them."""
        written = (each for each in self.node.api.writes() if each.resource == "resourceslices")
        return sum(1 for each in written if each.body and each.body["spec"].get("devices"))

    def links_of(self, pod: SimPod) -> list[str]:
        """The netdevs in a pod, by the bus address they hang on."""
        assert pod.sandbox is not None
        done = subprocess.run(
            ["nsenter", f"--net={pod.sandbox.netns_path}", "ip", "-j", "-d", "link"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        return [link["parentdev"] for link in json.loads(done.stdout) if link.get("parentdev")]

    def packets(self, device: str) -> int:
        """Counted of it by the agent's programs."""
        _, text = self.node.agent.get("/metrics")
        lines = [line for line in text.splitlines() if line.startswith("knd_pod_network_packets_total{")]
        return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if f'device="{device}"' in line)

    def sends(self, pod: SimPod, device: str) -> bool:
        """Whether what the pod sends is counted. Pods here are silent by themselves."""
        assert pod.sandbox is not None
        in_netns(pod.sandbox.netns_path, ask_for_a_neighbour)
        return self.packets(device) > 0

    # --- chapters -----------------------------------------------------------------------------------

    async def begin(self) -> None:
        await self.node.start_agent(seconds=START)
        await self.until("four VFs published", lambda: set(NEAR_VFS + FAR_VFS) <= self.taints().keys())
        await self.until("all of them well", lambda: not any(self.taints().values()))

    async def pod_with(self, name: str, device: str) -> SimPod:
        spec = ClaimSpec(
            name=name,
            requests={"net": lambda each: each["name"] == device},
            parameters={"": interface(addresses=[f"{OWN}/24"])},
        )
        return self.node.schedule(name, [spec])

    async def cable(self) -> None:
        """Pulled under a pod, then plugged in again."""
        pod = await self.node.start_pod(await self.pod_with("wired", NEAR_VFS[0]))
        await self.until("well before", lambda: self.health(NEAR_VFS[0]).status == "Healthy")
        before = self.slice_writes()
        self.pull(plugged=False)
        await self.until("a taint on the port's VFs", lambda: all(self.taints()[n] for n in NEAR_VFS))
        await self.until("kubelet knows", lambda: self.health(NEAR_VFS[0]).status == "Unhealthy")
        await self.until("the claim says so", lambda: self.conditions("wired").get("Healthy") == "False")
        self.note("pulled", {"taints": self.taints(), "message": self.health(NEAR_VFS[0]).message})
        self.note("devices while pulled", self.rows())
        self.pull(plugged=True)
        await self.until("no taint any more", lambda: not any(self.taints().values()))
        await self.until("kubelet knows", lambda: self.health(NEAR_VFS[0]).status == "Healthy")
        await self.until("the claim says so", lambda: self.conditions("wired").get("Healthy") == "True")
        about = (("Node", self.node.name), ("ResourceClaim", "wired"), ("Pod", "wired"))
        await self.until("all are told", lambda: all(len(self.events(*each)) >= 2 for each in about))
        self.note("slice writes of a flap", self.slice_writes() - before)
        told = {
            "node": self.events("Node", self.node.name),
            "claim": self.events("ResourceClaim", "wired"),
            "pod": self.events("Pod", "wired"),
        }
        self.note("told of the cable", told)
        self.note("still in the pod", self.links_of(pod))
        await self.node.delete_pod(pod)

    def rows(self) -> dict[str, Any]:
        done = self.node.knd("devices", f"--policy={self.node.policy_file}", "-o", "json")
        return {row["device"]: row for row in json.loads(done.stdout)["rows"]}

    def pull(self, *, plugged: bool) -> None:
        with CABLES.open("a") as file:
            file.write(f"{NEAR_PORT} {'plug' if plugged else 'pull'}\n")

    async def reporter(self) -> None:
        """A devlink health reporter says error, and is mended."""
        device, told = f"nsim-{SIMULATED}-port-1", f"netdevsim/netdevsim{SIMULATED}"
        health = Path(f"/sys/kernel/debug/netdevsim/netdevsim{SIMULATED}/health")
        await asyncio.to_thread(Path("/sys/bus/netdevsim/new_device").write_text, f"{SIMULATED} 1")
        await self.until("the simulated port is offered", lambda: self.taints().get(device) == [])
        (health / "fail_recover").write_text("Y")
        await asyncio.to_thread(break_reporter, health / "break_health")
        await self.until("a taint", lambda: self.taints()[device] == ["firmware"])
        self.note("reporter", self.rows()[device]["health"])
        (health / "fail_recover").write_text("N")
        await asyncio.to_thread(sh, "devlink", "health", "recover", told, "reporter", "dummy")
        await self.until("no taint any more", lambda: self.taints()[device] == [])
        await asyncio.to_thread(Path("/sys/bus/netdevsim/del_device").write_text, str(SIMULATED))
        await self.until("it is offered no more", lambda: device not in self.taints())

    async def unbound_while_prepared(self) -> None:
        """The driver is taken from a VF that a claim has and no pod yet; the pod then gets it whole."""
        device = FAR_VFS[0]
        pod = await self.node.prepare(await self.pod_with("early", device))
        await asyncio.to_thread(bind, address_of(device), bound=False)
        await self.until("a taint", lambda: "no-driver" in self.taints()[device])
        await self.until("kubelet knows why", lambda: "igbvf" in self.health(device).message)
        self.note("unbound", {"taints": self.taints(), "message": self.health(device).message})
        await asyncio.to_thread(bind, address_of(device), bound=True)
        await self.until("no taint any more", lambda: not self.taints()[device])
        await self.until("kubelet knows", lambda: self.health(device).status == "Healthy")
        await self.until("the claim was told", lambda: len(self.events("ResourceClaim", "early")) >= 2)
        self.note("told of the driver", self.events("ResourceClaim", "early"))
        pod = await self.node.start_pod(pod)
        self.note("in the pod after all", self.links_of(pod))
        await self.until("it is counted", lambda: self.sends(pod, device))
        await self.gone_under_a_pod(pod, device)

    async def gone_under_a_pod(self, pod: SimPod, device: str) -> None:
        """The VFs of a running pod's PF are taken away by hand, and made again."""
        await asyncio.to_thread(write, FAR, 0)
        await self.until("a taint", lambda: "gone" in self.taints().get(device, ()))
        await self.until("kubelet knows why", lambda: "was removed" in self.health(device).message)
        self.note("gone", {"taints": self.taints(), "message": self.health(device).message})
        self.note("nothing is left in the pod", self.links_of(pod))
        await asyncio.to_thread(write, FAR, 2)
        await self.until("it is in the pod again", lambda: address_of(device) in self.links_of(pod))
        await self.until("no taint any more", lambda: not self.taints()[device])
        await self.until("kubelet knows", lambda: self.health(device).status == "Healthy")
        await self.until("it is counted again", lambda: self.sends(pod, device))
        await self.until("the pod was told", lambda: len(self.events("Pod", "early")) >= 2)
        self.note("told of the loss", self.events("Pod", "early"))
        await self.node.delete_pod(pod)
        await self.until("it is offered again", lambda: not self.taints()[device])

    async def free_one_unbound(self) -> None:
        device = FAR_VFS[1]
        await self.until("it is there", lambda: self.taints().get(device) == [])
        await asyncio.to_thread(bind, address_of(device), bound=False)
        await self.until("a taint", lambda: self.taints().get(device) == ["no-driver"])
        await asyncio.to_thread(bind, address_of(device), bound=True)
        await self.until("offered again", lambda: self.taints().get(device) == [])
        both = {"DeviceUnhealthy", "DeviceHealthy"}
        await self.until("the node was told", lambda: both <= set(self.events("Node", self.node.name)))
        self.note("told of a free one", self.events("Node", self.node.name))

    async def made_anew_by_others(self) -> None:
        """Between two looks: the number is the same, the VFs are not."""
        self.note("made by knd", self.ports()[NEAR]["made_by"])
        os.kill(self.node.agent.pid, signal.SIGSTOP)
        try:
            await asyncio.to_thread(lambda: (write(NEAR, 0), write(NEAR, 2)))
        finally:
            os.kill(self.node.agent.pid, signal.SIGCONT)
        await self.until("no more claimed", lambda: self.ports()[NEAR]["made_by"] == "others")
        self.note("made by others", [number(NEAR), self.ports()[NEAR]["why_not"]])

    def ports(self) -> dict[str, Any]:
        done = self.node.knd("devices", f"--policy={self.node.policy_file}", "-o", "json")
        return {row["port"]: row for row in json.loads(done.stdout)["ports"]}


async def main() -> None:
    sh("ip", "link", "set", name_of(FAR) or "", "up")
    write(FAR, 2)
    simulate()
    sh("udevadm", "settle")
    async with SimNode(mode=RuntimeMode.POD_RPC, policy=POLICY) as node:
        borrow_udev(node.root)
        story = Story(node)
        try:
            await story.begin()
            for chapter in (
                story.cable,
                story.reporter,
                story.unbound_while_prepared,
                story.free_one_unbound,
                story.made_anew_by_others,
            ):
                await chapter()
        finally:
            print(json.dumps(story.seen | {"log": node.agent.tail(400)}))


if __name__ == "__main__":
    asyncio.run(main())
