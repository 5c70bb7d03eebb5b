"""Run in a guest by test_vf_settings: the real agent and real VFs of igb, set on their PF and put back.

Invariant: what a VF is set to is judged by what ip(8) says of its PF, never by the agent. The baseline that
must come back is not the kernel's default: the stage puts all VFs into a VLAN of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hw.model import IfIndex, VfLinkState, VfSettings, VfVlan, VlanProtocol
from hw.netlink import LinkSocket
from hw.vf import VfRates
from kndsim.agent import wait_until
from kndsim.demo.choice import PhysicalFunction
from kndsim.demo.devices import Devices, changes, dump
from kndsim.demo.sriov import make_vfs
from kndsim.kubelet import PrepareFailed, UnprepareFailed
from kndsim.node import ClaimSpec, SimNode, SimPod
from tests.node.crash_stage import Nursery
from tests.node.node_stage import node

pytestmark = pytest.mark.timeout(900)

PF = "0000:21:00.0"
VFS = 3
PATIENCE = 240.0
GUARDED = "[vf.driver, interface.hardwareAddress, vf.vlan, vf.trust, vf.spoofCheck, vf.minRate]"
MAC = "02:00:5e:00:00:{:02x}"
PLANS = {"prepare", "unprepare"}


class Loop:
    """An event loop in a thread of its own: the peers answer while a test waits."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, story: Coroutine[Any, Any, Any], seconds: float = 5 * PATIENCE) -> Any:
        return asyncio.run_coroutine_threadsafe(story, self._loop).result(seconds)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Stage:
    """One node for all tests here: each start of an agent takes its time in a guest."""

    def __init__(self, loop: Loop, sim: SimNode, made: Devices, nursery: Nursery, control: Path):
        self._loop = loop
        self.sim = sim
        self.nursery = nursery
        self.control = control
        self.made = made
        self.links, self.held = dump(made.compared), pf_holds()

    def run(self, story: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run(story)

    def start_agent(self) -> None:
        agent = self.sim.agent
        agent.process = self.nursery.new()  # type: ignore[assignment]
        agent.wait_ready(PATIENCE)

    def schedule(self, name: str, number: int = 0, *, address: bool = False, **vf: Any) -> SimPod:
        interface: dict[str, Any] = {"name": "net1", "addresses": [f"198.18.0.{number + 1}/24"]}
        if address:
            interface["hardwareAddress"] = MAC.format(number)
        kind = {"apiVersion": "knd.internal/v1alpha1", "kind": "NetworkDeviceConfig"}
        parameters = {**kind, "interface": interface, "vf": vf}
        return self.sim.schedule(name, [ClaimSpec(name=f"{name}-nic", parameters={"": parameters})])

    def end(self, pod: SimPod) -> None:
        """Of a pod that may have got nowhere: kubelet unprepares what it has tried to prepare."""
        self.run(self.sim.kubelet.unprepare(self.sim.driver, pod.claims, pod=pod.spec.uid))
        self.sim.api.delete("pods", pod.spec.name, pod.spec.namespace)
        for claim in pod.claims:
            self.sim.api.delete("resourceclaims", claim.name, claim.namespace)

    def unlike_before(self) -> list[str]:
        """What of the VFs is not as it was before any pod. Of the address the PF says what the VF has."""
        found = changes(self.links, dump(self.made.compared))
        now = pf_holds()
        for vf, held in self.held.items():
            found += [f"VF {vf}: {key} is {now[vf][key]}" for key in held if now[vf][key] != held[key]]
        own = {vf_link(vf)["address"] for vf in range(VFS)}
        found += [f"VF {vf} is told {mac}" for vf, mac in pf_addresses().items() if mac not in {NOBODY, *own}]
        drivers = [vf_driver(vf) for vf in range(VFS)]
        return found + [f"drivers are {drivers}" for _ in range(1) if set(drivers) != {"igbvf"}]

    def wait_as_before(self, when: str) -> None:
        try:
            wait_until(lambda: not self.unlike_before(), when, PATIENCE)
        except TimeoutError:
            pytest.fail(f"{when}: {'; '.join(self.unlike_before())}\n{self.sim.agent.tail()}")


NOBODY = "00:00:00:00:00:00"


def ip(*arguments: str) -> Any:
    done = subprocess.run(["ip", "-d", "-j", *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def pf_name() -> str:
    (name,) = os.listdir(f"/sys/bus/pci/devices/{PF}/net")
    return name


def vf_infos() -> dict[int, dict[str, Any]]:
    (link,) = ip("link", "show", pf_name())
    return {info["vf"]: info for info in link["vfinfo_list"][:VFS]}


def pf_addresses() -> dict[int, str]:
    return {vf: info["address"] for vf, info in vf_infos().items()}


def pf_holds() -> dict[int, dict[str, Any]]:
    """All but addresses and counters."""
    left_out = ("address", "stats", "vf")
    return {vf: {k: v for k, v in info.items() if k not in left_out} for vf, info in vf_infos().items()}


def vf_place(vf: int) -> Path:
    return Path(f"/sys/bus/pci/devices/{PF}/virtfn{vf}").resolve()


def vf_link(vf: int) -> dict[str, Any]:
    names = [path.name for path in (vf_place(vf) / "net").iterdir()]
    return dict(ip("link", "show", names[0])[0])


def vf_driver(vf: int) -> str:
    driver = vf_place(vf) / "driver"
    return driver.resolve().name if driver.exists() else ""


def vf_of(pod: SimPod) -> int:
    """Its number, by the claim's device."""
    (devices,) = pod.devices.values()
    address = devices[0].device.removeprefix("pci-")
    wanted = f"{address[:4]}:{address[5:7]}:{address[8:10]}.{address[11:]}"
    (vf,) = [vf for vf in range(VFS) if vf_place(vf).name == wanted]
    return vf


def in_pod(pod: SimPod, *command: str) -> subprocess.CompletedProcess[str]:
    assert pod.sandbox is not None
    argv = ["nsenter", f"--net={pod.sandbox.netns_path}", *command]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE)


def reaches(pod: SimPod, number: int) -> bool:
    return in_pod(pod, "ping", "-c", "1", "-W", "2", f"198.18.0.{number + 1}").returncode == 0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    control = tmp_path_factory.mktemp("control")
    pf = PhysicalFunction(address=PF, name=pf_name(), total_vfs=7)
    with make_vfs(pf, VFS) as made, contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(Loop()))
        policy = made.policy.replace("[interface.hardwareAddress]", GUARDED)
        made = replace(made, policy=policy)
        open_node = node(made, start=False, request_timeout=30.0)
        sim = loop.run(open_node.__aenter__())
        stack.callback(lambda: loop.run(open_node.__aexit__(None, None, None)))
        nursery = stack.enter_context(contextlib.closing(Nursery(sim, control, patience=PATIENCE)))
        stage = Stage(loop, sim, made, nursery, control)
        stage.start_agent()
        wait_until(lambda: len(offered(sim)) == VFS, "the VFs are offered", PATIENCE)
        yield stage


def offered(sim: SimNode) -> list[str]:
    slices = sim.api.slices(sim.driver, sim.name)
    return [device["name"] for each in slices for device in each["spec"]["devices"]]


# --- settings ---------------------------------------------------------------------------------------


def test_a_vlan_isolates_and_addresses_are_right_from_the_first_frame(stage: Stage) -> None:
    vlans = (100, 100, 200)

    async def begin() -> list[SimPod]:
        pods = [stage.schedule(f"v{n}", n, address=n == 0, vlan={"id": vlan}) for n, vlan in enumerate(vlans)]
        return [await stage.sim.start_pod(pod, seconds=PATIENCE) for pod in pods]

    indices = {vf: vf_link(vf)["ifindex"] for vf in range(VFS)}
    pods = stage.run(begin())
    for number, (pod, vlan) in enumerate(zip(pods, vlans, strict=True)):
        held = vf_infos()[vf_of(pod)]
        assert [(each["vlan"], each.get("protocol", "802.1Q")) for each in held["vlan_list"]] == [
            (vlan, "802.1Q")
        ], number
    assert pf_addresses()[vf_of(pods[0])] == MAC.format(0)
    wait_until(lambda: reaches(pods[0], 1), "same VLAN", PATIENCE)
    assert not reaches(pods[0], 2)
    assert not reaches(pods[2], 1)
    assert MAC.format(0) in in_pod(pods[1], "ip", "neigh", "show", "198.18.0.1").stdout

    async def end() -> None:
        for pod in pods:
            await stage.sim.delete_pod(pod)

    stage.run(end())
    stage.wait_as_before("after the VLANs")
    assert all(vf_link(vf)["ifindex"] != index for vf, index in indices.items()), "not probed anew"


def test_rates_trust_and_spoof_check_are_set_read_back_and_put_back(stage: Stage) -> None:
    wishes = {"maxRate": "50M", "trust": True, "spoofCheck": False, "vlan": {"id": 0}}

    async def begin() -> SimPod:
        return await stage.sim.start_pod(stage.schedule("r", address=True, **wishes), seconds=PATIENCE)

    pod = stage.run(begin())
    held = vf_infos()[vf_of(pod)]
    assert held["rate"] == {"max_tx": 50, "min_tx": 0}
    assert (held["trust"], held["spoofchk"]) == (True, False)
    assert held["vlan_list"] == [{}] or not held["vlan_list"][0].get("vlan")
    # Trusted, it may take an address of its own choice; that goes with it.
    in_pod(pod, "sh", "-c", f"ip link set net1 down; ip link set net1 address {MAC.format(9)}")
    stage.run(stage.sim.delete_pod(pod))
    stage.wait_as_before("after rates and trust")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"minRate": "10M"}, "vf.minRate 10M: igb"),
        ({"linkState": "disable"}, "vf.linkState disable: igb"),
        ({"vlan": {"id": 7, "protocol": "802.1ad"}, "trust": True}, "vf.vlan 7 qos 0 (802.1ad): igb"),
    ],
    ids=["min-rate", "link-state", "802.1ad"],
)
def test_what_igb_cannot_do_is_refused_with_a_sentence_and_nothing_stays(
    stage: Stage, wish: dict[str, Any], words: str
) -> None:
    pod = stage.schedule("no", **wish)
    with pytest.raises(PrepareFailed) as caught:
        stage.run(stage.sim.prepare(pod))
    assert words in str(caught.value)
    assert "choose another device" in str(caught.value)
    stage.end(pod)
    stage.wait_as_before("after a refusal")


