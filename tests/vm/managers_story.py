"""What happens in the guest: both network managers run, and VFs are made, given to a pod and come home.

Run in a guest with igb ports and kndsim.guest.managers' share as `python -m tests.vm.managers_story`. Prints
what was seen, as JSON. A VF that others made shows what the managers do with one that nobody told them of.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kndsim.guest.managers import PLACE
from kndsim.node import ClaimSpec, SimNode, interface
from kndsim.runtime import RuntimeMode
from kndsim.waiting import wait_until_async
from tests.vm.provisioning_story import BUS, borrow_udev, name_of, sh, write

OURS, OTHERS = "0000:21:00.0", "0000:42:00.0"
VFS = 2
PATIENCE = 300.0
POLICY = f"""apiVersion: knd.internal/v1alpha1
kind: NodePolicy
sriov:
  - match: {{addresses: ["{OURS}"]}}
    vfs: {VFS}
claims:
  allow: [interface.hardwareAddress]
"""
ROOT = Path("/run/managers")
LINKS = Path("/run/systemd/netif/links")
TAKE_ALL = "[Match]\nType=ether\n\n[Network]\nDHCP=yes\n"


@contextmanager
def managers() -> Iterator[None]:
    """networkd with a file for every link, and NetworkManager as it comes, in a root of their own."""
    for name in ("root", "new", "work"):
        (ROOT / name).mkdir(parents=True, exist_ok=True)
    layers = f"lowerdir={PLACE},upperdir={ROOT}/new,workdir={ROOT}/work"
    root = ROOT / "root"
    sh("mount", "-t", "overlay", "managers", "-o", layers, str(root))
    for name in ("proc", "sys", "dev", "run"):
        sh("mount", "--rbind", f"/{name}", f"{root}/{name}")
    shutil.copy("/etc/machine-id", root / "etc/machine-id")
    (root / "etc/NetworkManager/conf.d/guest.conf").write_text("[main]\nauth-polkit=false\n")
    for folder in ("/run/dbus", "/run/systemd/network"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    Path("/run/systemd/network/70-all.network").write_text(TAKE_ALL)
    with ExitStack() as stack:
        for number, argv in enumerate(
            (
                ("dbus-daemon", "--system", "--nofork"),
                ("/usr/lib/systemd/systemd-networkd",),
                ("/usr/sbin/NetworkManager", "--no-daemon"),
            )
        ):
            log = stack.enter_context(Path(f"/tmp/manager{number}.log").open("wb"))
            process = subprocess.Popen(["chroot", str(root), *argv], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def by_networkd(ifindex: int) -> str:
    """What networkd means to do with a link; "" until it has made up its mind."""
    try:
        lines = (LINKS / str(ifindex)).read_text().splitlines()
    except FileNotFoundError:
        return ""
    return dict(line.partition("=")[::2] for line in lines).get("ADMIN_STATE", "")


def by_manager() -> dict[str, str]:
    """NetworkManager's state by link; empty while it does not answer."""
    argv = ["chroot", str(ROOT / "root"), "nmcli", "-t", "-f", "DEVICE,STATE", "device"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    return dict(line.partition(":")[::2] for line in done.stdout.splitlines())


def vf_names(pf: str) -> list[str]:
    return [path.name for path in sorted(BUS.glob(f"{pf}/virtfn*/net/*"))]


def seen_of(names: list[str]) -> dict[str, Any]:
    """Links by name: what there is to be seen of a manager's doings, and what the managers say."""
    states, found = by_manager(), {}
    for name in names:
        (link,) = json.loads(sh("ip", "-j", "address", "show", "dev", name))
        found[name] = {
            "ifindex": link["ifindex"],
            "up": "UP" in link["flags"],
            "mac": link["address"],
            "altnames": sorted(link.get("altnames", ())),
            "addresses": [each["local"] for each in link["addr_info"]],
            "networkd": by_networkd(link["ifindex"]),
            "NetworkManager": states.get(name, ""),
        }
    return found


async def decided(what: str, names: Callable[[], list[str]], count: int) -> dict[str, Any]:
    """Both managers have looked at so many links, and this is what is to be seen then."""

    def look() -> dict[str, Any]:
        found = seen_of(names())
        undecided = ("", "pending", "initialized")
        whole = all(each["networkd"] not in undecided and each["NetworkManager"] for each in found.values())
        return found if len(found) == count and whole else {}

    seen = await asyncio.to_thread(lambda: asyncio.run(wait_until_async(look, PATIENCE, what)))
    print(what, file=sys.stderr, flush=True)
    return seen


async def main() -> None:
    told: dict[str, Any] = {}
    with managers():
        told["PFs"] = await decided("PFs", lambda: [name_of(OURS) or "", name_of(OTHERS) or ""], 2)
        write(OTHERS, 1)
        told["others"] = await decided("a VF of others", lambda: vf_names(OTHERS), 1)
        async with SimNode(mode=RuntimeMode.POD_RPC, policy=POLICY, request_timeout=30.0) as node:
            borrow_udev(node.root)
            try:
                await play(node, told)
            finally:
                print(json.dumps(told | {"log": node.agent.tail(100)}))
                await node.kill_agent()
                write(OURS, 0)
                write(OTHERS, 0)


async def play(node: SimNode, told: dict[str, Any]) -> None:
    await node.start_agent(seconds=PATIENCE)
    told["made"] = await decided("VFs made", lambda: vf_names(OURS), VFS)
    config = interface(name="net1", addresses=["198.18.0.2/24"], hardwareAddress="02:00:5e:00:00:01")
    claim = ClaimSpec(
        name="nic",
        requests={"net": lambda device: device["name"].startswith("pci-0000-21-1")},
        parameters={"": config},
    )
    pod = await node.start_pod(node.schedule("pod", [claim]), seconds=PATIENCE)
    assert pod.sandbox is not None
    inside = sh("nsenter", f"--net={pod.sandbox.netns_path}", "ip", "-j", "address", "show", "dev", "net1")
    told["in the pod"] = [each["local"] for each in json.loads(inside)[0]["addr_info"]]
    told["others' meanwhile"] = seen_of(vf_names(OTHERS))
    await node.delete_pod(pod)
    told["home"] = await decided("home again", lambda: vf_names(OURS), VFS)


if __name__ == "__main__":
    asyncio.run(main())
