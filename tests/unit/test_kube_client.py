"""Whatever the server does, a request ends in time, in an object or in a failure that says what to do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from driver.kube.client import ApiClient, Limits, Resource, connect
from driver.kube.failures import (
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    Throttled,
    Unavailable,
)
from kndsim.api import SimApi
from tests.unit.kube_support import QUICK, client_of


@pytest.fixture
def api() -> Iterator[SimApi]:
    with SimApi() as api:
        yield api


@pytest.fixture
def client(api: SimApi, tmp_path: Path) -> Iterator[ApiClient]:
    with client_of(api, tmp_path) as client:
        yield client


def test_objects_come_back_as_they_are(api: SimApi, client: ApiClient) -> None:
    uid = api.add_node("n")
    assert client.get(Resource.NODES, "n")["metadata"]["uid"] == uid
    assert client.last_error == ""
    assert dict(client.requests) == {"get nodes": 1}


@pytest.mark.parametrize(
    ("code", "kind"),
    [(403, Forbidden), (404, NotFound), (409, Conflict), (410, Gone), (422, Invalid), (500, Unavailable)],
)
def test_statuses_become_failures(api: SimApi, client: ApiClient, code: int, kind: type[Exception]) -> None:
    api.fail(code, message="because")
    with pytest.raises(kind, match="because"):
        client.get(Resource.NODES, "n")


def test_throttling_carries_the_servers_wish(api: SimApi, client: ApiClient) -> None:
    api.fail(429, retry_after=3)
    with pytest.raises(Throttled) as caught:
        client.get(Resource.NODES, "n")
    assert caught.value.retry_after == 3.0


def test_a_kept_alive_connection_that_was_dropped_costs_a_read_nothing(
    api: SimApi, client: ApiClient
) -> None:
    api.add_node("n")
    client.get(Resource.NODES, "n")
    api.close_on(times=1)
    assert client.get(Resource.NODES, "n")["metadata"]["name"] == "n"
    assert len(api.requests("get", "nodes")) == 3


def test_a_write_on_a_dropped_connection_is_not_repeated_blindly(api: SimApi, client: ApiClient) -> None:
    api.close_on(times=1, verb="create")
    with pytest.raises(Unavailable):
        client.create(Resource.EVENTS, {"metadata": {"name": "e"}}, "d")
    assert len(api.requests("create")) == 1


@pytest.mark.parametrize("data", [b"", b"[]", b"not json", b"\xff"])
def test_an_answer_that_is_no_object_is_no_answer(api: SimApi, client: ApiClient, data: bytes) -> None:
    api.answer_raw(data)
    with pytest.raises(Unavailable):
        client.get(Resource.NODES, "n")
    assert client.last_error


def test_an_endless_answer_is_cut_off(api: SimApi, client: ApiClient) -> None:
    api.answer_raw(b'{"x":"' + b"y" * (QUICK.answer + 1) + b'"}')
    with pytest.raises(Unavailable, match="answer over"):
        client.get(Resource.NODES, "n")


def test_nobody_listening_is_unavailable_at_once(tmp_path: Path) -> None:
    with SimApi() as api:
        kubeconfig = api.kubeconfig(tmp_path / "k")
    client = connect(kubeconfig, QUICK)
    start = time.monotonic()
    with pytest.raises(Unavailable):
        client.get(Resource.NODES, "n")
    assert time.monotonic() - start < QUICK.connect
    client.close()


@pytest.fixture
def dripping(tmp_path: Path) -> Iterator[tuple[ApiClient, threading.Event]]:
    """A server that takes the request and then says nothing, or one byte at a time once told to."""
    drip, end = threading.Event(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        connection, _ = listener.accept()
        held.append(connection)
        connection.recv(65536)
        if drip.is_set():
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not end.wait(0.05):
                try:
                    connection.send(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=serve)
    thread.start()
    path = tmp_path / "k"
    path.write_text(
        f"""{{"apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{{"name": "c", "cluster": {{"server": "http://127.0.0.1:{listener.getsockname()[1]}"}}}}],
        "users": [{{"name": "u", "user": {{}}}}],
        "contexts": [{{"name": "c", "context": {{"cluster": "c", "user": "u"}}}}]}}"""
    )
    client = connect(path, Limits(connect=1.0, read=0.3, total=0.5))
    yield client, drip
    client.close()
    end.set()
    thread.join()
    for connection in held:
        connection.close()
    listener.close()


@pytest.mark.parametrize("drips", [False, True])
def test_a_server_that_stalls_costs_no_more_than_the_time_out(
    dripping: tuple[ApiClient, threading.Event], drips: bool
) -> None:
    client, drip = dripping
    if drips:
        drip.set()
    start = time.monotonic()
    with pytest.raises(Unavailable):
        client.get(Resource.NODES, "n")
    assert time.monotonic() - start < 2.0


def test_names_cannot_leave_their_place_in_the_path(api: SimApi, client: ApiClient) -> None:
    api.add_node("n")
    for name in ("../nodes/n", "n?watch=1", "n/status", "%2e%2e"):
        with pytest.raises(NotFound):
            client.get(Resource.RESOURCE_CLAIMS, name, "de/fault")
    assert {request.resource for request in api.requests("get")} == {"resourceclaims"}
    assert len(api.requests()) == 4


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_would_mean_the_collection_is_not_sent(api: SimApi, client: ApiClient, name: str) -> None:
    with pytest.raises(NotFound):
        client.get(Resource.RESOURCE_CLAIMS, name, "d")
    with pytest.raises(NotFound):
        client.delete(Resource.RESOURCE_SLICES, name, uid="u", resource_version="1")
    with pytest.raises(NotFound):
        client.get(Resource.RESOURCE_CLAIMS, "c", name)
    assert api.requests() == []


def test_long_lists_come_in_pages_of_one_snapshot(api: SimApi, client: ApiClient) -> None:
    for index in range(250):
        api.add_pod("d", f"p{index}", node="n")
    pages = list(client.list_pages(Resource.PODS, "spec.nodeName=n"))
    assert [len(page) for page, _ in pages] == [100, 100, 50]
    assert len({version for _, version in pages}) == 1


def test_a_list_whose_snapshot_expires_half_way_is_gone(api: SimApi, client: ApiClient) -> None:
    for index in range(150):
        api.add_pod("d", f"p{index}", node="n")
    pages = client.list_pages(Resource.PODS, "spec.nodeName=n")
    next(pages)
    api.compact()
    with pytest.raises(Gone):
        next(pages)


def test_without_a_kubeconfig_outside_a_cluster_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(Unavailable, match="name a kubeconfig"):
        connect(None)


@pytest.mark.parametrize("content", [None, "", "a: [", "[]", "apiVersion: v1\nkind: Config\n", "\x00"])
def test_a_kubeconfig_that_is_none_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "kubeconfig"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Unavailable, match="cannot use kubeconfig"):
        connect(path)