def test_a_vf_given_by_its_files_is_set_before_its_holder_has_it_and_put_back_after(stage: Stage) -> None:
    claim = ClaimSpec(
        name="files-nic",
        parameters={
            "": {
                "apiVersion": "knd.internal/v1alpha1",
                "kind": "NetworkDeviceConfig",
                "interface": {"hardwareAddress": MAC.format(7)},
                "vf": {"driver": "vfio-pci", "vlan": {"id": 100}},
            }
        },
    )
    pod = stage.run(stage.sim.prepare(stage.sim.schedule("files", [claim])))
    vf = vf_of(pod)
    assert vf_driver(vf) == "vfio-pci"
    assert pf_addresses()[vf] == MAC.format(7)
    assert vf_infos()[vf]["vlan_list"][0]["vlan"] == 100
    stage.run(stage.sim.delete_pod(pod))
    stage.wait_as_before("after vfio")


# --- crashes ----------------------------------------------------------------------------------------


def test_an_agent_killed_between_any_two_steps_leaves_the_vfs_as_they_were(stage: Stage) -> None:
    lines = _points_of_a_life(stage)
    assert {act for plan, act, *_ in map(str.split, lines) if plan in PLANS} >= {
        *("set-on-pf", "arm-programs", "take-from-driver", "restore-on-pf", "bind-to-kernel")
    }
    for number, line in enumerate(lines):
        _die_at(stage, f"k{number}", line)


