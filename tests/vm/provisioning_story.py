"""What happens in the guest: an agent that makes VFs, and what is done to it. Prints what was seen, as JSON.

Run in a guest with igb ports as `python -m tests.vm.provisioning_story`. The agent's root is its own, but for
the folders of udev, which are the guest's.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kndsim.node import ClaimSpec, SimNode, SimPod
from kndsim.runtime_model import RuntimeMode
from kndsim.waiting import wait_until, wait_until_async
from tests.vm.story import Told

BUS = Path("/sys/bus/pci/devices")
NEAR, HOST, FAR, FOREIGN = "0000:21:00.0", "0000:21:00.1", "0000:41:00.0", "0000:42:00.0"
ALL = (NEAR, HOST, FAR, FOREIGN)
PATIENCE = 120.0
START = 120.0
KILLS = (5, 9, 15)
"""Each before another kind of change: the number written, a VF set, a driver bound."""


def policy(vfs: int) -> str:
    return f"""apiVersion: knd.internal/v1alpha1
kind: NodePolicy
sriov:
  - match: {{addresses: ["{FOREIGN}"]}}
    external: true
    vfs: 2
  - match: {{addresses: ["{HOST}"]}}
    vfs: 2
  - match: {{pfNames: ["ens*", "enp*", "eth*"], vendors: ["8086"]}}
    vfs: {vfs}
    vf: {{spoofCheck: false}}
