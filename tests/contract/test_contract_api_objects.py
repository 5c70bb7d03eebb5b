"""The API server's answers to the driver's reads and writes: codes, reasons, what they name, what is kept."""

from __future__ import annotations

from typing import Any

import pytest

from driver.kube import failures
from driver.kube.client import Resource
from tests.contract.api_peer import MERGE, OUTSIDER, RESOURCE, SLICES, Answer, ApiPeer


def is_failure(answer: Answer, code: int, reason: str, **details: Any) -> None:
    """A Status object as the client parses it, with these details and no causes but an Invalid's."""
    body = answer.body
    assert answer.code == code, answer.said
    assert (body["kind"], body["apiVersion"], body["status"]) == ("Status", "v1", "Failure"), answer.said
    assert (body["code"], body["reason"]) == (code, reason), answer.said
    assert {key: body["details"].get(key) for key in details} == details, answer.said
    assert code == 422 or not body["details"].get("causes"), answer.said


def test_what_is_not_there_is_named_with_its_group(api: ApiPeer) -> None:
    answer = api.http("GET", f"{SLICES}/nobody")
    is_failure(answer, 404, "NotFound", name="nobody", group="resource.k8s.io", kind="resourceslices")
    assert answer.body["message"] == 'resourceslices.resource.k8s.io "nobody" not found'
    answer = api.http("GET", f"{api.pods}/nobody")
    is_failure(answer, 404, "NotFound", name="nobody", kind="pods")
    assert answer.body["message"] == 'pods "nobody" not found'
    assert "group" not in answer.body["details"]


def test_a_node_that_is_there_has_a_uid(api: ApiPeer) -> None:
    with api.client() as client:
        assert client.get(Resource.NODES, api.node)["metadata"]["uid"]
        with pytest.raises(failures.NotFound, match='nodes "nobody" not found'):
            client.get(Resource.NODES, "nobody")


def test_a_created_slice_gets_a_name_a_uid_a_version_and_generation_1(api: ApiPeer) -> None:
    body = api.slice([{"name": "a"}])
    made = api.http("POST", SLICES, body)
    assert made.code == 201, made.said
    metadata = made.body["metadata"]
    prefix = body["metadata"]["generateName"][:58]
    assert metadata["name"].startswith(prefix)
    assert len(metadata["name"]) == len(prefix) + 5
    assert metadata["uid"]
    assert metadata["resourceVersion"].isdigit()
    assert metadata["generation"] == 1
    assert made.body["spec"]["devices"] == [{"name": "a"}]
    assert (made.body["kind"], made.body["apiVersion"]) == ("ResourceSlice", "resource.k8s.io/v1")


def test_a_name_that_is_taken_is_a_conflict_that_says_so(api: ApiPeer) -> None:
    api.claim("one", [])
    again = api.http("POST", api.claims, {"metadata": {"name": "one"}, "spec": {"devices": {}}})
    is_failure(again, 409, "AlreadyExists", name="one", group="resource.k8s.io", kind="resourceclaims")


