"""Lists and watches as the driver makes them: pages, resumption, bookmarks, what has expired."""

from __future__ import annotations

import pytest

from driver.kube import failures
from driver.kube.client import Resource
from tests.contract.api_peer import SLICES, ApiPeer


def listed(api: ApiPeer) -> tuple[list[str], str]:
    """Names of the slices of the driver's selector, and the list's version."""
    answer = api.http("GET", SLICES, fieldSelector=api.selector)
    assert answer.code == 200, answer.said
    names = [item["metadata"]["name"] for item in answer.body["items"]]
    return names, answer.body["metadata"]["resourceVersion"]


def test_a_list_has_a_kind_a_version_and_only_what_was_selected(api: ApiPeer) -> None:
    mine = api.made_slice()
    api.http("POST", SLICES, api.slice(nodeName=f"{api.elsewhere}-2"))
    api.http("POST", SLICES, api.slice(driver="other.example"))
    answer = api.http("GET", SLICES, fieldSelector=api.selector)
    assert answer.body["kind"] == "ResourceSliceList"
    assert answer.body["apiVersion"] == "resource.k8s.io/v1"
    assert answer.body["metadata"]["resourceVersion"].isdigit()
    assert [item["metadata"]["name"] for item in answer.body["items"]] == [mine["metadata"]["name"]]
    empty = api.http("GET", SLICES, fieldSelector="spec.driver=nobody.example,spec.nodeName=n")
    assert empty.body["items"] == []
    api.http("DELETE", SLICES, fieldSelector="spec.driver=other.example")


def test_pods_are_selected_by_their_node(api: ApiPeer) -> None:
    pod = api.pod("here")
    api.pod("there", nodeName=f"{api.elsewhere}-2")
    answer = api.http("GET", "/api/v1/pods", fieldSelector=f"spec.nodeName={api.elsewhere}")
    assert [item["metadata"]["uid"] for item in answer.body["items"]] == [pod["metadata"]["uid"]]


@pytest.mark.parametrize(
    ("path", "selector"),
    [(SLICES, "spec.nosuch=x"), (SLICES, "spec.allNodes=true"), ("/api/v1/pods", "spec.containers=x")],
)
def test_a_field_that_cannot_be_selected_by_is_a_bad_request(api: ApiPeer, path: str, selector: str) -> None:
    answer = api.http("GET", path, fieldSelector=selector)
    assert (answer.code, answer.body["reason"]) == (400, "BadRequest"), answer.said
    assert "field label not supported" in answer.body["message"]


def test_pages_are_one_list_of_one_version(api: ApiPeer) -> None:
    made = sorted(api.made_slice()["metadata"]["name"] for _ in range(5))
    with api.client(page=2) as client:
        pages = list(client.list_pages(Resource.RESOURCE_SLICES, api.selector))
    assert [len(items) for items, _ in pages] == [2, 2, 1]
    assert [item["metadata"]["name"] for items, _ in pages for item in items] == made
    assert len({version for _, version in pages}) == 1


def test_pages_do_not_see_what_comes_between_them(api: ApiPeer) -> None:
    for _ in range(3):
        api.made_slice()
    with api.client(page=2) as client:
        pages = client.list_pages(Resource.RESOURCE_SLICES, api.selector)
        first, _ = next(pages)
        late = api.made_slice()["metadata"]["name"]
        api.http("DELETE", f"{SLICES}/{first[0]['metadata']['name']}")
        rest = [item["metadata"]["name"] for items, _ in pages for item in items]
    assert len(rest) == 1
    assert late not in rest


def test_a_continue_token_that_is_none_is_a_bad_request(api: ApiPeer) -> None:
    answer = api.http("GET", SLICES, **{"continue": "nonsense", "limit": "2"})
    assert (answer.code, answer.body["reason"]) == (400, "BadRequest"), answer.said


def test_a_watch_goes_on_where_the_list_ended(api: ApiPeer) -> None:
    before = api.made_slice([{"name": "a"}])
    _, version = listed(api)
    name = before["metadata"]["name"]
    with api.http.watch(SLICES, fieldSelector=api.selector, resourceVersion=version) as events:
        after = api.made_slice()
        body = {**before, "spec": {**before["spec"], "devices": []}}
        changed = api.http("PUT", f"{SLICES}/{name}", body).body
        api.http("POST", SLICES, api.slice(nodeName=f"{api.elsewhere}-2"))
        gone = api.http("DELETE", f"{SLICES}/{name}").body
        seen = [next(each for each in events if each["type"] != "BOOKMARK") for _ in range(3)]
    assert [each["type"] for each in seen] == ["ADDED", "MODIFIED", "DELETED"]
    objects = [each["object"] for each in seen]
    assert [each["metadata"]["uid"] for each in objects] == [
        after["metadata"]["uid"],
        before["metadata"]["uid"],
        before["metadata"]["uid"],
    ]
    versions = [int(each["metadata"]["resourceVersion"]) for each in objects]
    assert versions[1] == int(changed["metadata"]["resourceVersion"])
    assert versions == sorted(set(versions))
    assert objects[2]["spec"] == gone["spec"]
    assert {each["kind"] for each in objects} == {"ResourceSlice"}


