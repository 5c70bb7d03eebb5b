"""What the scheduler gives of devices that rule each other out, as the driver publishes them."""

from __future__ import annotations

import pytest

from driver.kube.client import Resource
from driver.kube.slice_device import counter_sets, describe_all
from driver.kube.slice_plan import Pool, plan_slices
from driver.model import CounterUse, DeviceName, OfferedDevice
from tests.contract.api_peer import DRIVER, SLICES, ApiPeer

pytestmark = [
    pytest.mark.since("1.36", "older servers drop counters unless DRAPartitionableDevices is on"),
    pytest.mark.timeout(600),
]


def offered(name: str, kind: str, takes: int) -> OfferedDevice:
    use = CounterUse(set="port", takes={"vfs": str(takes)}, of={"vfs": "2"})
    return OfferedDevice(name=DeviceName(name), attributes={"kind": kind}, uses=(use,))


def test_a_pf_is_given_while_no_vf_is_and_vfs_while_the_pf_is_not(api: ApiPeer) -> None:
    devices = [offered("vf-0", "vf", 1), offered("vf-1", "vf", 1), offered("pf", "pf", 2)]
    described, problems = describe_all(devices)
    assert problems == ()
    plan = plan_slices(Pool(driver=DRIVER, node=api.node), [], described, {}, counter_sets(devices))
    with api.client() as client, api.device_class():
        made = [client.create(Resource.RESOURCE_SLICES, write.body) for write in plan.creates]
        try:
            assert api.give("whole", "pf") == "pf"
            assert api.give("early", "vf") is None
            api.take_back("early")
            api.take_back("whole")
            assert {api.give("one", "vf"), api.give("two", "vf")} == {"vf-0", "vf-1"}
            assert api.give("late", "pf") is None
            for claim in ("late", "one", "two"):
                api.take_back(claim)
            assert api.give("again", "pf") == "pf"
            api.take_back("again")
        finally:
            for each in made:
                api.http("DELETE", f"{SLICES}/{each['metadata']['name']}")
