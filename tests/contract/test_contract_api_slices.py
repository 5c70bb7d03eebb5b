"""What the API server takes as a ResourceSlice, and how it names what it does not take."""

from __future__ import annotations

import re
from typing import Any

import pytest

from driver.kube import failures
from driver.kube.client import Resource
from driver.kube.server_features import ask_for_counters
from driver.kube.slice_plan import Pool
from tests.contract.api_peer import DRIVER, SLICES, ApiPeer

TAINT = {"key": "k", "effect": "NoSchedule"}
WITH_COUNTERS = pytest.mark.since("1.36", "older servers drop counters unless DRAPartitionableDevices is on")


def device(name: str = "a", **more: Any) -> dict[str, Any]:
    return {"name": name, **more}


def many(count: int, **more: Any) -> list[dict[str, Any]]:
    return [device(f"d{index}", **more) for index in range(count)]


def attributes(**values: Any) -> list[dict[str, Any]]:
    return [device(attributes=values)]


def named(key: str, value: Any) -> list[dict[str, Any]]:
    return [device(attributes={key: value})]


def capacity(key: str, value: Any) -> list[dict[str, Any]]:
    return [device(capacity={key: {"value": value}})]


def counters(count: int = 1, **values: str) -> list[dict[str, Any]]:
    amounts = {name: {"value": value} for name, value in (values or {"vfs": "8"}).items()}
    return [{"name": f"c{index}", "counters": amounts} for index in range(count)]


def using(*sets: str) -> dict[str, Any]:
    amounts = {"vfs": {"value": "1"}}
    return {"consumesCounters": [{"counterSet": each, "counters": amounts} for each in sets]}


def test_a_slice_may_be_as_full_as_the_driver_makes_it(api: ApiPeer) -> None:
    full = {f"x{index}": {"string": "y" * 64} for index in range(31)}
    one = device("b", attributes=full, capacity={"c": {"value": "1"}}, taints=[TAINT])
    for devices in (many(128), [*many(63), one], [], [device("a" * 63)]):
        made = api.http("POST", SLICES, api.slice(devices))
        assert made.code == 201, made.said
        assert len(made.body["spec"].get("devices") or []) == len(devices)


def test_capitals_in_a_domain_are_let_pass(api: ApiPeer) -> None:
    for body in (
        api.slice([device()], driver="Upper.example"),
        api.slice([device(attributes={"Up.x/a": {"int": 1}})]),
    ):
        made = api.http("POST", SLICES, body)
        assert made.code == 201, made.said
        api.http("DELETE", f"{SLICES}/{made.body['metadata']['name']}")


TOO_MUCH = [
    pytest.param(many(129), ["spec.devices"], id="129 devices"),
    pytest.param(
        [*many(64), device("t", taints=[TAINT])],
        ["spec.devices"],
        marks=pytest.mark.since("1.36"),
        id="65 devices, one tainted",
    ),
    pytest.param(
        attributes(**{f"x{index}": {"int": 1} for index in range(33)}),
        ["spec.devices[0]"],
        id="33 attributes",
    ),
    pytest.param(
        [device(attributes={f"x{index}": {"int": 1} for index in range(32)}, capacity={"c": {"value": "1"}})],
        ["spec.devices[0]"],
        id="32 attributes and a capacity",
    ),
    pytest.param(
        attributes(x={"string": "y" * 65}), ["spec.devices[0].attributes[x].string"], id="string of 65 bytes"
    ),
    pytest.param(
        attributes(x={"string": "é" * 33}), ["spec.devices[0].attributes[x].string"], id="string of 66 bytes"
    ),
    pytest.param([device(taints=[TAINT] * 17)], ["spec.devices[0].taints"], id="17 taints"),
    pytest.param(
        [*many(64), device("t", **using("c"))],
        ["spec.devices"],
        marks=WITH_COUNTERS,
        id="65, one uses counters",
    ),
    pytest.param(
        [device(**using("a", "b", "c"))],
        ["spec.devices[0].consumesCounters"],
        marks=WITH_COUNTERS,
        id="counters of three sets",
    ),
    pytest.param(
        [device(**using("A"))],
        ["spec.devices[0].consumesCounters[0].counterSet"],
        marks=WITH_COUNTERS,
        id="upper case counter set",
    ),
]

BAD_NAMES = [
    pytest.param([device("Upper")], ["spec.devices[0]"], id="upper case device"),
    pytest.param([device("a_b")], ["spec.devices[0]"], id="device with underscore"),
    pytest.param([device("a" * 64)], ["spec.devices[0]"], id="device of 64"),
    pytest.param([device("")], ["spec.devices[0]"], id="no device name"),
    pytest.param([device(), device("b"), device()], ["spec.devices[2]"], id="same device twice"),
    pytest.param(named("a.b", {"int": 1}), ["spec.devices[0].attributes"], id="dot in identifier"),
    pytest.param(named("1a", {"int": 1}), ["spec.devices[0].attributes"], id="digit first"),
    pytest.param(named("a" * 33, {"int": 1}), ["spec.devices[0].attributes"], id="of 33"),
    pytest.param(capacity("a-b", "1"), ["spec.devices[0].capacity"], id="dash in capacity"),
]