def test_a_watch_from_an_old_event_repeats_all_since(api: ApiPeer) -> None:
    first = api.made_slice()
    second = api.made_slice()
    version = first["metadata"]["resourceVersion"]
    with api.http.watch(SLICES, fieldSelector=api.selector, resourceVersion=version) as events:
        seen = next(events)
    assert (seen["type"], seen["object"]["metadata"]["uid"]) == ("ADDED", second["metadata"]["uid"])


def test_a_watch_from_nowhere_starts_with_what_there_is(api: ApiPeer) -> None:
    made = api.made_slice()
    with api.http.watch(SLICES, fieldSelector=api.selector) as events:
        seen = next(events)
    assert (seen["type"], seen["object"]["metadata"]["uid"]) == ("ADDED", made["metadata"]["uid"])


def test_a_watch_that_sees_none_of_the_changes_has_a_bookmark_before_its_end(api: ApiPeer) -> None:
    _, version = listed(api)
    with api.http.watch(SLICES, fieldSelector=api.selector, resourceVersion=version, seconds=4) as events:
        other = api.http("POST", SLICES, api.slice(nodeName=f"{api.elsewhere}-2")).body
        marks = list(events)
    assert {each["type"] for each in marks} == {"BOOKMARK"}
    bookmark = marks[-1]["object"]
    assert (bookmark["kind"], bookmark["apiVersion"]) == ("ResourceSlice", "resource.k8s.io/v1")
    assert bookmark["metadata"]["resourceVersion"] == other["metadata"]["resourceVersion"]
    made = api.made_slice()
    go_on = bookmark["metadata"]["resourceVersion"]
    with api.http.watch(SLICES, fieldSelector=api.selector, resourceVersion=go_on) as events:
        assert next(events)["object"]["metadata"]["uid"] == made["metadata"]["uid"]


def test_a_watch_of_what_nobody_changes_has_no_objects(api: ApiPeer) -> None:
    """Bookmarks it may have: the server's version goes on with every resource, leases of others too."""
    _, version = listed(api)
    with api.http.watch(SLICES, fieldSelector=api.selector, resourceVersion=version, seconds=3) as events:
        assert [each for each in events if each["type"] != "BOOKMARK"] == []


def test_a_watch_ends_when_its_time_is_over(api: ApiPeer) -> None:
    _, version = listed(api)
    with api.client() as client:
        stream = client.watch(
            Resource.RESOURCE_SLICES, field_selector=api.selector, resource_version=version, seconds=2
        )
        with stream:
            assert {kind for kind, _ in stream} <= {"BOOKMARK"}


@pytest.mark.since("9.0", "a young server has all its history: this was seen of one an hour old")
def test_a_version_that_has_expired_is_told_inside_the_watch(api: ApiPeer) -> None:
    api.made_slice()
    with api.http.watch(SLICES, fieldSelector=api.selector, resourceVersion="1") as events:
        (event,) = list(events)
    assert event["type"] == "ERROR"
    status = event["object"]
    assert (status["kind"], status["code"], status["reason"]) == ("Status", 410, "Expired"), event
    assert "too old resource version" in status["message"]
    assert isinstance(failures.build("watch", status["code"], ""), failures.Gone)


def test_pods_are_seen_as_they_come_change_and_go(api: ApiPeer) -> None:
    selector = f"spec.nodeName={api.elsewhere}"
    version = api.http("GET", "/api/v1/pods", fieldSelector=selector).body["metadata"]["resourceVersion"]
    with api.http.watch("/api/v1/pods", fieldSelector=selector, resourceVersion=version) as events:
        pod = api.pod("one", resourceClaims=[{"name": "net", "resourceClaimName": "c"}])
        api.pod("elsewhere", nodeName=f"{api.elsewhere}-2")
        body = {"status": {"resourceClaimStatuses": [{"name": "net", "resourceClaimName": "c"}]}}
        done = api.http("PATCH", f"{api.pods}/one/status", body, kind="application/merge-patch+json")
        assert done.code == 200, done.said
        gone = api.http("DELETE", f"{api.pods}/one", {"gracePeriodSeconds": 0})
        assert gone.code == 200, gone.said
        seen = []
        for each in events:
            if each["type"] != "BOOKMARK":
                seen.append((each["type"], each["object"]["metadata"]["uid"]))
            if seen and seen[-1][0] == "DELETED":
                break
    uid = pod["metadata"]["uid"]
    assert seen[0] == ("ADDED", uid)
    assert ("MODIFIED", uid) in seen
    assert seen[-1] == ("DELETED", uid)
