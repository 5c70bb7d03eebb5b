"""A watch sees everything, in order, through every fault, at a bounded rate of requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from driver.kube.client import ApiClient, Resource
from driver.kube.failures import Unavailable
from driver.kube.watch import ListWatch
from driver.kube.wire import JsonObject, Malformed
from kndsim.api import SimApi
from tests.conftest import WaitUntil
from tests.unit.kube_support import FAST, QUICK, Recorder, client_of, rate, running


@pytest.fixture
def api() -> Iterator[SimApi]:
    with SimApi() as api:
        yield api


@pytest.fixture
def client(api: SimApi, tmp_path: Path) -> Iterator[ApiClient]:
    with client_of(api, tmp_path) as client:
        yield client


def name_of(raw: JsonObject) -> str:
    name: str = raw["metadata"]["name"]
    if name.startswith("malformed"):
        raise Malformed(f"{name} is malformed")
    return name


def watch_of(client: ApiClient, recorder: Recorder, **more: Any) -> ListWatch[str]:
    return ListWatch(
        lambda: client, Resource.PODS, "spec.nodeName=n", name_of, recorder, back_off=FAST, **more
    )


def test_the_list_comes_first_then_every_change_in_order(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    api.add_pod("d", "before", node="n")
    api.add_pod("d", "elsewhere", node="m")
    recorder = Recorder()
    with running(watch_of(client, recorder)):
        wait_until(lambda: api.requests("watch"))
        api.add_pod("d", "after", node="n")
        api.set_template_claim("d", "after", "net", "c")
        api.delete("pods", "after", "d")
        wait_until(lambda: len(recorder.changes) == 3)
    assert recorder.lists == [["before"]]
    assert recorder.changes == [("ADDED", "after"), ("MODIFIED", "after"), ("DELETED", "after")]


def test_a_pod_that_is_bound_here_later_is_seen_then(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    api.add_pod("d", "pending")
    recorder = Recorder()
    with running(watch_of(client, recorder)):
        wait_until(lambda: api.requests("watch"))
        api.edit("pods", "pending", lambda pod: {**pod, "spec": {**pod["spec"], "nodeName": "n"}}, "d")
        wait_until(lambda: recorder.changes == [("ADDED", "pending")])


def test_a_broken_connection_goes_on_without_a_new_list(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    recorder = Recorder()
    watch = watch_of(client, recorder)
    with running(watch):
        for index in range(3):
            wait_until(lambda: len(api.requests("watch")) > index and not watch.error)  # noqa: B023 - called here
            api.add_pod("d", f"p{index}", node="n")
            wait_until(lambda: len(recorder.changes) == index + 1)  # noqa: B023 - called here
            api.drop_connections()
    assert [name for _, name in recorder.changes] == ["p0", "p1", "p2"]
    assert len(api.requests("list")) == 1


def test_changes_made_while_away_are_not_missed(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    recorder = Recorder()
    with running(watch_of(client, recorder)):
        wait_until(lambda: api.requests("watch"))
        api.fail(503, times=3, verb="watch")
        api.drop_connections()
        api.add_pod("d", "meanwhile", node="n")
        wait_until(lambda: recorder.changes == [("ADDED", "meanwhile")])


def test_an_expired_version_is_followed_by_a_new_list(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    recorder = Recorder()
    with running(watch_of(client, recorder)):
        wait_until(lambda: api.requests("watch"))
        api.fail(500, times=2, verb="watch")
        api.drop_connections()
        api.add_pod("d", "lost", node="n")
        api.compact()
        wait_until(lambda: len(recorder.lists) == 2)
        assert recorder.lists[1] == ["lost"]


def test_a_watch_that_says_nothing_on_an_open_connection_is_given_up(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    recorder = Recorder()
    with running(watch_of(client, recorder)):
        wait_until(lambda: api.requests("watch"))
        api.hang_watches()
        api.add_pod("d", "unheard", node="n")
        wait_until(lambda: recorder.changes == [("ADDED", "unheard")])
    assert len(api.requests("list")) == 1


def test_bookmarks_keep_an_idle_watch_alive_and_its_version_fresh(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    with SimApi(bookmark_seconds=0.2) as api, client_of(api, tmp_path) as client:
        recorder = Recorder()
        watch = watch_of(client, recorder)
        with running(watch):
            wait_until(lambda: api.requests("watch"))
            for index in range(5):
                api.add_pod("d", f"other{index}", node="m")
            newest = str(api.store.version)
            wait_until(lambda: watch._version == newest)
            api.drop_connections()
            wait_until(lambda: len(api.requests("watch")) == 2)
        assert api.requests("watch")[1].query["resourceVersion"] == newest
        assert len(api.requests("list")) == 1


def test_a_watch_may_be_silent_for_longer_than_an_answer_may_take(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    limits = replace(QUICK, read=0.2, silence=10.0)
    with SimApi(bookmark_seconds=0.8) as api, client_of(api, tmp_path, limits) as client:
        recorder = Recorder()
        watch = watch_of(client, recorder)
        with running(watch):
            wait_until(lambda: api.requests("watch"))
            api.add_pod("d", "other", node="m")
            wait_until(lambda: watch._version == str(api.store.version), what="a bookmark has come")
        assert len(api.requests("watch")) == 1


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_a_storm_of_errors_meets_a_bounded_rate(
    api: SimApi, client: ApiClient, wait_until: WaitUntil, verb: str
) -> None:
    api.fail(500, times=10_000, verb=verb)
    watch = watch_of(client, Recorder())
    with running(watch):
        wait_until(lambda: len(api.requests(verb)) >= 8)
        assert rate([request.at for request in api.requests(verb)]) < 20
        assert "injected" in watch.error
        api.clear_faults()
        wait_until(lambda: not watch.error)


def test_a_server_that_ends_every_watch_at_once_meets_a_bounded_rate(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    api.answer_raw(b"", times=10_000, verb="watch")
    with running(watch_of(client, Recorder())):
        wait_until(lambda: len(api.requests("watch")) >= 8)
        assert rate([request.at for request in api.requests("watch")]) < 20
    assert len(api.requests("list")) == 1


def test_endless_expiry_meets_a_bounded_rate(api: SimApi, client: ApiClient, wait_until: WaitUntil) -> None:
    error = b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}\n'
    api.answer_raw(error, times=10_000, verb="watch")
    with running(watch_of(client, Recorder())):
        wait_until(lambda: len(api.requests("list")) >= 8)
        assert rate([request.at for request in api.requests("list")]) < 20


def test_retry_after_is_kept(api: SimApi, client: ApiClient, wait_until: WaitUntil) -> None:
    api.fail(429, times=1, verb="list", retry_after=1)
    with running(watch_of(client, Recorder())):
        wait_until(lambda: len(api.requests("list")) == 2)
    first, second = api.requests("list")
    assert second.at - first.at >= 1.0


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b'{"type":"ADDED"}\n',
        b'{"type":"CHANGED","object":{"metadata":{"name":"x","resourceVersion":"5"}}}\n',
        b'{"type":"ADDED","object":{"metadata":{"name":"malformed","resourceVersion":"5"}}}\n',
        b'{"type":"ERROR","object":{"code":"many"}}\n',
        b'{"type":"ADDED","object":[]}\n',
        b"x" * 2_000_000,
    ],
)
def test_nonsense_in_the_stream_ends_in_a_working_watch(
    api: SimApi, client: ApiClient, wait_until: WaitUntil, line: bytes
) -> None:
    api.answer_raw(line, times=1, verb="watch")
    recorder = Recorder()
    with running(watch_of(client, recorder)):
        wait_until(lambda: len(api.requests("watch")) == 2)
        api.add_pod("d", "fine", node="n")
        wait_until(lambda: recorder.changes == [("ADDED", "fine")])


def test_an_object_in_the_list_that_cannot_be_read_costs_only_itself(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    api.add_pod("d", "malformed", node="n")
    api.add_pod("d", "fine", node="n")
    recorder = Recorder()
    with running(watch_of(client, recorder)):
        wait_until(lambda: recorder.lists == [["fine"]])


def test_a_list_without_a_version_is_not_believed(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    api.answer_raw(b'{"items":[]}', times=1, verb="list")
    recorder = Recorder()
    with running(watch_of(client, recorder)):
        wait_until(lambda: recorder.lists)
    assert len(api.requests("list")) == 2


def test_without_a_configuration_it_waits_and_starts_when_there_is_one(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    tries: list[int] = []

    def late() -> ApiClient:
        tries.append(1)
        if len(tries) < 3:
            raise Unavailable("connect", 0, "no kubeconfig yet")
        return client

    recorder = Recorder()
    watch = ListWatch(late, Resource.PODS, "spec.nodeName=n", name_of, recorder, back_off=FAST)
    with running(watch):
        wait_until(lambda: recorder.lists)
        wait_until(lambda: not watch.error)


def test_a_server_too_old_for_the_api_is_told_from_one_that_is_away(
    api: SimApi, client: ApiClient, wait_until: WaitUntil
) -> None:
    api.fail(404, times=1, verb="list", message="the server could not find the requested resource")
    watch = watch_of(client, Recorder())
    with running(watch):
        wait_until(lambda: "needs Kubernetes 1.34" in watch.error)
        wait_until(lambda: not watch.error)
