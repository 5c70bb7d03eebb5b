"""What the API server takes of devices that several claims can have at once, and what it makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from driver.inventory import capacity_requests
from driver.kube.client import Resource
from driver.kube.server_features import ask_for_shares
from driver.kube.slice_device import describe, same_device
from driver.kube.slice_plan import Pool
from driver.model import CapacityRequest, DeviceName, OfferedDevice
from driver.traffic import Amounts, Sharable
from hw.subinterface import SubinterfaceKind, SubinterfaceMode
from tests.contract.api_peer import DRIVER, SLICES, ApiPeer

WITH_FRACTIONS = pytest.mark.since("1.37", "older servers round fractions up")
OTHER_NAME = pytest.mark.since("1.37", "older servers name the bound that the default is not within")
NO_CHECK = pytest.mark.since("1.37", "older servers look at a step less closely")
POLICY = "spec.devices[0].capacity[bandwidth].requestPolicy"
RANGE = {"min": "100M", "max": "4G", "step": "100M"}


def device(policy: dict[str, Any], value: str = "10G", **more: Any) -> dict[str, Any]:
    amount = {"value": value, "requestPolicy": policy}
    return {"name": "a", "allowMultipleAllocations": True, "capacity": {"bandwidth": amount}, **more}


def ranged(default: str = "500M", **bounds: str | None) -> dict[str, Any]:
    found = {name: text for name, text in (RANGE | bounds).items() if text is not None}
    return {"default": default, "validRange": found}


def chosen(default: str, *values: str) -> dict[str, Any]:
    return {"default": default, "validValues": list(values)}


UPLINK = OfferedDevice(
    name=DeviceName("uplink"),
    attributes={"kind": "shared", "subinterface": "macvlan"},
    capacities={"bandwidth": "10G", "shares": "16"},
    requests=capacity_requests(
        Sharable(
            kind=SubinterfaceKind.MACVLAN,
            mode=SubinterfaceMode.BRIDGE,
            bandwidth=10_000,
            amounts=Amounts(default=500, least=100, most=4_000, step=100),
            shares=16,
        )
    ),
)


def test_a_shared_device_is_taken_as_the_driver_makes_it_and_comes_back_the_same(api: ApiPeer) -> None:
    wanted = describe(UPLINK).device
    assert wanted is not None
    made = api.made_slice([wanted])
    (kept,) = made["spec"]["devices"]
    assert same_device(wanted, kept)
    policy = kept["capacity"]["bandwidth"]["requestPolicy"]
    assert policy == {"default": "500M", "validRange": {"min": "100M", "max": "4G", "step": "100M"}}
    bandwidth = CapacityRequest(default="1000M", least="0.5G", most="4000M")
    other = replace(UPLINK, requests={**UPLINK.requests, "bandwidth": bandwidth})
    described = describe(other).device
    assert described is not None
    answer = api.http(
        "PUT",
        f"{SLICES}/{made['metadata']['name']}",
        {**made, "spec": {**made["spec"], "devices": [described]}},
    )
    (kept,) = answer.body["spec"]["devices"]
    assert same_device(described, kept), answer.said
    policy = kept["capacity"]["bandwidth"]["requestPolicy"]
    assert policy == {"default": "1G", "validRange": {"min": "500M", "max": "4G"}}


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(ranged(max=None), id="no max"),
        pytest.param(ranged(max=None, step=None), id="min alone"),
        pytest.param(ranged("10G", max="10G", step="9900M"), id="one step is all"),
        pytest.param(ranged("20G", max=None, step=None), id="a default that nobody can have"),
        pytest.param({"default": "20G"}, id="default alone"),
        pytest.param({}, id="nothing"),
        pytest.param({"default": "1G", "validValues": []}, id="no values"),
        pytest.param(chosen("1G", "1G", "2G", "10G"), id="values"),
        pytest.param(
            ranged("1.5", min="0.5", max="3.5", step="1"), marks=WITH_FRACTIONS, id="fractions on a grid"
        ),
        pytest.param(chosen("1", "0.5", "1"), marks=WITH_FRACTIONS, id="values that are one when rounded"),
        pytest.param(ranged("1", min="-1", max=None, step=None), id="negative min without a step"),
    ],
)
def test_what_claims_may_ask_for_is_kept(api: ApiPeer, policy: dict[str, Any]) -> None:
    made = api.made_slice([device(policy)])
    (kept,) = made["spec"]["devices"]
    assert kept["allowMultipleAllocations"] is True
    assert same_device(device({key: value for key, value in policy.items() if value != []}), kept)


REFUSED = [
    pytest.param({**ranged(), "validValues": ["500M"]}, [POLICY], id="values and range"),
    pytest.param({"validRange": RANGE}, [f"{POLICY}.default"], id="range without default"),
    pytest.param({"validValues": ["1G"]}, [f"{POLICY}.default"], id="values without default"),
    pytest.param(ranged(min=None), [f"{POLICY}.validRange.min"], id="no min"),
    pytest.param(
        ranged(min="20G", max=None, step=None, default="20G"), [f"{POLICY}.validRange.min"], id="min"
    ),
    pytest.param(ranged("0"), [f"{POLICY}.validRange.default"], marks=OTHER_NAME, id="default below min"),
    pytest.param(ranged("5G"), [f"{POLICY}.validRange.default"], marks=OTHER_NAME, id="default above max"),
    pytest.param(
        ranged("3G", min="3G", max="2G", step=None),
        [f"{POLICY}.validRange.default", f"{POLICY}.validRange.max"],
        marks=OTHER_NAME,
        id="max below min",
    ),
    pytest.param(ranged(max="20G"), [f"{POLICY}.validRange.max"], id="max above all"),
    pytest.param(ranged(step="0"), [f"{POLICY}.validRange.step"], marks=NO_CHECK, id="no step"),
    pytest.param(ranged(step="-1"), [f"{POLICY}.validRange.step"], marks=NO_CHECK, id="negative step"),
    pytest.param(ranged("100M", max=None, step="10G"), [f"{POLICY}.validRange.step"], id="step above all"),
    pytest.param(ranged("550M"), [f"{POLICY}.validRange.step"], id="default between steps"),
    pytest.param(ranged(max="3950M"), [f"{POLICY}.validRange.step"], id="max between steps"),
    pytest.param(
        ranged("550M", max="3950M"), [f"{POLICY}.validRange.step"], id="default and max between steps"
    ),
    pytest.param(
        ranged("1", min="-1", max=None, step="1"),
        [f"{POLICY}.validRange.min"],
        marks=NO_CHECK,
        id="negative min",
    ),
    pytest.param(chosen("1G", "2G", "3G"), [f"{POLICY}.validValues"], id="default is no value"),
    pytest.param(chosen("1G", "2G", "1G"), [f"{POLICY}.validValues[1]"], id="descending values"),
    pytest.param(chosen("1G", "1G", "1000M"), [f"{POLICY}.validValues[1]"], id="a value twice"),
    pytest.param(
        ranged("1.5", min="0.5", max="3", step="1"),
        [f"{POLICY}.validRange.step"],
        marks=WITH_FRACTIONS,
        id="fraction between steps",
    ),
    pytest.param(
        ranged("1", min="1u", max=None, step=None),
        [f"{POLICY}.validRange.min"],
        marks=WITH_FRACTIONS,
        id="millionths",
    ),
    pytest.param(chosen("1G", "1G", "20G"), [f"{POLICY}.validValues[1]"], id="a value above all"),
    pytest.param(chosen("1", *map(str, range(1, 12))), [f"{POLICY}.validValues"], id="eleven values"),
]


@pytest.mark.parametrize(("policy", "fields"), REFUSED)
def test_amounts_that_do_not_go_together_are_refused_and_named(
    api: ApiPeer, policy: dict[str, Any], fields: list[str]
) -> None:
    answer = api.http("POST", SLICES, api.slice([device(policy)]))
    assert (answer.code, answer.fields) == (422, fields), answer.said


@NO_CHECK
def test_bounds_beyond_63_bits_are_refused_where_there_is_a_step(api: ApiPeer) -> None:
    policy = ranged("100M", max="10E", step="100M")
    answer = api.http("POST", SLICES, api.slice([device(policy, "20E")]))
    assert (answer.code, answer.fields) == (422, [f"{POLICY}.validRange.max"]), answer.said


@pytest.mark.parametrize("more", [{}, {"allowMultipleAllocations": False}])
def test_amounts_of_a_device_that_one_claim_has_alone_are_refused(api: ApiPeer, more: dict[str, Any]) -> None:
    whole = {key: value for key, value in device(ranged()).items() if key != "allowMultipleAllocations"}
    answer = api.http("POST", SLICES, api.slice([{**whole, **more}]))
    assert (answer.code, answer.fields) == (422, [POLICY]), answer.said


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param({"default": "1K"}, id="no quantity"),
        pytest.param({"default": True}, id="bool as quantity"),
        pytest.param({"validValues": "1"}, id="text as list"),
        pytest.param({"validRange": []}, id="list as object"),
    ],
)
def test_a_value_of_another_type_is_a_bad_request(api: ApiPeer, policy: dict[str, Any]) -> None:
    answer = api.http("POST", SLICES, api.slice([device(policy)]))
    assert (answer.code, answer.body.get("reason")) == (400, "BadRequest"), answer.said


def test_the_driver_learns_by_a_trial_that_devices_can_be_shared_and_nothing_is_made(api: ApiPeer) -> None:
    with api.client() as client:
        assert ask_for_shares(client, Pool(driver=DRIVER, node=api.elsewhere))
        assert [items for items, _ in client.list_pages(Resource.RESOURCE_SLICES, api.selector)] == [[]]