def _points_of_a_life(stage: Stage) -> list[str]:
    """Where an agent is killed: before and after each act that a pod's claim goes through."""
    visited = stage.control / "visited"
    os.truncate(visited, 0)

    async def life() -> None:
        pod = await stage.sim.prepare(stage.schedule("life", address=True, vlan={"id": 100}, trust=True))
        await stage.sim.delete_pod(pod)

    stage.run(life())
    stage.wait_as_before("after a life")
    found = dict.fromkeys(visited.read_text().splitlines())
    return [
        line
        for line in found
        if line.split("\t")[0] in PLANS and line.split("\t")[2] in ("after-intent", "after-act")
    ]


def _die_at(stage: Stage, name: str, line: str) -> None:
    (stage.control / "kill").write_text(line)
    pod = stage.schedule(name, address=True, vlan={"id": 100}, trust=True)

    async def until_it_dies() -> None:
        with contextlib.suppress(PrepareFailed, UnprepareFailed):
            made = await stage.sim.prepare(pod)
            await stage.sim.kubelet.unprepare(stage.sim.driver, made.claims, pod=made.spec.uid)

    stage.run(until_it_dies())
    assert not (stage.control / "kill").exists(), f"not killed at {line!r}"
    wait_until(lambda: not stage.sim.agent.alive(), f"it died at {line!r}", PATIENCE)
    stage.run(stage.sim.kill_agent())
    stage.start_agent()
    stage.wait_as_before(f"killed at {line!r}")

    stage.end(pod)
    stage.wait_as_before(f"ended after {line!r}")


# --- a PF that can do more ----------------------------------------------------------------------------


def test_a_pf_that_can_is_told_everything_and_tells_it_back() -> None:
    """netdevsim in legacy mode."""
    bus = Path("/sys/bus/netdevsim")
    (bus / "new_device").write_text("77 1")
    try:
        (bus / "devices/netdevsim77/sriov_numvfs").write_text("2")
        with LinkSocket(None) as links:
            (pf,) = [link.ifindex for link in links.dump() if link.parent_device == "netdevsim77"]
            before = links.vf_settings(pf, 1)
            assert before is not None
            _tell_everything(links, pf)
            assert links.vf_settings(pf, 0) == VfSettings(
                mac=MAC.format(1),  # type: ignore[arg-type]
                vlan=VfVlan(id=77, qos=3, protocol=VlanProtocol.SERVICE),
                min_rate=10,
                max_rate=100,
                spoof_check=False,
                trust=True,
                link_state=VfLinkState.DISABLE,
            )
            assert links.vf_settings(pf, 1) == before
            assert links.vf_settings(pf, 2) is None
    finally:
        (bus / "del_device").write_text("77")


def _tell_everything(links: LinkSocket, pf: IfIndex) -> None:
    vlan = VfVlan(id=77, qos=3, protocol=VlanProtocol.SERVICE)
    wishes: dict[str, Any] = {
        "vlan": vlan,
        "mac": MAC.format(1),
        "rates": VfRates(10, 100),
        "spoof_check": False,
        "trust": True,
        "link_state": VfLinkState.DISABLE,
    }
    for setting, value in wishes.items():
        links.set_vf(pf, 0, setting, value)