BAD_VALUES = [
    pytest.param(attributes(x={}), ["spec.devices[0].attributes"], id="no value"),
    pytest.param(attributes(x={"int": 1, "string": "a"}), ["spec.devices[0].attributes"], id="two values"),
    pytest.param(attributes(x={"float": 1}), ["spec.devices[0].attributes"], id="unknown kind of value"),
    pytest.param(
        attributes(x={"version": "v1.0.0"}), ["spec.devices[0].attributes[x].version"], id="v before version"
    ),
    pytest.param(
        attributes(x={"version": "1.0"}), ["spec.devices[0].attributes[x].version"], id="short version"
    ),
    pytest.param(
        [device(taints=[{"key": "k", "effect": "Never"}])],
        ["spec.devices[0].taints[0].effect"],
        id="unknown effect",
    ),
    pytest.param([device(taints=[{"key": "k"}])], ["spec.devices[0].taints[0].effect"], id="no effect"),
    pytest.param(
        [device(taints=[{"key": "a b", "effect": "NoExecute"}])],
        ["spec.devices[0].taints[0].key"],
        id="taint key with blank",
    ),
    pytest.param(
        [device(taints=[{**TAINT, "value": "a b"}])], ["spec.devices[0].taints[0].value"], id="taint value"
    ),
    pytest.param(
        [device("A"), device("b"), device("C")],
        ["spec.devices[0]", "spec.devices[2]"],
        id="two bad devices",
    ),
]


@pytest.mark.parametrize(("devices", "fields"), [*TOO_MUCH, *BAD_NAMES, *BAD_VALUES])
def test_what_is_refused_is_named_by_its_field(
    api: ApiPeer, devices: list[dict[str, Any]], fields: list[str]
) -> None:
    answer = api.http("POST", SLICES, api.slice(devices))
    assert (answer.code, answer.body.get("reason")) == (422, "Invalid"), answer.said
    # A bad key of a map is named by the map, or by itself in older versions; a name that is there
    # already by its device, or by itself.
    bare = [re.sub(r"(attributes|capacity)\[[^]]*\]$", r"\1", field) for field in answer.fields]
    assert {field.removesuffix(".name") for field in bare} == set(fields), answer.said
    details = answer.body["details"]
    assert (details["group"], details["kind"]) == ("resource.k8s.io", "ResourceSlice")
    assert answer.body["message"].startswith("ResourceSlice.resource.k8s.io ")


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({"driver": "a_b.example"}, ["spec.driver"]),
        ({"driver": "a" * 64}, ["spec.driver"]),
        ({"pool": {"name": "", "generation": 1, "resourceSliceCount": 1}}, ["spec.pool.name"]),
        ({"pool": {"name": "Up", "generation": 1, "resourceSliceCount": 1}}, ["spec.pool.name"]),
        ({"pool": {"name": "p", "generation": -1, "resourceSliceCount": 1}}, ["spec.pool.generation"]),
        ({"pool": {"name": "p", "generation": 1, "resourceSliceCount": 0}}, ["spec.pool.resourceSliceCount"]),
        ({"nodeName": None}, ["spec"]),
        ({"allNodes": True}, ["spec"]),
        pytest.param(
            {"sharedCounters": [{"name": "c", "counters": {"vfs": {"value": "1"}}}]},
            ["spec"],
            marks=pytest.mark.since("1.36"),
        ),
    ],
)
def test_the_head_of_a_slice_is_checked(api: ApiPeer, spec: dict[str, Any], fields: list[str]) -> None:
    answer = api.http("POST", SLICES, api.slice([device()], **spec))
    assert answer.code == 422, answer.said
    assert answer.fields == fields, answer.said


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(capacity("c", "1K"), id="no quantity"),
        pytest.param(capacity("c", ""), id="empty quantity"),
        pytest.param(attributes(x={"int": True}), id="bool as int"),
        pytest.param(attributes(x={"int": 2**63}), id="int of 65 bits"),
        pytest.param(attributes(x={"bool": "true"}), id="string as bool"),
        pytest.param(attributes(x={"string": 1}), id="int as string"),
        pytest.param([device(1)], id="number as name"),
    ],
)
def test_a_value_of_another_type_is_a_bad_request_that_names_no_field(
    api: ApiPeer, devices: list[dict[str, Any]]
) -> None:
    answer = api.http("POST", SLICES, api.slice(devices))
    assert (answer.code, answer.body.get("reason")) == (400, "BadRequest"), answer.said
    assert answer.fields == []


