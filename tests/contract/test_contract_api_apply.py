"""Server-side apply of status.devices: who owns what, what a forced apply takes, what goes with its owner."""

from __future__ import annotations

from typing import Any

import pytest

from driver.kube.client import Resource
from tests.contract.api_peer import APPLY, DRIVER, Answer, ApiPeer

OTHER = "other.example"
AT = "2026-11-24T10:00:00Z"
READY = {"type": "Ready", "status": "True", "reason": "Attached", "message": "", "lastTransitionTime": AT}
NOT_READY = {**READY, "status": "False", "reason": "Detached"}
NETWORK = {"interfaceName": "net1", "hardwareAddress": "02:00:00:00:00:01", "ips": ["192.0.2.5/24"]}


def entry(api: ApiPeer, device: str = "a", **more: Any) -> dict[str, Any]:
    return {"driver": DRIVER, "pool": api.elsewhere, "device": device, **more}


def applied(
    api: ApiPeer,
    entries: list[dict[str, Any]],
    *,
    manager: str = DRIVER,
    force: bool = True,
    uid: str = "",
    name: str = "one",
) -> Answer:
    metadata = {"name": name, "namespace": api.namespace, **({"uid": uid} if uid else {})}
    body = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": metadata,
        "status": {"devices": entries},
    }
    query = {"fieldManager": manager, "force": str(force).lower()}
    return api.http("PATCH", f"{api.claims}/{name}/status", body, kind=APPLY, **query)


def devices(answer: Answer) -> dict[str, dict[str, Any]]:
    """Entries by device, without the keys and without what is null."""
    assert answer.code == 200, answer.said
    keys = ("driver", "pool", "device")
    return {
        each["device"]: {key: value for key, value in each.items() if key not in keys and value is not None}
        for each in answer.body["status"].get("devices") or []
    }


def test_an_apply_of_the_driver_is_kept_as_sent(api: ApiPeer) -> None:
    claim = api.claim("one", ["a", "b"])
    sent = [
        entry(api, conditions=[READY], networkData=NETWORK, data={"accountingHook": "tcx"}),
        entry(api, "b", conditions=[NOT_READY]),
    ]
    with api.client() as client:
        answer = client.apply(
            Resource.RESOURCE_CLAIMS,
            "one",
            {
                "apiVersion": "resource.k8s.io/v1",
                "kind": "ResourceClaim",
                "metadata": {
                    "name": "one",
                    "namespace": api.namespace,
                    "uid": claim["metadata"]["uid"],
                },
                "status": {"devices": sent},
            },
            namespace=api.namespace,
            subresource="status",
            manager=DRIVER,
        )
    assert answer["status"]["devices"] == sent
    assert answer["status"]["allocation"] == claim["status"]["allocation"]
    assert answer["spec"] == claim["spec"]