def test_a_replace_with_the_version_that_was_read_moves_the_generation(api: ApiPeer) -> None:
    made = api.made_slice([{"name": "a"}])
    body = {**made, "spec": {**made["spec"], "devices": [{"name": "b"}]}}
    done = api.http("PUT", f"{SLICES}/{made['metadata']['name']}", body)
    assert done.code == 200, done.said
    assert done.body["metadata"]["generation"] == 2
    assert int(done.body["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])
    assert done.body["spec"]["devices"] == [{"name": "b"}]


def test_a_replace_with_an_old_version_is_a_conflict_and_changes_nothing(api: ApiPeer) -> None:
    made = api.made_slice([{"name": "a"}])
    path = f"{SLICES}/{made['metadata']['name']}"
    body = {**made, "spec": {**made["spec"], "devices": [{"name": "b"}]}}
    newer = api.http("PUT", path, body).body
    late = api.http("PUT", path, {**made, "spec": {**made["spec"], "devices": []}})
    is_failure(late, 409, "Conflict", name=made["metadata"]["name"], kind="resourceslices")
    assert "the object has been modified" in late.body["message"]
    assert api.http("GET", path).body["spec"] == newer["spec"]


def test_a_replace_that_says_the_same_makes_no_version(api: ApiPeer) -> None:
    made = api.made_slice([{"name": "a", "taints": [{"key": "k", "effect": "NoSchedule"}]}])
    done = api.http("PUT", f"{SLICES}/{made['metadata']['name']}", made)
    assert done.code == 200, done.said
    assert done.body["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    assert done.body["metadata"]["generation"] == 1


def test_a_replace_of_what_is_gone_is_not_found(api: ApiPeer) -> None:
    made = api.made_slice()
    path = f"{SLICES}/{made['metadata']['name']}"
    assert api.http("DELETE", path).code == 200
    is_failure(api.http("PUT", path, made), 404, "NotFound", kind="resourceslices")


def test_a_replace_with_the_uid_of_another_object_is_a_conflict(api: ApiPeer) -> None:
    made = api.made_slice()
    other = {**made["metadata"], "uid": "00000000-0000-0000-0000-000000000001"}
    answer = api.http("PUT", f"{SLICES}/{made['metadata']['name']}", {**made, "metadata": other})
    is_failure(answer, 409, "Conflict")


def test_a_replace_keeps_the_owner_that_was_sent(api: ApiPeer) -> None:
    uid = api.http("GET", f"/api/v1/nodes/{api.node}").body["metadata"]["uid"]
    owner = {"apiVersion": "v1", "kind": "Node", "name": api.node, "uid": uid, "controller": True}
    body = api.slice()
    body["metadata"]["ownerReferences"] = [owner]
    made = api.http("POST", SLICES, body)
    assert made.body["metadata"]["ownerReferences"] == [owner], made.said
    changed = {**made.body, "spec": {**made.body["spec"], "devices": [{"name": "a"}]}}
    done = api.http("PUT", f"{SLICES}/{made.body['metadata']['name']}", changed)
    assert done.body["metadata"]["ownerReferences"] == [owner], done.said


@pytest.mark.parametrize("field", ["uid", "resourceVersion"])
def test_a_delete_of_another_object_than_was_read_is_a_conflict(api: ApiPeer, field: str) -> None:
    made = api.made_slice()
    name = made["metadata"]["name"]
    wrong = {"uid": "00000000-0000-0000-0000-000000000001", "resourceVersion": "1"}[field]
    read = {"uid": made["metadata"]["uid"], "resourceVersion": made["metadata"]["resourceVersion"]}
    with api.client() as client:
        read_wrong = {**read, field: wrong}
        with pytest.raises(failures.Conflict, match="precondition"):
            client.delete(
                Resource.RESOURCE_SLICES,
                name,
                uid=read_wrong["uid"],
                resource_version=read_wrong["resourceVersion"],
            )
        client.delete(
            Resource.RESOURCE_SLICES, name, uid=read["uid"], resource_version=read["resourceVersion"]
        )
        with pytest.raises(failures.NotFound):
            client.delete(
                Resource.RESOURCE_SLICES, name, uid=read["uid"], resource_version=read["resourceVersion"]
            )


def test_a_deleted_slice_is_answered_as_it_was(api: ApiPeer) -> None:
    made = api.made_slice([{"name": "a"}])
    gone = api.http("DELETE", f"{SLICES}/{made['metadata']['name']}")
    assert gone.code == 200, gone.said
    assert gone.body["kind"] == "ResourceSlice"
    assert gone.body["spec"] == made["spec"]


def test_a_collection_is_deleted_by_its_selector_alone(api: ApiPeer) -> None:
    made = api.made_slice()
    other = api.http("POST", SLICES, api.slice(nodeName=f"{api.elsewhere}-2")).body
    gone = api.http("DELETE", SLICES, fieldSelector=api.selector)
    assert gone.code == 200, gone.said
    assert api.http("GET", f"{SLICES}/{made['metadata']['name']}").code == 404
    assert api.http("GET", f"{SLICES}/{other['metadata']['name']}").code == 200


def test_a_status_is_not_taken_where_the_spec_is_and_no_spec_where_the_status_is(api: ApiPeer) -> None:
    claim = api.claim("one", ["a"])
    assert claim["status"]["allocation"]["devices"]["results"][0]["device"] == "a"
    created = {"metadata": {"name": "two"}, "spec": claim["spec"], "status": claim["status"]}
    assert "allocation" not in (api.http("POST", api.claims, created).body.get("status") or {})
    spec = {**claim, "spec": {"devices": {}}}
    kept = api.http("PUT", f"{api.claims}/one/status", spec)
    assert kept.body["spec"] == claim["spec"], kept.said
    labelled = {**kept.body, "metadata": {**kept.body["metadata"], "labels": {"a": "b"}}, "status": {}}
    kept = api.http("PUT", f"{api.claims}/one", labelled)
    assert kept.body["status"] == claim["status"], kept.said
    assert kept.body["metadata"]["labels"] == {"a": "b"}


def test_fields_that_nobody_knows_are_dropped(api: ApiPeer) -> None:
    body = api.slice([{"name": "a", "colour": "red", "attributes": {"x": {"int": 1}}}], mood="good")
    made = api.http("POST", SLICES, body)
    assert made.code == 201, made.said
    assert made.body["spec"]["devices"] == [{"name": "a", "attributes": {"x": {"int": 1}}}]
    assert "mood" not in made.body["spec"]


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b'{"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "spec": {"devices": 7}}',
        b'{"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim"}',
    ],
)
def test_a_body_that_cannot_be_read_is_a_bad_request(api: ApiPeer, raw: bytes) -> None:
    answer = api.http("POST", SLICES, raw=raw)
    assert answer.code == 400, answer.said
    assert answer.body["reason"] == "BadRequest"
    assert isinstance(failures.from_answer("create", 400, None, raw), failures.Invalid)


def test_a_path_that_is_not_served_is_not_found(api: ApiPeer) -> None:
    answer = api.http("GET", f"{RESOURCE}/nosuchthings")
    assert answer.code == 404, answer.said


def test_who_may_not_is_told_who_and_what(api: ApiPeer) -> None:
    user = f"system:serviceaccount:{api.namespace}:{OUTSIDER}"
    with api.outsider() as http:
        for answer, resource, where in (
            (http("GET", f"{api.claims}/a"), "get resourceclaims", f'in the namespace "{api.namespace}"'),
            (http("POST", SLICES, api.slice()), "create resourceslices", "at the cluster scope"),
        ):
            verb, plural = resource.split()
            is_failure(answer, 403, "Forbidden", group="resource.k8s.io", kind=plural)
            what = f'cannot {verb} resource "{plural}" in API group "resource.k8s.io" {where}'
            assert f'is forbidden: User "{user}" {what}' in answer.body["message"], answer.said


def test_a_token_that_nobody_knows_is_unauthorized(api: ApiPeer) -> None:
    stranger = type(api.http)(api.kubeconfig, "no-such-token")
    answer = stranger("GET", SLICES)
    stranger.close()
    assert (answer.code, answer.body["reason"]) == (401, "Unauthorized"), answer.said


def event_of(api: ApiPeer, **changes: Any) -> dict[str, Any]:
    """As driver.kube.events makes it."""
    at = "2026-11-24T10:00:00Z"
    subject = {"kind": "ResourceClaim", "namespace": api.namespace, "name": "c", "uid": "u"}
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": "c.", "namespace": api.namespace},
        "involvedObject": {"apiVersion": "resource.k8s.io/v1", **subject},
        "type": "Warning",
        "reason": "NotPrepared",
        "message": "because",
        "count": 1,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "source": {"component": "knd.internal", "host": "n"},
        "reportingComponent": "knd.internal",
        "reportingInstance": "n",
    }
    return {**event, **changes}


def test_an_event_is_counted_up_by_a_merge_patch(api: ApiPeer) -> None:
    made = api.http("POST", api.events, event_of(api))
    assert made.code == 201, made.said
    path = f"{api.events}/{made.body['metadata']['name']}"
    patch = {"count": 3, "lastTimestamp": "2026-11-24T10:05:00Z"}
    done = api.http("PATCH", path, patch, kind=MERGE)
    assert done.code == 200, done.said
    assert {key: done.body[key] for key in patch} == patch
    assert done.body["message"] == "because"
    is_failure(api.http("PATCH", f"{api.events}/nobody", patch, kind=MERGE), 404, "NotFound", kind="events")


def test_an_event_about_an_object_elsewhere_is_refused(api: ApiPeer) -> None:
    event = event_of(api)
    event["involvedObject"]["namespace"] = "default"
    answer = api.http("POST", api.events, event)
    is_failure(answer, 422, "Invalid", kind="Event")
    assert answer.fields == ["involvedObject.namespace"], answer.said
