"""What happens in the guest: an agent that makes VFs of a simulated card in switchdev mode and gives them to
pods. Prints what was seen, as JSON.

Run in a guest as `python -m tests.vm.switchdev_story`. What is seen is told by ip(8), devlink(8) and sysfs,
never by the agent. Devices of the guest's own are not offered.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hw.devlink import Devlink, HealthEvents
from hw.devlink_codec import DevlinkHandle, PortFlavour
from hw.errors import HwError
from hw.model import MacAddress
from kndsim.kubelet import PrepareFailed
from kndsim.node import ClaimSpec, SimNode, SimPod
from kndsim.runtime_model import RuntimeMode
from kndsim.waiting import wait_until, wait_until_async
from tests.vm.provisioning_story import borrow_udev, properties, rules, sh
from tests.vm.story import Told

CARD = "netdevsim10"
HANDLE = f"netdevsim/{CARD}"
BUS = Path("/sys/bus/netdevsim")
BREAKER = Path(f"/sys/kernel/debug/netdevsim/{CARD}/health/break_health")
KILLS = (1, 2, 5)
"""Before the number is written, in the new mode, and while its VFs are finished."""
PATIENCE = 240.0
START = 420.0
MAC = "02:00:5e:00:10:01"
GUARDED = (
    "[interface.hardwareAddress, vf.vlan, vf.trust, vf.spoofCheck, vf.minRate, vf.maxRate, vf.linkState, "
    "vf.driver]"
)
WISHES: dict[str, Any] = {
    "vlan": {"id": 77, "qos": 3, "protocol": "802.1ad"},
    "minRate": "10M",
    "maxRate": "100M",
    "spoofCheck": True,
    "trust": True,
    "linkState": "disable",
}


def policy(rule: str) -> str:
    return f"""apiVersion: knd.internal/v1alpha1
kind: NodePolicy
devices:
  - match: {{names: ["pci-*"]}}
    offer: false
claims:
  allow: {GUARDED}
sriov:
  - match: {{addresses: ["{CARD}"]}}
    {rule}
