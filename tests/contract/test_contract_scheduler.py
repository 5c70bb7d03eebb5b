"""What the scheduler gives of devices that rule each other out, as the driver publishes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from driver.inventory import build
from driver.kube.client import Resource
from driver.kube.slice_device import counter_sets, describe_all
from driver.kube.slice_plan import Pool, plan_slices
from driver.model import CapacityRequest, CounterUse, DeviceName, OfferedDevice
from hw.model import DeviceKind
from tests.contract.api_peer import DRIVER, SLICES, ApiPeer
from tests.unit.bandwidth_world import PF_NAME, policy, port, sharing, vf_name
from tests.unit.bandwidth_world import held as holder

pytestmark = [
    pytest.mark.since("1.36", "older servers drop counters unless DRAPartitionableDevices is on"),
    pytest.mark.timeout(600),
]


def offered(name: str, kind: str, takes: int) -> OfferedDevice:
    use = CounterUse(set="port", takes={"vfs": str(takes)}, of={"vfs": "2"})
    return OfferedDevice(name=DeviceName(name), attributes={"kind": kind}, uses=(use,))


@contextmanager
def published(api: ApiPeer, devices: Sequence[OfferedDevice]) -> Iterator[None]:
    described, problems = describe_all(devices)
    assert problems == ()
    plan = plan_slices(Pool(driver=DRIVER, node=api.node), [], described, {}, counter_sets(devices))
    with api.client() as client, api.device_class():
        made = [client.create(Resource.RESOURCE_SLICES, write.body) for write in plan.creates]
        try:
            yield
        finally:
            for each in made:
                api.http("DELETE", f"{SLICES}/{each['metadata']['name']}")


def test_a_pf_is_given_while_no_vf_is_and_vfs_while_the_pf_is_not(api: ApiPeer) -> None:
    devices = [offered("vf-0", "vf", 1), offered("vf-1", "vf", 1), offered("pf", "pf", 2)]
    with published(api, devices):
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


def sized(size: int, speed: int, *, held: Sequence[int] = ()) -> list[OfferedDevice]:
    """Three VFs of this size and their PF of this speed, in Mb/s, as the product offers them while these VFs
    are held."""
    devices = build(port(3, speed), policy((size, None))).by_name
    uses = sharing(devices, *(holder(devices[vf_name(index)]) for index in held)).uses(devices)
    ordered = sorted(devices.values(), key=lambda device: (device.kind is DeviceKind.PF, device.name))
    return [
        OfferedDevice(
            name=each.name, attributes=each.attributes, capacities=each.capacities, uses=uses[each.name]
        )
        for each in ordered
    ]


def test_no_more_vfs_are_given_than_their_pf_has_bandwidth_for(api: ApiPeer) -> None:
    with published(api, sized(10_000, 25_000)):
        assert [api.give("one", "vf"), api.give("two", "vf")] == [vf_name(0), vf_name(1)]
        assert api.give("third", "vf") is None, "5G are left, and it is of 10G"
        api.take_back("third")
        assert api.give("whole", "pf") is None
        api.take_back("whole")
        api.take_back("one")
        assert api.give("next", "vf") == vf_name(0)
        for claim in ("two", "next"):
            api.take_back(claim)
        assert api.give("whole", "pf") == PF_NAME
        assert api.give("late", "vf") is None
        for claim in ("late", "whole"):
            api.take_back(claim)


def test_a_request_for_bandwidth_is_met_by_a_vf_of_that_size_or_by_none(api: ApiPeer) -> None:
    devices = build(port(3), policy((2_000, 2), (10_000, None))).by_name
    uses = sharing(devices).uses(devices)
    offers = [
        OfferedDevice(name=name, attributes=each.attributes, capacities=each.capacities, uses=uses[name])
        for name, each in devices.items()
        if each.kind is DeviceKind.VF
    ]
    with published(api, offers):
        assert api.give("wide", "vf", bandwidth="3G") == vf_name(2)
        assert api.give("wider", "vf", bandwidth="11G") is None
        assert api.give("narrow", "vf", bandwidth="2G") == vf_name(0)
        for claim in ("wide", "wider", "narrow"):
            api.take_back(claim)


def test_a_shared_device_is_given_in_amounts_by_its_policy_until_there_is_no_more(api: ApiPeer) -> None:
    device = OfferedDevice(
        name=DeviceName("uplink"),
        attributes={"kind": "shared"},
        capacities={"bandwidth": "1G", "shares": "3"},
        requests={
            "bandwidth": CapacityRequest(default="100M", least="50M", most="800M", step="50M"),
            "shares": CapacityRequest(default="1", values=("1",)),
        },
    )
    with published(api, [device]):
        given = {"default": "", "little": "1M", "more": "420M"}
        assert [api.give(name, "shared", bandwidth=amount) for name, amount in given.items()] == [
            "uplink"
        ] * 3
        parts = {name: api.part(name) for name in given}
        assert {name: int(amounts["bandwidth"]) for name, (_, amounts) in parts.items()} == {
            "default": 100_000_000,
            "little": 50_000_000,
            "more": 450_000_000,
        }
        assert {int(amounts["shares"]) for _, amounts in parts.values()} == {1}
        assert len({share for share, _ in parts.values()}) == 3
        assert api.give("fourth", "shared") is None, "three shares are all there are"
        for claim in ("fourth", "little", "default"):
            api.take_back(claim)
        assert api.give("much", "shared", bandwidth="700M") is None, "550M are left"
        assert api.give("too-much", "shared", bandwidth="900M") is None, "no claim can have more than 800M"
        assert api.give("rest", "shared", bandwidth="550M") == "uplink"
        for claim in ("much", "too-much", "rest", "more"):
            api.take_back(claim)


def test_a_port_that_became_slower_than_what_is_given_of_it_keeps_nothing_else_from_being_given(
    api: ApiPeer,
) -> None:
    other = OfferedDevice(
        name=DeviceName("other"),
        attributes={"kind": "other"},
        uses=(CounterUse(set="other", takes={"vfs": "1"}, of={"vfs": "1"}),),
    )
    with published(api, [*sized(10_000, 25_000), other]):
        assert [api.give("one", "vf"), api.give("two", "vf")] == [vf_name(0), vf_name(1)]
    with published(api, [*sized(10_000, 10_000, held=[0, 1]), other]):
        assert api.give("third", "vf") is None
        assert api.give("else", "other") == "other"
        for claim in ("one", "two", "third", "else"):
            api.take_back(claim)