def test_the_same_apply_again_makes_no_version(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    first = applied(api, [entry(api, conditions=[READY])])
    again = applied(api, [entry(api, conditions=[READY])])
    assert devices(again) == devices(first)
    assert again.body["metadata"]["resourceVersion"] == first.body["metadata"]["resourceVersion"]


def test_what_a_manager_no_longer_names_goes(api: ApiPeer) -> None:
    api.claim("one", ["a", "b"])
    applied(api, [entry(api, networkData=NETWORK, conditions=[READY]), entry(api, "b", conditions=[READY])])
    left = applied(api, [entry(api, conditions=[READY])])
    assert devices(left) == {"a": {"conditions": [READY]}}
    assert devices(applied(api, [])) == {}


def test_another_managers_entries_stay(api: ApiPeer) -> None:
    api.claim("one", ["a", "b"])
    applied(api, [entry(api, "b", conditions=[READY])], manager=OTHER)
    both = applied(api, [entry(api, conditions=[READY])])
    assert devices(both) == {"a": {"conditions": [READY]}, "b": {"conditions": [READY]}}
    assert devices(applied(api, [])) == {"b": {"conditions": [READY]}}


def test_two_managers_share_an_entry_field_by_field(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    applied(api, [entry(api, conditions=[READY])])
    both = applied(api, [entry(api, data={"x": 1})], manager=OTHER, force=False)
    assert devices(both) == {"a": {"conditions": [READY], "data": {"x": 1}}}
    mine = applied(api, [entry(api, networkData=NETWORK)])
    assert devices(mine) == {"a": {"networkData": NETWORK, "data": {"x": 1}}}
    assert devices(applied(api, [])) == {"a": {"data": {"x": 1}}}


def test_another_value_for_anothers_field_is_a_conflict_that_names_the_manager(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    applied(api, [entry(api, conditions=[READY], networkData=NETWORK)], manager=OTHER)
    same = applied(api, [entry(api, conditions=[READY])], force=False)
    assert devices(same) == {"a": {"conditions": [READY], "networkData": NETWORK}}
    refused = applied(api, [entry(api, conditions=[NOT_READY])], force=False)
    assert (refused.code, refused.body["reason"]) == (409, "Conflict"), refused.said
    causes = refused.body["details"]["causes"]
    assert {cause["reason"] for cause in causes} == {"FieldManagerConflict"}
    assert all(f'conflict with "{OTHER}"' in cause["message"] for cause in causes)
    assert all(field.startswith(".status.devices[") for field in refused.fields), refused.said


def test_a_forced_apply_takes_the_field_and_the_loser_no_longer_keeps_it(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    applied(api, [entry(api, conditions=[READY], data={"x": 1})], manager=OTHER)
    taken = applied(api, [entry(api, conditions=[NOT_READY])])
    assert devices(taken) == {"a": {"conditions": [NOT_READY], "data": {"x": 1}}}
    assert devices(applied(api, [], manager=OTHER)) == {"a": {"conditions": [NOT_READY]}}


def test_an_apply_for_another_object_of_the_name_is_refused_by_its_uid(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    answer = applied(api, [entry(api, conditions=[READY])], uid="00000000-0000-0000-0000-000000000001")
    assert (answer.code, answer.body["reason"]) == (422, "Invalid"), answer.said
    assert answer.fields == ["metadata.uid"]
    assert not api.http("GET", f"{api.claims}/one").body["status"].get("devices")


def test_an_apply_to_what_is_gone_is_not_found(api: ApiPeer) -> None:
    assert applied(api, [entry(api)]).code == 404
    uid = api.claim("one", ["a"])["metadata"]["uid"]
    assert api.http("DELETE", f"{api.claims}/one").code == 200
    assert applied(api, [entry(api, conditions=[READY])], uid=uid).code == 404


def test_an_apply_changes_nothing_but_the_status(api: ApiPeer) -> None:
    claim = api.claim("one", ["a"])
    body = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"name": "one", "namespace": api.namespace, "labels": {"a": "b"}},
        "status": {"devices": [entry(api, conditions=[READY])]},
    }
    path = f"{api.claims}/one/status"
    answer = api.http("PATCH", path, body, kind=APPLY, fieldManager=DRIVER, force="true")
    assert devices(answer) == {"a": {"conditions": [READY]}}
    assert "labels" not in answer.body["metadata"]
    assert answer.body["spec"] == claim["spec"]


def test_an_apply_without_a_manager_is_refused(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    body = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": {"name": "one"}}
    answer = api.http("PATCH", f"{api.claims}/one/status", body, kind=APPLY)
    assert answer.code == 422, answer.said
    assert "fieldManager" in answer.body["message"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"device": "z"}, "status.devices[0]"),
        ({"pool": "elsewhere"}, "status.devices[0]"),
        ({"conditions": [{**READY, "reason": ""}]}, "status.devices[0].conditions[0].reason"),
        ({"conditions": [{**READY, "reason": "not a word"}]}, "status.devices[0].conditions[0].reason"),
        ({"conditions": [{**READY, "status": "Maybe"}]}, "status.devices[0].conditions[0].status"),
        ({"conditions": [{**READY, "type": "a b"}]}, "status.devices[0].conditions[0].type"),
        ({"networkData": {"ips": ["192.0.2.5"]}}, "status.devices[0].networkData.ips[0]"),
        ({"networkData": {"ips": ["2001:DB8::1/64"]}}, "status.devices[0].networkData.ips[0]"),
        ({"networkData": {"interfaceName": "x" * 257}}, "status.devices[0].networkData.interfaceName"),
        ({"networkData": {"hardwareAddress": "x" * 129}}, "status.devices[0].networkData.hardwareAddress"),
        (
            {"networkData": {"ips": [f"192.0.2.{index}/24" for index in range(17)]}},
            "status.devices[0].networkData.ips",
        ),
        ({"data": {"x": "y" * 10241}}, "status.devices[0].data"),
    ],
)
def test_a_status_that_is_not_taken_is_named_by_its_field(
    api: ApiPeer, change: dict[str, Any], field: str
) -> None:
    api.claim("one", ["a"])
    answer = applied(api, [entry(api, **change)])
    assert (answer.code, answer.body["reason"]) == (422, "Invalid"), answer.said
    assert answer.fields == [field], answer.said


def test_a_condition_without_a_time_is_refused(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    timeless = {key: value for key, value in READY.items() if key != "lastTransitionTime"}
    answer = applied(api, [entry(api, conditions=[timeless])])
    assert answer.code == 422, answer.said
    assert answer.fields == ["status.devices[0].conditions[0].lastTransitionTime"]


def test_an_entry_without_a_key_is_of_no_device(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    answer = applied(api, [{"driver": DRIVER, "pool": api.elsewhere, "conditions": [READY]}])
    assert answer.code == 422, answer.said
    assert answer.fields == ["status.devices[0]", "status.devices[0].device"]


def test_an_entry_that_is_there_twice_is_refused(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    answer = applied(api, [entry(api), entry(api)])
    assert answer.code == 500, answer.said
    assert not api.http("GET", f"{api.claims}/one").body["status"].get("devices")


def test_entries_go_with_the_allocation(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    body = applied(api, [entry(api, conditions=[READY])]).body
    freed = api.http("PUT", f"{api.claims}/one/status", {**body, "status": {}})
    assert freed.code == 200, freed.said
    assert not (freed.body.get("status") or {}).get("devices")
    kept = applied(api, [entry(api, conditions=[READY])])
    assert kept.code in (200, 422), kept.said


def test_who_may_not_apply_is_told_what_is_missing(api: ApiPeer) -> None:
    api.claim("one", ["a"])
    with api.outsider() as http:
        body = {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "ResourceClaim",
            "metadata": {"name": "one", "namespace": api.namespace},
            "status": {"devices": [entry(api, conditions=[READY])]},
        }
        path = f"{api.claims}/one/status"
        answer = http("PATCH", path, body, kind=APPLY, fieldManager=DRIVER, force="true")
    assert answer.code == 403, answer.said
    assert (
        'cannot patch resource "resourceclaims/status" in API group "resource.k8s.io"'
        in answer.body["message"]
    )
