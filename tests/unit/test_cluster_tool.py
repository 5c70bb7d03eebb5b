"""The tool image's program: exact counts, over both families, and an end when told."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kndsim.cache import Cache
from kndsim.cluster import images
from kndsim.waiting import wait_until


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.tool(Cache(tmp_path_factory.mktemp("cache"))) / "knd-tool"


@contextmanager
def running(*argv: str | Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> str:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as made:
        made.bind(("::", 0))
        return str(made.getsockname()[1])


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def run(argv: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=False, timeout=20)


def test_what_is_sent_is_what_is_counted_over_both_families(tool: Path) -> None:
    port = free_port()
    with running(tool, "sink", port) as sink:
        assert line(sink) == f"listening port={port}"
        assert run([tool, "send", "127.0.0.1", port, "7", "1000", "46"]).stdout == "sent=7 bytes=7000\n"
        assert run([tool, "send", "::1", port, "5", "10", "0", "500"]).stdout == "sent=5 bytes=50\n"
        sink.send_signal(signal.SIGTERM)
        assert line(sink) == "received=12 bytes=7050"
        assert sink.wait(5) == 0


def test_the_class_is_in_the_datagram(tool: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        assert (
            run([tool, "send", "127.0.0.1", str(receiver.getsockname()[1]), "1", "4", "46"]).returncode == 0
        )
        data, (message, *_), *_ = receiver.recvmsg(100, 100)
        assert data == b"kkkk"
        assert message[2][0] == 46 << 2


def test_a_sink_that_has_all_it_waits_for_ends_by_itself(tool: Path) -> None:
    port = free_port()
    with running(tool, "sink", port, "3") as sink:
        line(sink)
        run([tool, "send", "::1", port, "3", "20", "0"])
        assert line(sink) == "received=3 bytes=60"
        assert sink.wait(5) == 0


def test_sleep_reaps_children_it_did_not_start_and_ends_at_once(tool: Path) -> None:
    """A shell that starts a child and then becomes the tool: the child is the tool's now."""
    script = f'sleep 0.1 & echo $!; exec "{tool}" sleep'
    with running("sh", "-c", script) as process:
        child = line(process)
        wait_until(lambda: not Path(f"/proc/{child}").exists(), what="the child is reaped")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "usage"),
        (["send", "127.0.0.1", "70000", "1", "1", "0"], "PORT 1-65535"),
        (["send", "127.0.0.1", "7", "1", "1", "64"], "DSCP 0-63"),
        (["send", "127.0.0.1", "7", "1x", "1", "0"], "COUNT"),
        (["send", "nowhere", "7", "1", "1", "0"], "nowhere is no IPv4 or IPv6 address"),
        (["sink", "0"], "PORT is 1-65535"),
    ],
)
def test_wrong_usage_is_said_with_its_bounds(tool: Path, args: list[str], said: str) -> None:
    done = run([tool, *args])
    assert done.returncode == 2
    assert re.search(said, done.stderr)
    assert done.stdout == ""
