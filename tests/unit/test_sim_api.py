"""The simulated API server is as strict as the real one, and its faults are what they say."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from kndsim.api import SimApi, new_share_id
from kndsim.api_rules import canonical_quantity, quantity_value, slice_causes

DRIVER = "knd.internal"
NODE = "n"
SLICES = "/apis/resource.k8s.io/v1/resourceslices"
STATUS = "/apis/resource.k8s.io/v1/namespaces/d/resourceclaims/c/status"
APPLY = "application/apply-patch+yaml"


class Client:
    """http.client alone: nothing of the driver is needed to talk to it."""

    def __init__(self, api: SimApi) -> None:
        self.connection = http.client.HTTPConnection(api.url.removeprefix("http://"), timeout=5)

    def __call__(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        data = None if body is None else json.dumps(body)
        self.connection.request(method, path, data, {"Content-Type": kind})
        response = self.connection.getresponse()
        return response.status, json.loads(response.read() or b"null")


@pytest.fixture
def api() -> Iterator[SimApi]:
    with SimApi() as api:
        yield api


@pytest.fixture
def call(api: SimApi) -> Iterator[Client]:
    client = Client(api)
    yield client
    client.connection.close()


def spec(devices: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    pool = {"name": NODE, "generation": 1, "resourceSliceCount": 1}
    return {"driver": DRIVER, "nodeName": NODE, "pool": pool, "devices": devices or [], **more}


def made(call: Client, devices: list[Any] | None = None) -> dict[str, Any]:
    body = {"metadata": {"generateName": "00000-x-"}, "spec": spec(devices)}
    code, slice_ = call("POST", SLICES, body)
    assert code == 201, slice_
    result: dict[str, Any] = slice_
    return result


def test_generated_names_are_cut_at_58_and_get_5_more(call: Client) -> None:
    code, slice_ = call("POST", SLICES, {"metadata": {"generateName": "a" * 80 + "-"}, "spec": spec()})
    assert code == 201
    name = slice_["metadata"]["name"]
    assert len(name) == 63
    assert name.startswith("a" * 58)
    assert slice_["metadata"]["generation"] == 1
    assert slice_["metadata"]["uid"]


def test_a_replace_with_an_old_version_conflicts(call: Client) -> None:
    slice_ = made(call)
    path = f"{SLICES}/{slice_['metadata']['name']}"
    changed = {**slice_, "spec": spec([{"name": "a"}])}
    code, stored = call("PUT", path, changed)
    assert code == 200
    assert stored["metadata"]["generation"] == 2
    assert call("PUT", path, changed)[0] == 409


def test_a_replace_that_changes_nothing_makes_no_version(api: SimApi, call: Client) -> None:
    slice_ = made(call, [{"name": "a", "taints": [{"key": "k", "effect": "NoSchedule"}]}])
    version = api.store.version
    code, stored = call("PUT", f"{SLICES}/{slice_['metadata']['name']}", slice_)
    assert (code, stored) == (200, slice_)
    assert api.store.version == version


def test_immutable_fields_are_immutable(call: Client) -> None:
    slice_ = made(call)
    path = f"{SLICES}/{slice_['metadata']['name']}"
    for change in ({"driver": "other.example"}, {"nodeName": "m"}, {"pool": {"name": "p"}}):
        bad = {**slice_, "spec": {**slice_["spec"], **change}}
        assert call("PUT", path, bad)[0] == 422


@pytest.mark.parametrize(
    ("devices", "field"),
    [
        ([{"name": "Upper"}], "spec.devices[0].name"),
        ([{"name": "a" * 64}], "spec.devices[0].name"),
        ([{"name": "a"}, {"name": "a"}], "spec.devices[1]"),
        ([{"name": f"d{i}"} for i in range(129)], "spec.devices"),
        (
            [
                {"name": f"d{i}", "taints": [{"key": "k", "effect": "NoSchedule"}] if i == 0 else []}
                for i in range(65)
            ],
            "spec.devices",
        ),
        ([{"name": "a", "attributes": {f"x{i}": {"int": 1} for i in range(33)}}], "spec.devices[0]"),
        ([{"name": "a", "attributes": {"x": {"string": "y" * 65}}}], "spec.devices[0].attributes[x].string"),
        ([{"name": "a", "attributes": {"x": {"version": "v1"}}}], "spec.devices[0].attributes[x].version"),
        ([{"name": "a", "attributes": {"x": {}}}], "spec.devices[0].attributes[x]"),
        ([{"name": "a", "attributes": {"a.b": {"int": 1}}}], "spec.devices[0].attributes"),
        ([{"name": "a", "taints": [{"key": "k", "effect": "Never"}]}], "spec.devices[0].taints[0].effect"),
    ],
)
def test_slices_beyond_the_limits_are_refused_with_the_field(
    call: Client, devices: list[Any], field: str
) -> None:
    code, answer = call("POST", SLICES, {"metadata": {"name": "x"}, "spec": spec(devices)})
    assert code == 422
    assert field in [cause["field"] for cause in answer["details"]["causes"]]


def test_slices_at_the_limits_are_taken(call: Client) -> None:
    attributes = {f"x{index}": {"string": "y" * 64} for index in range(31)}
    device = {"attributes": attributes, "capacity": {"z": {"value": "1Gi"}}}
    assert (
        call(
            "POST",
            SLICES,
            {"metadata": {"name": "x"}, "spec": spec([{"name": f"d{i}", **device} for i in range(128)])},
        )[0]
        == 201
    )


def test_where_a_slice_applies_is_said_exactly_once() -> None:
    for bad in (
        {**spec(), "allNodes": True},
        {key: value for key, value in spec().items() if key != "nodeName"},
    ):
        assert slice_causes(bad)


def test_delete_checks_its_preconditions(call: Client) -> None:
    slice_ = made(call)
    path = f"{SLICES}/{slice_['metadata']['name']}"
    assert call("DELETE", path, {"preconditions": {"uid": "another"}})[0] == 409
    assert call("DELETE", path, {"preconditions": {"resourceVersion": "1"}})[0] == 409
    assert call("DELETE", path, {"preconditions": {"uid": slice_["metadata"]["uid"]}})[0] == 200
    assert call("DELETE", path)[0] == 404


def test_a_collection_is_deleted_by_its_fields_as_kubelet_does(api: SimApi, call: Client) -> None:
    made(call)
    body = {"metadata": {"name": "other"}, "spec": {**spec(), "driver": "gpu.example.com"}}
    call("POST", SLICES, body)
    assert call("DELETE", f"{SLICES}?fieldSelector=spec.nodeName%3D{NODE},spec.driver%3D{DRIVER}")[0] == 200
    assert api.slices(DRIVER, NODE) == []
    assert len(api.slices("gpu.example.com", NODE)) == 1


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("1000M", "1G"),
        ("1024Ki", "1Mi"),
        ("0.5", "500m"),
        ("6G", "6G"),
        ("5859375Ki", "5859375Ki"),
        ("0", "0"),
        ("1e3", "1e3"),
    ],
)
def test_quantities_come_back_in_the_servers_form(sent: str, kept: str) -> None:
    assert canonical_quantity(sent) == kept
    assert quantity_value(sent) == quantity_value(kept)


def test_fields_of_a_gate_that_is_off_vanish_without_a_word() -> None:
    with SimApi(dropped_fields=["taints"]) as api:
        call = Client(api)
        slice_ = made(call, [{"name": "a", "taints": [{"key": "k", "effect": "NoSchedule"}]}])
        call.connection.close()
    assert slice_["spec"]["devices"] == [{"name": "a"}]


def test_what_a_gate_that_is_off_drops_is_not_looked_at_and_the_capacity_stays() -> None:
    policy = {"default": "20G", "validRange": {"min": "1G"}}
    capacity = {"bandwidth": {"value": "10G", "requestPolicy": policy}, "shares": {"value": "4"}}
    device = {"name": "a", "allowMultipleAllocations": True, "capacity": capacity}
    with SimApi(dropped_fields=["allowMultipleAllocations", "requestPolicy"]) as api:
        call = Client(api)
        slice_ = made(call, [device])
        call.connection.close()
    assert slice_["spec"]["devices"] == [
        {"name": "a", "capacity": {"bandwidth": {"value": "10G"}, "shares": {"value": "4"}}}
    ]


# --- server-side apply ------------------------------------------------------------------------------


def entry(driver: str, device: str, **more: Any) -> dict[str, Any]:
    return {"driver": driver, "pool": NODE, "device": device, **more}


def apply(call: Client, manager: str, *entries: Any, uid: str | None = None, force: str = "true") -> int:
    body = {"metadata": {"uid": uid} if uid else {}, "status": {"devices": list(entries)}, "spec": {"x": 1}}
    code: int = call("PATCH", f"{STATUS}?fieldManager={manager}&force={force}", body, APPLY)[0]
    return code


@pytest.fixture
def claim(api: SimApi) -> str:
    other = {"request": "gpu", "driver": "gpu.x", "pool": NODE, "device": "g"}
    devices = [("net", NODE, "a", None), ("net", NODE, "b", None)]
    return api.add_claim("d", "c", driver=DRIVER, devices=devices, extra_results=[other])


def devices_of(api: SimApi) -> list[tuple[str, str]]:
    return [(each["driver"], each["device"]) for each in api.claim("d", "c")["status"].get("devices", [])]


def test_an_apply_owns_what_it_names_and_drops_what_it_no_longer_names(
    api: SimApi, call: Client, claim: str
) -> None:
    assert apply(call, DRIVER, entry(DRIVER, "a"), entry(DRIVER, "b"), uid=claim) == 200
    assert apply(call, "gpu.x", entry("gpu.x", "g")) == 200
    assert apply(call, DRIVER, entry(DRIVER, "b")) == 200
    assert devices_of(api) == [(DRIVER, "b"), ("gpu.x", "g")]
    assert apply(call, DRIVER) == 200
    assert devices_of(api) == [("gpu.x", "g")]
    assert api.claim("d", "c")["spec"] != {"x": 1}


def test_another_managers_entry_needs_force(api: SimApi, call: Client, claim: str) -> None:
    assert apply(call, "one", entry(DRIVER, "a", data={"x": 1})) == 200
    assert apply(call, "two", entry(DRIVER, "a", data={"x": 2}), force="false") == 409
    assert apply(call, "two", entry(DRIVER, "a", data={"x": 2})) == 200
    assert apply(call, "one") == 200
    assert devices_of(api) == [(DRIVER, "a")]


def test_shares_are_entries_of_their_own(api: SimApi, call: Client) -> None:
    shares = [new_share_id(), new_share_id()]
    api.add_claim("d", "c", driver=DRIVER, devices=[("net", NODE, "a", share) for share in shares])
    assert apply(call, DRIVER, *(entry(DRIVER, "a", shareID=share) for share in shares)) == 200
    assert len(devices_of(api)) == 2


@pytest.mark.parametrize(
    "bad",
    [
        entry(DRIVER, "not-allocated"),
        entry(DRIVER, "a", networkData={"ips": ["192.0.2.5"]}),
        entry(DRIVER, "a", networkData={"ips": ["2001:DB8::1/64"]}),
        entry(DRIVER, "a", networkData={"ips": ["192.0.2.5/24"] * 2}),
        entry(DRIVER, "a", conditions=[{"type": "Ready", "status": "True", "reason": ""}]),
        entry(DRIVER, "a", conditions=[{"type": "Ready", "status": "yes", "reason": "R"}]),
    ],
)
def test_entries_the_real_server_would_refuse_are_refused(
    api: SimApi, call: Client, claim: str, bad: dict[str, Any]
) -> None:
    assert apply(call, DRIVER, bad) == 422
    assert devices_of(api) == []


def test_an_apply_for_another_uid_or_of_keyless_entries_fails(call: Client, claim: str) -> None:
    assert apply(call, DRIVER, entry(DRIVER, "a"), uid="another") == 422
    assert apply(call, DRIVER, {"driver": DRIVER}) == 422
    assert apply(call, DRIVER, entry(DRIVER, "a"), entry(DRIVER, "a")) == 500
    assert call("PATCH", STATUS, {"status": {}}, APPLY)[0] == 422, "a field manager is needed"
    assert call("PATCH", STATUS, {"status": {}}, "application/strategic-merge-patch+json")[0] == 415


# --- the scheduler ----------------------------------------------------------------------------------


def test_devices_are_given_out_once_and_tainted_ones_to_the_tolerant_alone(api: SimApi, call: Client) -> None:
    taint = {"key": "k", "effect": "NoSchedule"}
    made(
        call,
        [
            {"name": "bad", "taints": [taint]},
            {"name": "a"},
            {"name": "b", "attributes": {"rdma": {"bool": True}}},
        ],
    )
    for name in ("one", "two", "three"):
        api.add_claim("d", name)
    rdma = {"net": lambda device: bool(device.get("attributes", {}).get("rdma", {}).get("bool"))}
    assert api.allocate("d", "one", DRIVER, NODE, rdma) == [("net", NODE, "b", None)]
    assert api.allocate("d", "two", DRIVER, NODE, {"net": lambda _: True}) == [("net", NODE, "a", None)]
    with pytest.raises(LookupError, match="net"):
        api.allocate("d", "three", DRIVER, NODE, {"net": lambda _: True})
    api.delete("resourceclaims", "one", "d")
    assert api.allocate("d", "three", DRIVER, NODE, {"net": lambda _: True}) == [("net", NODE, "b", None)]
    api.add_claim("d", "four")
    every = {"net": lambda _: True}
    assert api.allocate("d", "four", DRIVER, NODE, every, tolerate=True) == [("net", NODE, "bad", None)]


def test_an_incomplete_pool_gives_nothing(api: SimApi, call: Client) -> None:
    pool = {"name": NODE, "generation": 1, "resourceSliceCount": 2}
    call("POST", SLICES, {"metadata": {"name": "x"}, "spec": {**spec([{"name": "a"}]), "pool": pool}})
    api.add_claim("d", "c")
    with pytest.raises(LookupError):
        api.allocate("d", "c", DRIVER, NODE, {"net": lambda _: True})


# --- faults -----------------------------------------------------------------------------------------


def test_faults_fit_their_requests_and_end(api: SimApi, call: Client) -> None:
    api.add_node(NODE)
    api.fail(503, times=2, verb="get", resource="nodes", retry_after=7)
    assert call("GET", SLICES)[0] == 200
    assert call("GET", f"/api/v1/nodes/{NODE}")[0] == 503
    assert call("GET", f"/api/v1/nodes/{NODE}")[0] == 503
    assert call("GET", f"/api/v1/nodes/{NODE}")[0] == 200


def test_a_watch_of_a_compacted_version_is_told_410(api: SimApi, call: Client) -> None:
    api.compact()
    call.connection.close()
    code, event = call("GET", f"{SLICES}?watch=1&resourceVersion=1")
    assert code == 200
    assert event["type"] == "ERROR"
    assert event["object"]["code"] == 410


def test_every_request_is_logged_with_its_body(api: SimApi, call: Client) -> None:
    made(call)
    call("GET", "/api/v1/namespaces/d/pods/p")
    first, second = api.requests()
    assert (first.verb, first.resource, first.body["spec"]["driver"]) == ("create", "resourceslices", DRIVER)
    assert (second.verb, second.namespace, second.name) == ("get", "d", "p")
    assert api.writes() == [first]


@pytest.mark.parametrize("path", ["/", "/api/v1", "/api/v1/secrets", "/apis/apps/v1/daemonsets"])
def test_what_is_not_simulated_is_not_found(call: Client, path: str) -> None:
    assert call("GET", path)[0] == 404


def test_bodies_that_are_nothing_are_refused(call: Client) -> None:
    call.connection.request("POST", SLICES, "{", {"Content-Type": "application/json"})
    assert call.connection.getresponse().status == 400