"""


SWITCHED = policy("vfs: 3\n    mode: switchdev")
FEWER = policy("vfs: 2\n    mode: switchdev")
LEGACY = policy("vfs: 2\n    mode: legacy\n    vf: {vlan: 5, trust: true, spoofCheck: true}")
REMOVED = policy("vfs: 0")


def told(*argv: str) -> Any:
    return json.loads(sh(*argv) or "{}")


def links() -> dict[str, dict[str, Any]]:
    """Of the card, by the names of its ports."""
    found = told("ip", "-d", "-j", "link", "show")
    return {link["phys_port_name"]: link for link in found if link.get("parentdev") == CARD}


def vf_ports() -> list[str]:
    return sorted(name for name in links() if "vf" in name)


def number() -> int:
    return int((BUS / "devices" / CARD / "sriov_numvfs").read_text())


def picture() -> dict[str, Any]:
    """The card, but for what chance gives its ports."""
    (mode,) = told("devlink", "-j", "dev", "eswitch", "show", HANDLE)["dev"].values()
    ports = links()
    return {
        "mode": mode["mode"],
        "vfs": number(),
        "ports": {name: (link["mtu"], "UP" in link["flags"]) for name, link in ports.items()},
        "names": {name: link["ifname"] for name, link in ports.items()},
        "macs": {name: link["address"] for name, link in ports.items() if "vf" in name},
        "held": {str(vf["vf"]): vf for vf in ports["p1"].get("vfinfo_list", ())},
        "rates": told("devlink", "-j", "port", "function", "rate", "show").get("rate", {}),
    }


class Story(Told):
    def offered(self) -> dict[str, Any]:
        slices = self.node.api.slices(SimNode.driver, self.node.name)
        devices = [device for each in slices for device in each["spec"].get("devices", ())]
        return {d["name"]: d["attributes"] for d in devices if d["name"].startswith("nsim-10-")}

    def port(self) -> dict[str, Any]:
        done = self.node.knd("devices", f"--policy={self.node.policy_file}", "-o", "json")
        (row,) = (row for row in json.loads(done.stdout)["ports"] if row["port"] == CARD)
        return dict(row)

    async def until(self, what: str, condition: Callable[[], object]) -> None:
        try:
            await wait_until_async(condition, PATIENCE, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{picture()}\n{self.node.agent.tail(60)}") from error

    def is_done(self, vfs: int) -> bool:
        path = self.node.root / f"var/lib/knd/sriov/{CARD}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        return bool(record.get("done") and record["vfs"] == vfs == number())

    def schedule(self, name: str, device: str, **vf: Any) -> SimPod:
        parameters = {
            "apiVersion": "knd.internal/v1alpha1",
            "kind": "NetworkDeviceConfig",
            "interface": {"name": "net1", "addresses": ["198.18.7.1/24"], "hardwareAddress": MAC},
            "vf": vf,
        }
        spec = ClaimSpec(
            name=f"{name}-nic",
            requests={"net": lambda found: found["name"] == device},
            parameters={"": parameters},
        )
        return self.node.schedule(name, [spec])

    # --- chapters -----------------------------------------------------------------------------------

    async def made(self) -> None:
        self.note("before", picture())
        await self.node.start_agent(seconds=START)
        await self.until("three VFs", lambda: self.is_done(3) and len(vf_ports()) == 3)
        await self.until("published", lambda: len(self.offered()) == 3)
        await asyncio.to_thread(sh, "udevadm", "settle")
        self.note("made", picture())
        self.note("offered", self.offered())
        self.note("port", self.port())
        self.note("udev", dict(properties(links()["pf0vf0"]["ifname"])))

    async def devlink_itself(self) -> None:
        """Our codec and devlink(8) are asked the same."""
        handle = DevlinkHandle("netdevsim", CARD)
        with Devlink() as devlink, HealthEvents() as events:
            ours = [
                (f"{port.handle}/{port.index}", port.netdev, port.pf, port.vf)
                for port in devlink.ports()
                if port.flavour is PortFlavour.PCI_VF
            ]
            shown = told("devlink", "-j", "port", "show")["port"]
            theirs = [
                (name, port["netdev"], port["pfnum"], port["vfnum"])
                for name, port in shown.items()
                if port["flavour"] == "pcivf"
            ]
            self.note("ports of VFs", [ours, theirs])
            (first, *_) = (port for port in devlink.ports() if port.flavour is PortFlavour.PCI_VF)
            try:
                devlink.set_function(first, hw_addr=MacAddress(MAC))
            except HwError as error:
                self.note("function", str(error))
            self.note("driver", devlink.info(handle).driver)
            await asyncio.to_thread(BREAKER.write_text, "trouble")
            heard: list[bool] = []

            def hear() -> bool:
                heard.extend(each.healthy for each in events.read() or () if each.name == "dummy")
                return len(heard) >= 2

            await self.until("trouble and its end are heard of", hear)
            self.note("heard", heard)

    async def set_and_put_back(self) -> None:
        before = picture()
        pod = await self.node.start_pod(self.schedule("all", "nsim-10-vf-1", **WISHES), seconds=PATIENCE)
        self.note("set", picture())
        assert pod.sandbox is not None
        argv = ["nsenter", f"--net={pod.sandbox.netns_path}", "ip", "-j", "address", "show", "net1"]
        self.note("in pod", told(*argv)[0])
        claim = pod.claims[0].name
        await self.until("status", lambda: self.node.api.claim("default", claim)["status"].get("devices"))
        (status,) = self.node.api.claim("default", claim)["status"]["devices"]
        self.note("status", status["conditions"][0]["message"])
        await self.node.kill_agent()
        await self.node.start_agent(seconds=START)
        self.note("set after a kill", picture())
        await self.node.delete_pod(pod)
        await self.until("as before the pod", lambda: picture() == before)
        self.note("put back", [before, picture()])

    async def refused(self) -> None:
        """More than the 16 bits of Mb/s that netdevsim has for a limit."""
        before = picture()
        pod = self.schedule("no", "nsim-10-vf-0", maxRate="70G")
        try:
            await self.node.prepare(pod)
        except PrepareFailed as error:
            self.note("refusal", str(error))
        self.note("refused", [before, picture()])
        await self.node.kubelet.unprepare(self.node.driver, pod.claims, pod=pod.spec.uid)
        self.node.api.delete("pods", pod.spec.name, pod.spec.namespace)
        for claim in pod.claims:
            self.node.api.delete("resourceclaims", claim.name, claim.namespace)

    async def changed_under_a_holder(self) -> None:
        """Fewer are wanted while one is held; a rate tree stands in the way of none."""
        pod = await self.node.prepare(self.schedule("holder", "nsim-10-vf-2"))
        self.node.policy_file.write_text(FEWER)
        await self.until("refused", lambda: self.port()["why_not"])
        self.note("held", [self.port()["why_not"], number()])
        rate = ("devlink", "port", "function", "rate")
        await asyncio.to_thread(sh, *rate, "add", f"{HANDLE}/tree")
        await asyncio.to_thread(sh, *rate, "set", f"{HANDLE}/128", "parent", "tree")
        await self.node.delete_pod(pod)
        await self.until("two VFs", lambda: self.is_done(2) and len(vf_ports()) == 2)
        await self.until("published", lambda: len(self.offered()) == 2)
        self.note("fewer", picture())

    async def by_hand(self) -> None:
        """Someone takes the card to legacy mode."""
        await asyncio.to_thread(sh, "devlink", "dev", "eswitch", "set", HANDLE, "mode", "legacy")
        await self.until("in its mode again", lambda: len(vf_ports()) == 2 and self.is_done(2))
        await self.until("published", lambda: len(self.offered()) == 2)
        self.note("again", picture())

    async def in_legacy_mode(self) -> None:
        self.node.policy_file.write_text(LEGACY)
        await self.until("legacy", lambda: self.is_done(2) and picture()["mode"] == "legacy")
        await self.until("nothing is offered", lambda: not self.offered())
        self.note("legacy", picture())
        done = self.node.knd("devices", f"--policy={self.node.policy_file}", "-o", "json")
        rows = {row["device"]: row["why_not"] for row in json.loads(done.stdout)["rows"]}
        self.note("legacy devices", {name: why for name, why in rows.items() if "nsim-10" in name})

    async def killed(self) -> None:
        found = []
        for at in KILLS:
            await self.cleaned()
            self.node.policy_file.write_text(SWITCHED)
            self.node.agent.start((sys.executable, "-m", "tests.vm.dying_maker", str(at)))
            await asyncio.to_thread(wait_until, lambda: not self.node.agent.alive(), PATIENCE, "its end")
            self.node.agent.kill()
            half = picture()
            await self.node.start_agent(seconds=START)
            await self.until("three VFs", lambda: self.is_done(3) and len(vf_ports()) == 3)
            await self.until("published", lambda: len(self.offered()) == 3)
            found.append({"at": at, "half": half, "after": picture()})
        self.note("killed", found)

    async def cleaned(self) -> None:
        await self.node.stop_agent()
        done = await asyncio.to_thread(self.node.knd, "cleanup", f"--policy={self.node.policy_file}")
        self.note("cleanup", [done.returncode, done.stdout, done.stderr])
        self.note("cleaned", picture())
        self.note("rules left", rules())


async def main() -> None:
    await asyncio.to_thread((BUS / "new_device").write_text, "10 2")
    await asyncio.to_thread(sh, "udevadm", "settle")
    async with SimNode(mode=RuntimeMode.POD_RPC, policy=SWITCHED) as node:
        borrow_udev(node.root)
        story = Story(node)
        chapters = (
            story.made,
            story.devlink_itself,
            story.set_and_put_back,
            story.refused,
            story.changed_under_a_holder,
            story.by_hand,
            story.in_legacy_mode,
            story.killed,
            story.cleaned,
        )
        try:
            for chapter in chapters:
                await chapter()
        finally:
            print(json.dumps(story.seen | {"log": node.agent.tail(400)}))


if __name__ == "__main__":
    asyncio.run(main())
