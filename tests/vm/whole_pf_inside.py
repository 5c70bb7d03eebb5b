"""Run by test_whole_pf in a guest without an IOMMU: a PF of igb and its VFs, given away one way or the other.

Invariant: what is so is asked of ip(8) and of sysfs, never of the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kndsim.agent import wait_until
from kndsim.kubelet import PrepareFailed
from kndsim.kubelet_model import SimClaim
from kndsim.node import ClaimSpec, SimNode, SimPod
from kndsim.runtime import RuntimeMode

pytestmark = pytest.mark.timeout(900)

PF, OWN = "0000:21:00.0", "0000:21:00.1"
"""The first has VFs that others made, the second such as the policy asks for."""
WHOLE, VFS = "pci-0000-21-00-0", 2
PATIENCE, START = 120.0, 400.0
KIND = {"apiVersion": "knd.internal/v1alpha1", "kind": "NetworkDeviceConfig"}
POLICY = f"""\
apiVersion: knd.internal/v1alpha1
kind: NodePolicy
devices:
  - offer: false
  - match: {{names: ["pci-0000-21-*"]}}
    offer: true
sriov:
  - match: {{addresses: ["{OWN}"]}}
    vfs: 2
claims: {{allow: [vf.driver, vf.minRate, vf.vlan]}}
"""


class Stage:
    """One node for all tests here, with an event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.sim = SimNode(mode=RuntimeMode.POD_RPC, policy=POLICY, request_timeout=30.0, udev=True)

    def run(self, story: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(story, self._loop).result(5 * PATIENCE)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def device(self, name: str) -> Mapping[str, Any] | None:
        slices = self.sim.api.slices(self.sim.driver, self.sim.name)
        devices = [each for one in slices for each in one["spec"].get("devices", ())]
        return next((each for each in devices if each["name"] == name), None)

    def schedule(self, name: str, device: str, **parameters: Any) -> SimPod:
        """As the scheduler gives it; LookupError where it does not."""
        try:
            takes: Callable[[Any], bool] = lambda found: bool(found["name"] == device)  # noqa: E731 - of a mapping
            claim = ClaimSpec(
                name=f"{name}-nic", requests={"net": takes}, parameters={"": {**KIND, **parameters}}
            )
            return self.sim.schedule(name, [claim])
        except LookupError:
            self.sim.api.delete("resourceclaims", f"{name}-nic", "default")
            raise

    def forced(self, name: str, device: str) -> SimPod:
        """As by a scheduler that knows no counters."""
        devices = [("net", self.sim.name, device, None)]
        uid = self.sim.api.add_claim("default", f"{name}-nic", driver=self.sim.driver, devices=devices)
        return self.sim.add_pod(name, [SimClaim("default", f"{name}-nic", uid)])

    def refusal(self, pod: SimPod) -> str:
        with pytest.raises(PrepareFailed) as caught:
            self.run(self.sim.prepare(pod))
        self.run(self.sim.kubelet.unprepare(self.sim.driver, pod.claims, pod=pod.spec.uid))
        self.sim.api.delete("pods", pod.spec.name, pod.spec.namespace)
        for claim in pod.claims:
            self.sim.api.delete("resourceclaims", claim.name, claim.namespace)
        return str(caught.value)


def ip(*arguments: str) -> Any:
    done = subprocess.run(["ip", "-d", "-j", *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def pf_name(address: str = PF) -> str:
    (name,) = os.listdir(f"/sys/bus/pci/devices/{address}/net")
    return name


def port() -> tuple[bool, list[dict[str, Any]]]:
    """Whether it is up, and what it holds of its VFs."""
    (link,) = ip("link", "show", pf_name())
    return "UP" in link["flags"], [
        {k: v for k, v in vf.items() if k != "stats"} for vf in link["vfinfo_list"]
    ]


def at_home() -> bool:
    return Path(f"/sys/class/net/{NAME}").exists()


def vf_place(vf: int, pf: str = PF) -> Path:
    return Path(f"/sys/bus/pci/devices/{pf}/virtfn{vf}").resolve()


def vf_device(vf: int) -> str:
    return "pci-" + vf_place(vf).name.replace(":", "-").replace(".", "-")


def vf_driver(vf: int) -> str:
    driver = vf_place(vf) / "driver"
    return driver.resolve().name if driver.exists() else ""


NAME = pf_name()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    number = Path(f"/sys/bus/pci/devices/{PF}/sriov_numvfs")
    subprocess.run(["ip", "link", "set", NAME, "up"], check=True)
    number.write_text(str(VFS))
    subprocess.run(["udevadm", "settle"], check=True)
    wait_until(lambda: all((vf_place(vf) / "net").exists() for vf in range(VFS)), "VFs", PATIENCE)
    with contextlib.ExitStack() as stack:
        stage = stack.enter_context(contextlib.closing(Stage()))
        stage.run(stage.sim.__aenter__())
        stack.callback(lambda: stage.run(stage.sim.__aexit__(None, None, None)))
        stage.run(stage.sim.start_agent(seconds=START))
        wait_until(lambda: bool(stage.device(WHOLE)), "the PF is offered", PATIENCE)
        yield stage


def test_a_pf_is_claimed_whole_while_its_vfs_are_free_and_they_are_as_before_after_it(
    stage: Stage,
) -> None:
    before = port()
    assert before[0]
    pod = stage.run(stage.sim.start_pod(stage.schedule("whole", WHOLE), seconds=PATIENCE))
    assert not at_home()
    with pytest.raises(LookupError):
        stage.schedule("part", vf_device(0))
    said = stage.refusal(stage.forced("forced", vf_device(0)))
    assert f"its PF {WHOLE} is held by claim default/whole-nic" in said
    change = ["nsenter", f"--net={pod.sandbox.netns_path}", "ip", "link", "set", NAME, "vf", "0"]
    for words in (["vlan", "77"], ["mac", "02:66:66:66:66:66"], ["trust", "on"], ["spoofchk", "off"]):
        subprocess.run([*change, *words], check=True)
    stage.run(stage.sim.delete_pod(pod))
    wait_until(lambda: at_home() and port()[0], "the PF is home and up", PATIENCE)
    assert port() == before
    wait_until(lambda: bool((vf_place(0) / "net").exists()), "its VF has a netdev again", PATIENCE)


def test_a_pf_is_refused_while_one_of_its_vfs_is_taken(stage: Stage) -> None:
    wait_until(lambda: bool(stage.device(vf_device(1))), "the VF is offered", PATIENCE)
    pod = stage.run(stage.sim.start_pod(stage.schedule("part", vf_device(1)), seconds=PATIENCE))
    with pytest.raises(LookupError):
        stage.schedule("whole", WHOLE)
    said = stage.refusal(stage.forced("forced", WHOLE))
    assert f"its VF {vf_device(1)} is held by claim default/part-nic" in said
    assert at_home()
    told = json.loads(stage.sim.knd("devices", "-o", "json").stdout)["rows"]
    (row,) = [each for each in told if each["device"] == WHOLE]
    assert (row["offered"], "held by claim" in row["why_not"]) == (False, True)
    stage.run(stage.sim.delete_pod(pod))
    again = stage.run(stage.sim.start_pod(stage.schedule("again", WHOLE), seconds=PATIENCE))
    stage.run(stage.sim.delete_pod(again))
    wait_until(lambda: at_home() and port()[0], "the PF is home and up", PATIENCE)


def test_without_an_iommu_no_vf_is_given_by_its_files_unless_policy_says_so(stage: Stage) -> None:
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    assert not list(Path("/sys/kernel/iommu_groups").iterdir())
    wait_until(lambda: bool(stage.device(vf_device(1))), "the VF is offered", PATIENCE)
    said = stage.refusal(stage.schedule("refused", vf_device(1), vf={"driver": "vfio-pci"}))
    assert "noIommu: true" in said
    assert vf_driver(1) == "igbvf"


def test_what_the_driver_can_set_is_published_and_what_it_cannot_is_refused_up_front(stage: Stage) -> None:
    name = "pci-" + vf_place(0, OWN).name.replace(":", "-").replace(".", "-")

    def settings() -> str:
        device = stage.device(name)
        found = device["attributes"].get("vfSettings", {}) if device else {}
        return str(found.get("string", ""))

    # A rate can be asked about when the port has a link.
    subprocess.run(["ip", "link", "set", pf_name(OWN), "up"], check=True)
    wait_until(lambda: "maxRate" in settings(), "what can be set is published", PATIENCE)
    assert settings() == "mac,maxRate,spoofCheck,trust,vlan"
    said = stage.refusal(stage.schedule("wish", name, vf={"minRate": "10M"}))
    assert "vf.minRate 10M: igb, which drives its PF" in said
    assert "vfSettings" in said


def test_the_doctor_finds_nothing_failed_on_a_node_that_serves(stage: Stage) -> None:
    done = stage.sim.knd("doctor", "-o", "json")
    rows = json.loads(done.stdout)["rows"]
    assert [row for row in rows if row["verdict"] == "fail"] == []
    assert done.returncode == 0
    ports = [row["said"] for row in rows if row["check"] == "port"]
    assert any(PF in each and f"{VFS} of 7 VFs, made by others" in each for each in ports), ports
    assert any(OWN in each and "2 of 7 VFs, made by knd" in each for each in ports), ports
