"""The server answers on loopback, tells why it is not ready, and no client can harm it."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from driver.metrics import Metrics, MetricsServer, MetricsUnavailable
from driver.metrics import server as server_module

WaitUntil = Callable[..., object]


@contextmanager
def serving(metrics: Metrics | None = None, **options: object) -> Iterator[MetricsServer]:
    with MetricsServer(metrics or Metrics(), port=0, **options) as server:  # type: ignore[arg-type]
        yield server


def ask(server: MetricsServer, path: str, method: str = "GET") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), {k.lower(): v for k, v in answer.getheaders()}
    finally:
        connection.close()


def send(server: MetricsServer, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    return answer


# --- what it answers ----------------------------------------------------------------------------------


def test_metrics_are_served_as_prometheus_text() -> None:
    metrics = Metrics()
    metrics.event("DeviceQuarantined")
    with serving(metrics) as server:
        status, text, headers = ask(server, "/metrics")
        assert ask(server, "/metrics?name=x")[0] == 200
    assert status == 200
    assert 'knd_events_total{reason="DeviceQuarantined"} 1.0' in text
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert int(headers["content-length"]) == len(text)


def test_readiness_gives_its_reasons_and_is_a_metric() -> None:
    reasons: tuple[str, ...] = ("NRI: not connected", "journal: it was lost")
    with serving(unready=lambda: reasons) as server:
        assert ask(server, "/readyz")[:2] == (503, "NRI: not connected\njournal: it was lost\n")
        assert "knd_ready 0.0" in ask(server, "/metrics")[1]
        reasons = ()
        assert ask(server, "/readyz")[:2] == (200, "ok\n")
        assert "knd_ready 1.0" in ask(server, "/metrics")[1]


def test_liveness_is_apart_from_readiness() -> None:
    stuck: tuple[str, ...] = ()
    with serving(unready=lambda: ("not yet",), unlive=lambda: stuck) as server:
        assert ask(server, "/livez")[0] == 200
        stuck = ("the event loop does not turn",)
        assert ask(server, "/livez")[:2] == (503, "the event loop does not turn\n")


def test_head_has_no_body() -> None:
    with serving() as server:
        assert ask(server, "/livez", "HEAD")[:2] == (200, "")


def test_it_is_gone_at_the_end_of_its_context() -> None:
    with serving() as server:
        port = server.port
        ask(server, "/livez")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert "metrics" not in [thread.name for thread in threading.enumerate()]


# --- where it listens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "localhost", "", "fe80::1"])
def test_only_loopback_addresses_are_listened_on(host: str) -> None:
    with pytest.raises(MetricsUnavailable, match="loopback"):
        MetricsServer(Metrics(), host=host, port=0)


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(MetricsUnavailable, match="is not a TCP port"):
        MetricsServer(Metrics(), port=port)


def test_a_port_that_is_taken_is_a_sentence() -> None:
    with serving() as server:
        second = MetricsServer(Metrics(), port=server.port)
        with pytest.raises(MetricsUnavailable, match=rf"port {server.port}.*choose another"):
            second.__enter__()


# --- clients that behave badly ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"rubbish\r\n\r\n", b"400"),
        (b"GET\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/9.9.9\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/2.0\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /metricsx HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"405"),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", b"405"),
    ],
)
def test_a_bad_request_is_the_clients_error_and_the_next_is_answered(
    request_text: bytes, status: bytes
) -> None:
    with serving() as server:
        answer = send(server, request_text)
        assert status in answer.split(b"\r\n")[0], answer[:200]
        assert ask(server, "/livez")[0] == 200


def test_what_a_client_sends_is_not_shown_back_as_a_page() -> None:
    with serving() as server:
        answer = send(server, b"GET /<script> HTTP/1.1\r\n\r\n")
    assert b"text/plain" in answer
    assert b"<script>" not in answer


def test_a_client_that_leaves_at_once_costs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        for data in (b"", b"GET /metr"):
            send(server, data)
        assert ask(server, "/livez")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_more_clients_than_there_are_places_are_told_to_come_later(wait_until: WaitUntil) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow() -> tuple[str, ...]:
        begun.release()
        assert go_on.wait(10)
        return ()

    with serving(unready=slow) as server:
        threads = [
            threading.Thread(target=ask, args=(server, "/readyz")) for _ in range(server_module._CLIENTS_MAX)
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert begun.acquire(timeout=10)
        assert b"503" in send(server, b"")
        go_on.set()
        for thread in threads:
            thread.join()
        assert wait_until(lambda: ask(server, "/livez")[0] == 200)


def test_without_a_thread_for_a_client_the_next_is_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with serving() as server:
        for _ in range(server_module._CLIENTS_MAX + 1):
            with monkeypatch.context() as patch:
                patch.setattr(server_module.http.server.ThreadingHTTPServer, "process_request", no_thread)
                assert send(server, b"") == b""
        assert ask(server, "/livez")[0] == 200
    assert "no thread can be started" in caplog.text


def test_a_silent_client_is_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < server_module._Handler.timeout <= 10
    monkeypatch.setattr(server_module._Handler, "timeout", 0.05)
    with (
        serving() as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as client,
    ):
        assert client.recv(1) == b""


def test_a_silent_client_does_not_hold_up_a_scrape() -> None:
    with serving() as server, socket.create_connection(("127.0.0.1", server.port), timeout=10):
        assert ask(server, "/metrics")[0] == 200


def test_reasons_that_cannot_be_given_are_a_server_error_without_details(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> tuple[str, ...]:
        raise RuntimeError("secret detail")

    with serving(unready=broken) as server:
        status, text, _ = ask(server, "/readyz")
        assert ask(server, "/metrics")[0] == 200
    assert status == 500
    assert "secret detail" not in text
    assert "secret detail" in caplog.text