"""


def sh(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


def write(pf: str, vfs: int) -> None:
    (BUS / pf / "sriov_numvfs").write_text(str(vfs))


def number(pf: str) -> int:
    return int((BUS / pf / "sriov_numvfs").read_text())


def name_of(address: str) -> str | None:
    folder = BUS / address / "net"
    return next((path.name for path in sorted(folder.iterdir())), None) if folder.is_dir() else None


def picture(pf: str) -> dict[str, Any]:
    """A PF and its VFs, as sysfs, the PF and the netdevs themselves tell."""
    name = name_of(pf)
    assert name is not None, pf
    (told,) = json.loads(sh("ip", "-j", "-d", "link", "show", name))
    vfs: dict[str, Any] = {}
    for path in sorted((BUS / pf).glob("virtfn*")):
        address = path.resolve().name
        vf = name_of(address)
        (link,) = json.loads(sh("ip", "-j", "link", "show", vf)) if vf else ({},)
        vfs[path.name.removeprefix("virtfn")] = {
            "address": address,
            "driver": (path / "driver").resolve().name if (path / "driver").exists() else None,
            "name": vf,
            "ifindex": link.get("ifindex"),
            "mac": link.get("address"),
            "up": "UP" in link.get("flags", ()),
            "numa": int((path / "numa_node").read_text()),
        }
    return {
        "name": name,
        "vfs": vfs,
        "given": {str(vf["vf"]): vf for vf in told.get("vfinfo_list", ())},
        "up": "UP" in told["flags"],
        "autoprobe": int((BUS / pf / "sriov_drivers_autoprobe").read_text()),
    }


def indexes(pf: str) -> set[int]:
    """Of the netdevs of its VFs."""
    return {int(path.read_text()) for path in (BUS / pf).glob("virtfn*/net/*/ifindex")}


def node_picture() -> dict[str, Any]:
    return {pf: picture(pf) for pf in ALL}


def properties(name: str) -> Mapping[str, str]:
    lines = sh("udevadm", "info", "--query=property", f"/sys/class/net/{name}").splitlines()
    return dict(line.partition("=")[::2] for line in lines)


def rules() -> list[str]:
    folders = (Path("/run/udev/rules.d"), Path("/run/systemd/network"))
    return [str(path) for folder in folders for path in folder.glob("*knd*")]


class Story(Told):
    def published(self) -> list[str]:
        slices = self.node.api.slices(SimNode.driver, self.node.name)
        return sorted(device["name"] for each in slices for device in each["spec"].get("devices", ()))

    def ports(self) -> dict[str, Any]:
        done = self.node.knd("devices", f"--policy={self.node.policy_file}", "-o", "json")
        return {row["port"]: row for row in json.loads(done.stdout)["ports"]}

    async def until(self, what: str, condition: Callable[[], object]) -> None:
        try:
            await wait_until_async(condition, PATIENCE, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.node.agent.tail(60)}") from error

    async def finished(self, vfs: int) -> None:
        """Both ports have as many, whole: on a busy machine an agent may be ready before."""
        await self.until(f"{vfs} finished VFs on both ports", lambda: all(map(self.is_done, (NEAR, FAR))))
        await self.until("published", lambda: len(self.ours()) == 2 * vfs)

    def is_done(self, pf: str) -> bool:
        path = self.node.root / f"var/lib/knd/sriov/{pf}.json"
        try:
            told = json.loads(path.read_text())
        except FileNotFoundError:
            return False
        return bool(told["done"] and told["vfs"] == number(pf))

    # --- chapters -----------------------------------------------------------------------------------

    async def made(self) -> None:
        self.note("before", node_picture())
        await self.node.start_agent(seconds=START)
        await self.finished(4)
        self.note("made", node_picture())
        self.note("published", self.published())
        self.note("ports", self.ports())
        name = self.seen["made"][NEAR]["vfs"]["0"]["name"]
        await asyncio.to_thread(sh, "udevadm", "settle")
        self.note("udev", dict(properties(name)))
        self.note("udev of the PF", dict(properties(name_of(NEAR) or "")))

    def ours(self) -> list[str]:
        return [name for name in self.published() if name.startswith(("pci-0000-21-1", "pci-0000-41-1"))]

    async def restarted(self) -> None:
        await self.node.kill_agent()
        await self.node.start_agent(seconds=START)
        self.note("restarted", node_picture())

    async def shrunk(self) -> None:
        """Fewer are wanted while one is held."""
        spec = ClaimSpec(name="one", requests={"net": lambda device: device["name"] == "pci-0000-21-10-0"})
        pod: SimPod = await self.node.prepare(self.node.schedule("holder", [spec]))
        self.node.policy_file.write_text(policy(2))
        await self.until("two VFs on the free port", lambda: number(FAR) == 2)
        await self.until("published", lambda: len(self.ours()) == 6)
        self.note("held", {pf: number(pf) for pf in ALL})
        self.note("ports while held", self.ports())
        await self.node.delete_pod(pod)
        await self.until("two VFs on the port that was held", lambda: number(NEAR) == 2)
        await self.finished(2)
        self.note("let go", node_picture())

    async def unmade_by_hand(self) -> None:
        await asyncio.to_thread(write, FAR, 0)
        # The record says done all the time, so the netdevs tell: they are others.
        old = {vf["ifindex"] for vf in self.seen["let go"][FAR]["vfs"].values()}
        await self.until("VFs made again", lambda: number(FAR) == 2 and indexes(FAR).isdisjoint(old))
        await self.finished(2)
        self.note("again", node_picture())

    async def killed(self) -> None:
        found: list[Any] = []
        for at in KILLS:
            await self.cleaned()
            entry = (sys.executable, "-m", "tests.vm.dying_maker", str(at))
            self.node.agent.start(entry)
            await asyncio.to_thread(
                wait_until, lambda: not self.node.agent.alive(), PATIENCE, "the agent's end"
            )
            self.node.agent.kill()
            half = {pf: number(pf) for pf in (NEAR, FAR)}
            await self.node.start_agent(seconds=START)
            await self.finished(2)
            found.append({"at": at, "half": half, "after": node_picture()})
        self.note("killed", found)

    async def cleaned(self) -> None:
        await self.node.stop_agent()
        done = await asyncio.to_thread(self.node.knd, "cleanup", f"--policy={self.node.policy_file}")
        self.note("cleanup", [done.returncode, done.stdout, done.stderr])
        self.note("cleaned", node_picture())
        self.note("rules left", rules())


def borrow_udev(root: Path) -> None:
    """The agent's own folders, but those that the guest's udev reads."""
    Path("/run/systemd/network").mkdir(parents=True, exist_ok=True)
    (root / "run/systemd").mkdir(parents=True, exist_ok=True)
    (root / "run/systemd/network").symlink_to("/run/systemd/network")
    (root / "run/udev").symlink_to("/run/udev")


async def main() -> None:
    host = name_of(HOST) or ""
    sh("ip", "address", "add", "198.51.100.1/24", "dev", host)
    sh("ip", "link", "set", name_of(FOREIGN) or "", "up")
    write(FOREIGN, 2)
    sh("udevadm", "settle")
    async with SimNode(mode=RuntimeMode.POD_RPC, policy=policy(4)) as node:
        borrow_udev(node.root)
        story = Story(node)
        try:
            for chapter in (story.made, story.restarted, story.shrunk, story.unmade_by_hand, story.killed):
                await chapter()
            await story.cleaned()
        finally:
            print(json.dumps(story.seen | {"log": node.agent.tail(400)}))


if __name__ == "__main__":
    asyncio.run(main())