@pytest.mark.parametrize(
    ("sets", "fields"),
    [
        pytest.param(counters(9), ["spec.sharedCounters"], marks=WITH_COUNTERS, id="nine sets"),
        pytest.param(
            counters(1, **{f"x{index}": "1" for index in range(33)}),
            ["spec.sharedCounters[0].counters"],
            marks=WITH_COUNTERS,
            id="33 counters",
        ),
        pytest.param([*counters(), *counters()], ["spec.sharedCounters[1]"], marks=WITH_COUNTERS, id="twice"),
    ],
)
def test_a_counter_set_that_is_refused_is_named(
    api: ApiPeer, sets: list[dict[str, Any]], fields: list[str]
) -> None:
    answer = api.http("POST", SLICES, api.slice(devices=None, sharedCounters=sets))
    assert (answer.code, answer.fields) == (422, fields), answer.said


@WITH_COUNTERS
def test_counters_are_kept_canonical_and_their_sets_may_be_in_another_slice(api: ApiPeer) -> None:
    made = api.http("POST", SLICES, api.slice(devices=None, sharedCounters=counters(8, vfs="1000")))
    assert made.code == 201, made.said
    assert made.body["spec"]["sharedCounters"][0]["counters"]["vfs"]["value"] == "1k"
    kept = api.made_slice([*many(63), device("last", **using("c0", "nowhere"))])
    assert kept["spec"]["devices"][63]["consumesCounters"] == using("c0", "nowhere")["consumesCounters"]


def test_the_driver_learns_by_a_trial_whether_counters_are_kept_and_nothing_is_made(api: ApiPeer) -> None:
    with api.client() as client:
        has = ask_for_counters(client, Pool(driver=DRIVER, node=api.elsewhere))
        assert [items for items, _ in client.list_pages(Resource.RESOURCE_SLICES, api.selector)] == [[]]
    version = re.match(r"v1\.(\d+)", api.version)
    assert has is (version is None or int(version[1]) >= 36)


def test_driver_node_and_pool_of_a_slice_cannot_be_changed(api: ApiPeer) -> None:
    made = api.made_slice()
    path = f"{SLICES}/{made['metadata']['name']}"
    for change, field in (
        ({"driver": "other.example"}, "spec.driver"),
        ({"nodeName": "m"}, "spec.nodeName"),
        ({"pool": {**made["spec"]["pool"], "name": "p"}}, "spec.pool.name"),
    ):
        answer = api.http("PUT", path, {**made, "spec": {**made["spec"], **change}})
        assert (answer.code, answer.fields) == (422, [field]), answer.said
        assert "immutable" in answer.body["message"]
    changed = {**made["spec"]["pool"], "generation": 2, "resourceSliceCount": 3}
    answer = api.http("PUT", path, {**made, "spec": {**made["spec"], "pool": changed}})
    assert answer.code == 200, answer.said


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("1000M", "1G"),
        ("1024Mi", "1Gi"),
        ("0.5", "500m"),
        ("1.5G", "1500M"),
        ("1e3", "1e3"),
        ("100000", "100k"),
        ("0", "0"),
        ("12345", "12345"),
        ("25G", "25G"),
        ("1500Mi", "1500Mi"),
        ("0Gi", "0"),
        ("4096", "4096"),
        ("1.5Gi", "1536Mi"),
    ],
)
def test_a_quantity_comes_back_in_its_canonical_form(api: ApiPeer, sent: str, kept: str) -> None:
    made = api.made_slice(capacity("bandwidth", sent))
    assert made["spec"]["devices"][0]["capacity"]["bandwidth"]["value"] == kept


def test_a_taint_gets_a_time_and_keeps_the_one_it_has(api: ApiPeer) -> None:
    made = api.made_slice([device(taints=[TAINT])])
    (taint,) = made["spec"]["devices"][0]["taints"]
    assert taint["timeAdded"].endswith("Z")
    old = "2026-01-01T00:00:00Z"
    body = {**made, "spec": {**made["spec"], "devices": [device(taints=[{**taint, "timeAdded": old}])]}}
    done = api.http("PUT", f"{SLICES}/{made['metadata']['name']}", body)
    assert done.body["spec"]["devices"][0]["taints"][0]["timeAdded"] == old, done.said


def test_the_driver_learns_which_devices_were_refused(api: ApiPeer) -> None:
    with api.client() as client, pytest.raises(failures.Invalid) as caught:
        client.create(Resource.RESOURCE_SLICES, api.slice([device(), device("b", taints=[{"key": "k"}])]))
    assert caught.value.fields == ("spec.devices[1].taints[0].effect",)
