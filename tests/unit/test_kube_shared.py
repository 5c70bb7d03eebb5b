"""Devices that are given out in shares, in slices: whole in what is said of them, or not there at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.kube.request_policy import request_policy
from driver.kube.slice_device import describe, same_device
from driver.kube.slice_plan import dropped_fields
from driver.kube.wire import JsonObject
from driver.model import CapacityRequest, OfferedDevice
from tests.conftest import WaitUntil
from tests.unit.kube_support import offered
from tests.unit.slices_world import Agent, Setting, offer_and_wait, slices_setting, start
from tests.unit.test_kube_slice_plan import server_says

RANGE = CapacityRequest(default="500M", least="100M", most="4G", step="100M")
ONE = CapacityRequest(default="1", values=("1",))


def shared(name: str = "uplink", bandwidth: CapacityRequest = RANGE) -> OfferedDevice:
    capacities = {"bandwidth": "10G", "shares": "16"}
    made = offered(name, {"kind": "shared"}, capacities)
    return replace(made, requests={"bandwidth": bandwidth, "shares": ONE})


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    with slices_setting(tmp_path) as made:
        yield made


def trials(setting: Setting) -> int:
    return sum(bool(each.query.get("dryRun")) for each in setting.api.writes())


def ever_published(setting: Setting) -> set[str]:
    bodies = [each.body for each in setting.api.writes() if not each.query.get("dryRun")]
    return {device["name"] for body in bodies for device in body["spec"].get("devices", [])}


def test_a_shared_device_says_that_several_may_have_it_and_what_each_may_ask_for() -> None:
    described = describe(shared())
    assert described.problems == []
    assert described.device == {
        "name": "uplink",
        "attributes": {"kind": {"string": "shared"}},
        "allowMultipleAllocations": True,
        "capacity": {
            "bandwidth": {
                "value": "10G",
                "requestPolicy": {
                    "default": "500M",
                    "validRange": {"min": "100M", "max": "4G", "step": "100M"},
                },
            },
            "shares": {"value": "16", "requestPolicy": {"default": "1", "validValues": ["1"]}},
        },
    }
    assert server_says(described.device) == []
    bare = describe(shared(bandwidth=CapacityRequest(default="1G", least="1M"))).device
    assert bare is not None
    assert bare["capacity"]["bandwidth"]["requestPolicy"]["validRange"] == {"min": "1M"}


def test_a_whole_device_says_nothing_of_shares() -> None:
    device = describe(offered("vf", capacities={"bandwidth": "10G"})).device
    assert device == {
        "name": "vf",
        "attributes": {"kind": {"string": "vf"}},
        "capacity": {"bandwidth": {"value": "10G"}},
    }


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (CapacityRequest(default="500M"), "neither values nor a least amount"),
        (replace(RANGE, default="50M"), "does not hold"),
        (replace(RANGE, default="5G"), "does not hold"),
        (replace(RANGE, most="20G"), "does not hold"),
        (replace(RANGE, default="550M"), "not multiples"),
        (replace(RANGE, most="4050M"), "not multiples"),
        (replace(RANGE, step="10G", default="100M", most="100M"), "a step of"),
        (replace(RANGE, step="0"), "a step of"),
        (replace(RANGE, step="nonsense"), "not a quantity"),
        (replace(RANGE, least="0.5"), "no whole number"),
        (replace(RANGE, least="-1"), "no whole number"),
        (CapacityRequest(default="1G", values=("1G", "20G")), "more than there is"),
        (CapacityRequest(default="1G", values=("2G",)), "none of the values"),
        (CapacityRequest(default="1G", values=("2G", "1G")), "ascending"),
        (CapacityRequest(default="1G", values=("1G", "1000M")), "ascending"),
        (CapacityRequest(default="1", values=tuple(map(str, range(1, 12)))), "ascending"),
        (CapacityRequest(default="1G", values=("1G",), least="1G"), "both values and a range"),
    ],
)
def test_a_device_whose_amounts_cannot_be_said_is_left_out_and_not_given_whole(
    request_: CapacityRequest, said: str
) -> None:
    described = describe(shared(bandwidth=request_))
    assert described.device is None
    (problem,) = described.problems
    assert "device uplink is not offered" in problem
    assert said in problem


def test_amounts_of_a_capacity_that_is_not_there_leave_the_device_out() -> None:
    described = describe(replace(shared(), capacities={"shares": "16"}))
    assert described.device is None


AMOUNTS = st.sampled_from(["0", "1", "50M", "100M", "500M", "550M", "1G", "4G", "10G", "20G", "0.5", "x"])
REQUESTS = st.builds(
    CapacityRequest,
    default=AMOUNTS,
    least=st.none() | AMOUNTS,
    most=st.none() | AMOUNTS,
    step=st.none() | AMOUNTS,
) | st.builds(CapacityRequest, default=AMOUNTS, values=st.lists(AMOUNTS, max_size=12).map(tuple))


@given(REQUESTS, AMOUNTS.filter(lambda amount: amount != "x"))
def test_whatever_can_be_asked_for_what_is_published_passes_the_server(
    request_: CapacityRequest, there: str
) -> None:
    described = describe(replace(shared(bandwidth=request_), capacities={"bandwidth": there, "shares": "16"}))
    if described.device is None:
        assert described.problems
    else:
        assert server_says(described.device) == []
        assert same_device(described.device, described.device)


@given(REQUESTS)
def test_whatever_the_server_takes_of_whole_numbers_is_published_unless_nobody_could_have_it(
    request_: CapacityRequest,
) -> None:
    bounds = {"min": request_.least, "max": request_.most, "step": request_.step}
    said = {name: text for name, text in bounds.items() if text is not None}
    texts = (request_.default, *request_.values, *said.values())
    if {"x", "0.5"}.intersection(texts) or not (request_.values or request_.least):
        return
    policy: JsonObject = {"default": request_.default}
    policy |= {"validValues": list(request_.values)} if request_.values else {"validRange": said}
    amount = {"value": "10G", "requestPolicy": policy}
    refused = server_says({"name": "a", "allowMultipleAllocations": True, "capacity": {"bandwidth": amount}})
    mixed = request_.values and said
    if not refused and request_.default != "20G" and not mixed:
        assert request_policy(request_, "10G") == policy


def test_quantities_that_the_server_wrote_otherwise_are_no_difference_and_others_are() -> None:
    wanted = describe(shared()).device
    assert wanted is not None
    stored = copy.deepcopy(wanted)
    policy = stored["capacity"]["bandwidth"]["requestPolicy"]
    policy["default"], policy["validRange"]["max"] = "0.5G", "4000M"
    stored["capacity"]["shares"]["requestPolicy"] |= {"validValues": ["1000m"], "validRange": None}
    assert same_device(wanted, stored)
    for path, other in (("default", "600M"), ("validRange", {"min": "100M", "max": "4G"})):
        stored = copy.deepcopy(wanted)
        stored["capacity"]["bandwidth"]["requestPolicy"][path] = other
        assert not same_device(wanted, stored)
    for field in ("requestPolicy", "value"):
        stored = copy.deepcopy(wanted)
        del stored["capacity"]["shares"][field]
        assert not same_device(wanted, stored)
        assert dropped_fields([wanted], [stored]) == (field,)
    stored = copy.deepcopy(wanted)
    del stored["allowMultipleAllocations"]
    assert dropped_fields([wanted], [stored]) == ("allowMultipleAllocations",)
    del stored["capacity"]
    assert "capacity" in dropped_fields([wanted], [stored])


def test_shared_devices_are_published_after_a_trial_and_not_written_again(
    setting: Setting, wait_until: WaitUntil
) -> None:
    devices = [offered("vf-0"), shared()]
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, devices, wait_until)
    assert (setting.names(), trials(setting)) == (["vf-0", "uplink"], 1)
    (each,) = setting.published()
    assert each["spec"]["devices"][1]["allowMultipleAllocations"] is True
    setting.api.clear_log()
    again = setting.agent()
    with start(again):
        offer_and_wait(again, devices, wait_until)
    assert [each.query for each in setting.api.writes()] == [{"dryRun": "All"}]


def test_nothing_is_asked_of_the_server_where_nothing_is_shared(
    setting: Setting, wait_until: WaitUntil
) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, [offered("vf-0")], wait_until)
    assert trials(setting) == 0
    assert agent.publisher.server.has_shares is None


@pytest.mark.parametrize(
    "fields",
    [{"allowMultipleAllocations", "requestPolicy"}, {"requestPolicy"}],
)
def test_where_the_server_gives_a_device_to_one_claim_alone_no_shared_one_is_ever_published(
    setting: Setting, wait_until: WaitUntil, fields: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    setting.api.dropped_fields |= fields
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, [offered("vf-0"), shared()], wait_until)
        offer_and_wait(agent, [offered("vf-1"), shared()], wait_until)
    assert setting.names() == ["vf-1"]
    assert ever_published(setting) == {"vf-0", "vf-1"}
    assert caplog.text.count("DRAConsumableCapacity") == 1
    assert agent.publisher.server.has_shares is False


@pytest.mark.parametrize("field", ["allowMultipleAllocations", "requestPolicy"])
def test_a_server_that_loses_the_feature_has_no_shared_device_for_long(
    setting: Setting, wait_until: WaitUntil, field: str
) -> None:
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, [offered("vf-0"), shared()], wait_until)
        setting.api.dropped_fields |= {"allowMultipleAllocations", "requestPolicy"}
        if field == "requestPolicy":
            setting.api.dropped_fields.discard("allowMultipleAllocations")
        agent.publisher.offer([offered("vf-0"), offered("vf-1"), shared()])
        wait_until(lambda: agent.publisher.published and setting.names() == ["vf-0", "vf-1"])


def test_a_server_that_was_asked_in_vain_is_asked_again_when_its_list_is_read_anew(
    setting: Setting, wait_until: WaitUntil
) -> None:
    setting.api.dropped_fields |= {"allowMultipleAllocations", "requestPolicy"}
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, [shared()], wait_until)
        assert setting.names() == []
        setting.api.dropped_fields.clear()
        setting.api.compact()
        wait_until(lambda: setting.names() == ["uplink"])


def test_a_server_that_refuses_the_trial_has_no_shared_device(
    setting: Setting, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    setting.api.fail(422, verb="create", resource="resourceslices")
    agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, [offered("vf-0"), shared()], wait_until)
    assert setting.names() == ["vf-0"]
    assert "gives out no devices in shares" in caplog.text


def test_counters_and_shares_are_asked_for_each_by_itself(setting: Setting, wait_until: WaitUntil) -> None:
    setting.api.dropped_fields |= {"sharedCounters", "consumesCounters"}
    agent: Agent = setting.agent()
    with start(agent):
        offer_and_wait(agent, [offered("vf-0"), shared()], wait_until)
    assert (agent.publisher.server.has_counters, agent.publisher.server.has_shares) == (None, True)
