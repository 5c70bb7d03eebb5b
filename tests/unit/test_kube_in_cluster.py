"""As a pod: the service account's token and CA over TLS, with a token that is rotated."""

from __future__ import annotations

import datetime
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from driver.kube.client import Resource, connect
from driver.kube.failures import Unavailable
from driver.kube.pods import parse_pod
from driver.kube.watch import ListWatch
from kndsim.api import SimApi
from tests.conftest import WaitUntil
from tests.unit.kube_support import FAST, QUICK, Recorder, running


@dataclass
class Certificate:
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("tls")
    made = Certificate(folder / "ca.crt", folder / "tls.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=sim", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(made.key), "-out", str(made.certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@pytest.fixture
def api(certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimApi]:
    """A TLS server, and the environment and files that a pod of its cluster would have."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    (tmp_path / "token").write_text("first")
    with SimApi(tls=context) as api:
        import kubernetes.config.incluster_config as incluster

        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
        monkeypatch.setattr(incluster, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
        monkeypatch.setattr(incluster, "SERVICE_CERT_FILENAME", str(certificate.certificate))
        yield api


def test_the_token_is_sent_and_read_again_after_it_was_rotated(
    api: SimApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kubernetes.config.incluster_config as incluster

    api.add_node("n")
    client = connect(None, QUICK)
    client.get(Resource.NODES, "n")
    (tmp_path / "token").write_text("second")

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Later:
            return cls.fromtimestamp(time.time() + 120, tz)

    monkeypatch.setattr(incluster.datetime, "datetime", Later)
    client.get(Resource.NODES, "n")
    client.close()
    sent = [request.authorization.lower() for request in api.requests()]
    assert sent == ["bearer first", "bearer second"]


def test_a_token_file_that_has_gone_is_a_failure_like_any_other(
    api: SimApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(None, QUICK)
    (tmp_path / "token").unlink()

    def expired(*_: object) -> None:
        raise FileNotFoundError(tmp_path / "token")

    client._configuration.refresh_api_key_hook = expired
    with pytest.raises(Unavailable, match="token"):
        client.get(Resource.NODES, "n")
    client.close()


def test_a_server_with_another_certificate_is_not_talked_to(
    api: SimApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import certifi
    import kubernetes.config.incluster_config as incluster

    monkeypatch.setattr(incluster, "SERVICE_CERT_FILENAME", certifi.where())
    client = connect(None, QUICK)
    with pytest.raises(Unavailable, match=r"(?i)certificate"):
        client.get(Resource.NODES, "n")
    client.close()
    assert api.requests() == []


def test_a_watch_over_tls_delivers_survives_silence_and_stops_at_once(
    api: SimApi, wait_until: WaitUntil
) -> None:
    client = connect(None, QUICK)
    recorder = Recorder()
    watch = ListWatch(lambda: client, Resource.PODS, "spec.nodeName=n", parse_pod, recorder, back_off=FAST)
    with running(watch):
        wait_until(lambda: api.requests("watch"))
        api.add_pod("d", "one", node="n")
        wait_until(lambda: len(recorder.changes) == 1)
        api.hang_watches()
        api.add_pod("d", "two", node="n")
        wait_until(lambda: len(recorder.changes) == 2)
        start = time.monotonic()
        watch.stop()
        assert watch.join(5)
        assert time.monotonic() - start < 0.5
    client.close()
